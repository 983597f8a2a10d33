"""Branch and cool: a run that begins at another's checkpoint, ends on its own, and leaves the other as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import checkpoint
from hasten.cli import main
from hasten.errors import CheckpointError, RecipeError
from hasten.loop import Result, advance, capture, prepare_for, start, train
from hasten.loop.branching import branch_recipe, read_parent, take_over
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events, read_metrics


@pytest.fixture(scope="module")
def settings(text_file: Path, validation_file: Path, tiny: tuple[str, ...]) -> list[str]:
    return [
        f"data={text_file}",
        f"val={validation_file}",
        *(word for word in tiny if not word.startswith("evaluate")),
        "budget=40",
        "checkpoint.every=8",
        "checkpoint.keep=9",
        "evaluate.every=50%",
        "evaluate.tokens=512",
        "compile=off",
    ]


@pytest.fixture(scope="module")
def parent(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "run"
    made = train(resolve(None, [*settings, "schedule=constant", "schedule.warmup=4", f"out={folder}"]).recipe)
    assert made.status == "finished"
    return folder


def trained(settings: list[str], folder: Path) -> Path:
    """Return a run folder with a recipe and checkpoints alone, which is all that a branch reads."""
    recipe = resolve(None, settings).recipe
    state = start(recipe, prepare_for(recipe))
    for step in range(8, 41, 8):
        advance(state, step)
        checkpoint.save(folder / "checkpoints", step, *capture(state), keep=9)
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cosine_parent(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ["schedule=cosine", "schedule.weight_decay=linear(0.5)", "optimizer.weight_decay=0.2"]
    return trained([*settings, *more], tmp_path_factory.mktemp("cosine") / "run")


def branch(run: Path, *overrides: str, step: int | None = None, **options: Any) -> Result:
    return train(branch_recipe(run, step=step, overrides=overrides).recipe, **options)


def masters(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / f"step-{step:08d}").tensors["model"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time of change and the content of everything below `folder`, folders and links included."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, content)
    return found


def messages(kind: str, seen: list[str]) -> Any:
    return lambda event: seen.append(event.values["message"]) if event.kind == kind else None


# --- what a branch is -------------------------------------------------------------------------------------------


def test_a_branch_that_keeps_the_rate_is_the_run_itself_gone_on(parent: Path, own_folder: Path) -> None:
    """Weights, optimizer, random state and place in the data are all there, or one bit would differ."""
    out = own_folder / "branch"
    branch(parent, "schedule=constant", "budget=16", f"out={out}", step=24)
    assert_same(masters(out, 16), masters(parent, 40))
    theirs, ours = read_metrics(RunFolder(parent)), read_metrics(RunFolder(out))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs[24:]]
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs[24:]]
    assert [row["step"] for row in ours] == list(range(1, 17))


def test_a_branch_cools_down_over_a_tenth_of_the_steps_by_default(parent: Path, own_folder: Path) -> None:
    resolved = branch_recipe(parent)
    recipe = resolved.recipe
    assert (recipe.branch_from, recipe.branch_step, str(recipe.budget)) == (str(parent), 40, "4")
    schedule = recipe.schedule.build(total_steps=4, tokens_per_step=512)
    assert repr(schedule) == "sqrt(floor=0.01, start=1.0)"
    assert recipe.out is None
    result = branch(parent, f"out={own_folder / 'branch'}")
    assert result.status == "finished"
    rates = [row["lr"] for row in read_metrics(RunFolder(own_folder / "branch"))]
    assert rates == pytest.approx([recipe.optimizer.lr * schedule(step / 4) for step in range(4)])
    assert (own_folder / "branch" / "final" / "model.safetensors").is_file()


def test_the_run_that_is_branched_from_stays_byte_for_byte_as_it_was(parent: Path, own_folder: Path) -> None:
    before = snapshot(parent)
    branch(parent, f"out={own_folder / 'a'}", "budget=2", step=8)
    branch(parent, f"out={own_folder / 'c'}", step=16, dry_run=True)
    with pytest.raises(RecipeError):
        branch(parent, "lr=0.9", f"out={own_folder / 'd'}")
    assert snapshot(parent) == before
    assert not (own_folder / "c").exists()
    assert not (own_folder / "d").exists()


def test_the_record_says_where_a_branch_came_from(parent: Path, own_folder: Path) -> None:
    out = own_folder / "branch"
    branch(parent, f"out={out}", "budget=2", step=24)
    again = resolve(out).recipe
    assert (again.branch_from, again.branch_step) == (str(parent), 24)
    (event,) = [event for event in read_events(RunFolder(out)) if event["kind"] == "branch"]
    assert (event["run"], event["run_step"], event["factor"]) == (str(parent), 24, 1.0)
    assert event["run_tokens"] == read_metrics(RunFolder(parent))[23]["tokens"]
    manifest = (parent / "checkpoints" / "step-00000024" / "manifest.json").read_text()
    assert event["checkpoint_sha256"] in manifest


class Killed(BaseException):
    """Ends a run as a kill would: nothing is saved on the way out."""


def killed_at(step: int) -> Any:
    def hook(event: Any) -> None:
        if event.kind == "step" and event.step == step:
            raise Killed

    return hook


@pytest.mark.parametrize("killed_after", [1, 5])
def test_a_killed_branch_goes_on_bit_for_bit_even_without_the_other_run(
    killed_after: int, parent: Path, own_folder: Path
) -> None:
    copy, out, whole = own_folder / "copy", own_folder / "branch", own_folder / "whole"
    shutil.copytree(parent, copy, symlinks=True)
    branch(copy, f"out={whole}", "budget=8", "checkpoint.every=4", step=32)
    recipe = branch_recipe(copy, step=32, overrides=[f"out={out}", "budget=8", "checkpoint.every=4"]).recipe
    with pytest.raises(Killed):
        train(recipe, hooks=[killed_at(killed_after)])
    shutil.rmtree(copy)
    assert train(recipe).status == "finished"
    assert_same(masters(out, 8), masters(whole, 8))
    assert [row["loss"] for row in read_metrics(RunFolder(out))] == [
        row["loss"] for row in read_metrics(RunFolder(whole))
    ]
    assert train(resolve(out).recipe).already_finished


def test_a_branch_of_a_branch_is_a_branch(parent: Path, own_folder: Path) -> None:
    first = own_folder / "first"
    branch(parent, "schedule=constant", "budget=8", f"out={first}", step=24)
    second = own_folder / "second"
    branch(first, "schedule=constant", "budget=8", f"out={second}")
    assert_same(masters(second, 8), masters(parent, 40))


# --- where it goes on -------------------------------------------------------------------------------------------


def test_a_branch_goes_on_from_the_factors_of_the_last_step(cosine_parent: Path) -> None:
    recipe = branch_recipe(cosine_parent, step=16).recipe
    parents = resolve(cosine_parent).recipe
    schedules = parents.schedule.build_all(total_steps=40, tokens_per_step=512)
    assert recipe.schedule.start == pytest.approx(schedules["lr"](15 / 40), abs=1e-12)
    found = recipe.schedule.build_all(total_steps=2, tokens_per_step=512)
    assert found["weight_decay"](0.5) == pytest.approx(schedules["weight_decay"](15 / 40), abs=1e-12)


def test_a_schedule_of_the_users_own_is_taken(parent: Path) -> None:
    def schedule(*overrides: str) -> str:
        recipe = branch_recipe(parent, overrides=overrides).recipe
        return repr(recipe.schedule.build(total_steps=10, tokens_per_step=512))

    assert schedule("schedule=linear") == "linear(floor=0.01, start=1.0)"
    assert schedule("schedule=cosine", "schedule.floor=0.1") == "cosine(floor=0.1, start=1.0)"
    assert schedule("schedule=power", "schedule.exponent=3") == "power(3.0, floor=0.01, start=1.0)"
    assert schedule("schedule=wsd") == "hold() | sqrt(floor=0.01, share=0.2)"
    assert schedule("schedule=custom", "schedule.expression=linear(0)") == "linear(floor=0.0)"
    mapping = branch_recipe(parent, overrides={"schedule": "linear", "budget": 7}).recipe
    assert (mapping.schedule.name, str(mapping.budget)) == ("linear", "7")


def test_a_run_at_its_floor_is_warned_about(cosine_parent: Path) -> None:
    seen: list[str] = []
    branch(cosine_parent, "schedule.floor=0.02", dry_run=True, hooks=[messages("warning", seen)])
    assert any("already at the floor" in message for message in seen)
    seen.clear()
    branch(cosine_parent, step=16, dry_run=True, hooks=[messages("warning", seen)])
    assert not any("already at the floor" in message for message in seen)


def test_a_schedule_that_jumps_back_up_is_warned_about(cosine_parent: Path) -> None:
    seen: list[str] = []
    branch(cosine_parent, "schedule=wsd", step=32, dry_run=True, hooks=[messages("warning", seen)])
    assert any("schedule.start=" in message for message in seen)


def test_schedules_of_length_and_size_do_not_begin_again(settings: list[str], own_folder: Path) -> None:
    more = ["lengths=steps", "lengths.start=16", "batch.schedule=stages((0, 0.25), (0.5, 1.0))", "schedule=constant"]
    run = trained([*settings, *more], own_folder / "growing")
    early, late = (branch_recipe(run, step=step).recipe for step in (8, 40))
    assert early.lengths.name == late.lengths.name == "constant"
    assert (early.batch.tokens, late.batch.tokens) == (128, 512)
    assert early.batch.schedule is None
    assert early.schedule.start == pytest.approx(0.5)  # sqrt(1 / 4) for the size of the step
    out = own_folder / "branch"
    branch(run, "budget=2", f"out={out}", step=8)
    first = read_metrics(RunFolder(out))[0]
    assert (first["seq_len"], first["lr"]) == (64, pytest.approx(0.5 * early.optimizer.lr))


def test_the_horizon_of_the_optimizers_own_warmups_stays(settings: list[str], own_folder: Path) -> None:
    """AdEMAMix raises alpha over the run: told of the branch's few steps, it would jump to the end at once."""
    run = trained([*settings, "optimizer=ademamix", "schedule=constant"], own_folder / "slow")
    out = own_folder / "branch"
    branch(run, "schedule=constant", "budget=16", f"out={out}", step=24)
    state = checkpoint.load(out / "checkpoints" / "step-00000016")
    groups = checkpoint.unpack(state.tensors["optimizer"], state.state["optimizer"])["param_groups"]
    assert {group["total_steps"] for group in groups if "total_steps" in group} == {40}
    assert_same(masters(out, 16), masters(run, 40))


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_step_without_a_checkpoint_is_refused_with_those_that_exist(parent: Path) -> None:
    with pytest.raises(RecipeError, match=r"no checkpoint of step 25.*8, 16, 24, 32, 40"):
        branch_recipe(parent, step=25)


@pytest.mark.parametrize("setting", ["model.width=64", "lr=0.1", "seed=7", "precision=bf16", "seq_len=128"])
def test_what_a_branch_takes_over_cannot_change(setting: str, parent: Path, own_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"takes over.*(width|lr|seed|precision|seq_len)"):
        branch(parent, setting, f"out={own_folder / 'branch'}")
    assert list(own_folder.iterdir()) == []


def test_a_recipe_of_another_model_is_refused(parent: Path, settings: list[str]) -> None:
    wider = [word for word in settings if not word.startswith("model.width")] + ["model.width=64"]
    recipe = resolve(None, [*wider, f"branch_from={parent}", "branch_step=8"]).recipe
    with pytest.raises(RecipeError, match=r"model\.width: 32 -> 64"):
        read_parent(recipe)
    state = start(resolve(None, wider).recipe, prepare_for(recipe))
    with pytest.raises(RecipeError, match="width 32, here 64"):
        take_over(state, checkpoint.load(parent / "checkpoints" / "step-00000008"))


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(parent: Path, own_folder: Path) -> None:
    with pytest.raises(RecipeError, match="no run folder"):
        branch_recipe(own_folder / "nowhere")
    (own_folder / "bare").mkdir()
    shutil.copy(parent / "recipe.toml", own_folder / "bare")
    with pytest.raises(RecipeError, match="no checkpoint to branch from"):
        branch_recipe(own_folder / "bare")
    with pytest.raises(RecipeError, match=r"branch_step=STEP \(there are 8, 16, 24, 32, 40\)"):
        train(resolve(parent, [f"branch_from={parent}", "out=x"]).recipe)


def test_a_damaged_checkpoint_is_passed_over_but_not_touched(parent: Path, own_folder: Path) -> None:
    copy = own_folder / "copy"
    shutil.copytree(parent, copy, symlinks=True)
    victim = copy / "checkpoints" / "step-00000040" / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    before = snapshot(copy)
    resolved = branch_recipe(copy)
    assert resolved.recipe.branch_step == 32
    assert any("step-00000040" in note and "damaged" in note for note in resolved.notes)
    with pytest.raises(CheckpointError, match="damaged"):
        branch_recipe(copy, step=40)
    assert snapshot(copy) == before


# --- on the command line and from Python ------------------------------------------------------------------------


def command(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_branching_on_the_command_line(parent: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--branch", str(parent), "--at", "24", "budget=3", "out=cooled", "--no-report"]
    assert command(arguments) == 0
    assert (own_folder / "cooled" / "final").is_dir()
    capsys.readouterr()
    assert command(arguments) == 0
    assert "finished already" in capsys.readouterr().out
    assert command(["train", "--at", "24"]) == 2
    assert "--branch RUN" in capsys.readouterr().err
    assert command(["train", "recipe.toml", "--branch", str(parent)]) == 2
    assert "leave 'recipe.toml' out" in capsys.readouterr().err


def test_branching_from_python(parent: Path, own_folder: Path) -> None:
    def look(event: Any) -> None:
        if event.kind == "branch":
            raise Killed

    with pytest.raises(Killed):
        train(branch_from=str(parent), branch_step=16, budget=2, out=str(own_folder / "branch"), hooks=[look])
    recipe = resolve(own_folder / "branch").recipe
    assert (recipe.branch_step, recipe.schedule.name, str(recipe.budget)) == (16, "sqrt", "2")

"""Going on only with what is the same: what changed is refused with a diff, allowed by name, or told."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import size

from hasten import checkpoint
from hasten.cli import main
from hasten.data import PackedBatches
from hasten.errors import CheckpointError, RecipeError
from hasten.loop import Event, Result, State, advance, capture, prepare_for, restore, start, train
from hasten.loop.changes import begin
from hasten.loop.identity import AnotherRun, differences, identity, read_allow
from hasten.loop.terms import read_terms
from hasten.pool import last_words, train_command
from hasten.recipe import Recipe, resolve
from hasten.record import RunFolder, read_events, read_metrics, read_result, write_result
from hasten.record.environment import code_sha256, tree_sha256

STOP, BUDGET = 6, 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a test gives PyTorch in threads is its own."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(text_file: Path, validation_file: Path, tiny: tuple[str, ...]) -> list[str]:
    tiny = tuple(setting for setting in tiny if not setting.startswith("evaluate."))
    often = ("checkpoint.every=3", "evaluate.every=100%", "evaluate.tokens=512")
    return [f"data={text_file}", f"val={validation_file}", *tiny, f"budget={BUDGET}", *often]


@pytest.fixture(scope="module")
def paused(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands at step 6 of 12."""
    folder = tmp_path_factory.mktemp("paused") / "run"
    assert train(resolve(None, [*base, f"out={folder}"]).recipe, until=STOP).status == "paused"
    return folder


@pytest.fixture
def run(paused: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(paused, tmp_path / "run", symlinks=True))


def go_on(base: list[str], run: Path, *changes: str, allow: tuple[str, ...] = (), **options: Any) -> Result:
    kept = [setting for setting in base if setting.partition("=")[0] not in {c.partition("=")[0] for c in changes}]
    return train(resolve(None, [*kept, *changes, f"out={run}"]).recipe, allow=allow, **options)


def saved_with(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Save the newest checkpoint again, after `change` to its plain data."""
    loaded, _ = checkpoint.newest(run / "checkpoints")
    plain = json.loads(json.dumps(loaded.state))
    change(plain)
    checkpoint.save(run / "checkpoints", loaded.step, loaded.tensors, plain, keep=9)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def refused(base: list[str], run: Path, *changes: str, allow: tuple[str, ...] = ()) -> AnotherRun:
    """Return the refusal, which leaves every file of the run as it was."""
    before = content(run)
    with pytest.raises(AnotherRun) as error:
        go_on(base, run, *changes, allow=allow)
    assert content(run) == before
    return error.value


# What is given, the line that says so, and what to allow.
TAKEN = [
    (["lr=0.001"], "optimizer.lr: was 0.005, is 0.001", "lr"),
    (["optimizer.weight_decay=0.3"], "optimizer.weight_decay: was 0.1, is 0.3", "weight_decay"),
    (["optimizer.betas=[0.8,0.9]"], "optimizer.betas: was [0.9, 0.95], is [0.8, 0.9]", "optimizer.betas"),
    (["optimizer.eps=1e-6"], "optimizer.eps: was 1e-08, is 1e-06", "optimizer"),
    (["schedule=linear"], "schedule.name: was cosine, is linear", "schedule"),
    (["schedule.warmup=1"], "schedule.warmup: was 2%, is 1", "schedule.warmup"),
    (["schedule.weight_decay=linear()"], "schedule.weight_decay: was none, is ", "schedule"),
    (["clip.max_norm=0.5"], "clip.max_norm: was 1.0, is 0.5", "clip.max_norm"),
    (["clip=none"], "clip.name: was norm, is none", "clip"),
    (["budget=20"], "budget: was 12, is 20", "budget"),
    (["batch_tokens=256"], "batch.tokens: was 512, is 256", "batch_tokens"),
    (["target_loss=0.01"], "target_loss: was none, is 0.01", "target_loss"),
    (["data.document_mask=false"], "data.document_mask: was true, is false", "data"),
    (["data.packing=chunk"], "data.packing: was best_fit, is chunk", "data.packing"),
    (["lengths=linear", "lengths.start=32"], "lengths.name: was constant, is linear", "lengths"),
    (["compile=off"], "compile: was auto, is off", "compile"),
]
FIXED = [
    (["model.width=64"], "model.width: was 32, is 64", "their shape"),
    (["optimizer=lion"], "optimizer.name: was adamw, is lion", "another update rule"),
    (["optimizer.ema=0.9"], "optimizer.ema: was 0.0, is 0.9", "does not hold"),
    (["precision=bf16"], "precision.name: was float32, is bf16", "of that format"),
    (["seed=1"], "seed: was 0, is 1", "the order of the text"),
    (["seq_len=32"], "lengths.seq_len: was 64, is 32", "made for it"),
    (["data.tokenizer=bpe", "data.vocab_size=300"], "data.vocab_size: was 4096, is 300", "each token"),
    (["data.tokenizer=bpe"], "tokenizer: was 257, is ", "each"),
    (["budget=4"], "budget: was 12, is 4", "are done"),
    (["lengths=linear", "lengths.mode=bucket", "lengths.start=32"], "lengths.mode: was none, is bucket", "in rows of"),
]


@pytest.mark.parametrize(("given", "line", "name"), TAKEN, ids=lambda value: str(value)[:40])
def test_a_change_is_refused_with_its_diff_and_taken_where_it_is_allowed(
    given: list[str], line: str, name: str, base: list[str], run: Path
) -> None:
    old = (run / "recipe.toml").read_text()
    error = refused(base, run, *given)
    assert any(said.startswith(line) for said in error.lines), error
    assert f"--allow {line.partition(':')[0].removesuffix('.name')}" in str(error)
    result = go_on(base, run, *given, allow=(name,), until=STOP + 2)
    assert (result.status, result.values["steps"]) == ("paused", STOP + 2)
    (event,) = [event for event in read_events(RunFolder(run)) if event["kind"] == "resume"]
    assert line.partition(":")[0] in [change["name"] for change in event["allowed"]]
    assert (run / f"recipe-until-step-{STOP}.toml").read_text() == old
    assert go_on(base, run, *given, until=STOP + 2).already_finished  # the new command needs no more --allow


@pytest.mark.parametrize(("given", "line", "why"), FIXED, ids=lambda value: str(value)[:40])
def test_what_cannot_change_within_a_run_stays_refused_with_the_reason(
    given: list[str], line: str, why: str, base: list[str], run: Path
) -> None:
    tables = tuple({setting.partition("=")[0].partition(".")[0] for setting in given})
    error = refused(base, run, *given, allow=(*tables, "corpus", "tokenizer"))
    (said,) = [said for said in error.lines if said.startswith(line)]
    assert why in said
    assert "--allow" not in str(error)


@pytest.mark.parametrize("name", ["code", "torch", "device"])
def test_another_code_torch_or_device_is_refused_and_named(name: str, base: list[str], run: Path) -> None:
    saved_with(run, lambda plain: plain["identity"].update({name: "other"}))
    error = refused(base, run)
    assert [line.partition(":")[0] for line in error.lines] == [name]
    assert str(error).endswith(f"--allow {name}")
    assert go_on(base, run, allow=(name,), until=STOP + 1).status == "paused"


def test_another_text_is_refused_and_read_from_its_beginning_where_it_is_allowed(
    base: list[str], run: Path, text_file: Path
) -> None:
    other = run.parent / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    assert [line.partition(":")[0] for line in refused(base, run, f"data={other}").lines] == ["data.train", "corpus"]
    assert refused(base, run, f"data={other}", allow=("data.train",)).lines[0].startswith("corpus: was ")
    assert go_on(base, run, f"data={other}", allow=("data.train", "corpus"), until=8).status == "paused"
    loaded, _ = checkpoint.newest(run / "checkpoints")
    assert loaded.state["position"] == [2 * 8]  # two steps of eight rows of the new text


def test_text_of_which_only_the_held_out_side_changed_goes_on_where_it_was(
    base: list[str], run: Path, validation_file: Path
) -> None:
    other = run.parent / "other.txt"
    other.write_text(validation_file.read_text(encoding="utf-8")[:5_000], encoding="utf-8")
    go_on(base, run, f"val={other}", allow=("val", "corpus"), until=8)
    assert checkpoint.newest(run / "checkpoints")[0].state["position"] == [8 * 8]


def test_the_command_line_shows_the_whole_diff_and_takes_allows(
    base: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *base, f"out={run}", "lr=0.001", "clip=none", "--until", str(STOP + 1)]
    for allowed, code in (([], 2), (["--allow", "lr", "--allow", "clip"], 0)):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *allowed])
        assert ended.value.code == code
        error = capsys.readouterr().err
        assert error == "" if code == 0 else error.splitlines()[1:3] == DIFF, error


DIFF = ["  optimizer.lr: was 0.005, is 0.001", "  clip.name: was norm, is none"]


def test_everything_that_changed_is_in_one_refusal(base: list[str], run: Path, text_file: Path) -> None:
    other = run.parent / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    saved_with(run, lambda plain: plain["identity"].update(code="other"))
    error = refused(base, run, f"data={other}", "lr=0.001", "clip=none", allow=("clip",))
    assert [line.partition(":")[0] for line in error.lines] == ["data.train", "optimizer.lr", "code", "corpus"]


def test_an_allowed_rate_counts_from_the_next_step_on(base: list[str], run: Path, paused: Path) -> None:
    whole = Path(shutil.copytree(paused, run.parent / "whole", symlinks=True))
    go_on(base, whole, until=STOP + 3)
    go_on(base, run, "lr=0.0025", allow=("lr",), until=STOP + 3)
    before = [row["lr"] for row in read_metrics(RunFolder(whole))]
    now = [row["lr"] for row in read_metrics(RunFolder(run))]
    assert now == pytest.approx([*before[:STOP], *(lr / 2 for lr in before[STOP:])])


def test_an_allowed_budget_plans_only_the_steps_that_are_left(base: list[str], run: Path) -> None:
    result = go_on(base, run, "budget=20", allow=("budget",))
    progress = [row["progress"] for row in read_metrics(RunFolder(run))]
    half = STOP / BUDGET
    expected = [*(step / BUDGET for step in range(STOP)), *(half + half * step / 14 for step in range(14))]
    assert progress == pytest.approx(expected)
    assert result.values["total_steps"] == result.values["steps"] == 20


def test_a_budget_of_time_replaces_one_of_steps_and_the_other_way_round(base: list[str], run: Path) -> None:
    with pytest.raises(Killed):
        go_on(base, run, "budget=90s", allow=("budget",), hooks=[stop_at(8)])
    assert resolve(run).recipe.budget.unit == "seconds"
    error = refused(base, run, "budget=0.001s", allow=("budget",))
    assert "are used already" in error.lines[0]
    assert go_on(base, run, f"budget={BUDGET}", allow=("budget",)).values["steps"] == BUDGET


def stop_at(step: int) -> Callable[[Event], None]:
    """Return a hook that breaks a run off without a word, as a kill would."""

    def hook(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            raise Killed

    return hook


class Killed(Exception):
    """Stands for the end of a process."""


def test_what_was_allowed_stays_allowed_after_a_kill_before_the_next_checkpoint(base: list[str], run: Path) -> None:
    saved_with(run, lambda plain: plain["identity"].update(code="other"))
    with pytest.raises(Killed):
        go_on(base, run, "lr=0.001", allow=("lr", "code"), hooks=[stop_at(STOP + 1)])
    assert refused(base, run).lines == ("optimizer.lr: was 0.001, is 0.005",)  # the old rate is the change now
    assert go_on(base, run, "lr=0.001", until=STOP + 1).status == "paused"
    assert read_metrics(RunFolder(run))[-1]["lr"] < 0.001


def loaded_state(base: list[str], run: Path, *changes: str, allow: tuple[str, ...]) -> State:
    kept = [setting for setting in base if setting.partition("=")[0] not in {c.partition("=")[0] for c in changes}]
    recipe = resolve(None, [*kept, *changes]).recipe
    loaded, _ = checkpoint.newest(run / "checkpoints")
    state = start(recipe, prepare_for(recipe))
    state.notes["packing"] = []
    begin(state, loaded, read_terms(RunFolder(run), loaded, read_allow(allow)))
    return state


def test_allowed_settings_reach_every_group_and_leave_what_the_rule_counts(base: list[str], run: Path) -> None:
    given = ["lr=0.001", "optimizer.weight_decay=0.3", "optimizer.betas=[0.8,0.9]", "schedule.beta1=constant(0.5)"]
    state = loaded_state(base, run, *given, allow=("optimizer", "schedule"))
    fresh = start(state.recipe, state.data)
    kept = state.kept()  # what the guard goes back to has them too
    restore(state, kept.tensors, kept.plain)
    for group, new in zip(state.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
        for name in ("lr", "initial_lr", "weight_decay", "betas"):
            assert group[name] == new[name], name
    steps = {float(held["step"]) for held in state.optimizer.state.values()}
    assert steps == {float(STOP)}


def test_a_schedule_that_is_given_up_leaves_its_setting_as_it_began(base: list[str], run: Path) -> None:
    given = "schedule.weight_decay=linear(floor=0.5)"
    go_on(base, run, given, allow=("schedule",), until=9)
    state = loaded_state(base, run, allow=("schedule",))
    assert max(group["weight_decay"] for group in state.optimizer.param_groups) == 0.1


def test_a_diverged_run_goes_on_with_a_change_that_is_allowed(base: list[str], run: Path) -> None:
    folder = RunFolder(run)
    write_result(folder, {**read_result(folder), "status": "diverged"})
    assert go_on(base, run).status == "diverged"
    refused(base, run, "lr=0.001")
    assert go_on(base, run, "lr=0.001", allow=("lr",), until=STOP + 1).status == "paused"
    assert go_on(base, run, "lr=0.001").status == "finished"


def test_nothing_of_a_finished_run_can_be_changed(base: list[str], run: Path) -> None:
    go_on(base, run)
    error = refused(base, run, "budget=20", allow=("budget",))
    assert "--branch" in str(error)
    saved_with(run, lambda plain: plain["identity"].update(code="other"))
    assert go_on(base, run).already_finished  # nothing is trained, so it does not matter by which code


def test_a_run_without_a_checkpoint_may_be_begun_anew_with_anything_that_is_allowed(
    base: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        go_on(base, out, hooks=[stop_at(2)])
    refused(base, out, "model.width=64")
    assert go_on(base, out, "model.width=64", allow=("model",), until=2).status == "paused"
    assert (out / "recipe-until-step-0.toml").exists()


def test_a_checkpoint_of_an_older_hasten_goes_on_and_it_is_said(base: list[str], run: Path) -> None:
    def older(plain: dict[str, Any]) -> None:
        plain["format"] = 2
        for key in ("identity", "clip", "jumps", "bad"):
            plain.pop(key, None)
        plain["guard"] = {"bad": 0, "skipped": 0}

    saved_with(run, older)
    assert refused(base, run, "lr=0.001").lines == ("optimizer.lr: was 0.005, is 0.001",)
    messages: list[str] = []
    assert go_on(base, run, until=STOP + 1, hooks=[said(messages)]).status == "paused"
    assert any("not recorded by an older hasten" in message for message in messages)


def test_a_checkpoint_of_a_newer_hasten_is_refused(base: list[str], run: Path) -> None:
    saved_with(run, lambda plain: plain.update(format=99))
    with pytest.raises(CheckpointError, match="format 99"):
        go_on(base, run)


def said(messages: list[str]) -> Callable[[Event], None]:
    return lambda event: messages.append(event.values["message"]) if event.kind in ("note", "warning") else None


def test_an_allow_that_allows_nothing_is_said(base: list[str], run: Path) -> None:
    messages: list[str] = []
    go_on(base, run, allow=("lr", "code"), until=STOP + 1, hooks=[said(messages)])
    assert [message for message in messages if "allows nothing" in message] == [
        "--allow lr allows nothing: that is as it was.",
        "--allow code allows nothing: that is as it was.",
    ]


@pytest.mark.parametrize(
    ("name", "near"), [("learning_rat", "learning_rate"), ("cdoe", "code"), ("crashloop", "crash-loop")]
)
def test_an_unknown_allow_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=near):
        read_allow([name])


def test_keys_that_may_change_freely_are_said_and_need_no_allow(base: list[str], run: Path) -> None:
    messages: list[str] = []
    go_on(base, run, "checkpoint.every=5", "evaluate.every=50%", until=STOP + 1, hooks=[said(messages)])
    assert "checkpoint.every: was 3, is 5" in messages
    assert not (run / f"recipe-until-step-{STOP}.toml").exists()


# --- threads, micro-batches and workers: the same text in the same order, other last bits, and it is told ------------


@pytest.fixture(scope="module")
def uninterrupted(base: list[str]) -> tuple[Recipe, State, list[str], list[float]]:
    recipe = resolve(None, base).recipe
    return recipe, *followed(start(recipe, prepare_for(recipe)), until=BUDGET)


def followed(state: State, *, until: int) -> tuple[State, list[str], list[float]]:
    """Train, and return a hash of what each step read, and its loss."""
    read: list[str] = []
    losses: list[float] = []
    while state.step < until:
        batches, _ = state.take(state.shape())
        rows = [torch.cat(part) for part in zip(*((b.tokens_BT, b.labels_BT) for b in batches), strict=True)]
        read.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in rows)).hexdigest())
        advance(state, state.step + 1, hooks=[lambda event: losses.append(event.values.get("loss"))])
    return state, read, [loss for loss in losses if loss is not None]


# Threads, rows of a micro-batch, and the step to go on from.
SPLITS = [(2, 8, 6), (2, 3, 1), *((1, rows, stop) for rows in (4, 3, 2, 1) for stop in (1, 6))]
ALL_SPLITS = [(threads, rows, stop) for threads in (1, 2, 3) for rows in range(1, 9) for stop in range(1, BUDGET)]


@pytest.mark.torture
@pytest.mark.parametrize(("threads", "micro_rows", "stop"), (SPLITS, ALL_SPLITS)[size(0, 1)])
def test_other_threads_and_micro_batches_read_the_same_and_lose_the_same(
    threads: int, micro_rows: int, stop: int, uninterrupted: tuple[Recipe, State, list[str], list[float]]
) -> None:
    recipe, whole, read, losses = uninterrupted
    first, before, _ = followed(start(recipe, whole.data), until=stop)
    tensors, plain = capture(first)
    tensors = {group: {name: t.clone() for name, t in named.items()} for group, named in tensors.items()}
    other = resolve(recipe, {"batch.micro_rows": micro_rows, "threads": threads}).recipe
    torch.set_num_threads(threads)
    resumed = start(other, whole.data)
    restore(resumed, tensors, plain)
    _, after, now = followed(resumed, until=BUDGET)
    assert [*before, *after] == read
    assert now == pytest.approx(losses[stop:], abs=1e-5)
    changed = {"threads": threads != 1, "micro_rows": micro_rows != 8}
    found = differences(plain["identity"], identity(resumed))
    assert {change.name for change in found} == {name for name, has in changed.items() if has}
    assert {change.kind for change in found} == {"told"}


def test_other_threads_and_micro_batches_of_a_run_are_told(base: list[str], run: Path) -> None:
    messages: list[str] = []
    go_on(base, run, "threads=2", "batch.micro_rows=2", until=STOP + 1, hooks=[said(messages)])
    for name in ("threads: was 1, is 2", "micro_rows: was 8, is 2"):
        assert any(message.startswith(name) for message in messages), messages
    told = [event.get("told") for event in read_events(RunFolder(run)) if event["kind"] == "resume"]
    assert [change["name"] for change in told[0]] == ["threads", "micro_rows"]


def test_micro_rows_that_decide_the_size_of_steps_are_refused(base: list[str], tmp_path: Path) -> None:
    settings = [*base, "batch.schedule=stages((0, 0.5), (0.5, 1.0))"]
    out = tmp_path / "run"
    go_on(settings, out, "batch.micro_rows=2", until=STOP)
    assert refused(settings, out, "batch.micro_rows=4").lines[0].startswith("batch.micro_rows: was 2, is 4")


@pytest.mark.parametrize("workers", [1, 2])
def test_other_workers_of_packed_batches_go_on_in_the_same_order(workers: int, base: list[str]) -> None:
    recipe = resolve(None, base).recipe
    data = prepare_for(recipe)

    def packed() -> PackedBatches:
        return PackedBatches(data.train, seq_len=64, batch_tokens=256, total_steps=6)

    whole = [item["input_ids"] for item in packed()]
    first, resumed = packed(), packed()
    begun = [item["input_ids"] for item, _ in zip(first, range(2), strict=False)]
    resumed.load_state_dict(first.state_dict(step=2))
    rest = [item["input_ids"] for item in resumed.loader(num_workers=workers)]
    assert all(torch.equal(a, b) for a, b in zip(whole, [*begun, *rest], strict=True))


# --- the hash of the code, and processes of others -------------------------------------------------------------------


def test_the_hash_of_the_code_follows_names_and_content_not_the_place(tmp_path: Path) -> None:
    def package(name: str, **files: str) -> str:
        for file, text in files.items():
            path = tmp_path / name / f"{file}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tree_sha256(tmp_path / name)

    assert package("a", x="1\n", y="2\n") == package("b", x="1\n", y="2\n")
    assert len({package("a"), package("c", x="1\n2\n"), package("d", x="1\n", z="2\n"), package("e", x="", y="")}) == 4
    assert code_sha256() == code_sha256()


def test_a_pool_passes_allows_on_and_repeats_a_refusal_whole(tmp_path: Path) -> None:
    assert train_command(Path("a.toml"), allow=("code",))[-2:] == ("--allow", "code")
    log = tmp_path / "log.txt"
    log.write_text("step 1\nhasten: r holds a run made with something else:\n  code: was a, is b\nRestore that.\n")
    assert last_words(log) == "r holds a run made with something else: code: was a, is b Restore that."
    log.write_text("hasten: stopped.\n  corpus  12 documents\nstep 3\n")
    assert last_words(log) == "step 3"

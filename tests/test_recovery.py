"""Bad batches, broken gradients and broken weights: the run goes on, and ends where the clean run ends."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from sizes import size

from hasten import checkpoint
from hasten.errors import DamagedData, RunError
from hasten.loop import Event, Result, State, restore, start, train
from hasten.loop.between import validate
from hasten.loop.leaving import DAMAGED, GUARDED, count_left_out
from hasten.loop.recovery import go_back
from hasten.loop.snapshots import hold, snapshot
from hasten.loop.sources import prepare_for
from hasten.loop.steps import advance
from hasten.loop.telling import Teller
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events, read_metrics

STEPS = 90
SETTINGS = (*TINY, f"budget={STEPS}", "schedule.warmup=5", "lr=3e-3", "evaluate.every=1000", "guard.snapshot_every=20")


@pytest.fixture
def settings(text_file: Path) -> list[str]:
    return [*SETTINGS, f"data={text_file}"]


def shorter(settings: list[str], steps: int) -> list[str]:
    return [f"budget={steps}" if setting.startswith("budget=") else setting for setting in settings]


def run(settings: list[str], spoil: Callable[[State], None] | None = None, **more: Any) -> Result:
    """Train by `settings`; `spoil` gets the state before the first step."""

    def look(event: Event) -> None:
        if event.kind == "prepared" and spoil is not None:
            spoil(event.values["state"])

    return train(resolve(None, [*settings, "out=run"]).recipe, hooks=[look], **more)


def at_positions(*rows: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    """Return what spoils the loss of the steps that begin at these rows of the data, however often they are read."""

    def spoil(state: State) -> None:
        def see(module: torch.nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
            is_training = out.ndim == 0 and out.requires_grad
            return change(out) if is_training and state.position[0] in rows else out

        state.model.register_forward_hook(see)

    return spoil


def advanced(
    settings: list[str], spoil: Callable[[State], None] | None = None, stop: int = STEPS
) -> tuple[State, list[Event]]:
    """Return the state after `stop` steps, without a run folder, and all that was told on the way."""
    recipe = resolve(None, settings).recipe
    state, told = start(recipe, prepare_for(recipe)), []
    if spoil is not None:
        spoil(state)
    return advance(state, stop, hooks=[told.append]), told


def val_loss(state: State) -> float:
    return validate(state, max_tokens=4096).loss


@pytest.fixture(scope="session")
def clean(text_file: Path) -> State:
    return advanced([*SETTINGS, f"data={text_file}"])[0]


def ends_like(state: State, clean: State) -> bool:
    """Say whether a run ended within 2 % of the loss of the clean one."""
    return state.step == STEPS and abs(val_loss(state) / val_loss(clean) - 1) < 0.02


def of_kind(told: list[Event], kind: str) -> list[Event]:
    return [event for event in told if event.kind == kind]


def events(kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(RunFolder(Path("run"))) if event["kind"] == kind]


def no_broken_checkpoint() -> bool:
    """Say whether every number in every checkpoint is finite."""
    return all(
        bool(tensor.isfinite().all())
        for path in Path("run/checkpoints").glob("step-????????")
        for named in checkpoint.load(path).tensors.values()
        for tensor in named.values()
        if tensor.is_floating_point()
    )


def rows_of(step: int) -> int:
    return (step - 1) * 8  # batch_tokens=512 in rows of 64


FAULTS = {
    "a loss that is nan": lambda loss: loss * math.nan,
    "a loss that is inf": lambda loss: loss * math.inf,
    "a spike of three times the loss": lambda loss: loss * 3,
    "a spike of a hundred times the loss": lambda loss: loss * 100,
    "a nan that only the gradient has": lambda loss: loss + (loss - loss.detach()) * math.nan,
    "a gradient of a thousand times": lambda loss: loss + (loss - loss.detach()) * 999,
}


@pytest.mark.torture
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [41, 77, 81, 86, 30][: size(1, 5)])
def test_a_bad_batch_is_left_out_and_the_run_ends_where_the_clean_one_does(
    fault: str, step: int, settings: list[str], clean: State
) -> None:
    state, told = advanced(settings, at_positions(rows_of(step), change=FAULTS[fault]))
    (bad,) = of_kind(told, "bad_step")
    assert (bad.step, bad.values["action"]) == (step, "skip")
    assert bad.values["documents"]
    assert ends_like(state, clean)
    assert state.notes["left_out"] == {GUARDED: clean.tokens - state.tokens}
    assert [event.step for event in of_kind(told, "step") if event.values["skipped"]] == [step]


@pytest.mark.torture
@pytest.mark.parametrize("fault", list(FAULTS)[size(3, 0) :])
@pytest.mark.parametrize("step", [65, 43, 61, 71, 75][: size(1, 5)])
def test_bad_batches_in_a_row_send_the_run_back_and_on_past_them(
    fault: str, step: int, settings: list[str], clean: State
) -> None:
    bad = [rows_of(step + more) for more in range(3)]
    state, told = advanced(settings, at_positions(*bad, change=FAULTS[fault]))
    (back,) = of_kind(told, "rollback")
    assert (back.step, back.values["failed_at"]) == (step // 20 * 20, step + 2)
    assert (back.values["rate_factor"], state.guard.rollbacks) == (1.0, 1)
    assert ends_like(state, clean)
    assert state.notes["left_out"] == {GUARDED: back.values["tokens"]}
    assert state.position[0] == (STEPS + back.values["failed_at"] - back.step) * 8  # on behind what was read in vain


def test_a_run_that_went_back_has_one_line_for_every_step(settings: list[str]) -> None:
    bad = [rows_of(step) for step in (31, 32, 33)]
    result = run([*shorter(settings, 50)], at_positions(*bad, change=FAULTS["a loss that is nan"]))
    assert (result.status, result.values["rollbacks"]) == ("finished", 1)
    lines = read_metrics(RunFolder(Path("run")))
    assert [line["step"] for line in lines] == list(range(1, 51))
    assert not any(line["skipped"] for line in lines)
    assert [event["step"] for event in events("bad_step")] == [31, 32, 33]
    assert events("rollback")[0]["failed_at"] == 33


@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_a_broken_number_in_the_state_is_never_saved_and_the_run_goes_back(where: str, settings: list[str]) -> None:
    states: list[State] = []

    def look(event: Event) -> None:
        if event.kind == "prepared":
            states.append(event.values["state"])
        if event.kind == "step" and event.step == 33 and len(states) == 1:
            states.append(states[0])
            first = next(iter(states[0].precision.named_masters().values()))
            target = first.data if where == "model" else states[0].optimizer.state[first]["exp_avg"]
            target.view(-1)[7] = math.nan

    recipe = resolve(None, [*shorter(settings, 50), "out=run", "checkpoint.every=7"]).recipe
    result = train(recipe, hooks=[look])
    assert (result.status, result.values["rollbacks"]) == ("finished", 1)
    assert no_broken_checkpoint()


def test_what_is_bad_everywhere_ends_as_diverged_after_so_many_tries(settings: list[str]) -> None:
    everywhere = at_positions(*range(rows_of(30), 100_000), change=FAULTS["a loss that is nan"])
    result = run([*settings, "guard.max_rollbacks=2", "checkpoint.every=15"], everywhere)
    assert (result.status, result.values["rollbacks"]) == ("diverged", 2)
    assert [event["rate_factor"] for event in events("rollback")] == [1.0, 0.5]
    assert "nan" in result.reason
    assert no_broken_checkpoint()


def test_a_run_goes_back_to_its_checkpoints_where_it_is_told_to(settings: list[str]) -> None:
    bad = [rows_of(step) for step in (31, 32, 33)]
    told = [*shorter(settings, 50), "guard.snapshot=disk", "checkpoint.every=11"]
    result = run(told, at_positions(*bad, change=FAULTS["a loss that is nan"]))
    assert (result.status, result.values["rollbacks"]) == ("finished", 1)
    assert events("rollback")[0]["step"] == 22


def test_resumed_before_within_and_after_the_trouble_a_run_is_bit_identical(settings: list[str]) -> None:
    spoil = at_positions(*(rows_of(step) for step in (31, 32, 33)), change=FAULTS["a loss that is nan"])
    recipe = resolve(None, settings).recipe
    for stop in (25, 32, 35):
        whole, _ = advanced(settings, spoil, stop)
        taken = snapshot(whole)
        hold(whole, taken)  # as saving does
        saved = checkpoint.load(checkpoint.save(Path(str(stop)), stop, taken.tensors, taken.plain, keep=1))
        resumed = start(recipe, prepare_for(recipe))
        spoil(resumed)
        restore(resumed, saved.tensors, saved.state)
        for state in (whole, resumed):
            advance(state, 40)
        assert (resumed.position, resumed.tokens) == (whole.position, whole.tokens)
        assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


def test_what_was_damaged_or_short_of_memory_since_stays_known_after_going_back(settings: list[str]) -> None:
    state, _ = advanced(settings, stop=25)
    count_left_out(state, DAMAGED, 700)
    state.notes["micro_rows"] = 1
    go_back(state, Teller((), state), "for a test")
    assert (state.step, state.position) == (20, (25 * 8,))
    assert state.notes["left_out"][DAMAGED] == 700
    assert state.notes["micro_rows"] == 1


def test_without_trouble_the_guard_changes_no_bit(settings: list[str]) -> None:
    weights = []
    for guard in ("spikes", "finite", "none"):
        plain = [setting for setting in settings if "guard" not in setting]
        recipe = resolve(None, [*plain, f"guard={guard}"]).recipe
        state = advance(start(recipe, prepare_for(recipe)), 40)
        weights.append(torch.cat([p.detach().reshape(-1) for p in state.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_without_a_guard_broken_losses_in_a_row_end_the_run(settings: list[str]) -> None:
    everywhere = at_positions(*range(rows_of(30), 100_000), change=FAULTS["a loss that is nan"])
    result = run([*[s for s in settings if "guard" not in s], "guard=none"], everywhere)
    assert (result.status, result.values["rollbacks"]) == ("diverged", 0)


@pytest.fixture
def damaged(library_text: str, own_folder: Path, settings: list[str]) -> Iterator[list[str]]:
    """Settings of a run whose stored tokens have one flipped bit in the last of their blocks of 1 MiB."""
    Path("long.txt").write_text(library_text * 7, encoding="utf-8")
    found = [f"data={own_folder / 'long.txt'}", *(setting for setting in settings if "data=" not in setting)]
    shard = next(prepare_for(resolve(None, found).recipe).folder.glob("train*.bin"))
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    yield found
    shutil.rmtree(shard.parent)


def test_damaged_tokens_are_left_out_where_the_recipe_says_so(damaged: list[str]) -> None:
    state, told = advanced([*damaged, "data.on_damage=skip"], stop=20)
    damages = of_kind(told, "damage")
    assert (state.step, state.status, len(damages) > 0) == (20, "running", True)
    assert state.notes["left_out"] == {DAMAGED: sum(event.values["tokens"] for event in damages)}
    assert all(event.values["documents"] and event.values["block"] == 3 for event in damages)


def test_damaged_tokens_stop_the_run_otherwise(damaged: list[str]) -> None:
    with pytest.raises(DamagedData, match=r"train-00000\.bin is damaged: the block of 1 MiB at byte 3145728"):
        advanced(damaged, stop=20)


def test_a_run_of_which_all_is_damaged_ends(settings: list[str], own_folder: Path, text_file: Path) -> None:
    Path("other.txt").write_bytes(text_file.read_bytes()[100:])
    found = [f"data={own_folder / 'other.txt'}", *(setting for setting in settings if "data=" not in setting)]
    shard = next(prepare_for(resolve(None, found).recipe).folder.glob("train*.bin"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(DamagedData):
        advanced([*found, "data.on_damage=skip"], stop=1)
    shutil.rmtree(shard.parent)


def test_too_little_memory_makes_micro_batches_smaller_and_the_tokens_of_a_step_stay(settings: list[str]) -> None:
    recipe = resolve(None, [*shorter(settings, 20), "batch.micro_rows=8"]).recipe
    told: list[str] = []

    def look(event: Event) -> None:
        if event.kind == "warning":
            told.append(event.values["message"])

    states = [start(recipe, prepare_for(recipe)) for _ in range(2)]

    def refuse(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        if states[0].step >= 10 and given[0].shape[0] > 2:
            raise torch.OutOfMemoryError("no memory for so many rows")

    states[0].forward.register_forward_pre_hook(refuse)
    for state in states:
        advance(state, 20, hooks=[look])
    assert [state.batches.micro_rows for state in states] == [2, 8]
    assert states[0].tokens == states[1].tokens
    assert len(told) == 2
    first, second = (torch.cat([p.detach().reshape(-1) for p in state.model.parameters()]) for state in states)
    assert torch.allclose(first, second, atol=1e-4)


def test_without_memory_for_a_single_row_the_run_ends_with_one_sentence(settings: list[str]) -> None:
    state, _ = advanced(settings, stop=3)

    def refuse(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        raise torch.OutOfMemoryError("nothing left\nat all")

    state.forward.register_forward_pre_hook(refuse)
    with pytest.raises(RunError, match=r"no memory for step 4, though .* one row of 64 tokens \(nothing left\)"):
        advance(state, 5)
    assert state.step == 3

"""The loop under schedules of row length, attention window and batch size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hasten.checkpoint import load, save
from hasten.loop import Event, State, advance, capture, prepare_for, restore, start
from hasten.loop.between import validate
from hasten.loop.probing import probe
from hasten.loop.timetable import work_ahead
from hasten.recipe import resolve

GROWING = ("lengths=linear", "lengths.start=8", "lengths.over=50%", "lengths.replay=0.3")
STAGES = "batch.schedule=stages((0, 0.25), (0.5, 1.0))"


@pytest.fixture(scope="module")
def started(text_file: Path, tiny: tuple[str, ...]) -> Callable[..., State]:
    def begin(*settings: str, steps: int | str = 24) -> State:
        recipe = resolve(None, [f"data={text_file}", *tiny, f"budget={steps}", *settings]).recipe
        return start(recipe, prepare_for(recipe))

    return begin


def seen(state: State, steps: int) -> list[Event]:
    events: list[Event] = []
    advance(state, steps, hooks=[events.append])
    return events


@contextmanager
def fed(state: State) -> Iterator[list[tuple[int, ...]]]:
    """Yield the shape of everything that reaches the model inside the block."""
    shapes: list[tuple[int, ...]] = []
    handle = state.model.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    yield shapes
    handle.remove()


def test_the_model_is_fed_the_lengths_that_the_schedule_says(started):
    state = started(*GROWING)
    expected = [state.lengths(step / 24, step) for step in range(24)]
    assert set(expected) == {8, 16, 32, 64}
    with fed(state) as shapes:
        advance(state, 24)
    assert shapes == [(512 // length, length) for length in expected]


def test_the_length_of_every_step_is_on_record(started):
    state = started(*GROWING)
    assert [e.values["seq_len"] for e in seen(state, 24)] == [state.lengths(step / 24, step) for step in range(24)]


def test_a_length_schedule_changes_neither_tokens_nor_their_order_nor_the_rate(started):
    growing, fixed = started(*GROWING), started()
    for step in range(24):
        one, _ = growing.batches.take((step * 8,), rows=8, length=growing.lengths(step / 24, step))
        other, _ = fixed.batches.take((step * 8,), rows=8, length=64)
        assert torch.equal(one[0].tokens_BT.flatten(), other[0].tokens_BT.flatten())
        assert torch.equal(one[0].labels_BT.flatten(), other[0].labels_BT.flatten())
    pairs = list(zip(seen(growing, 24), seen(fixed, 24), strict=True))
    assert all(a.values["tokens"] == b.values["tokens"] and a.values["lr"] == b.values["lr"] for a, b in pairs)


def test_a_row_seen_in_pieces_does_not_reach_back_over_their_edges(started):
    short = started("lengths=steps", "lengths.sizes=[8,64]", "data.document_mask=false")
    state = started("data.document_mask=false")
    batches, _ = state.batches.take((0,), rows=8)
    logits = short.model(batches[0].tokens_BT.reshape(-1, 8))
    alone = torch.cat([short.model(piece) for piece in batches[0].tokens_BT.reshape(-1, 8).split(1)])
    torch.testing.assert_close(logits, alone)
    assert short.shape().length == 8


def test_resumed_at_every_step_a_growing_run_is_bit_identical(started, tmp_path):
    settings = (*GROWING, STAGES, "batch.micro_rows=2", "schedule.weight_decay=linear(floor=0.1)")
    whole = started(*settings)
    advance(whole, 24)
    for stop in range(1, 24, 2):
        stopped = started(*settings)
        advance(stopped, stop)
        saved = load(save(tmp_path / str(stop), stop, *capture(stopped), keep=1))
        resumed = started(*settings)
        restore(resumed, saved.tensors, saved.state)
        advance(resumed, 24)
        assert (resumed.position, resumed.tokens) == (whole.position, whole.tokens)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), stop


def test_a_batch_schedule_changes_rows_and_rate(started):
    state = started(STAGES, "batch.micro_rows=2", "schedule=constant", "schedule.warmup=0")
    events = seen(state, 24)
    tokens = [events[0].values["tokens"]] + [
        b.values["tokens"] - a.values["tokens"] for a, b in itertools.pairwise(events)
    ]
    lr = state.recipe.optimizer.lr
    assert all(100 < count <= 128 for count in tokens[:12])
    assert all(480 < count <= 512 for count in tokens[12:])
    assert [e.values["lr"] for e in events] == pytest.approx([lr * 0.5] * 12 + [lr] * 12)


def test_a_token_budget_counts_the_mean_size_of_a_step(started):
    state = started(STAGES, "batch.micro_rows=2", steps="10ktok")
    assert state.total_steps == 32  # 10000 / (5 rows of 64 on average), rounded up
    advance(state, state.total_steps)
    assert state.tokens == pytest.approx(10_000, rel=0.05)


def test_a_window_schedule_trains_with_a_growing_reach(started):
    state = started("lengths=window", "lengths.start=4", "lengths.over=50%")
    windows = []
    for _ in range(24):
        windows.append(int(state.shape().window))
        advance(state, state.step + 1)
    assert windows == [4 + 60 * step // 12 if step < 12 else 64 for step in range(24)]
    assert started().shape().window is None


def test_a_window_limits_what_a_step_learns_from(started):
    one, other = started("lengths=window", "lengths.start=1", "lengths.over=90%"), started()
    first, second = seen(one, 3), seen(other, 3)
    assert first[2].values["loss"] != second[2].values["loss"]


def test_momentum_and_decay_follow_their_schedules(started):
    state = started("schedule.weight_decay=linear(floor=0.5)", "schedule.beta1=warmup(0.5, start=0.9) | hold()")
    advance(state, 12)
    advance(state, 13)  # the step at half-time
    groups = [group for group in state.optimizer.param_groups if group["initial_weight_decay"]]
    assert groups
    assert all(group["weight_decay"] == pytest.approx(0.75 * group["initial_weight_decay"]) for group in groups)
    assert all(group["betas"][0] == pytest.approx(state.recipe.optimizer.betas[0]) for group in groups)


def test_validation_is_at_full_length_whatever_the_rows(started):
    state = started(*GROWING)
    with fed(state) as shapes:
        validate(state, max_tokens=None)
    assert {length for _, length in shapes} == {64}


def test_a_probe_visits_every_length_and_changes_nothing(started):
    state, untouched = started(*GROWING), started(*GROWING)
    assert probe(state) > 0
    assert set(state.notes["costs"]) == {"8", "16", "32", "64"}
    assert all(parameter.grad is None for parameter in state.model.parameters())
    advance(state, 5)
    advance(untouched, 5)
    for a, b in zip(state.model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_work_ahead_follows_what_each_length_costs(started):
    state = started("lengths=steps", "lengths.sizes=[32,64]", "lengths.over=50%")
    state.notes["costs"] = {"32": 1.0, "64": 4.0}
    assert work_ahead(state) == pytest.approx((0.25 + 1.0) / 2, abs=0.01)
    state.step = 12
    assert work_ahead(state) == 1.0
    both = started(STAGES, "batch.micro_rows=2")
    assert work_ahead(both) == pytest.approx((0.25 + 1.0) / 2, abs=0.01)


@pytest.mark.parametrize(
    "settings", [("lengths=linear", "lengths.mode=bucket", "lengths.start=16"), ("data.packing=pad",)]
)
def test_other_ways_to_make_rows_train(started, settings):
    state = started(*settings)
    losses = [event.values["loss"] for event in seen(state, 24)]
    assert losses[-1] < losses[0]

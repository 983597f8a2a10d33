"""The loop: normalisation, accumulation, stopping and going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.checkpoint import load, save
from hasten.loop import Event, advance, capture, prepare_for, restore, start
from hasten.model import Decoder
from hasten.recipe import Recipe, resolve


@pytest.fixture(scope="module")
def recipe(text_file: Path, tiny: tuple[str, ...]) -> Recipe:
    return resolve(None, [f"data={text_file}", *tiny, "budget=50"]).recipe


def changed(recipe: Recipe, *settings: str, text_file: Path, tiny: tuple[str, ...]) -> Recipe:
    return resolve(None, [f"data={text_file}", *tiny, "budget=50", *settings]).recipe


def losses(recipe: Recipe, *, steps: int, double: bool = False) -> list[float]:
    data = prepare_for(recipe)
    model = None
    if double:
        config = recipe.model.build(data.vocab_size, recipe.lengths.seq_len)
        model = Decoder(config, seed=0).double()
    seen: list[float] = []

    def note(event: Event) -> None:
        seen.append(event.values["loss"])

    advance(start(recipe, data, model=model), steps, hooks=[note])
    return seen


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-5), (True, 1e-9)])
def test_accumulation_does_not_change_the_losses(
    double: bool, tolerance: float, text_file: Path, tiny: tuple[str, ...], recipe: Recipe
) -> None:
    runs = [
        losses(changed(recipe, f"batch.micro_rows={rows}", text_file=text_file, tiny=tiny), steps=50, double=double)
        for rows in (8, 4, 2, 1)
    ]
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], abs=tolerance)


def test_stopping_and_going_on_changes_no_bit(recipe: Recipe) -> None:
    data = prepare_for(recipe)
    whole, parts = start(recipe, data), start(recipe, data)
    advance(whole, 20)
    for stop in (1, 2, 7, 20):
        advance(parts, stop)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resume_at_every_step_is_bit_identical(recipe: Recipe, tmp_path: Path) -> None:
    data = prepare_for(recipe)
    whole = advance(start(recipe, data, horizon=12), 12)
    for stop in range(1, 12):
        stopped = advance(start(recipe, data, horizon=12), stop)
        saved = load(save(tmp_path / str(stop), stop, *capture(stopped), keep=1))
        resumed = start(recipe, data, horizon=12)
        restore(resumed, saved.tensors, saved.state)
        advance(resumed, 12)
        assert resumed.tokens == whole.tokens
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), stop


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sqrt", "constant"])
def test_the_rate_follows_the_schedule_at_every_step(
    schedule: str, text_file: Path, tiny: tuple[str, ...], recipe: Recipe
) -> None:
    recipe = changed(recipe, f"schedule={schedule}", text_file=text_file, tiny=tiny)
    state = start(recipe, prepare_for(recipe), horizon=20)
    rates: list[float] = []
    advance(state, 20, hooks=[lambda event: rates.append(event.values["lr"])])
    assert rates == pytest.approx([recipe.optimizer.lr * state.schedule(step / 20) for step in range(20)])


def test_the_horizon_is_not_the_stop(recipe: Recipe) -> None:
    state = start(recipe, prepare_for(recipe), horizon=1000)
    advance(state, 3)
    assert (state.step, state.total_steps, state.status) == (3, 1000, "running")


def test_loss_is_a_mean_over_real_targets_when_the_last_row_is_padded(recipe: Recipe) -> None:
    data = prepare_for(recipe)
    state = start(recipe, data, horizon=10)
    last = int(state.steps_per_epoch)
    seen: list[Event] = []
    advance(state, min(10, last + 1), hooks=[seen.append])
    assert all(2.0 < event.values["loss"] < 8.0 for event in seen)

"""Every optimizer in the trainer: it learns, it resumes bit for bit, and what it asks for is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.checkpoint import load, save
from hasten.loop import Event, State, advance, capture, prepare_for, restore, start, train
from hasten.loop.state import replan, weights_to_evaluate
from hasten.model import read_model
from hasten.optim import OPTIMIZERS
from hasten.recipe import Recipe, resolve

# Rates that show within 24 steps that a tiny model learns.
RATES = {"sgd": 1.0, "prodigy": 1.0, "adafactor": 0.05}
MORE = {"prodigy": ("optimizer.d0=1e-3",), "soap": ("optimizer.precondition_frequency=3",)}
MORE["soap_muon"] = MORE["soap"]
STEPS = 24


@pytest.fixture(scope="module")
def settings(text_file: Path, tiny: tuple[str, ...]) -> list[str]:
    return [f"data={text_file}", *tiny, "schedule.warmup=0"]


def recipe_for(name: str, settings: list[str], *more: str) -> Recipe:
    rate = RATES.get(name, 5e-3)
    return resolve(None, [*settings, f"optimizer={name}", f"lr={rate}", *MORE.get(name, ()), *more]).recipe


def losses(state: State, stop: int) -> list[float]:
    seen: list[float] = []

    def note(event: Event) -> None:
        seen.append(event.values["loss"])

    advance(state, stop, hooks=[note])
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tiny_model_learns_and_resumes_bit_for_bit(name, settings, tmp_path):
    recipe = recipe_for(name, settings, f"budget={STEPS}")
    data = prepare_for(recipe)
    whole = start(recipe, data)
    seen = losses(whole, STEPS)
    assert sum(seen[-3:]) / 3 < seen[0] - 0.3
    stopped = advance(start(recipe, data), 10)
    saved = load(save(tmp_path, 10, *capture(stopped), keep=1))
    resumed = start(recipe, data)
    restore(resumed, saved.tensors, saved.state)
    advance(resumed, STEPS)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "more", [("optimizer.ema=0.9",), ("precision=bf16",), ("optimizer.state_format=8bit",)], ids=str
)
def test_averages_low_precision_and_8bit_state_resume_bit_for_bit(more, settings, tmp_path):
    recipe = recipe_for("adamw", settings, "budget=12", *more)
    data = prepare_for(recipe)
    whole = advance(start(recipe, data), 12)
    saved = load(save(tmp_path, 5, *capture(advance(start(recipe, data), 5)), keep=1))
    resumed = start(recipe, data)
    restore(resumed, saved.tensors, saved.state)
    advance(resumed, 12)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "more"), [("schedule_free_adamw", ()), ("adamw", ("optimizer.ema=0.9",))])
def test_what_an_optimizer_averages_is_evaluated_exported_and_kept(name, more, settings, tmp_path):
    recipe = recipe_for(name, settings, "budget=12", *more)
    state = advance(start(recipe, prepare_for(recipe)), 12)
    trained = [p.detach().clone() for p in state.model.parameters()]
    with weights_to_evaluate(state):
        averaged = {key: p.detach().clone() for key, p in state.model.named_parameters()}
    assert all(torch.equal(p, old) for p, old in zip(state.model.parameters(), trained, strict=True))
    assert not all(torch.equal(p, old) for p, old in zip(averaged.values(), trained, strict=True))
    saved = load(save(tmp_path / "saved", 12, *capture(state), keep=1))
    assert all(torch.equal(saved.tensors["averaged"][key], value) for key, value in averaged.items())

    result = train(recipe.model_copy(update={"out": str(tmp_path / "run")}))
    exported = read_model(result.folder / "final")
    for key, value in exported.named_parameters():
        assert torch.equal(value, averaged[key])


def test_an_optimizer_that_averages_nothing_saves_nothing_twice(settings):
    recipe = recipe_for("adamw", settings, "budget=2")
    assert "averaged" not in capture(start(recipe, prepare_for(recipe)))[0]


def test_an_extra_pass_draws_labels_and_changes_neither_weights_nor_the_text(settings):
    recipe = recipe_for("sophia", settings, "budget=8", "optimizer.estimate_every=4")
    data = prepare_for(recipe)
    state = start(recipe, data)
    advance(state, 3)
    matrix = state.precision.master(state.model.lm_head.weight)
    assert not state.optimizer.state[matrix]["hessian"].any()
    advance(state, 4)
    first = state.optimizer.state[matrix]["hessian"].clone()
    assert first.any()
    advance(state, 7)
    assert torch.equal(state.optimizer.state[matrix]["hessian"], first)
    assert state.optimizer.param_groups[0]["batch_tokens"] == recipe.tokens_per_step
    assert all(p.grad is None for p in state.model.parameters())
    other = advance(start(recipe, data), 4)
    assert torch.equal(other.optimizer.state[other.precision.master(other.model.lm_head.weight)]["hessian"], first)


def test_warmups_of_an_optimizer_follow_the_plan_of_the_run(settings):
    recipe = recipe_for("ademamix", settings, "budget=40", "optimizer.beta3_warmup=10")
    state = start(recipe, prepare_for(recipe))
    group = state.optimizer.param_groups[0]
    assert (group["total_steps"], group["alpha_warmup"], group["beta3_warmup"]) == (40, 1.0, 10)
    advance(state, 4)
    replan(state, 60)
    assert (group["total_steps"], state.total_steps) == (60, 60)
    timed = recipe_for("ademamix", settings, "budget=60s")
    assert start(timed, prepare_for(timed)).optimizer.param_groups[0]["total_steps"] > 10**6  # until it is planned


def test_a_timed_run_tells_the_optimizer_its_length(settings, tmp_path):
    recipe = recipe_for("ademamix", settings, "budget=2s", f"out={tmp_path / 'run'}")
    result = train(recipe)
    saved = load(sorted((result.folder / "checkpoints").glob("step-*"))[-1])
    assert saved.state["optimizer"]["param_groups"][0]["total_steps"] == result.values["total_steps"]

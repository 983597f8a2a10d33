"""Schedules equal their formulas at every step; progress keeps what was; torch's own schedulers agree."""

from __future__ import annotations

import json
import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from hasten.errors import RecipeError
from hasten.schedules import (
    SCHEDULES,
    Progress,
    Schedule,
    as_lr_scheduler,
    constant,
    cosine,
    linear,
    sqrt,
    warmup,
)

FORMULAS = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - x**0.5,
}


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_decay_equals_its_formula_at_every_step(name, floor):
    schedule, total_steps = SCHEDULES[name](floor=floor), 777
    for step in range(total_steps + 1):
        expected = floor + (1 - floor) * FORMULAS[name](step / total_steps)
        assert schedule(step / total_steps) == pytest.approx(expected, rel=0, abs=1e-15)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_decay_after_a_warmup_equals_its_formula_at_every_step(name):
    schedule, total_steps, warm = warmup(0.1, start=0.25) | SCHEDULES[name](floor=0.02), 500, 50
    for step in range(total_steps + 1):
        if step < warm:
            expected = 0.25 + 0.75 * step / warm
        else:
            expected = 0.02 + 0.98 * FORMULAS[name]((step - warm) / (total_steps - warm))
        assert schedule(step / total_steps) == pytest.approx(expected, rel=0, abs=1e-13)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_decay_interpolates_to_its_floor_and_never_stays_on_it(name):
    factors = [SCHEDULES[name](floor=0.3)(step / 100) for step in range(101)]
    assert factors[0] == 1.0
    assert factors[-1] == 0.3
    assert all(before > after for before, after in pairwise(factors))


def test_progress_outside_the_run_gives_the_ends():
    schedule = warmup(0.1, start=0.5) | linear(floor=0.2)
    assert schedule(0.0) == 0.5
    assert schedule(1.5) == 0.2
    assert cosine(floor=0.2)(-0.5) == 1.0


def test_the_warmup_meets_the_decay_at_the_peak():
    schedule = warmup(0.25, start=0.01) | cosine(floor=0.0)
    below, at, above = schedule(0.25 - 1e-9), schedule(0.25), schedule(0.25 + 1e-9)
    assert at == 1.0
    assert below == pytest.approx(1.0, abs=1e-7)
    assert above == pytest.approx(1.0, abs=1e-7)


def test_a_warmup_alone_stays_at_the_peak():
    assert [warmup(0.5, start=0.0)(x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_constant_is_its_value_throughout():
    assert {constant()(step / 10) for step in range(11)} == {1.0}
    assert (warmup(0.5, start=0.5) | constant(0.7))(0.8) == 0.7


def test_a_schedule_prints_as_the_expression_that_made_it():
    schedule = warmup(0.0123456789, start=0.01) | cosine(floor=0.01)
    assert repr(schedule) == "warmup(0.0123456789, start=0.01) | cosine(floor=0.01)"
    assert repr(sqrt(floor=1 / 3)) == "sqrt(floor=0.3333333333333333)"
    assert repr(constant(0.5)) == "constant(0.5)"


def test_equal_schedules_are_equal_values():
    assert warmup(0.1) | linear(floor=0.1) == warmup(0.1) | linear(floor=0.1)
    assert hash(cosine(floor=0.1)) == hash(cosine(floor=0.1))
    assert cosine(floor=0.1) != linear(floor=0.1)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_a_warmup_outside_the_run_is_refused(share):
    with pytest.raises(RecipeError, match="warmup share"):
        warmup(share)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
@pytest.mark.parametrize("build", [cosine, linear, sqrt, lambda start: warmup(0.1, start)])
def test_a_factor_outside_zero_to_one_is_refused(build, value):
    with pytest.raises(RecipeError):
        build(value)


def test_nothing_follows_a_schedule_that_takes_the_whole_run():
    with pytest.raises(RecipeError, match="takes the whole run"):
        cosine(floor=0.1) | linear(floor=0.1)
    with pytest.raises(TypeError):
        warmup(0.1) | 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_says_until_when_it_may_be_planned_again(name):
    alone = SCHEDULES[name]()
    chained = warmup(0.2) | alone
    assert alone.cooldown_start == 0.95
    assert chained.cooldown_start == pytest.approx(0.2 + 0.8 * 0.95)


# --- as a torch scheduler ---------------------------------------------------------------------------------------


def sgd(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def rates_of(optimizer: torch.optim.Optimizer, scheduler: object, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR calls what torch itself deprecates
            scheduler.step()
    return [*rates, [group["lr"] for group in optimizer.param_groups]]


def test_warmup_and_cosine_equal_torchs_schedulers_at_every_step():
    ours, theirs = sgd(1e-2), sgd(1e-2)
    schedule = warmup(0.1, start=0.1) | cosine(floor=0.01)
    reference = SequentialLR(
        theirs,
        [LinearLR(theirs, start_factor=0.1, total_iters=10), CosineAnnealingLR(theirs, T_max=90, eta_min=1e-4)],
        milestones=[10],
    )
    expected = rates_of(theirs, reference, 100)
    actual = rates_of(ours, as_lr_scheduler(ours, schedule, 100), 100)
    assert torch.tensor(actual).numpy() == pytest.approx(torch.tensor(expected).numpy(), rel=1e-6)
    assert actual[0] == [pytest.approx(1e-3)]
    assert actual[-1] == [pytest.approx(1e-4)]


def test_a_linear_schedule_equals_torchs_at_every_step():
    ours, theirs = sgd(0.3), sgd(0.3)
    expected = rates_of(theirs, LinearLR(theirs, 1.0, 0.1, total_iters=40), 40)
    actual = rates_of(ours, as_lr_scheduler(ours, linear(floor=0.1), 40), 40)
    assert actual == [[pytest.approx(rate, rel=1e-12)] for (rate,) in expected]


def test_groups_keep_their_ratios():
    optimizer = sgd(1.0, 0.25)
    rates = rates_of(optimizer, as_lr_scheduler(optimizer, warmup(0.2) | sqrt(floor=0.1), 20), 20)
    assert all(second == pytest.approx(first / 4) for first, second in rates)


def test_a_resumed_scheduler_goes_on_exactly():
    whole, schedule = sgd(0.1), warmup(0.3) | cosine(floor=0.0)
    expected = rates_of(whole, as_lr_scheduler(whole, schedule, 20), 20)
    first = sgd(0.1)
    stopped = as_lr_scheduler(first, schedule, 20)
    rates_of(first, stopped, 7)
    saved = json.loads(json.dumps(stopped.state_dict()))
    second = sgd(0.1)
    resumed = as_lr_scheduler(second, schedule, 20)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved)
    assert rates_of(second, resumed, 13) == expected[7:]


def test_steps_beyond_the_run_stay_at_the_end():
    optimizer = sgd(1.0)
    rates = rates_of(optimizer, as_lr_scheduler(optimizer, linear(floor=0.5), 3), 5)
    assert [rate for (rate,) in rates[3:]] == [0.5, 0.5, 0.5]
    with pytest.raises(RecipeError, match="total_steps=0"):
        as_lr_scheduler(optimizer, linear(floor=0.5), 0)


# --- progress ---------------------------------------------------------------------------------------------------


def test_progress_of_one_piece_is_the_share_of_steps():
    progress = Progress(((0, 0.0), (80, 1.0)))
    assert [progress(step) for step in range(82)] == [*(step / 80 for step in range(81)), 1.0]
    assert progress.total_steps == 80


@pytest.mark.parametrize("total_steps", [40, 80, 200])
def test_a_new_plan_keeps_the_past_and_only_turns_the_slope(total_steps):
    before = Progress(((0, 0.0), (80, 1.0)))
    after = before.replanned(30, total_steps)
    assert [after(step) for step in range(31)] == pytest.approx([before(step) for step in range(31)], abs=1e-15)
    slope = (1 - before(30)) / (total_steps - 30)
    assert after(31) - after(30) == pytest.approx(slope)
    assert after(total_steps - 1) < after(total_steps) == 1.0
    assert after.total_steps == total_steps


def test_many_new_plans_rise_from_zero_to_one():
    progress = Progress(((0, 0.0), (100, 1.0)))
    for step, total_steps in ((0, 50), (3, 90), (3, 200), (4, 61), (60, 600), (599, 601)):
        progress = progress.replanned(step, total_steps)
    values = [progress(step) for step in range(602)]
    assert values[0] == 0.0
    assert values[-1] == 1.0
    assert all(low < high for low, high in pairwise(values))


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5, unique=True))
def test_progress_at_a_knot_is_the_knots_exactly(values):
    knots = ((0, 0.0), *((7 * (i + 1), value) for i, value in enumerate(sorted(values))), (50, 1.0))
    progress = Progress(knots)
    assert [(step, progress(step)) for step, _ in knots] == list(knots)


def test_progress_comes_back_from_json_exactly():
    progress = Progress(((0, 0.0), (70, 1.0))).replanned(13, 97).replanned(50, 91)
    again = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert again == progress
    assert [again(step) for step in range(92)] == [progress(step) for step in range(92)]


@pytest.mark.parametrize(("step", "total_steps"), [(50, 50), (60, 50), (80, 100), (-1, 50)])
def test_a_plan_cannot_end_before_it_begins(step, total_steps):
    with pytest.raises(AssertionError):
        Progress(((0, 0.0), (80, 1.0))).replanned(step, total_steps)


def test_schedules_need_nothing_but_a_call():
    assert all(isinstance(build(), Schedule) for build in SCHEDULES.values())

"""Schedules equal their formulas at every step; progress keeps what was; torch's own schedulers agree."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    MultiStepLR,
    PolynomialLR,
    SequentialLR,
)

import hasten
from hasten.errors import RecipeError
from hasten.schedules import (
    SCHEDULES,
    Progress,
    Schedule,
    apply,
    as_lr_scheduler,
    constant,
    cooldown,
    cosine,
    cycles,
    findings,
    hold,
    inverse_sqrt,
    linear,
    parse,
    power,
    sqrt,
    stages,
    warmup,
    wsd,
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
    with pytest.raises(RecipeError, match="takes the whole run"):
        warmup(0.1) | hold() | linear()
    with pytest.raises(TypeError):
        warmup(0.1) | 0.5


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "wsd"])
def test_every_schedule_says_until_when_it_may_be_planned_again(name):
    alone = SCHEDULES[name]()
    chained = warmup(0.2) | alone
    assert alone.cooldown_start == 0.95
    assert chained.cooldown_start == pytest.approx(0.2 + 0.8 * 0.95)


@pytest.mark.parametrize(
    ("schedule", "start"),
    [
        (wsd(cooldown=0.2), 0.8),
        (warmup(0.1) | wsd(cooldown=0.3, shape="linear"), 0.7),
        (warmup(0.01) | hold(0.7) | linear(floor=0), 0.71),
        (warmup(0.1) | inverse_sqrt() | cooldown(0.1), 0.9),
        (warmup(0.1) | hold(0.3), 0.1 + 0.9 * 0.95),
    ],
)
def test_a_cooldown_after_a_plateau_is_never_planned_again(schedule, start):
    assert schedule.cooldown_start == pytest.approx(start, abs=1e-15)


# --- pieces in a row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", FORMULAS)
def test_a_trapezoid_equals_its_formula_at_every_step(shape):
    schedule, total_steps = warmup(0.1, start=0.2) | wsd(cooldown=0.25, shape=shape, floor=0.05), 400
    for step in range(total_steps + 1):
        if step < 40:
            expected = 0.2 + 0.8 * step / 40
        elif step < 300:
            expected = 1.0
        else:
            expected = 0.05 + 0.95 * FORMULAS[shape]((step - 300) / 100)
        assert schedule(step / total_steps) == pytest.approx(expected, rel=0, abs=1e-13)


def test_a_share_means_the_same_wherever_it_stands():
    left = (warmup(0.01) | hold(0.7)) | linear(floor=0)
    right = warmup(0.01) | (hold(0.7) | linear(floor=0))
    assert left == right
    assert left == parse("warmup(0.01, start=0.01) | hold(0.7) | linear(floor=0.0)")
    assert [left(x) for x in (0.01, 0.71)] == [1.0, 1.0]
    assert left(0.71 + 0.29 / 2) == pytest.approx(0.5)
    assert left(1.0) == 0.0


def test_the_free_piece_takes_what_the_others_leave_before_and_after_it():
    schedule = warmup(0.1) | hold() | cooldown(0.2, shape="linear", floor=0.0)
    assert schedule == warmup(0.1) | wsd(cooldown=0.2, shape="linear", floor=0.0)
    assert [schedule(step / 10) for step in (1, 5, 8)] == [1.0, 1.0, 1.0]
    assert [schedule(step / 10) for step in (9, 10)] == [pytest.approx(0.5), 0.0]


def test_pieces_that_leave_something_over_stay_at_their_end():
    assert [linear(floor=0.5, share=0.5)(x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 0.75, 0.5, 0.5, 0.5]
    assert (warmup(0.2) | hold(0.3))(1.0) == 1.0


def test_a_decay_goes_on_from_where_the_one_before_ended():
    schedule = linear(floor=0.5, share=0.4) | hold(0.2) | linear(floor=0.1)
    assert [schedule(x) for x in (0.4, 0.5, 0.6)] == [pytest.approx(0.5)] * 3
    assert schedule(0.8) == pytest.approx(0.3)
    assert schedule(1.0) == 0.1
    assert (constant(0.3, share=0.5) | sqrt(floor=0.0))(0.625) == pytest.approx(0.15)
    assert linear(floor=0.0, start=0.6)(0.5) == pytest.approx(0.3)


def test_a_warmup_may_come_again():
    schedule = linear(floor=0.2, share=0.5) | warmup(0.1, start=None) | linear(floor=0.0)
    assert schedule(0.5) == pytest.approx(0.2)
    assert schedule(0.55) == pytest.approx(0.6)
    assert schedule(0.6) == pytest.approx(1.0)
    restart = linear(floor=0.2, share=0.5) | warmup(0.1, start=0.0) | linear(floor=0.0)
    assert restart(0.5 - 1e-9) == pytest.approx(0.2)
    assert restart(0.5) == 0.0


@pytest.mark.parametrize(
    "build",
    [
        lambda: warmup(0.5) | hold(0.5) | linear(),
        lambda: warmup(0.5) | hold(0.6),
        lambda: warmup(0.5) | wsd(cooldown=0.5),
        lambda: cooldown(1.0) | warmup(0.01),
    ],
)
def test_shares_that_are_more_than_the_run_are_refused(build):
    with pytest.raises(RecipeError, match="make them smaller"):
        build()


def test_shares_that_are_exactly_the_run_are_taken():
    schedule = warmup(0.1) | hold(0.2) | linear(floor=0.0, share=0.7)
    assert [schedule(x) for x in (0.1, 0.3, 1.0)] == [1.0, 1.0, 0.0]


shares = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5)


@given(shares, st.data())
def test_joined_pieces_meet_and_end_on_the_last_floor(weights, data):
    whole = sum(weights) * 1.01
    build = {
        "hold": lambda share, floor: hold(share),
        "cosine": lambda share, floor: cosine(floor, share=share),
        "sqrt": lambda share, floor: sqrt(floor, share=share),
        "power": lambda share, floor: power(3.0, floor, share=share),
        "inverse_sqrt": lambda share, floor: inverse_sqrt(floor=floor, share=share),
    }
    schedule, places, at = warmup(0.005, start=0.0), [0.005], 0.005
    for weight in weights:
        share = 0.98 * weight / whole
        floor = data.draw(st.floats(0.0, 1.0))
        schedule = schedule | build[data.draw(st.sampled_from(sorted(build)))](share, floor)
        at += share
        places.append(at)
    schedule = schedule | linear(floor=0.25)
    for place in places:
        assert schedule(place - 1e-11) == pytest.approx(schedule(place + 1e-11), abs=1e-3)
    assert schedule(1.0) == 0.25
    assert schedule == parse(repr(schedule))
    assert all(0.0 <= schedule(x / 97) <= 1.0 + 1e-12 for x in range(98))


# --- the other curves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 5.0])
def test_a_power_decay_equals_torchs_at_every_step(exponent):
    ours, theirs = sgd(0.3), sgd(0.3)
    expected = rates_of(theirs, PolynomialLR(theirs, total_iters=50, power=exponent), 50)
    actual = rates_of(ours, as_lr_scheduler(ours, power(exponent, floor=0.0), 50), 50)
    assert actual == [[pytest.approx(rate, rel=1e-9, abs=1e-12)] for (rate,) in expected]
    assert power(exponent, floor=0.2)(0.5) == pytest.approx(0.2 + 0.8 * 0.5**exponent)


@pytest.mark.parametrize("total_steps", [40, 70, 1000])
def test_stages_equal_torchs_at_every_step(total_steps):
    ours, theirs = sgd(1.0), sgd(1.0)
    places = [3 * total_steps // 10, 7 * total_steps // 10]
    expected = rates_of(theirs, MultiStepLR(theirs, places, gamma=0.5), total_steps)
    actual = rates_of(ours, as_lr_scheduler(ours, stages((0.3, 0.5), (0.7, 0.25)), total_steps), total_steps)
    assert actual == expected


def test_stages_are_places_of_the_whole_run_also_after_a_warmup():
    schedule = warmup(0.1, start=0.0) | stages((0.5, 0.1), (0.75, 0.01))
    assert [schedule(step / 100) for step in (0, 10, 49, 50, 74, 75, 100)] == [0.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert (stages((0.5, 0.4), share=0.6) | linear(floor=0.0))(0.8) == pytest.approx(0.2)
    assert [stages((0, 0.25), (0.3, 1.0))(x) for x in (0.0, 0.299, 0.3)] == [0.25, 0.25, 1.0]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_cycles_without_a_new_warmup_equal_torchs_restarts(count):
    ours, theirs, length = sgd(1.0), sgd(1.0), 20
    expected = rates_of(theirs, CosineAnnealingWarmRestarts(theirs, T_0=length, eta_min=0.1), length * count - 1)
    schedule = cycles(count, floor=0.1, rewarm=0.0)
    actual = rates_of(ours, as_lr_scheduler(ours, schedule, length * count), length * count - 1)
    assert actual == [[pytest.approx(rate, rel=1e-9)] for (rate,) in expected]
    assert schedule(1.0) == pytest.approx(0.1, abs=1e-15)


def test_cycles_that_stretch_equal_torchs_restarts():
    ours, theirs = sgd(1.0), sgd(1.0)
    expected = rates_of(theirs, CosineAnnealingWarmRestarts(theirs, T_0=10, T_mult=2, eta_min=0.0), 69)
    schedule = cycles(3, floor=0.0, rewarm=0.0, stretch=2.0)
    actual = rates_of(ours, as_lr_scheduler(ours, schedule, 70), 69)
    assert actual == [[pytest.approx(rate, rel=1e-9, abs=1e-12)] for (rate,) in expected]


def test_cycles_rise_from_the_floor_to_a_peak_that_may_shrink():
    schedule = cycles(2, shape="linear", floor=0.1, rewarm=0.2, shrink=0.5)
    assert schedule(0.5 - 1e-9) == pytest.approx(0.1, abs=1e-7)
    assert schedule(0.5) == pytest.approx(0.1)
    assert schedule(0.55) == pytest.approx(0.3)
    assert schedule(0.6) == pytest.approx(0.5)
    assert schedule(0.8) == pytest.approx(0.3)
    assert schedule(1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("start", [0.0, 0.1, 0.01])
def test_every_cycle_begins_at_its_own_step(start):
    """Places that miss a step by rounding alone belong to it: 0.29 * 100 is 28.999999999999996."""
    total_steps, count = 1000, 90
    prefix = warmup(start, start=1.0) if start else None
    body = cycles(count, floor=0.0, rewarm=0.0)
    schedule = prefix | body if prefix else body
    cycle = total_steps * (1 - start) / count
    if cycle == int(cycle):
        for number in range(1, count):
            step = round(total_steps * start + number * cycle)
            assert schedule(step / total_steps) == pytest.approx(1.0), step
            assert schedule((step - 1) / total_steps) < 0.1, step


def test_inverse_sqrt_is_that_of_transformers_at_every_step():
    ours, total_steps, warm = warmup(0.1, start=0.0) | inverse_sqrt(), 500, 50
    for step in range(total_steps + 1):
        expected = step / warm if step < warm else 1.0 / math.sqrt((step - warm + warm) / warm)
        assert ours(step / total_steps) == pytest.approx(expected, rel=1e-12)
    assert inverse_sqrt(timescale=0.1)(0.1) == pytest.approx(math.sqrt(0.5))
    assert inverse_sqrt()(0.02) == pytest.approx(math.sqrt(0.5))


def test_inverse_sqrt_reaches_a_floor_by_stretching():
    schedule = warmup(0.1) | inverse_sqrt(floor=0.05)
    factors = [schedule(0.1 + 0.009 * step) for step in range(101)]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.05, abs=1e-15)
    assert all(before > after for before, after in pairwise(factors))


@pytest.mark.parametrize(
    "build",
    [
        lambda: power(0.0),
        lambda: power(math.inf),
        lambda: cosine(share=0.0),
        lambda: cosine(share=1.1),
        lambda: hold(0.0),
        lambda: linear(start=-0.1),
        lambda: stages((-0.1, 0.1)),
        lambda: stages((1.0, 0.1)),
        lambda: stages((0.5, -0.1)),
        lambda: stages((0.5, 0.1), (0.5, 0.01)),
        lambda: stages(0.5, 0.1),
        lambda: cycles(0),
        lambda: cycles(2.0),
        lambda: cycles(True),
        lambda: cycles(2, rewarm=1.0),
        lambda: cycles(2, shrink=0.0),
        lambda: cycles(2, stretch=11.0),
        lambda: cycles(2, shape="sine"),
        lambda: inverse_sqrt(0.0),
        lambda: wsd(0.0),
        lambda: wsd(1.0),
        lambda: wsd(shape="cos"),
        lambda: cooldown(None),
        lambda: linear("0.1"),
        lambda: linear(True),
        lambda: constant(10**400),
    ],
)
def test_a_setting_that_makes_no_curve_is_refused(build):
    with pytest.raises(RecipeError):
        build()


# --- the text form ----------------------------------------------------------------------------------------------

EXPRESSIONS = [
    "warmup(0.1, start=0.1) | cosine(floor=0.01)",
    "warmup(0.01, start=0.01) | hold(0.7) | linear(floor=0.0)",
    "hold() | sqrt(floor=0.01, share=0.2)",
    "constant(0.5)",
    "constant(0.5, share=0.25) | power(2.0, floor=0.0, start=0.9)",
    "warmup(0.1, start=None) | inverse_sqrt(timescale=0.1, floor=0.2, share=0.5)",
    "inverse_sqrt()",
    "stages((0.5, 0.1), (0.75, 0.01), share=0.9)",
    "cycles(3, shape='sqrt', floor=0.0, rewarm=0.1, shrink=0.5, stretch=2.0, share=0.9) | linear(floor=0.0)",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_what_is_printed_reads_back_as_the_same_value(text):
    assert repr(parse(text)) == text
    assert parse(repr(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("warmup(0.1)|cosine()", warmup(0.1) | cosine()),
        (" warmup( share=0.1 )\n | wsd(0.2,\n shape='linear') ", warmup(0.1) | wsd(0.2, "linear")),
        ("trapezoid()", wsd()),
        ("warmup(.1) | hold() | cooldown(0.2)", warmup(0.1) | wsd()),
        ("stages([0.5, 0.1])", stages((0.5, 0.1))),
        ("(warmup(1e-2) | hold(0.5)) | linear(+0)", warmup(0.01) | hold(0.5) | linear(0.0)),
    ],
)
def test_text_as_people_write_it(text, same):
    assert parse(text) == same


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no schedule"),
        ("warmup(0.1) |", "cannot be read"),
        ("warmp(0.1)", "did you mean 'warmup'"),
        ("cosine", "lacks its brackets"),
        ("cosine(flor=0.1)", "did you mean 'floor'"),
        ("cosine(0.1, 0.2)", "cosine(floor=0.01, *, share=None, start=None)"),
        ("warmup()", "missing a required argument: 'share'"),
        ("cosine(floor=-0.1)", "outside [0, 1]"),
        ("cosine(floor='a')", "no number"),
        ("cosine() + linear()", "is no schedule"),
        ("0.5", "is no schedule"),
        ("cosine(floor=1/3)", "numbers, texts or tuples"),
        ("cosine(floor=abs(1))", "numbers, texts or tuples"),
        ("cosine(*[0.1])", "numbers, texts or tuples"),
        ("cosine(**{'floor': 0.1})", "has no None"),
        ("cosine(floor='\\d')", "no number"),
        ("cosine()) | (cosine()", "takes the whole run"),
        ("cosine(floor=True)", "numbers, texts or tuples"),
        ("__import__('os').system('ls')", "is no schedule"),
        ("cosine.__class__()", "is no schedule"),
        ("(lambda: cosine())()", "is no schedule"),
        ("cosine() if 1 else linear()", "is no schedule"),
        ("cosine(\x00)", "cannot be read"),
        ("(" * 900 + ")" * 900, "cannot be read"),
        ("warmup(0.1) | " * 500 + "cosine()", "too long"),
        ("cosine(floor=" + "9" * 400 + ")", "outside"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(text, says):
    with pytest.raises(RecipeError) as refused:
        parse(text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


# --- doubts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "total_steps", "says"),
    [
        (warmup(0.009) | cosine(), 100, "less than one of 100 steps"),
        (warmup(0.01) | cosine(), 100, ""),
        (warmup(0.1, start=1.0) | cosine(), 100, "begins at the peak"),
        (warmup(0.1, start=0.0) | cosine(), 100, "The first step"),
        (cosine(floor=1.0), 100, "never decays"),
        (linear(floor=0.0), 100, ""),
        (linear(floor=0.0, share=0.5), 100, "zero at about 50% of the steps, from step 50 of 100"),
        (linear(floor=0.01, share=0.5), 100, ""),
        (constant(0.0), 100, "zero at about 100%"),
        (constant(), 100, ""),
        (wsd(cooldown=0.009), 100, "less than one of 100 steps"),
        (wsd(cooldown=0.01), 100, ""),
        (warmup(0.2) | wsd(cooldown=0.2), 10, ""),
        (constant(0.1, share=0.5) | linear(floor=0.2), 100, "rises from 0.1 to 0.2"),
        (cycles(50, rewarm=0.0), 100, ""),
        (cycles(51, rewarm=0.0), 100, "too short"),
        (cycles(10, rewarm=0.1), 100, ""),
        (cycles(10, rewarm=0.09), 100, "rises again in 0.9 steps"),
        (cycles(3, rewarm=0.3, stretch=0.1), 100, "too short"),
        (stages((0.5, 1.0)), 100, "changes nothing"),
        (stages((0.5, 0.1), (0.505, 0.01)), 100, "The stage at 0.5 "),
        (stages((0.99, 0.1)), 100, ""),
        (stages((0.995, 0.1)), 100, "The stage at 0.995"),
        (stages((0.5, 0.1), share=0.5) | linear(), 100, "The stage at 0.5"),
        (inverse_sqrt(floor=1.0), 100, "never decays"),
        (warmup(0.1) | inverse_sqrt(), 100, ""),
    ],
)
def test_what_does_nothing_or_harms_is_found(schedule, total_steps, says):
    found = findings(schedule, total_steps)
    assert bool(found) == bool(says), found
    assert not says or any(says in sentence for sentence in found), found


def test_a_zero_is_no_harm_to_what_is_not_a_rate():
    assert findings(linear(floor=0.0, share=0.5), 100, what="weight decay") == ()


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
    assert len(actual) == 101
    assert actual == [[pytest.approx(rate, rel=1e-12)] for (rate,) in expected]
    printed = [f"{rate:.4f}" for (rate,) in actual]
    assert printed[:3] == ["0.0010", "0.0019", "0.0028"]
    assert printed[8:11] == ["0.0082", "0.0091", "0.0100"]
    assert printed[-1] == "0.0001"


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


def test_the_rates_come_back_whichever_is_loaded_first():
    whole, schedule = sgd(0.1, 0.3), warmup(0.3) | cosine(floor=0.0)
    expected = rates_of(whole, as_lr_scheduler(whole, schedule, 20), 20)
    first = sgd(0.1, 0.3)
    stopped = as_lr_scheduler(first, schedule, 20)
    rates_of(first, stopped, 7)
    optimizer_state, state = copy.deepcopy(first.state_dict()), stopped.state_dict()
    for loads_optimizer in ("before", "between", "after", "never"):
        second = sgd(0.1, 0.3)
        if loads_optimizer == "before":
            second.load_state_dict(optimizer_state)
        resumed = as_lr_scheduler(second, schedule, 20)
        if loads_optimizer == "between":
            second.load_state_dict(optimizer_state)
        resumed.load_state_dict(state)
        if loads_optimizer == "after":
            second.load_state_dict(optimizer_state)
        assert rates_of(second, resumed, 13) == expected[7:], loads_optimizer


def test_a_group_added_in_the_middle_follows_with_its_own_peak():
    optimizer, schedule = sgd(1.0), linear(floor=0.0)
    scheduler = as_lr_scheduler(optimizer, schedule, 10)
    rates_of(optimizer, scheduler, 4)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5})
    rates = rates_of(optimizer, scheduler, 2)
    assert rates[1] == [pytest.approx(0.5), pytest.approx(0.25)]
    assert rates[2] == [pytest.approx(0.4), pytest.approx(0.2)]
    again = sgd(1.0, 0.5)
    resumed = as_lr_scheduler(again, schedule, 10)
    resumed.load_state_dict(scheduler.state_dict())
    assert rates_of(again, resumed, 1) == [rates[2], [pytest.approx(0.3), pytest.approx(0.15)]]


def test_a_rate_that_is_a_tensor_is_filled_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=rate)
    scheduler = as_lr_scheduler(optimizer, linear(floor=0.0), 4)
    seen = [value for (value,) in rates_of(optimizer, scheduler, 3)]
    assert optimizer.param_groups[0]["lr"] is seen[0]
    assert float(seen[-1]) == pytest.approx(0.125)


def test_it_is_a_torch_scheduler_to_torch_too():
    optimizer = sgd(1.0)
    scheduler = as_lr_scheduler(optimizer, linear(floor=0.0), 4)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()
    optimizer = sgd(1.0)
    parts = [as_lr_scheduler(optimizer, linear(floor=0.5), 4), as_lr_scheduler(optimizer, constant(0.25), 4)]
    rates = rates_of(optimizer, SequentialLR(optimizer, parts, milestones=[4]), 5)
    assert [rate for (rate,) in rates] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.25, 0.25])


# --- weight decay, momentum, betas ------------------------------------------------------------------------------


def adamw(**settings):
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **settings)


def test_every_setting_is_its_initial_value_times_the_factor():
    optimizer = adamw(lr=0.1, weight_decay=0.4, betas=(0.8, 0.9))
    schedules = {
        "lr": linear(floor=0.0),
        "weight_decay": linear(floor=0.5),
        "beta1": warmup(0.5, start=0.5),
        "beta2": constant(1.1),
    }
    for progress in (0.0, 0.25, 0.5, 1.0, 0.25):
        factors = apply(optimizer, schedules, progress)
        (group,) = optimizer.param_groups
        assert factors == {name: schedule(progress) for name, schedule in schedules.items()}
        assert group["lr"] == 0.1 * schedules["lr"](progress)
        assert group["weight_decay"] == 0.4 * schedules["weight_decay"](progress)
        assert group["betas"] == (0.8 * schedules["beta1"](progress), 0.9 * 1.1)
        assert type(group["betas"]) is tuple


def test_groups_keep_their_own_initial_values_through_a_saved_state():
    build = lambda: torch.optim.SGD(  # noqa: E731
        [
            {"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr, "momentum": m}
            for lr, m in ((1.0, 0.9), (0.5, 0.8))
        ],
        lr=1.0,
    )
    first, schedules = build(), {"lr": linear(floor=0.0), "momentum": linear(floor=0.5)}
    apply(first, schedules, 0.5)
    second = build()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        apply(optimizer, schedules, 0.75)
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]
        assert [group["momentum"] for group in optimizer.param_groups] == [0.9 * 0.625, 0.8 * 0.625]


def test_a_tensor_is_filled_and_its_initial_value_is_no_alias():
    rate = torch.tensor(0.5)
    optimizer = adamw(lr=rate, capturable=False, foreach=False)
    for progress, expected in ((0.5, 0.25), (0.0, 0.5), (1.0, 0.0)):
        apply(optimizer, {"lr": linear(floor=0.0)}, progress)
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == expected


@pytest.mark.parametrize(
    ("schedules", "says"),
    [
        ({"wieght_decay": constant()}, "did you mean 'weight_decay'"),
        ({"eps": constant()}, "cannot be scheduled"),
        ({"momentum": constant()}, "No group of this optimizer has momentum"),
        ({"beta1": constant(1.2)}, r"must stay in \[0, 1\)"),
    ],
)
def test_what_no_group_has_is_refused_by_name(schedules, says):
    with pytest.raises(RecipeError, match=says):
        apply(adamw(betas=(0.9, 0.95)), schedules, 0.5)


def ours(name: str, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    return model, hasten.optimizer(model, name, **settings)


def stepped(model, optimizer, prepare) -> list[torch.Tensor]:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for step in range(4):
        prepare(optimizer, step)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("name", "setting", "values"),
    [
        ("adamw", "weight_decay", [0.4, 0.3, 0.2, 0.1]),
        ("adamw", "beta1", [0.4, 0.3, 0.2, 0.1]),
        ("adamw", "beta2", [0.8, 0.6, 0.4, 0.2]),
        ("muon", "weight_decay", [0.4, 0.3, 0.2, 0.1]),
        ("muon", "momentum", [0.8, 0.6, 0.4, 0.2]),
        ("muon", "lr", [0.04, 0.03, 0.02, 0.01]),
    ],
)
def test_our_optimizers_take_a_changed_value_in_the_next_step(name, setting, values):
    """The values set by a schedule give the steps that setting them by hand gives."""
    given = {"lr": 0.04, "weight_decay": 0.4}
    if setting.startswith("beta"):
        given["betas"] = (0.4, 0.8)
    if setting == "momentum":
        given["momentum"] = 0.8
    schedule = {setting: linear(floor=0.0)}

    def by_hand(optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            if setting.startswith("beta"):
                betas = list(group["betas"])
                betas[int(setting[-1]) - 1] = values[step]
                group["betas"] = tuple(betas)
            elif setting in group:
                ratio = values[step] / values[0]
                group.setdefault("first", group[setting])
                group[setting] = group["first"] * ratio

    scheduled = stepped(*ours(name, **given), lambda optimizer, step: apply(optimizer, schedule, step / 4))
    expected = stepped(*ours(name, **given), by_hand)
    fixed = stepped(*ours(name, **given), lambda optimizer, step: None)
    for a, b in zip(scheduled, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(scheduled, fixed, strict=True))


def test_our_optimizers_keep_initial_values_in_their_saved_state():
    _, optimizer = ours("muon", lr=0.04, weight_decay=0.4)
    apply(optimizer, {"weight_decay": linear(floor=0.0), "momentum": linear(floor=0.0)}, 0.5)
    before = [group["weight_decay"] for group in optimizer.param_groups]
    _, again = ours("muon", lr=0.04, weight_decay=0.4)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    apply(again, {"weight_decay": linear(floor=0.0), "momentum": linear(floor=0.0)}, 0.5)
    assert [group["weight_decay"] for group in again.param_groups] == before


# --- the examples of the docstrings -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["curves", "doubts", "groups", "pieces", "progress", "text"])
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(f"hasten.schedules.{name}")
    assert doctest.testmod(module).failed == 0


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

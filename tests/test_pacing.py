"""Pacing: the speed of late steps, the steps a clock buys with it, and when that is worth a new plan."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.pacing import MOST_SEEN, WINDOW_SHARE, Pace, steps_that_fit, worth_planning_again


def observed(budget: float, seconds_of_steps: list[float]) -> Pace:
    pace, seconds = Pace(budget), 0.0
    for step, cost in enumerate(seconds_of_steps, start=1):
        seconds += cost
        pace.observe(step, seconds)
    return pace


def test_no_speed_before_two_observations():
    assert Pace(60.0).seconds_per_work is None
    assert observed(60.0, [1.0]).seconds_per_work is None
    assert observed(60.0, [1.0, 2.0]).seconds_per_work == 2.0


def test_no_speed_between_two_observations_of_the_same_step():
    pace = Pace(60.0)
    pace.observe(5, 1.0)
    pace.observe(5, 2.0)
    assert pace.seconds_per_work is None


def test_observations_may_be_several_steps_apart():
    pace = Pace(60.0)
    pace.observe(10, 4.0)
    pace.observe(30, 9.0)
    assert pace.seconds_per_work == 0.25


def test_the_first_step_is_never_part_of_the_speed():
    assert observed(60.0, [30.0, 0.5, 0.5, 0.5]).seconds_per_work == 0.5


def test_a_change_of_speed_is_followed_once_the_window_has_passed():
    window_steps = int(WINDOW_SHARE * 1000.0) + 2
    pace = observed(1000.0, [0.25] * 400 + [1.0] * window_steps)
    assert pace.seconds_per_work == 1.0


def test_a_change_of_speed_counts_for_its_part_of_the_window_until_then():
    pace = observed(1000.0, [0.25] * 400 + [1.0] * 50)
    assert 0.25 < pace.seconds_per_work < 1.0


def test_a_million_steps_are_not_kept_and_the_speed_is_that_of_the_window():
    pace = observed(1_000_000.0, [0.5] * 50_000 + [0.25] * 1_000_000)
    assert len(pace._seen) <= MOST_SEEN
    assert pace.seconds_per_work == pytest.approx(0.25, rel=1e-3)
    assert observed(math.inf, [0.5] * 20_000).seconds_per_work == 0.5


def test_steps_longer_than_the_window_are_still_averaged_over_twelve():
    pace = observed(10.0, [50.0] * 20 + [100.0] * 11)
    assert pace.seconds_per_work == 100.0
    assert observed(10.0, [50.0] * 20 + [100.0] * 10).seconds_per_work == pytest.approx((50 + 10 * 100) / 11)


def test_memory_stays_bounded_by_the_window():
    pace = observed(100.0, [1.0] * 5000)
    assert len(pace._seen) <= WINDOW_SHARE * 100 + 2


@pytest.mark.parametrize(
    ("seconds_left", "seconds_per_step", "total"),
    [(10.0, 0.5, 120), (10.0, 0.0, None), (0.2, 0.5, 101), (0.0, 0.5, 101), (-3.0, 0.5, 101), (0.8, 0.5, 102)],
)
def test_the_steps_that_fit_are_the_nearest_and_at_least_one_more(seconds_left, seconds_per_step, total):
    fitting = steps_that_fit(100, seconds_left, seconds_per_step)
    assert fitting > 100
    assert total in (None, fitting)


@given(st.integers(0, 10**6), st.floats(0.0, 1e6), st.floats(1e-4, 1e3))
def test_a_plan_misses_the_clock_by_half_a_step_at_most(step, seconds_left, seconds_per_step):
    steps = steps_that_fit(step, seconds_left, seconds_per_step) - step
    missed = abs(steps * seconds_per_step - seconds_left)
    assert missed <= 0.5 * seconds_per_step * (1 + 1e-9) or steps == 1


@pytest.mark.parametrize(
    ("step", "total_steps", "fitting_steps", "is_worth_it"),
    [
        (0, 1000, 1010, False),
        (0, 1000, 1011, True),
        (0, 1000, 990, False),
        (0, 1000, 989, True),
        (900, 1000, 1001, False),  # one step alone is never worth a knot
        (900, 1000, 1002, True),
        (999, 1000, 1001, False),
    ],
)
def test_a_new_plan_is_worth_more_than_a_hundredth_of_what_is_left(step, total_steps, fitting_steps, is_worth_it):
    assert worth_planning_again(step, total_steps, fitting_steps) == is_worth_it

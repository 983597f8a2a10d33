"""Row lengths, attention windows and batch sizes over the progress of a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.data.lengths import BatchSizes, LengthSchedule, WindowSchedule, halvings
from hasten.errors import RecipeError

SIZES = (64, 128, 256, 512, 1024)


@pytest.mark.parametrize("progress", [0.0, 1e-9, 0.5, 1.0])
def test_a_constant_length_is_the_same_at_every_progress(progress):
    assert LengthSchedule(256)(progress) == 256
    assert LengthSchedule(256).is_constant


@pytest.mark.parametrize("seq_len", [0, -1])
def test_a_length_below_one_is_refused(seq_len):
    with pytest.raises(RecipeError, match=f"lengths.seq_len={seq_len} is no length; give at least 1"):
        LengthSchedule(seq_len)
    assert LengthSchedule(1)(0.0) == 1


def test_schedules_are_values():
    assert LengthSchedule(64) == LengthSchedule(64, (64,))
    assert "growth='linear'" in repr(LengthSchedule(64, (32, 64), growth="linear"))


@given(
    st.sampled_from(["linear", "sqrt", "root", "steps"]),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.2, 5.0),
)
def test_rows_only_grow_and_only_to_members(growth, share, one, other, degree):
    schedule = LengthSchedule(1024, SIZES, growth=growth, share=share, degree=degree)
    low, high = sorted((one, other))
    assert schedule(low) in SIZES
    assert schedule(low) <= schedule(high)
    assert schedule(0.0) == 64
    assert schedule(share) == schedule(1.0) == 1024
    assert schedule(share - 1e-6 * share) < 1024


@pytest.mark.parametrize(
    ("growth", "wanted"),
    [
        ("linear", lambda x: 64 + 960 * x),
        ("sqrt", lambda x: 64 + 960 * math.sqrt(x)),
        ("root", lambda x: 64 + 960 * x ** (1 / 3)),
    ],
)
def test_a_length_is_the_formula_brought_down_to_a_member(growth, wanted):
    schedule = LengthSchedule(1024, SIZES, growth=growth, share=0.5, degree=3.0 if growth == "root" else 2.0)
    for step in range(500):
        x = step / 500
        assert schedule(0.5 * x) == max(size for size in SIZES if size <= wanted(x) + 1e-6), x


def test_steps_hold_every_shorter_size_for_an_equal_part():
    realised = LengthSchedule(1024, SIZES, growth="steps", share=0.4).realised(1000)
    assert realised == {64: 0.1, 128: 0.1, 256: 0.1, 512: 0.1, 1024: 0.6}


def test_a_function_of_ones_own_grows_rows():
    late = LengthSchedule(256, (64, 128, 256), growth=lambda x: x**4, share=1.0)
    assert [late(progress) for progress in (0.0, 0.75, 0.77, 0.99, 1.0)] == [64, 64, 128, 128, 256]


def test_replay_returns_to_every_shorter_length_and_depends_on_seed_and_step_alone():
    schedule = LengthSchedule(1024, SIZES, growth="linear", share=0.5, replay=0.2, seed=3)
    later = [schedule(0.75, step) for step in range(4000)]
    shares = {size: later.count(size) / 4000 for size in SIZES}
    assert abs(1 - shares[1024] - 0.2) < 0.02
    assert all(abs(shares[size] - 0.05) < 0.02 for size in SIZES[:-1])
    assert later == [schedule(0.99, step) for step in range(4000)]
    other = LengthSchedule(1024, SIZES, growth="linear", share=0.5, replay=0.2, seed=4)
    assert later != [other(0.75, step) for step in range(4000)]
    assert [schedule(0.1, step) for step in range(50)] == [schedule(0.1)] * 50  # none while rows still grow


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sizes": (100, 1024)}, "100 does not divide lengths.seq_len=1024"),
        ({"sizes": (64, 512)}, "end with lengths.seq_len=1024"),
        ({"sizes": (512, 64, 1024)}, "must rise"),
        ({"share": 0.0}, "outside \\(0, 1\\]"),
        ({"share": 1.1}, "outside \\(0, 1\\]"),
        ({"replay": 1.0}, "outside \\[0, 1\\)"),
        ({"growth": "linaer"}, "did you mean 'linear'"),
        ({"degree": 0.0}, "is no root"),
    ],
)
def test_impossible_schedules_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        LengthSchedule(1024, **{"sizes": SIZES, "growth": "linear", **settings})


def test_the_realised_lengths_are_those_of_the_steps():
    schedule = LengthSchedule(1024, SIZES, growth="linear", share=0.6, replay=0.1)
    steps = [schedule(step / 300, step) for step in range(300)]
    assert schedule.realised(300) == {size: steps.count(size) / 300 for size in SIZES}
    assert set(schedule.realised(1)) == {64}
    assert abs(sum(schedule.realised(10**6).values()) - 1) < 1e-9


def test_halvings_stop_at_odd_lengths_and_at_the_start():
    assert halvings(1024, 64) == SIZES
    assert halvings(1024, 65) == SIZES[1:]
    assert halvings(1000, 1) == (125, 250, 500, 1000)
    assert halvings(7, 1) == (7,)


def test_a_window_grows_from_its_start_and_then_has_no_limit():
    window = WindowSchedule(1024, start=64, share=0.5)
    assert [window(progress) for progress in (0.0, 0.25, 0.4999999, 0.5, 1.0)] == [64, 544, 1023, None, None]
    assert WindowSchedule(1024)(0.0) is None


@given(st.integers(1, 64), st.integers(1, 8), st.floats(0.001, 1.0))
def test_a_step_takes_whole_micro_batches_and_at_least_one(num_micro, micro_rows, factor):
    sizes = BatchSizes(num_micro * micro_rows, micro_rows, growth=lambda progress: factor)
    rows = sizes(0.3)
    assert rows % micro_rows == 0
    assert micro_rows <= rows <= num_micro * micro_rows
    assert rows == micro_rows or rows <= factor * sizes.rows + 1e-6
    assert rows + micro_rows > factor * sizes.rows - 1e-6


def test_the_rate_follows_the_batch_to_a_power():
    sizes = BatchSizes(32, 2, growth=lambda progress: 0.25 if progress < 0.5 else 1.0)
    assert (sizes.lr_factor(0.0), sizes.lr_factor(0.5)) == (0.5, 1.0)
    assert BatchSizes(32, 2, growth=lambda progress: 0.25, lr_power=0.0).lr_factor(0.0) == 1.0
    assert BatchSizes(32, 2).lr_factor(0.0) == 1.0
    assert sizes.mean_rows == 20.0
    assert BatchSizes(32, 2).mean_rows == 32

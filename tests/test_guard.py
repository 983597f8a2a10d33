"""The guard calls a run diverged after enough bad steps in a row, and not before."""

from __future__ import annotations

import math

import pytest

from hasten.guard import Guard, Verdict


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("patience", [1, 2, 5])
def test_non_finite_losses_in_a_row_are_divergence_at_the_last_allowed_one(loss: float, patience: int) -> None:
    guard = Guard(patience=patience)
    verdicts = [guard.judge(loss, 1.0) for _ in range(patience)]
    assert [v.diverged for v in verdicts] == [False] * (patience - 1) + [True]
    assert "loss" in verdicts[-1].reason
    assert f"{patience} steps in a row" in verdicts[-1].reason


def test_one_good_step_starts_the_count_again() -> None:
    guard = Guard(patience=2)
    for _ in range(10):
        assert guard.judge(math.nan, 1.0) == Verdict()
        assert guard.judge(2.0, 1.0) == Verdict()


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_non_finite_gradient_counts_when_it_was_applied_and_not_when_it_was_skipped(norm: float) -> None:
    applied, skipped = Guard(patience=2), Guard(patience=2)
    assert [applied.judge(1.0, norm).diverged for _ in range(2)] == [False, True]
    assert not any(skipped.judge(1.0, norm, skipped=True).diverged for _ in range(20))


def test_skipping_for_ever_is_divergence_too() -> None:
    guard = Guard(max_skipped=4)
    verdicts = [guard.judge(1.0, math.inf, skipped=True) for _ in range(4)]
    assert [v.diverged for v in verdicts] == [False, False, False, True]
    assert "overflowed" in verdicts[-1].reason


@pytest.mark.parametrize(("loss", "norm"), [(0.0, 0.0), (1e38, 1e38), (-5.0, 0.0)])
def test_finite_values_are_fine_however_large(loss: float, norm: float) -> None:
    guard = Guard(patience=1)
    assert all(guard.judge(loss, norm).status == "ok" for _ in range(5))


def test_a_resumed_guard_goes_on_counting() -> None:
    guard, resumed = Guard(patience=3), Guard(patience=3)
    guard.judge(math.nan, 1.0)
    guard.judge(math.nan, 1.0)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.judge(math.nan, 1.0).diverged

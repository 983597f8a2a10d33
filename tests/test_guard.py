"""The guard leaves out what can only harm, goes back when it comes in a row, and lets everything else through."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable

import pytest

from hasten.guard import FEWEST, Guard, Verdict
from hasten.recipe import resolve

INF, NAN = math.inf, math.nan
GO = Verdict()


def learned(steps: int = 200, level: float = 3.0, noise: float = 0.03, **settings: float) -> Guard:
    """Return a guard that has seen a calm run."""
    guard, chance = Guard(**settings), random.Random(1)
    for _ in range(steps):
        assert guard.judge(level + chance.gauss(0, noise), math.exp(chance.gauss(0, 0.2)), length=64) == GO
    return guard


def actions(guard: Guard, steps: Iterable[tuple[float, float]]) -> list[str]:
    return [guard.judge(loss, norm, length=64).action for loss, norm in steps]


# --- what is bad ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "norm", "cause"), [(NAN, 1, "loss"), (INF, 1, "loss"), (-INF, NAN, "loss"), (3, NAN, "gradient")]
)
@pytest.mark.parametrize("before", [0, 200])
def test_what_is_not_finite_is_left_out_from_the_first_step_on(loss, norm, cause, before):
    verdict = learned(before).judge(loss, norm, length=64)
    assert (verdict.action, verdict.cause, verdict.kind) == ("skip", cause, "nonfinite")
    assert f"{loss if cause == 'loss' else norm:g}" in verdict.reason


@pytest.mark.parametrize(
    ("loss", "norm", "cause"),
    [(4.5, 1, "loss"), (10.0, 1, "loss"), (3.0, 30.0, "gradient"), (3.0, 1e30, "gradient"), (1e300, 1e300, "loss")],
)
def test_a_planted_spike_is_left_out_at_its_first_step(loss, norm, cause):
    verdict = learned().judge(loss, norm, length=64)
    assert (verdict.action, verdict.cause, verdict.kind) == ("skip", cause, "spike")
    assert "above the median" in verdict.reason
    assert "(8 are allowed)" in verdict.reason


@pytest.mark.parametrize("threshold", [4.0, 8.0])
@pytest.mark.parametrize("level", [0.0, 0.5, 3.0])
def test_a_loss_is_a_spike_just_above_the_threshold_and_not_at_it(threshold, level):
    guard = Guard(threshold=threshold)
    assert set(actions(guard, [(level, 1.0)] * 50)) == {"go"}
    allowed = level + threshold * 0.02 * max(level, 1.0)  # where nothing varies: 2 %, of a nat at least
    assert actions(guard, [(allowed * 1.0001 + 1e-9, 1.0), (allowed * 0.9999 - 1e-9, 1.0)]) == ["skip", "go"]


def test_a_norm_is_a_spike_eleven_times_above_the_median_where_norms_hardly_vary():
    guard = Guard()
    assert set(actions(guard, [(3.0, 0.01)] * 50)) == {"go"}
    assert actions(guard, [(3.0, 0.01 * math.exp(2.41)), (3.0, 0.01 * math.exp(2.39))]) == ["skip", "go"]


@pytest.mark.parametrize(("seen", "action"), [(FEWEST - 1, "go"), (FEWEST, "skip")])
def test_nothing_is_a_spike_before_enough_steps_are_known(seen, action):
    assert learned(seen).judge(30.0, 1.0, length=64).action == action


def test_what_falls_is_never_a_spike():
    guard = learned()
    assert set(actions(guard, [(0.0, 1.0), (-5.0, 1e-30), (1e-9, 0.0)])) == {"go"}


def test_spikes_do_not_shift_what_is_usual():
    guard = learned()
    before = guard.state_dict()["losses"]
    assert guard.judge(9.0, 1.0, length=64).action == "skip"
    assert guard.state_dict()["losses"] == before
    assert guard.judge(9.0, 1.0, length=64).action == "skip"


# --- what is no divergence ------------------------------------------------------------------------------------------


def test_a_loss_that_falls_fast_and_is_noisy_raises_no_alarm():
    chance = random.Random(2)
    losses = [2.0 + 8.0 * math.exp(-step / 60) + chance.gauss(0, 0.15) for step in range(1500)]
    norms = [math.exp(chance.gauss(1.0 - step / 1000, 0.4)) for step in range(1500)]
    assert set(actions(Guard(), zip(losses, norms, strict=True))) == {"go"}


def test_short_rows_mixed_in_are_compared_with_short_rows():
    guard, chance = Guard(), random.Random(3)
    levels = {64: 2.0, 8: 2.9}  # nats: 45 % above, which would be a spike
    for _ in range(600):
        length = chance.choice((64, 64, 64, 8))
        assert guard.judge(levels[length] + chance.gauss(0, 0.02), 1.0, length=length) == GO
    assert guard.judge(levels[8], 1.0, length=64).kind == "spike"
    assert guard.judge(levels[8] * 1.5, 1.0, length=8).kind == "spike"


@pytest.mark.parametrize(("before", "after"), [(3.0, 3.3), (3.0, 3.4), (1.0, 1.1), (0.01, 0.1)])
def test_a_moderate_rise_for_good_raises_no_alarm(before, after):
    guard = learned(level=before, noise=0.005 * before)
    assert set(actions(guard, [(after + 0.001 * (step % 7), 1.5) for step in range(300)])) == {"go"}


def test_a_large_rise_for_good_is_let_through_when_going_back_did_not_help():
    guard = learned(20, level=8.0)
    assert set(actions(guard, [(2.0 + 0.01 * (step % 5), 1.0) for step in range(300)])) == {"go"}
    saved = guard.state_dict()
    for _ in range(3):
        assert actions(guard, [(3.5, 1.0)] * 3) == ["skip", "skip", "rollback"]
        guard.rolled_back(saved)
    assert actions(guard, [(3.5, 1.0)] * 2) == ["skip", "skip"]
    verdict = guard.judge(3.5, 1.0, length=64)
    assert (verdict.action, verdict.cause, verdict.kind) == ("go", "loss", "spike")
    assert "after 3 rollbacks; let through" in verdict.reason
    assert set(actions(guard, [(3.5, 1.0)] * 100)) == {"go"}
    assert actions(guard, [(5.0, 1.0)]) == ["skip"]


def test_norms_alone_never_end_a_run():
    guard = learned(max_rollbacks=0)
    assert actions(guard, [(3.0, 100.0)] * 3) == ["skip", "skip", "go"]
    assert set(actions(guard, [(3.0, 100.0)] * 100)) == {"go"}


def test_at_most_a_tenth_of_the_steps_are_skipped_for_spikes():
    guard = learned()
    done = [guard.judge(9.0 if step % 4 == 0 else 3.0, 1.0, length=64) for step in range(128)]
    assert [verdict.action for verdict in done].count("skip") == 12
    (told,) = (verdict for verdict in done if verdict.action == "go" and verdict.cause)
    assert "let through, as 12 of the last 128 steps were skipped" in told.reason
    assert guard.judge(NAN, 1.0, length=64).action == "skip"


def test_a_row_of_bad_steps_means_going_back_also_when_no_more_may_be_skipped():
    guard = learned()
    actions(guard, [(9.0 if step % 8 == 0 else 3.0, 1.0) for step in range(128)])
    assert actions(guard, [(9.0, 1.0)] * 3)[-1] == "rollback"


# --- bad steps in a row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("bad", [(NAN, 1.0), (3.0, INF), (20.0, 1.0)])
def test_as_many_bad_steps_in_a_row_as_patience_allows_mean_going_back(patience, bad):
    guard = learned(patience=patience)
    assert actions(guard, [bad] * patience) == ["skip"] * (patience - 1) + ["rollback"]


def test_one_good_step_starts_the_count_again():
    guard = learned()
    for _ in range(10):
        assert actions(guard, [(NAN, 1.0), (NAN, 1.0), (3.0, 1.0)]) == ["skip", "skip", "go"]


def test_the_rate_is_lowered_from_the_second_try_on_and_the_tries_end():
    guard = learned(level=3.0, lowering=0.5)
    saved, factors = guard.state_dict(), []
    for _ in range(3):
        assert actions(guard, [(NAN, 1.0)] * 3)[-1] == "rollback"
        guard.rolled_back(saved)
        factors.append(guard.rate_factor)
    assert factors == [1.0, 0.5, 0.25]
    verdicts = [guard.judge(NAN, 1.0) for _ in range(3)]
    assert [v.action for v in verdicts] == ["skip", "skip", "diverged"]
    assert verdicts[-1].reason == "a loss of nan; 3 bad steps in a row after 3 rollbacks"


def test_a_loss_above_that_of_the_beginning_ends_a_run_without_tries():
    guard = learned(max_rollbacks=0)
    assert actions(guard, [(9.0, 1.0)] * 3) == ["skip", "skip", "diverged"]


@pytest.mark.parametrize(("past", "tries"), [(510, 1), (511, 0)])
def test_tries_are_back_four_windows_past_the_step_that_failed(past, tries):
    guard = learned(100)
    saved = guard.state_dict()
    actions(guard, [(3.0, 1.0)] * 50 + [(NAN, 1.0)] * 3)
    guard.rolled_back(saved)
    assert set(actions(guard, [(3.0, 1.0)] * (53 + past))) == {"go"}
    assert (guard.tries, guard.rollbacks) == (1, 1)
    actions(guard, [(3.0, 1.0)])
    assert (guard.tries, guard.rollbacks) == (tries, 1)


def test_going_back_restores_what_was_usual_at_the_snapshot():
    guard = learned(100)
    saved = guard.state_dict()
    actions(guard, [(2.8, 1.0)] * 100 + [(NAN, 1.0)] * 3)
    guard.rolled_back(saved)
    after = guard.state_dict()
    assert {key: after[key] for key in ("losses", "log_norms", "skipped", "steps", "bad")} == {
        key: saved[key] for key in ("losses", "log_norms", "skipped", "steps", "bad")
    }


# --- overflows, other guards ----------------------------------------------------------------------------------------


def test_overflows_are_left_to_the_loss_scaler_until_no_scale_fits():
    guard = learned()
    verdicts = [guard.judge(3.0, INF, overflowed=True) for _ in range(64)]
    assert verdicts[:-1] == [GO] * 63
    assert (verdicts[-1].action, verdicts[-1].cause) == ("diverged", "overflow")
    assert "64 steps in a row overflowed at every loss scale" in verdicts[-1].reason


def test_an_overflow_between_good_steps_is_forgotten_and_one_with_a_broken_loss_is_bad():
    guard = learned(max_overflows=2)
    for _ in range(10):
        assert guard.judge(3.0, NAN, overflowed=True) == GO
        assert guard.judge(3.0, 1.0) == GO
    assert guard.judge(NAN, NAN, overflowed=True).action == "skip"


def test_without_a_guard_nothing_is_skipped_and_bad_steps_in_a_row_end_the_run():
    guard = resolve(None, ["guard=none"]).recipe.guard.build()
    assert not guard.is_active
    assert not guard.allows_rollback
    assert set(actions(guard, [(3.0, 1.0)] * 100 + [(1e9, 1e9)] * 10 + [(NAN, 1.0)] * 2)) == {"go"}
    assert guard.judge(NAN, 1.0).action == "diverged"


def test_a_guard_for_what_is_not_finite_lets_every_number_through():
    guard = resolve(None, ["guard=finite", "guard.patience=2"]).recipe.guard.build()
    assert set(actions(guard, [(3.0, 1.0)] * 100 + [(1e30, 1e30)] * 10)) == {"go"}
    assert actions(guard, [(3.0, NAN), (NAN, 1.0)]) == ["skip", "rollback"]
    assert guard.state_dict()["losses"] == {}


def test_the_recipe_builds_what_it_says():
    given = ["threshold=5", "window=40", "patience=2", "max_rollbacks=7", "rate_factor=0.1", "snapshot_every=9"]
    guard = resolve(None, [f"guard.{setting}" for setting in given]).recipe.guard.build()
    assert guard == Guard(
        threshold=5.0, window=40, patience=2, max_rollbacks=7, lowering=0.1, snapshot_every=9, is_active=True
    )
    assert resolve().recipe.guard.build() == Guard()
    assert not resolve(None, ["guard.max_rollbacks=0"]).recipe.guard.build().allows_rollback


# --- state and agreement --------------------------------------------------------------------------------------------


def wild(steps: int) -> list[tuple[float, float, bool, int]]:
    """Return a run with everything in it: a trend, spikes, some in a row, broken values, overflows, two lengths."""
    chance, made = random.Random(4), []
    for step in range(steps):
        loss, norm = 2.0 + 6.0 * math.exp(-step / 80) + chance.gauss(0, 0.05), math.exp(chance.gauss(0, 0.3))
        fault = chance.random()
        if fault < 0.02 or 300 < step < 306:
            loss = chance.choice((NAN, INF, 12.0, 4.5))
        elif fault < 0.04:
            norm = chance.choice((NAN, INF, 100.0))
        made.append((loss, norm, 0.04 < fault < 0.06, chance.choice((64, 16))))
    return made


def follow(guard: Guard, steps: Iterable[tuple[float, float, bool, int]], saved: dict) -> list[Verdict]:
    verdicts = []
    for loss, norm, overflowed, length in steps:
        verdicts.append(guard.judge(loss, norm, overflowed=overflowed, length=length))
        if verdicts[-1].action == "rollback":
            guard.rolled_back(saved)
    return verdicts


def test_guards_with_equal_inputs_agree_on_every_verdict():
    saved = Guard().state_dict()
    one, other = (follow(Guard(), wild(600), saved) for _ in range(2))
    assert one == other
    assert {verdict.action for verdict in one} == {"go", "skip", "rollback"}


@pytest.mark.parametrize("stop", [0, 10, 150, 303, 304, 599])
def test_a_guard_resumed_from_json_goes_on_alike(stop):
    steps, saved = wild(600), Guard().state_dict()
    whole, first, second = Guard(), Guard(), Guard()
    expected = follow(whole, steps, saved)
    began = follow(first, steps[:stop], saved)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert began + follow(second, steps[stop:], saved) == expected
    assert second == whole
    assert second.state_dict() == whole.state_dict()

"""From numbers to verdicts: effects are paired and relative, verdicts corrected and worded, the answer plain."""

from __future__ import annotations

import math

import pytest

from hasten.comparison.effects import Effect, Rung, interval_of, next_rung, to_loss_effects, whole_effects
from hasten.comparison.verdicts import Question, answer, judge_all
from hasten.statistics import estimate


def run(bits, *, steps=100, seconds=10.0, memory=10**9, seed=0):
    return {
        "seed": seed, "run": f"r{seed}", "status": "finished", "val_bpb": bits, "val_loss": bits, "steps": steps,
        "tokens": steps * 64, "train_seconds": seconds, "memory_bytes": memory,
    }  # fmt: skip


def effect(*changes):
    logs = tuple(math.log1p(change) for change in changes)
    return Effect(logs, estimate(logs))


def judged(*questions, by_time=True, margin=0.01, **more):
    return judge_all(
        [Question(f"a{i}", "base", q, **more) for i, q in enumerate(questions)], by_time=by_time, margin=margin
    )


def test_effects_are_relative_and_paired():
    found = whole_effects([run(1.8), run(2.7)], [run(2.0), run(3.0)], level=0.95)
    shown = found["bits_per_byte"].to_json()
    assert shown["each"] == pytest.approx([-0.1, -0.1])
    assert shown["mean"] == pytest.approx(-0.1)
    assert found["train_seconds"].found.method == "identical"


@pytest.mark.parametrize(
    ("wanted", "pairs", "level", "method"),
    [
        ("t", 12, 0.95, "t"),
        ("bootstrap", 9, 0.95, "t"),
        ("bootstrap", 10, 0.95, "bootstrap"),
        ("bootstrap", 10, 1 - 0.05 / 6, "bootstrap"),
        ("bootstrap", 40, 1 - 0.05 / 12, "t"),
    ],
)
def test_interval_is_the_one_wanted_where_it_is_good(wanted, pairs, level, method):
    found, why = interval_of(wanted, pairs, level=level)
    assert found == method
    assert (why == "") == (method == wanted)


def test_every_effect_is_estimated_by_the_method_asked_for():
    arm = [run(1.9 + 0.01 * (7 * seed % 5), seconds=9 + seed % 3) for seed in range(10)]
    base, rung = [run(2.0, seconds=10.0)] * 10, [Rung(0, 0.5, run(1.95, steps=50, seconds=5.0), True)]
    for method in ("t", "bootstrap"):
        found = whole_effects(arm, base, level=0.95, method=method)
        found |= to_loss_effects(arm, base, [rung] * 5 + [[]] * 5, level=0.95, method=method)
        for name in ("bits_per_byte", "train_seconds", "seconds_to_loss", "steps_to_loss"):
            assert found[name].to_json()["method"] == method


def test_what_a_run_lacks_is_not_an_effect():
    assert whole_effects([run(1.8, memory=None)], [run(2.0)], level=0.95)["memory"] is None


def test_time_to_loss_is_interpolated_between_finished_schedules():
    arm, base = run(1.8, seconds=10.0), run(2.0, seconds=10.0)
    missed, there = run(2.1, steps=50, seconds=5.0), run(1.9, steps=65, seconds=6.5)
    ladder = [Rung(0, 0.5, missed, False), Rung(0, 0.65, there, True)]
    found = to_loss_effects([arm], [base], [ladder], level=0.95)
    assert found["steps_to_loss"].to_json()["each"][0] == pytest.approx(math.sqrt(50 * 65) / 100 - 1)
    assert found["steps_to_loss"].at_most == 0
    assert found["seconds_to_loss"].to_json()["each"][0] == pytest.approx(math.sqrt(5.0 * 6.5) / 10 - 1)


def test_shortest_rung_that_gets_there_counts_where_none_misses():
    found = to_loss_effects([run(1.8)], [run(2.0)], [[Rung(0, 0.5, run(1.9, steps=50), True)]], level=0.95)
    assert found["steps_to_loss"].to_json()["each"] == pytest.approx([-0.5])
    assert found["steps_to_loss"].to_json()["at_most"] == 1


def test_arm_that_never_gets_there_is_censored():
    found = to_loss_effects([run(2.1), run(1.9)], [run(2.0), run(2.0)], [[], []], level=0.95)
    shown = found["tokens_to_loss"].to_json()
    assert (shown["mean"], shown["censored"], shown["each"][0], shown["method"]) == (None, 1, None, "censored")


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({}, 0.65),
        ({0.65: True}, 0.5),
        ({0.65: False}, 0.8),
        ({0.65: True, 0.5: True}, None),
        ({0.65: False, 0.8: True}, None),
    ],
)
def test_search_for_the_rung_halves(tried, expected):
    assert next_rung((0.5, 0.65, 0.8), tried, whole_reached=True) == expected
    assert next_rung((0.5, 0.65, 0.8), tried, whole_reached=False) is None


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ((-0.05, -0.06, -0.055), "pays"),
        ((0.05, 0.06, 0.055), "costs"),
        ((-0.001, 0.001, 0.0005), "none"),
        ((-0.05, 0.06, -0.01), "unknown"),
        ((0.0, 0.0, 0.0), "identical"),
        ((-0.05,), "unknown"),
    ],
)
def test_verdict_at_equal_time(changes, verdict):
    assert judged({"bits_per_byte": effect(*changes)})[0].verdict == verdict


def test_more_comparisons_ask_for_more():
    one = {"bits_per_byte": effect(-0.05, -0.07, -0.04)}
    noise = {"bits_per_byte": effect(-0.05, 0.06, -0.01)}
    assert judged(one)[0].verdict == "pays"
    first = judged(one, *[noise] * 9)[0]
    assert first.verdict == "unknown"
    assert first.p == pytest.approx(10 * first.p_raw)


def test_diverged_arm_still_counts_as_a_comparison():
    one = {"bits_per_byte": effect(-0.05, -0.07, -0.04)}
    questions = [Question("a", "base", one), *(Question(f"d{i}", "base", {}, diverged=2) for i in range(9))]
    verdicts = judge_all(questions, by_time=True, margin=0.01)
    assert [v.verdict for v in verdicts] == ["unknown", *["diverged"] * 9]
    assert verdicts[1].reason == "2 seeds diverged."


@pytest.mark.parametrize(
    ("bits", "seconds", "verdict", "words"),
    [
        ((-0.05, -0.06, -0.055), (0.001, -0.002, 0.001), "pays", "fewer bits"),
        ((0.0, 0.0, 0.0), (-0.20, -0.21, -0.19), "pays", "same losses"),
        ((0.0, 0.0, 0.0), (-0.20, 0.21, -0.1), "identical", "changed nothing"),
        ((0.001, -0.001, 0.0005), (0.30, 0.31, 0.32), "costs", "longer"),
        ((-0.05, -0.06, -0.055), (0.30, 0.31, 0.32), "unknown", "more time for the same tokens"),
        ((-0.05, -0.06, -0.055), (-0.30, -0.31, -0.32), "pays", "less time"),
        ((-0.05, -0.06, -0.055), (-0.30, 0.31, 0.32), "pays", "cannot be told"),
        ((-0.05, 0.06, -0.01), (-0.001, 0.001, 0.0), "unknown", "seeds would tell"),
    ],
)
def test_verdict_at_equal_tokens_weighs_loss_and_time(bits, seconds, verdict, words):
    (found,) = judged({"bits_per_byte": effect(*bits), "train_seconds": effect(*seconds)}, by_time=False)
    assert found.verdict == verdict
    assert words in found.reason


@pytest.mark.parametrize(("to_loss", "verdict"), [((-0.3, -0.31, -0.29), "pays"), ((0.3, 0.31, 0.29), "costs")])
def test_time_to_loss_decides_between_loss_and_time(to_loss, verdict):
    effects = {"bits_per_byte": effect(-0.05, -0.06, -0.055), "train_seconds": effect(0.3, 0.31, 0.32)}
    (found,) = judged({**effects, "seconds_to_loss": effect(*to_loss)}, by_time=False)
    assert found.verdict == verdict
    assert "gets to the loss of base" in found.reason


def test_unknown_says_how_many_more_seeds():
    (found,) = judged({"bits_per_byte": effect(-0.02, 0.01, -0.01)})
    assert found.further_seeds > 0
    assert f"about {found.further_seeds} more seeds" in found.reason


def test_no_verdict_before_all_runs_are_there():
    (found,) = judged({"bits_per_byte": effect(-0.05, -0.06)}, missing=2)
    assert (found.verdict, found.reason) == ("unknown", "2 of its runs are still to come.")


def said(*changes, mode="add-one", names=None, **more):
    questions = [
        Question(names[i] if names else f"a{i}", "base", {"bits_per_byte": effect(*each)}, **more)
        for i, each in enumerate(changes)
    ]
    verdicts = judge_all(questions, by_time=True, margin=0.01)
    return answer(questions, verdicts, base="base", budget="60s", seeds=3, mode=mode)


GOOD, BETTER, BAD, NOISE, SAME = (
    (-0.05, -0.051, -0.049), (-0.1, -0.101, -0.099), (0.05, 0.051, 0.049), (-0.2, 0.3, -0.1), (0.0, 0.0, 0.0),
)  # fmt: skip


def test_answer_names_the_best_arm_that_pays():
    words = said(GOOD, BETTER, BAD)
    assert words.startswith("Use a1: 10 % fewer bits per byte (95 % interval ")
    assert words.endswith("than base, each with 60s. a0 also pays.")


def test_answer_keeps_the_base_where_nothing_pays():
    assert said(BAD, SAME) == "Keep base: nothing pays here with 60s."
    assert said(BAD, NOISE).startswith("Keep base: nothing is shown to pay here with 60s. About a1 nothing can be said")


def test_answer_of_an_unfinished_study_is_that():
    assert said(GOOD, missing=1) == "Not finished: 1 run is still to come."


def test_answer_of_leaving_out_says_what_to_keep():
    words = said(BAD, SAME, GOOD, mode="leave-one-out", names=["without muon", "without clip", "without swa"])
    assert words == "Keep muon: without it it is worse. Drop swa: it is better without. clip makes no difference."


def test_answer_of_head_to_head_names_both():
    assert "Use muon rather than base" in said(GOOD, mode="head-to-head", names=["muon vs base"])


def test_an_interval_apart_from_zero_that_decides_nothing_says_why():
    found = effect(-0.05, -0.03, -0.02, -0.045)
    (alone,) = judged({"bits_per_byte": found}, by_time=False)
    many = judged(*[{"bits_per_byte": found}] * 20, by_time=False)
    assert alone.verdict == "pays"
    assert {one.verdict for one in many} == {"unknown"}
    assert "once all comparisons are corrected for" in many[0].reason

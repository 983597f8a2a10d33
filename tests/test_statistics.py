"""What paired runs tell: intervals, corrections, verdicts, and that they keep their promises on simulated studies."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from hasten.errors import RecipeError
from hasten.statistics import (
    Estimate,
    estimate,
    further_seeds,
    holm,
    judge,
    level_of_look,
    relative,
    spent,
    telling_half_width,
)


def normal(n: int, seed: int = 0, mean: float = 0.3) -> list[float]:
    return np.random.default_rng(seed).normal(mean, 1.0, n).tolist()


def known(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high, 5, None, 1.0, "t", 0.95)


# --- one estimate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.975, 0.9999])
def test_t_intervals_and_p_are_those_of_scipy(n, level):
    values = normal(n, seed=n)
    found, peer = estimate(values, level=level), stats.ttest_1samp(values, 0.0)
    interval = peer.confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.p == pytest.approx(peer.pvalue, rel=1e-9)
    assert (found.mean, found.standard_deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (found.n, found.method, found.level) == (n, "t", level)


def test_an_interval_leaves_zero_out_exactly_when_p_is_below_alpha():
    for method, n in (("t", 3), ("t", 12), ("bootstrap", 12)):
        for seed in range(40):
            found = estimate(normal(n, seed, mean=0.7), method=method)
            assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_interval_at_one_minus_p_reaches_zero(sign, skewed):
    values = np.exp(normal(20, seed=3)) - 1.1 if skewed else np.array(normal(20, seed=4, mean=0.35))
    found = estimate(sign * values, method="bootstrap")
    assert 0.01 < found.p < 0.5
    reaching = estimate(sign * values, method="bootstrap", level=1 - found.p)
    assert min(abs(reaching.low), abs(reaching.high)) < 0.002 * found.standard_deviation


def test_bootstrap_is_bca_of_scipy_at_the_widened_level_and_the_same_every_time():
    values = [0.3, -0.1, 0.8, 2.0, 0.1, 0.4, -0.3, 1.2, 0.2, 0.6, 0.9, -0.2]
    found = estimate(values, method="bootstrap")
    tail = stats.norm.cdf(math.sqrt(12 / 11) * stats.t.ppf(0.025, 11))
    assert tail < 0.012
    peer = stats.bootstrap(
        (values,), np.mean, method="BCa", confidence_level=1 - 2 * tail, n_resamples=99_999,
        random_state=np.random.default_rng(1),
    )  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(peer.confidence_interval), abs=0.02)
    assert found == estimate(values, method="bootstrap")
    assert found.method == "bootstrap"


def test_an_extreme_bootstrap_p_is_no_smaller_than_resamples_can_show():
    for n, least in ((10, 0.0029), (20, 0.00054)):
        assert estimate([1.0 + x / 100 for x in normal(n)], method="bootstrap").p >= least


def test_bootstrap_is_refused_below_ten_values():
    with pytest.raises(RecipeError, match="bootstrap of 9 values gives intervals that are too narrow"):
        estimate(normal(9), method="bootstrap")
    assert estimate(normal(10), method="bootstrap").method == "bootstrap"


def test_bootstrap_goes_up_to_the_level_of_a_second_look():
    assert estimate(normal(10), method="bootstrap", level=level_of_look(2)).low is not None
    with pytest.raises(RecipeError, match=r"no trustworthy interval at level 0\.995833"):
        estimate(normal(10), method="bootstrap", level=level_of_look(3))


def test_bootstrap_of_ten_normal_values_is_as_wide_as_t_on_average():
    samples = [normal(10, seed) for seed in range(25)]
    t, bootstrap = ([estimate(values, method=method) for values in samples] for method in ("t", "bootstrap"))
    ratios = [(wide.high - wide.low) / (found.high - found.low) for wide, found in zip(bootstrap, t, strict=True)]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.04), "plain BCa comes to 0.82"


@pytest.mark.parametrize("method", ["t", "bootstrap"])
@pytest.mark.parametrize("n", [1, 3, 12])
def test_identical_results_say_so_and_have_no_interval(n, method):
    found = estimate([0.0, -0.0, 0.0, 0.0] * 3 if n == 12 else [0.0] * n, method=method)
    assert found.method == "identical"
    assert (found.mean, found.low, found.high, found.p) == (0.0, None, None, None)
    assert judge(found, p=None, margin=0.01) == "identical"


def test_one_last_bit_of_difference_is_not_identical():
    found = estimate([0.0, 2e-16, 0.0])
    assert (found.method, judge(found, p=found.p, margin=0.01)) == ("t", "none")
    assert found.low < found.high


@pytest.mark.parametrize("values", [[], [-0.05]])
def test_fewer_than_two_values_are_too_few(values):
    found = estimate(values)
    assert found == Estimate(values[0] if values else None, None, None, len(values), None, None, "too few", 0.95)
    assert judge(found, p=found.p, margin=0.01) == "unknown"
    assert estimate([-0.05, -0.04]).method == "t"


@pytest.mark.parametrize("factors", [[0.5, 0.5, 0.5], [1.1, 1.2, 1.3]])
def test_equal_differences_never_give_an_interval_of_width_zero(factors):
    values = [math.log(0.95 * factor) - math.log(factor) for factor in factors]  # equal but for rounding
    found = estimate(values)
    assert (found.method, found.low, found.high, found.p) == ("too few", None, None, None)
    assert (found.mean, found.standard_deviation) == (pytest.approx(math.log(0.95)), 0.0)
    assert judge(found, p=found.p, margin=0.01) == "unknown"
    assert estimate([*values[:2], values[2] * (1 + 1e-6)]).method == "t"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=f"difference of {value} has no mean; leave out runs that diverged"):
        estimate([0.1, value])
    with pytest.raises(ValueError, match="leave out"):
        further_seeds([0.1, value], half_width=0.1)


def test_a_setting_out_of_range_is_refused():
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(RecipeError, match="above 0 and below 1"):
            estimate([0.1, 0.2], level=level)
    with pytest.raises(RecipeError, match="did you mean 'bootstrap'"):
        estimate([0.1, 0.2], method="bootstap")
    with pytest.raises(RecipeError, match="A margin of -"):
        judge(known(-1, 1), p=0.5, margin=-0.01)
    with pytest.raises(RecipeError, match="alpha=0"):
        judge(known(-1, 1), p=0.5, margin=0.01, alpha=0)


def test_a_log_ratio_becomes_a_relative_change():
    assert relative(math.log(0.9)) == pytest.approx(-0.1)
    assert relative(1e-18) == 1e-18
    assert relative(None) is None


# --- several comparisons, several looks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 x .005, 3 x .01, 2 x .03, and .04 not below .06
        ([0.04], [0.04]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([None, 0.01, None, 0.02], [None, 0.02, None, 0.02]),
        ([None], [None]),
        ([], []),
    ],
)
def test_holm_by_hand(given, corrected):
    assert holm(given) == [None if p is None else pytest.approx(p) for p in corrected]


def test_holm_refuses_what_is_no_p():
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="is no p value"):
            holm([0.5, p])


def test_looks_spend_less_than_alpha_together():
    total = math.fsum(spent(look, 0.05) for look in range(1, 10_001))
    assert total == pytest.approx(0.05 * (1 - 1 / 10_001))
    assert (spent(1), spent(2)) == (0.025, pytest.approx(0.05 / 6))
    assert all(earlier > later for earlier, later in pairwise(spent(look) for look in range(1, 50)))
    with pytest.raises(ValueError, match="no look number 0"):
        spent(0)


def test_level_of_the_only_look_is_the_level_asked_for():
    assert level_of_look(1, level=0.9, sequential=False) == 0.9
    assert [level_of_look(look) for look in (1, 2)] == pytest.approx([0.975, 1 - 0.05 / 6])
    with pytest.raises(ValueError, match="it has one look"):
        level_of_look(2, sequential=False)


# --- the verdict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "p", "verdict"),
    [
        ((-0.05, -0.001), 0.05, "pays"),
        ((-0.05, -0.001), math.nextafter(0.05, 1), "unknown"),
        ((0.001, 0.05), 0.05, "costs"),
        ((0.001, 0.05), math.nextafter(0.05, 1), "unknown"),
        ((-0.01, 0.01), 1.0, "none"),
        ((-0.01, 0.0), None, "none"),
        ((-0.01, math.nextafter(0.01, 1)), 1.0, "unknown"),
        ((math.nextafter(-0.01, -1), 0.01), 1.0, "unknown"),
        ((-0.004, -0.002), 0.001, "pays"),
        ((-0.004, -0.002), 0.2, "none"),
        ((-0.05, -0.001), None, "unknown"),
    ],
)
def test_both_sides_of_every_boundary_of_a_verdict(interval, p, verdict):
    assert judge(known(*interval), p=p, margin=0.01, alpha=0.05) == verdict


def test_a_verdict_uses_the_alpha_of_its_look():
    found = known(-0.05, -0.01)
    assert judge(found, p=0.03, margin=0.01, alpha=spent(1)) == "unknown"
    assert judge(found, p=0.025, margin=0.01, alpha=spent(1)) == "pays"


# --- how many more --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "half_width", "level"), [(3, 0.3, 0.95), (5, 0.7, 0.975), (10, 0.05, 0.99), (4, 9, 0.5)])
def test_further_seeds_are_the_fewest_that_suffice(n, half_width, level):
    values = normal(n)
    further = further_seeds(values, half_width=half_width, level=level, most=5000)

    def half(count: int) -> float:
        return stats.t.ppf((1 + level) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count)

    assert half(n + further) <= half_width
    assert further == 0 or half(n + further - 1) > half_width


def test_further_seeds_end_at_most():
    values = normal(3)
    needed = further_seeds(values, half_width=0.1)
    assert needed > 3
    assert further_seeds(values, half_width=0.1, most=needed) == needed
    assert further_seeds(values, half_width=0.1, most=needed - 1) is None


def test_further_seeds_without_a_spread():
    assert further_seeds([0.1], half_width=1.0) is None
    assert further_seeds([0.1, 0.1], half_width=1.0) is None
    assert further_seeds([0.0, 0.0], half_width=1.0) == 0
    with pytest.raises(RecipeError, match="number above 0"):
        further_seeds([0.1, 0.2], half_width=0.0)


@pytest.mark.parametrize("mean", [-0.04, -0.006, 0.0, 0.004, 0.01])
def test_an_interval_of_the_telling_half_width_gives_an_answer(mean):
    half = telling_half_width(mean, margin=0.01)
    assert mean + half <= 1e-15 or mean - half >= -1e-15 or max(mean + half, half - mean) <= 0.01
    assert half >= 0.005


# --- the promises, on studies whose truth is known ------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_and_false_pays_are_rare(n):
    studies = np.random.default_rng(n).normal(0.0, 0.01, (4000, n)).tolist()
    found = [estimate(values) for values in studies]
    assert 0.93 <= np.mean([each.low <= 0 <= each.high for each in found]) <= 0.97
    verdicts = [judge(each, p=each.p, margin=0.01) for each in found]
    assert verdicts.count("pays") <= 0.05 * len(studies)
    assert verdicts.count("pays") + verdicts.count("costs") <= 0.065 * len(studies)


def test_holm_keeps_false_verdicts_of_five_arms_rare():
    generator = np.random.default_rng(0)
    base, arms = generator.normal(0, 1, (2000, 1, 5)), generator.normal(0, 1, (2000, 5, 5))
    false = 0
    for study in (arms - base).tolist():
        corrected = holm([estimate(values).p for values in study])
        false += min(corrected) <= 0.05
    assert 0.01 * 2000 < false <= 0.05 * 2000


def test_sequential_intervals_cover_at_every_look_at_once():
    studies = np.random.default_rng(0).normal(0.0, 1.0, (2000, 20)).tolist()
    covered = honest = naive = 0
    for values in studies:
        looks = [estimate(values[:n], level=level_of_look(look)) for look, n in enumerate(range(3, 21), 1)]
        covered += all(found.low <= 0 <= found.high for found in looks)
        honest += any(judge(f, p=f.p, margin=0, alpha=spent(look)) != "unknown" for look, f in enumerate(looks, 1))
        naive += any(found.p <= 0.05 for found in looks)
    assert covered >= 0.93 * len(studies)
    assert honest <= 0.05 * len(studies)
    assert naive > 0.15 * len(studies)  # what looking again and again at plain 95 % intervals does

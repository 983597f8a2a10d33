"""What paired runs tell: an estimate with its interval, a p value, a verdict.

A value here is a paired difference of one seed, as a rule the log of arm over base (`relative` makes it a relative
change); lower is better. With a fixed number of seeds there is one look, and intervals are at the level asked for.
Where seeds are added until the answer is clear, look k spends ``alpha / (k (k + 1))`` (`spent`), its intervals are at
`level_of_look`, and the error of all looks together is at most alpha, whatever made one stop.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from hasten.errors import RecipeError, nearest

if TYPE_CHECKING:
    import numpy as np

# scipy is imported inside functions: scipy.special takes 0.3 s, scipy.stats 0.6 s more, and few commands need either.

Method = Literal["t", "bootstrap", "identical", "too few"]
Interval = Literal["t", "bootstrap"]
Verdict = Literal["pays", "costs", "none", "identical", "unknown"]

# Below ten values a bootstrap of the mean covers too rarely: of 95 % intervals, 83 % at five values of normal noise
# (benchmarks/results/2026-11-24_statistics). Levels up to that of a second look (0.9917) have been tried; higher ones
# would need tails that ten to forty values do not have.
BOOTSTRAP_FROM, BOOTSTRAP_LEVEL, RESAMPLES = 10, 0.992, 99_999

# Differences that agree to this share of themselves differ by rounding: they have no spread to reckon with.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean of paired differences with what is known about it.

    Args:
        mean: of the values; None where there are none.
        low: lower end of the two-sided interval, None where there is no interval.
        high: its upper end.
        n: number of values.
        p: two-sided, of a mean of 0; None where there is no interval.
        standard_deviation: of one value (n - 1), None below two values.
        method: ``t`` or ``bootstrap`` where there is an interval; ``identical``: all values are exactly 0;
            ``too few``: fewer than two values, or values that are all the same and not 0, so that nothing is known of
            their spread.
        level: of the interval, 0 to 1.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None
    standard_deviation: float | None
    method: Method
    level: float


def estimate(values: Sequence[float], *, level: float = 0.95, method: str = "t") -> Estimate:
    """Return the mean of paired differences with a two-sided interval and the p value of a mean of 0.

    ``t``: ``mean +- t(n - 1) * sd / sqrt(n)``. ``bootstrap``: bias-corrected and accelerated (BCa), of the mean, with
    99,999 resamples from a fixed seed, so that the same values give the same interval, at a level that makes up for few
    values: its tails are ``Phi(-sqrt(n / (n - 1)) t(n - 1))``. Plain BCa says 95 % and covers 90 % at ten values of
    normal noise. An interval of width zero never comes out: equal values have no interval at all. Surprises: with two
    values, t(1) = 12.7; a bootstrap's p is never below 0.003 with ten values, 0.0005 with twenty.

    Args:
        values: paired differences, one a seed, finite.
        level: of the interval, above 0 and below 1; at most 0.992 with ``bootstrap``.
        method: ``t`` or ``bootstrap``.

    Raises:
        RecipeError: an unknown method, a level that is none, or a bootstrap of fewer than 10 values.
        ValueError: a value that is not finite; runs that diverged have no difference and must be left out.

    Source:
        Student, "The probable error of a mean" (1908); Efron, "Better bootstrap confidence intervals" (1987);
        Hesterberg, "What teachers should know about the bootstrap" (2015), section 5.3, widens the percentile interval
        so; here BCa is widened.

    Example:
        >>> found = estimate([-0.05, -0.04, -0.06])
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3), round(found.p, 3)
        (-0.05, -0.075, -0.025, 0.013)
    """
    check_interval(method)
    _check_share("level", level)
    if method == "bootstrap" and level > BOOTSTRAP_LEVEL:
        raise RecipeError(
            f"A bootstrap has no trustworthy interval at level {level:g}; give at most {BOOTSTRAP_LEVEL}, or method t."
        )
    values, mean, deviation = _moments(values)
    n = len(values)
    if n and not any(values):
        return Estimate(0.0, None, None, n, None, deviation, "identical", level)
    if not _has_spread(values, deviation):
        return Estimate(mean, None, None, n, None, None if n < 2 else 0.0, "too few", level)
    if method == "bootstrap" and n < BOOTSTRAP_FROM:
        raise RecipeError(
            f"A bootstrap of {n} values gives intervals that are too narrow; "
            f"give at least {BOOTSTRAP_FROM} seeds, or method t."
        )
    low, high, p = _by_bootstrap(values, level) if method == "bootstrap" else _by_t(mean, deviation, n, level)
    return Estimate(mean, low, high, n, p, deviation, method, level)


def check_interval(method: str) -> None:
    """Refuse what is no way to an interval.

    Raises:
        RecipeError: an unknown method.
    """
    known = get_args(Interval)
    if method not in known:
        raise RecipeError(f"There is no interval by {method!r}{nearest(method, known)}; give t or bootstrap.")


def relative(log_ratio: float | None) -> float | None:
    """Return the relative change that a log ratio is: ``exp(log_ratio) - 1``; None stays None.

    Of a mean of log ratios it is the change of the geometric mean.

    Example:
        >>> round(relative(math.log(0.95)), 6)
        -0.05
    """
    return None if log_ratio is None else math.expm1(log_ratio)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for their number: the chance that any true null gets alpha or less is at most alpha.

    Holds whatever the dependence; arms that share a base are dependent. A None stays None and does not count. In a
    study with several looks, an arm that already pays or costs may be None; an arm that was given up for another reason
    must stay, as 1.0: a family that shrinks because of what was seen would break the promise.

    Args:
        p_values: of the comparisons of one family, 0 to 1.

    Raises:
        ValueError: a p value that is none.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Example:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        if not 0 <= p <= 1:
            raise ValueError(f"{p} is no p value; it lies between 0 and 1.")
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def spent(look: int, alpha: float = 0.05) -> float:
    """Return the error that look number `look` may spend: ``alpha / (look (look + 1))``.

    All looks together spend alpha, however many there are: ``alpha (1 - 1 / (looks + 1))`` after `looks`. A bound over
    the union of the looks, so it needs no plan of when to look and holds for any rule of stopping. The price: the first
    look alone has alpha / 2, 0.025 of 0.05, and looks are dependent, so less than alpha is really used.

    Args:
        look: 1, 2, ...
        alpha: error of the whole study, above 0 and below 1.

    Raises:
        RecipeError: an alpha that is none.
        ValueError: a look below 1.

    Source:
        The idea of spending: Lan and DeMets, "Discrete sequential boundaries for clinical trials" (1983). Theirs uses
        the joint distribution of the looks and is sharper; here it is Bonferroni over looks, for any number of them.

    Example:
        >>> spent(1), round(spent(2), 6)
        (0.025, 0.008333)
    """
    _check_share("alpha", alpha)
    if look < 1:
        raise ValueError(f"There is no look number {look}; looks count from 1.")
    return alpha / (look * (look + 1))


def level_of_look(look: int, *, level: float = 0.95, sequential: bool = True) -> float:
    """Return the level of the intervals at a look: ``1 - spent(look, 1 - level)``.

    A study with a fixed number of seeds has one look and spends all there: its intervals are at `level`.

    Args:
        look: 1, 2, ...
        level: that all looks together must keep.
        sequential: whether there may be another look.

    Raises:
        RecipeError: a level that is none.
        ValueError: a look below 1, or a second one in a study that has one.

    Example:
        >>> level_of_look(1, sequential=False), round(level_of_look(1), 6), round(level_of_look(2), 6)
        (0.95, 0.975, 0.991667)
    """
    _check_share("level", level)
    if sequential:
        return 1 - spent(look, 1 - level)
    if look != 1:
        raise ValueError(f"Look number {look} at a study with a fixed number of seeds; it has one look.")
    return level


def further_seeds(values: Sequence[float], *, half_width: float, level: float = 0.95, most: int = 1000) -> int | None:
    """Return how many more pairs make the interval about `half_width` to either side; 0 where it is so already.

    The least number of further pairs with ``t(n - 1) * sd / sqrt(n) <= half_width``, as if the spread seen so far were
    the true one. It is not: the true one may be 0.5 to 6 times that of three seeds, 0.6 to 3 times that of five (95 %).

    Args:
        values: paired differences so far, finite.
        half_width: wanted, in the unit of the values, above 0.
        level: of the interval.
        most: further pairs at most.

    Returns:
        None where more than `most` are needed, or where the values show no spread to reckon with (fewer than two, or
        all the same and not 0).

    Raises:
        RecipeError: a level or a half width that is none.
        ValueError: a value that is not finite.

    Example:
        >>> further_seeds([-0.02, 0.01, -0.01], half_width=0.01)
        9
    """
    _check_share("level", level)
    if not 0 < half_width < math.inf:
        raise RecipeError(f"An interval cannot be {half_width} wide to either side; give a number above 0.")
    values, _, deviation = _moments(values)
    if values and not any(values):
        return 0
    if not _has_spread(values, deviation):
        return None
    from scipy.special import stdtrit

    def is_narrow(further: int) -> bool:
        n = len(values) + further
        return float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n) <= half_width

    further = bisect.bisect_left(range(most + 1), True, key=is_narrow)
    return further if further <= most else None


def telling_half_width(mean: float, *, margin: float) -> float:
    """Return the widest half width at which an interval around `mean` would give an answer.

    ``max(|mean|, margin - |mean|)``: either it leaves 0 out, or it lies within the margin. For `further_seeds`; the
    answer is as rough as the mean it is given.

    Args:
        mean: of the values so far.
        margin: largest difference that counts as none, in the unit of the mean.

    Example:
        >>> telling_half_width(-0.04, margin=0.01), telling_half_width(0.002, margin=0.01)
        (0.04, 0.008)
    """
    return max(abs(mean), margin - abs(mean))


def judge(found: Estimate, *, p: float | None, margin: float, alpha: float = 0.05) -> Verdict:
    """Return the verdict on an arm: what is lower is better.

    ``identical`` where every pair agreed to the last bit; ``pays`` or ``costs`` where ``p <= alpha``, by the sign of
    the mean, however small the effect; ``none`` where the interval lies within ``+-margin``; ``unknown`` otherwise.

    Args:
        found: estimate at the level of the look.
        p: its p value, corrected for the number of arms (`holm`); None where there is none.
        margin: largest difference that counts as none, in the unit of the estimate (log ratio), at least 0.
        alpha: 1 - level at the only look, ``spent(look)`` where there are more.

    Raises:
        RecipeError: a margin or an alpha that is none.

    Example:
        >>> found = estimate([-0.05, -0.04, -0.06])
        >>> judge(found, p=found.p, margin=0.01), judge(found, p=0.06, margin=0.01)
        ('pays', 'unknown')
    """
    _check_share("alpha", alpha)
    if not 0 <= margin < math.inf:
        raise RecipeError(f"A margin of {margin} is none; give a number of at least 0, such as 0.01 for 1 %.")
    if found.method == "identical":
        return "identical"
    if found.mean is None or found.low is None or found.high is None:
        return "unknown"
    if p is not None and p <= alpha and found.mean:
        return "pays" if found.mean < 0 else "costs"
    return "none" if -margin <= found.low and found.high <= margin else "unknown"


# --- below the surface ----------------------------------------------------------------------------------------------


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise RecipeError(f"{name}={value} is out of range; give a number above 0 and below 1, such as 0.95 or 0.05.")


def _moments(values: Sequence[float]) -> tuple[list[float], float | None, float | None]:
    """Return the values as floats, their mean, and their standard deviation."""
    values = [float(value) for value in values]
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"A difference of {value} has no mean; leave out runs that diverged.")
    if not values:
        return values, None, None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return values, mean, None
    return values, mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _has_spread(values: list[float], deviation: float | None) -> bool:
    return deviation is not None and deviation > ROUNDING * max(abs(value) for value in values)


def _by_t(mean: float, deviation: float, n: int, level: float) -> tuple[float, float, float]:
    """Return low, high and p by Student's t."""
    from scipy.special import stdtr, stdtrit

    error = deviation / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    return mean - half, mean + half, 2 * float(stdtr(n - 1, -abs(mean) / error))


def _by_bootstrap(values: list[float], level: float) -> tuple[float, float, float]:
    """Return low, high and p by the BCa bootstrap, widened for few values."""
    import numpy as np
    from scipy.special import ndtr, ndtri, stdtr, stdtrit
    from scipy.stats import bootstrap

    n = len(values)
    few = math.sqrt(n / (n - 1))
    tail = float(ndtr(few * stdtrit(n - 1, (1 - level) / 2)))
    sample = np.array(values)
    found = bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * tail,
        method="BCa",
        batch=RESAMPLES // 9,
        random_state=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    reaching = _tail_that_reaches_zero(sample, found.bootstrap_distribution)
    return float(low), float(high), min(1.0, 2 * float(stdtr(n - 1, ndtri(reaching) / few)))


def _tail_that_reaches_zero(sample: np.ndarray, means: np.ndarray) -> float:
    """Return the tail at which the BCa interval just reaches 0, solved from Efron's formula.

    A resample whose mean is 0 counts against the effect. Never below 1e-5: 99,999 resamples show no rarer thing.
    """
    from scipy.special import ndtr, ndtri

    mean = sample.mean()
    side = 1.0 if mean > 0 else -1.0
    centred = side * (sample - mean)
    acceleration = (centred**3).sum() / (centred**2).sum() ** 1.5 / 6
    rarest = 1 / (len(means) + 1)
    below_mean = ((side * means < side * mean).mean() + (side * means <= side * mean).mean()) / 2
    bias = ndtri(below_mean)
    shift = ndtri(max((side * means <= 0).mean(), rarest)) - bias
    stretch = 1 + acceleration * shift
    one_sided = ndtr(shift / stretch - bias) if stretch > 0 else 0.0
    return float(min(max(one_sided, rarest), 0.5))

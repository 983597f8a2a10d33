"""The curves by name: warm-ups, decays, cool-downs, stages and cycles, each checked as it is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hasten.errors import RecipeError, nearest
from hasten.schedules.pieces import (
    SHAPES,
    Chain,
    Constant,
    Cycles,
    Decay,
    Hold,
    InverseSqrt,
    Schedule,
    Stages,
    Warmup,
)

# What DeepSeek LLM decays by (arXiv:2401.02954, section 2.3).
TWO_STAGES = ((0.8, 0.316), (0.9, 0.1))
MOST_CYCLES = 10_000


def warmup(share: float, start: float | None = 0.01) -> Warmup:
    """Return a linear rise from `start` to 1, the peak, over `share` of the run.

    ``start + (1 - start) * x``. Not from zero: a first step at rate zero would be lost.

    Source: Goyal et al., arXiv:1706.02677, section 2.2. Most optimizers want 1 to 2 % of a run, sign methods and
    Schedule-Free 6 to 25 % (arXiv:2509.01440).

    Args:
        share: of the run, in (0, 1).
        start: factor of the peak at the first step, in [0, 1]; None: where the piece before ended.

    Raises:
        RecipeError: out of range.

    Example:
        >>> schedule = warmup(0.1, start=0.1) | cosine(floor=0.01)
        >>> [round(0.01 * schedule(step / 100), 4) for step in (0, 1, 9, 10, 100)]
        [0.001, 0.0019, 0.0091, 0.01, 0.0001]
    """
    share = _number("warmup share", share, above=True, below=True)
    return Warmup(share, None if start is None else _number("warmup start", start))


def hold(share: float | None = None) -> Hold:
    """Return a piece that stays at the factor that the one before ended at: the peak, after a warm-up.

    Args:
        share: of the run, in (0, 1]; None: what the other pieces leave.

    Raises:
        RecipeError: out of range.

    Example:
        >>> schedule = warmup(0.01) | hold(0.7) | linear(floor=0)
        >>> [round(schedule(x), 3) for x in (0.01, 0.71, 0.855, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """
    return Hold(_share("hold", share))


def constant(value: float = 1.0, share: float | None = None) -> Constant:
    """Return a piece that is `value` throughout.

    Args:
        value: factor of the peak, finite, at least 0.
        share: of the run, in (0, 1]; None: what the other pieces leave.

    Raises:
        RecipeError: out of range.

    Example:
        >>> constant()(0.3)
        1.0
    """
    return Constant(_number("constant", value, high=math.inf), _share("constant", share))


def cosine(floor: float = 0.01, *, share: float | None = None, start: float | None = None) -> Decay:
    """Return half a cosine down to `floor`: ``floor + (start - floor) * (1 + cos(pi * x)) / 2``.

    Source: Loshchilov & Hutter, arXiv:1608.03983, without restarts. A floor of 0.01 is better than the customary 0.1,
    which is the worst of those tried; below 0.1 the differences are small (arXiv:2509.01440).

    Args:
        floor: factor of the peak at the end, in [0, 1].
        share: of the run, in (0, 1]; None: what the other pieces leave.
        start: factor to begin at, at least 0; None: where the piece before ended, 1 at the beginning of a run.

    Raises:
        RecipeError: out of range.

    Example:
        >>> cosine(floor=0.1)(0.5)
        0.55
    """
    return _decay("cosine", floor, share, start)


def linear(floor: float = 0.01, *, share: float | None = None, start: float | None = None) -> Decay:
    """Return a straight line down to `floor`: ``floor + (start - floor) * (1 - x)``.

    Source: Defazio et al., arXiv:2310.07831 (there to zero). At least as good as the cosine for Lion, Signum, SOAP and
    MARS; best floors 0.001 to 0.0001 (arXiv:2509.01440).

    Args:
        floor, share, start: as those of `cosine`.

    Raises:
        RecipeError: out of range.

    Example:
        >>> linear(floor=0.0)(0.75)
        0.25
    """
    return _decay("linear", floor, share, start)


def sqrt(floor: float = 0.01, *, share: float | None = None, start: float | None = None) -> Decay:
    """Return the square-root decay down to `floor`: ``floor + (start - floor) * (1 - sqrt(x))``.

    Source: Haegele et al., arXiv:2405.18392: their best cool-down, "1-sqrt"; without a share it takes the whole run.

    Args:
        floor, share, start: as those of `cosine`.

    Raises:
        RecipeError: out of range.

    Example:
        >>> sqrt(floor=0.0)(0.25)
        0.5
    """
    return _decay("sqrt", floor, share, start)


def power(
    exponent: float = 2.0, floor: float = 0.01, *, share: float | None = None, start: float | None = None
) -> Decay:
    """Return the polynomial decay down to `floor`: ``floor + (start - floor) * (1 - x) ** exponent``.

    1 is the straight line; above 1 it falls fast first and ends gently, below 1 the other way round. The formula is
    that of `torch.optim.lr_scheduler.PolynomialLR`.

    Args:
        exponent: above 0.
        floor, share, start: as those of `cosine`.

    Raises:
        RecipeError: out of range.

    Example:
        >>> power(2.0, floor=0.0)(0.5)
        0.25
    """
    exponent = _number("power exponent", exponent, high=100.0, above=True)
    return _decay("power", floor, share, start, exponent)


def inverse_sqrt(
    timescale: float | None = None, floor: float | None = None, *, share: float | None = None
) -> InverseSqrt:
    """Return the inverse square root ``sqrt(t / (t + x))``, `x` the progress since it began.

    With `t` the length of the warm-up, the default, this is ``sqrt(warm-up / progress)``. It needs no horizon, so a
    run can be cooled down whenever it is wanted: ``warmup(0.01) | inverse_sqrt() | linear(share=0.1)``.

    Source: Vaswani et al., arXiv:1706.03762, section 5.3; with a cool-down: Zhai et al., arXiv:2106.04560.

    Args:
        timescale: share of the run after which the factor is ``sqrt(1 / 2)``, above 0; None: as much as came before
            it, 0.02 at the beginning of a run.
        floor: factor of the peak to end at, in [0, 1], reached by stretching the curve; None: as it falls, so with a
            warm-up of 2 % it ends at ``sqrt(0.02)``, 0.14.
        share: of the run, in (0, 1]; None: what the other pieces leave.

    Raises:
        RecipeError: out of range.

    Example:
        >>> (warmup(0.25) | inverse_sqrt())(1.0)
        0.5
    """
    if timescale is not None:
        timescale = _number("inverse_sqrt timescale", timescale, high=math.inf, above=True)
    floor = None if floor is None else _number("inverse_sqrt floor", floor)
    return InverseSqrt(timescale, floor, _share("inverse_sqrt", share))


def stages(*steps: tuple[float, float], share: float | None = None) -> Stages:
    """Return a factor that changes in steps: from each place on it is the one given there.

    Source: He et al., arXiv:1512.03385 (0.1 at a half, 0.01 at three quarters); the default is DeepSeek LLM's, 0.316
    from 80 % on and 0.1 from 90 % on (arXiv:2401.02954).

    Args:
        *steps: ``(progress of the whole run, factor of the peak)``, places rising in [0, 1), factors at least 0.
        share: of the run, in (0, 1]; None: what the other pieces leave.

    Raises:
        RecipeError: out of range, or places that do not rise.

    Example:
        >>> schedule = stages((0.5, 0.1), (0.75, 0.01))
        >>> [schedule(x) for x in (0.0, 0.499, 0.5, 0.75)]
        [1.0, 1.0, 0.1, 0.01]
    """
    pairs: list[tuple[float, float]] = []
    for step in steps or TWO_STAGES:
        if not isinstance(step, (tuple, list)) or len(step) != 2:
            raise RecipeError(f"{step!r} is no stage: give (progress, factor), as (0.5, 0.1).")
        place = _number("stage place", step[0], below=True)
        pairs.append((place, _number("stage factor", step[1], high=math.inf)))
        if len(pairs) > 1 and pairs[-2][0] >= place:
            raise RecipeError(f"The stage at {place:g} does not come after the one at {pairs[-2][0]:g}: let them rise.")
    return Stages(tuple(pairs), _share("stages", share))


def cycles(
    count: int = 4,
    *,
    shape: str = "cosine",
    floor: float = 0.01,
    rewarm: float = 0.1,
    shrink: float = 1.0,
    stretch: float = 1.0,
    share: float | None = None,
) -> Cycles:
    """Return `count` decays one after another, each but the first after a linear rise from the floor.

    Every cycle ends in a usable model. Its peak is ``shrink ** number``, its length is to the next one's as 1 to
    `stretch`.

    Source: Loshchilov & Hutter, arXiv:1608.03983 (``rewarm=0``: a jump; `stretch` is their T_mult).

    Args:
        count: of cycles, at least 1.
        shape: of each decay: ``cosine``, ``linear`` or ``sqrt``.
        floor: factor of the peak at the end of each cycle, in [0, 1].
        rewarm: share of a cycle that rises, in [0, 1).
        shrink: factor from one peak to the next, in (0, 1].
        stretch: factor from one length to the next, in [0.1, 10].
        share: of the run, in (0, 1]; None: what the other pieces leave.

    Raises:
        RecipeError: out of range.

    Example:
        >>> schedule = cycles(2, floor=0.0, rewarm=0.2)
        >>> [round(schedule(x), 3) for x in (0.0, 0.25, 0.5, 0.55, 0.6, 1.0)]
        [1.0, 0.5, 0.0, 0.5, 1.0, 0.0]
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_CYCLES:
        raise RecipeError(f"cycles count={count!r}: give a whole number from 1 to {MOST_CYCLES}.")
    return Cycles(
        count,
        _shape("cycles", shape),
        _number("cycles floor", floor),
        _number("cycles rewarm", rewarm, below=True),
        _number("cycles shrink", shrink, above=True),
        _number("cycles stretch", stretch, low=0.1, high=10.0),
        _share("cycles", share),
    )


def cooldown(share: float, shape: str = "sqrt", floor: float = 0.01) -> Decay:
    """Return a decay over `share` of the run, from wherever the piece before ended.

    Args:
        share: of the run, in (0, 1].
        shape: ``sqrt``, ``linear`` or ``cosine``.
        floor: factor of the peak at the end, in [0, 1].

    Raises:
        RecipeError: out of range.

    Example:
        >>> warmup(0.02) | hold() | cooldown(0.2)
        warmup(0.02, start=0.01) | hold() | sqrt(floor=0.01, share=0.2)
    """
    if share is None:
        raise RecipeError("A cooldown needs a share of the run, as cooldown(0.2).")
    return _decay(_shape("cooldown", shape), floor, share, None)


def wsd(cooldown: float = 0.2, shape: str = "sqrt", floor: float = 0.01) -> Chain:
    """Return the peak held, then a decay over the last `cooldown` of the run: with a warm-up before it, a trapezoid.

    Any checkpoint before the cool-down can go on for longer, or be cooled down apart (see ``hasten train --branch``).

    Source: Hu et al., arXiv:2404.06395 (WSD, cool-downs of about 10 %); Haegele et al., arXiv:2405.18392 ("1-sqrt" over
    20 % equals a cosine of the same length). WSD is best for Muon, and less than 5 % of compute from the cosine for
    others; its lr is about half of the cosine's (arXiv:2509.01440).

    Args:
        cooldown: share of the run, in (0, 1).
        shape: of the cool-down: ``sqrt``, ``linear`` or ``cosine``.
        floor: factor of the peak at the end, in [0, 1].

    Raises:
        RecipeError: out of range.

    Example:
        >>> schedule = warmup(0.02) | wsd(cooldown=0.2, shape="linear", floor=0.0)
        >>> [round(schedule(x), 3) for x in (0.02, 0.8, 0.9, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """
    share = _number("wsd cooldown", cooldown, above=True, below=True)
    return hold() | _decay(_shape("wsd", shape), floor, share, None)


def _decay(name: str, floor: float, share: float | None, start: float | None, exponent: float | None = None) -> Decay:
    floor = _number(f"{name} floor", floor)
    start = None if start is None else _number(f"{name} start", start, high=math.inf)
    return Decay(name, floor, _share(name, share), start, exponent)


def _shape(what: str, shape: str) -> str:
    if shape not in SHAPES:
        near = nearest(shape, SHAPES) if isinstance(shape, str) else ""
        raise RecipeError(f"{what} shape={shape!r} is unknown{near}: give one of {', '.join(SHAPES)}.")
    return shape


def _share(what: str, share: float | None) -> float | None:
    return None if share is None else _number(f"{what} share", share, above=True)


def _number(
    what: str, value: Any, *, low: float = 0.0, high: float = 1.0, above: bool = False, below: bool = False
) -> float:
    """Return `value` as a float; `above` and `below` leave the bounds themselves out."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{what}={value!r} is no number.")
    try:
        number = float(value) + 0.0  # + 0.0: minus zero is zero
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    is_inside = (low < number if above else low <= number) and (number < high if below else number <= high)
    if not (math.isfinite(number) and is_inside):
        brackets = "(" if above else "[", ")" if below or high == math.inf else "]"
        raise RecipeError(f"{what}={number} is outside {brackets[0]}{low:g}, {high:g}{brackets[1]}.")
    return number


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "cycles": cycles,
    "inverse_sqrt": inverse_sqrt,
    "linear": linear,
    "power": power,
    "sqrt": sqrt,
    "stages": stages,
    "wsd": wsd,
}

"""A schedule: a frozen, printable, stateless value that maps the progress of a run to a factor.

One concept serves learning rate, weight decay, momentum, row length and batch size. ``progress`` runs from 0 (before
the first step) to 1 (after the last); the factor multiplies the peak. Pieces compose:
``warmup(0.01) | cosine(floor=0.01)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hasten.errors import RecipeError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

# From here on the horizon of a run stays as it is: the little that is left is the end of the decay.
LAST_REPLAN = 0.95


class Schedule:
    """What every schedule can do: be called with a progress in [0, 1], be composed with ``|``, be printed."""

    @property
    def cooldown_start(self) -> float:
        """Progress from which the horizon must not be planned again.

        A decay over the whole run has no cool-down of its own; its last twentieth counts as one.
        """
        return LAST_REPLAN

    def __call__(self, progress: float) -> float:
        raise NotImplementedError

    def __or__(self, after: Schedule) -> Schedule:
        raise RecipeError(f"{self!r} takes the whole run, so nothing can follow it; begin with warmup(share).")


@dataclass(frozen=True)
class Warmup(Schedule):
    """See `warmup`."""

    share: float
    start: float

    def __call__(self, progress: float) -> float:
        if progress >= self.share:
            return 1.0
        return self.start + (1.0 - self.start) * progress / self.share

    def __or__(self, after: Schedule) -> Chain:
        return Chain(self, after) if isinstance(after, Schedule) else NotImplemented

    def __repr__(self) -> str:
        return f"warmup({self.share!r}, start={self.start!r})"


@dataclass(frozen=True)
class Chain(Schedule):
    """A warm-up, then a schedule that sees its own progress from 0 to 1 over the rest."""

    first: Warmup
    rest: Schedule

    def __call__(self, progress: float) -> float:
        if progress < self.first.share:
            return self.first(progress)
        return self.rest((progress - self.first.share) / (1.0 - self.first.share))

    @property
    def cooldown_start(self) -> float:
        """The rest's, in progress of the whole."""
        return self.first.share + (1.0 - self.first.share) * self.rest.cooldown_start

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.rest!r}"


@dataclass(frozen=True)
class Decay(Schedule):
    """From 1 to `floor` along `shape`: ``floor + (1 - floor) * shape(progress)``; interpolated, never clamped."""

    name: str
    floor: float

    def __call__(self, progress: float) -> float:
        return self.floor + (1.0 - self.floor) * _SHAPES[self.name](min(max(progress, 0.0), 1.0))

    def __repr__(self) -> str:
        return f"{self.name}(floor={self.floor!r})"


@dataclass(frozen=True)
class Constant(Schedule):
    """See `constant`."""

    value: float

    def __call__(self, progress: float) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"constant({self.value!r})"


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "linear": lambda x: 1.0 - x,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}


def warmup(share: float, start: float = 0.01) -> Warmup:
    """Return a linear rise from `start` to 1 over the first `share` of the run; 1 afterwards.

    ``start + (1 - start) * progress / share``. Not from zero: a first step at rate zero would be lost.

    Args:
        share: of the run, in (0, 1).
        start: factor of the peak at the first step, in [0, 1].

    Raises:
        RecipeError: out of range.

    Example:
        >>> schedule = warmup(0.1, start=0.1) | cosine(floor=0.01)
        >>> [round(0.01 * schedule(step / 100), 4) for step in (0, 1, 9, 10, 100)]
        [0.001, 0.0019, 0.0091, 0.01, 0.0001]
    """
    _check("warmup share", share, low=0.0, high=1.0, is_open=True)
    _check("warmup start", start)
    return Warmup(share, start)


def cosine(floor: float = 0.01) -> Decay:
    """Return half a cosine from 1 to `floor`: ``floor + (1 - floor) * (1 + cos(pi * x)) / 2``.

    Source: Loshchilov & Hutter, arXiv:1608.03983, without restarts.

    Args:
        floor: factor of the peak at the end, in [0, 1].

    Raises:
        RecipeError: out of range.

    Example:
        >>> cosine(floor=0.1)(0.5)
        0.55
    """
    return _decay("cosine", floor)


def linear(floor: float = 0.01) -> Decay:
    """Return a straight line from 1 to `floor`: ``floor + (1 - floor) * (1 - x)``.

    Source: Defazio et al., arXiv:2310.07831 (there to zero).

    Args:
        floor: factor of the peak at the end, in [0, 1].

    Raises:
        RecipeError: out of range.

    Example:
        >>> linear(floor=0.0)(0.75)
        0.25
    """
    return _decay("linear", floor)


def sqrt(floor: float = 0.01) -> Decay:
    """Return the square-root decay from 1 to `floor`: ``floor + (1 - floor) * (1 - sqrt(x))``.

    Source: Haegele et al., arXiv:2405.18392 (their cool-down "1-sqrt"), here over the whole run.

    Args:
        floor: factor of the peak at the end, in [0, 1].

    Raises:
        RecipeError: out of range.

    Example:
        >>> sqrt(floor=0.0)(0.25)
        0.5
    """
    return _decay("sqrt", floor)


def constant(value: float = 1.0) -> Constant:
    """Return a schedule that is `value` throughout.

    Args:
        value: factor of the peak, finite, at least 0.

    Raises:
        RecipeError: out of range.

    Example:
        >>> constant()(0.3)
        1.0
    """
    _check("constant", value, high=math.inf)
    return Constant(value)


def _decay(name: str, floor: float) -> Decay:
    _check(f"{name} floor", floor)
    return Decay(name, floor)


def _check(what: str, value: float, *, low: float = 0.0, high: float = 1.0, is_open: bool = False) -> None:
    is_inside = low < value < high if is_open else low <= value <= high
    if not (math.isfinite(value) and is_inside):
        brackets = "()" if is_open else "[]"
        raise RecipeError(f"{what}={value} is outside {brackets[0]}{low:g}, {high:g}{brackets[1]}.")


@dataclass(frozen=True)
class Progress:
    """A piecewise-linear map of optimizer steps to [0, 1].

    A budget of steps or tokens has one piece. A wall-clock budget adds a knot whenever it is planned again: the
    progress made stays, only the slope ahead changes.

    Args:
        knots: ``(step, progress)``, both rising, from ``(0, 0.0)`` to ``(total_steps, 1.0)``.

    Example:
        >>> plan = Progress(((0, 0.0), (100, 1.0))).replanned(50, 150)
        >>> plan(50), plan(100), plan(150)
        (0.5, 0.75, 1.0)
    """

    knots: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.knots]
        assert self.knots[0] == (0, 0.0), self.knots
        assert self.knots[-1][1] == 1.0, self.knots
        assert all(a < b for a, b in pairwise(steps)), self.knots
        assert all(low < high for (_, low), (_, high) in pairwise(self.knots)), self.knots

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run as now planned."""
        return self.knots[-1][0]

    def __call__(self, step: int) -> float:
        """Return the progress before optimizer step `step` (counted from 0); 1 from the last one on."""
        for (left, low), (right, high) in pairwise(self.knots):
            if step < right:  # a knot is the left end of the next piece: its progress comes back exactly
                return low + (high - low) * (step - left) / (right - left)
        return 1.0

    def replanned(self, step: int, total_steps: int) -> Progress:
        """Return the map that keeps everything up to `step` and reaches 1 at `total_steps` instead.

        Args:
            step: optimizer steps done; before the end of the old plan and of the new one.
            total_steps: of the new plan.
        """
        assert 0 <= step < min(total_steps, self.total_steps), (step, total_steps, self.total_steps)
        before = tuple(knot for knot in self.knots if knot[0] < step)
        return Progress((*before, (step, self(step)), (total_steps, 1.0)))

    def to_json(self) -> list[list[float]]:
        """Return the knots as plain lists."""
        return [list(knot) for knot in self.knots]

    @classmethod
    def from_json(cls, knots: Sequence[Sequence[float]]) -> Progress:
        """Return the map that `to_json` wrote, exactly."""
        return cls(tuple((int(step), float(progress)) for step, progress in knots))


def as_lr_scheduler(optimizer: Optimizer, schedule: Schedule, total_steps: int) -> LRScheduler:
    """Return a `torch` learning-rate scheduler that follows `schedule` over `total_steps` calls of ``step()``.

    ``lr = initial_lr * schedule(step / total_steps)``. Each parameter group keeps its own peak (its ``initial_lr``), so
    ratios between groups stay. `state_dict` holds only the position, because the schedule is a pure function.

    Args:
        optimizer: any `torch` optimizer; its groups' ``lr`` are the peaks.
        schedule: of factors.
        total_steps: optimizer steps of the whole run, at least 1; later steps stay at the schedule's end.

    Raises:
        RecipeError: `total_steps` is below 1.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> scheduler = as_lr_scheduler(optimizer, linear(floor=0.0), total_steps=4)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(scheduler.get_last_lr()[0])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.5, 0.375, 0.25, 0.125]
    """
    from torch.optim.lr_scheduler import LRScheduler

    if total_steps < 1:
        raise RecipeError(f"total_steps={total_steps} is no run; give at least 1.")

    class ScheduledLR(LRScheduler):
        """Multiplies every group's peak with the schedule's factor."""

        def get_lr(self) -> list[float]:
            factor = schedule(min(1.0, self.last_epoch / total_steps))
            return [peak * factor for peak in self.base_lrs]

        def state_dict(self) -> dict[str, Any]:
            names = ("base_lrs", "last_epoch", "_step_count", "_last_lr")
            return {name: self.__dict__[name] for name in names}

    return ScheduledLR(optimizer)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "sqrt": sqrt,
}

"""The pieces that schedules are made of: frozen values, each a curve over its own part of a run, joined with ``|``.

Every share and every place is of the whole run, so ``|`` is associative and a share means the same wherever it stands.
One piece of a schedule may leave its share out: it takes what the others leave. A piece begins at the factor that the
one before ended at, or at 1, the peak, so joined pieces meet unless one of them says where it begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

from hasten.errors import RecipeError

# From here on the horizon of a run stays as it is: the little that is left is the end of the decay.
LAST_REPLAN = 0.95
# Places closer than this are one: sums and quotients of shares miss each other by rounding.
EDGE = 1e-12


class Schedule:
    """What every schedule can do: be called with a progress in [0, 1], be joined with ``|``, be printed."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces in the order of the run."""
        raise NotImplementedError

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The pieces with the part of the run that each has, and the factor that it begins at."""
        return _laid_out(self.pieces)

    @property
    def cooldown_start(self) -> float:
        """Progress from which the horizon must not be planned again.

        A decay that follows anything but a warm-up is a cool-down: it is never stretched once it began. A decay over
        the whole run has no cool-down of its own; its last twentieth counts as one.
        """
        *before, last = self.parts
        if last.piece.falls and not all(part.piece.rises for part in before):
            return last.begin
        return last.begin + (1.0 - last.begin) * LAST_REPLAN

    def __call__(self, progress: float) -> float:
        """Return the factor at `progress`; outside [0, 1] that of the nearer end."""
        part = next((part for part in reversed(self.parts) if progress >= part.begin - EDGE), self.parts[0])
        return part(progress)

    def __or__(self, after: Schedule) -> Chain:
        return Chain((*self.pieces, *after.pieces)) if isinstance(after, Schedule) else NotImplemented


@dataclass(frozen=True)
class Part:
    """A piece in its place.

    Args:
        piece: the curve.
        begin, end: progress of the whole run between which it runs.
        level: factor that the piece before ended at; 1 for the first.
    """

    piece: Piece
    begin: float
    end: float
    level: float

    def __call__(self, progress: float) -> float:
        """Return the factor at `progress` of the whole run; beyond `end` what the piece ended at."""
        return self.piece.factor(self, min(max(progress, self.begin), self.end))

    def share_done(self, progress: float) -> float:
        """Return how much of the part lies before `progress`, exactly 0 and 1 at its ends."""
        if progress >= self.end - EDGE:
            return 1.0
        return (progress - self.begin) / (self.end - self.begin)


class Piece(Schedule):
    """One curve; `share` is its part of the run, None for what the others leave."""

    share: float | None
    rises: ClassVar[bool] = False
    falls: ClassVar[bool] = False

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The piece itself."""
        return (self,)

    def factor(self, part: Part, progress: float) -> float:
        """Return the factor at `progress`, which is inside `part`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chain(Schedule):
    """Several pieces, one after another."""

    chained: tuple[Piece, ...]

    def __post_init__(self) -> None:
        assert len(self.parts) == len(self.chained)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces in the order of the run."""
        return self.chained

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.chained))


def _laid_out(pieces: tuple[Piece, ...]) -> tuple[Part, ...]:
    """Give every piece its part of the run.

    Raises:
        RecipeError: two pieces without a share, or shares that are more than the run.
    """
    free = [piece for piece in pieces if piece.share is None]
    if len(free) > 1:
        raise RecipeError(
            f"{free[0]!r} takes the whole run that the others leave, and so does {free[1]!r}: give one of them share=."
        )
    given = math.fsum(piece.share for piece in pieces if piece.share is not None)
    if given > 1 + EDGE or (free and given > 1 - EDGE):
        left = f"leave nothing for {free[0]!r}" if free else "are more than the run"
        shares = " + ".join(f"{piece.share:g}" for piece in pieces if piece.share is not None)
        raise RecipeError(f"The shares {shares} = {given:g} {left}: make them smaller.")
    first_after = pieces.index(free[0]) + 1 if free else len(pieces) + 1
    # Places behind the free piece are counted from the end, so that a cool-down of 20 % begins at 1 - 0.2 exactly.
    places = [
        1.0 - math.fsum(piece.share or 0.0 for piece in pieces[number:])
        if number >= first_after
        else math.fsum(piece.share or 0.0 for piece in pieces[:number])
        for number in range(len(pieces) + 1)
    ]
    if abs(places[-1] - 1.0) < EDGE:
        places[-1] = 1.0
    parts: list[Part] = []
    for piece, begin, end in zip(pieces, places, places[1:]):
        level = parts[-1](parts[-1].end) if parts else 1.0
        parts.append(Part(piece, begin, end, level))
    return tuple(parts)


@dataclass(frozen=True)
class Warmup(Piece):
    """See `hasten.schedules.warmup`."""

    share: float
    start: float | None
    rises: ClassVar[bool] = True

    def factor(self, part: Part, progress: float) -> float:
        """Return the factor at `progress`."""
        x = part.share_done(progress)
        return (part.level if self.start is None else self.start) * (1.0 - x) + x

    def __repr__(self) -> str:
        return f"warmup({self.share!r}, start={self.start!r})"


@dataclass(frozen=True)
class Hold(Piece):
    """See `hasten.schedules.hold`."""

    share: float | None = None

    def factor(self, part: Part, progress: float) -> float:
        """Return the factor at `progress`."""
        return part.level

    def __repr__(self) -> str:
        return "hold()" if self.share is None else f"hold({self.share!r})"


@dataclass(frozen=True)
class Constant(Piece):
    """See `hasten.schedules.constant`."""

    value: float
    share: float | None = None

    def factor(self, part: Part, progress: float) -> float:
        """Return the factor at `progress`."""
        return self.value

    def __repr__(self) -> str:
        return f"constant({self.value!r}{_settings(share=self.share)})"


SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "linear": lambda x: 1.0 - x,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}


@dataclass(frozen=True)
class Decay(Piece):
    """From `start` to `floor` along a shape from 1 to 0: ``floor + (start - floor) * shape(x)``, never clamped.

    ``power`` is the shape ``(1 - x) ** exponent``; every other name is one of `SHAPES`.
    """

    name: str
    floor: float
    share: float | None = None
    start: float | None = None
    exponent: float | None = None
    falls: ClassVar[bool] = True

    def factor(self, part: Part, progress: float) -> float:
        """Return the factor at `progress`."""
        x = part.share_done(progress)
        height = SHAPES[self.name](x) if self.exponent is None else (1.0 - x) ** self.exponent
        return (part.level if self.start is None else self.start) * height + self.floor * (1.0 - height)

    def __repr__(self) -> str:
        exponent = "" if self.exponent is None else f"{self.exponent!r}, "
        return f"{self.name}({exponent}floor={self.floor!r}{_settings(share=self.share, start=self.start)})"


@dataclass(frozen=True)
class InverseSqrt(Piece):
    """See `hasten.schedules.inverse_sqrt`."""

    timescale: float | None
    floor: float | None
    share: float | None = None

    # The timescale where no warm-up says one: that of the default warm-up.
    ALONE: ClassVar[float] = 0.02

    def factor(self, part: Part, progress: float) -> float:
        """Return the factor at `progress`."""
        scale = self.timescale or part.begin or self.ALONE
        height = math.sqrt(scale / (scale + progress - part.begin))
        if self.floor is None:
            return part.level * height
        last = math.sqrt(scale / (scale + part.end - part.begin))
        height = (height - last) / (1.0 - last)
        return part.level * height + self.floor * (1.0 - height)

    def __repr__(self) -> str:
        settings = _settings(timescale=self.timescale, floor=self.floor, share=self.share)
        return f"inverse_sqrt({settings.removeprefix(', ')})"


@dataclass(frozen=True)
class Stages(Piece):
    """See `hasten.schedules.stages`."""

    stages: tuple[tuple[float, float], ...]
    share: float | None = None

    def factor(self, part: Part, progress: float) -> float:
        """Return the factor at `progress`."""
        reached = [factor for place, factor in self.stages if progress >= place - EDGE]
        return reached[-1] if reached else part.level

    def __repr__(self) -> str:
        return f"stages({', '.join(map(repr, self.stages))}{_settings(share=self.share)})"


@dataclass(frozen=True)
class Cycles(Piece):
    """See `hasten.schedules.cycles`."""

    count: int
    shape: str
    floor: float
    rewarm: float
    shrink: float
    stretch: float
    share: float | None = None

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """The share of the piece that is over when each cycle ends; the last is 1."""
        lengths = [self.stretch**number for number in range(self.count)]
        whole = math.fsum(lengths)
        return (*(end / whole for end in list(accumulate(lengths))[:-1]), 1.0)

    def factor(self, part: Part, progress: float) -> float:
        """Return the factor at `progress`."""
        x = part.share_done(progress)
        number = min(sum(x >= end - EDGE for end in self.ends), self.count - 1)
        begin = self.ends[number - 1] if number else 0.0
        y = min(max((x - begin) / (self.ends[number] - begin), 0.0), 1.0)
        peak = self.shrink**number if number else part.level
        rewarm = self.rewarm if number else 0.0
        if y < rewarm:
            return self.floor + (peak - self.floor) * y / rewarm
        height = SHAPES[self.shape]((y - rewarm) / (1.0 - rewarm))
        return peak * height + self.floor * (1.0 - height)

    def __repr__(self) -> str:
        said = f"{self.count}, shape={self.shape!r}, floor={self.floor!r}, rewarm={self.rewarm!r}"
        more = _settings(shrink=self.shrink, stretch=self.stretch, share=self.share)
        return f"cycles({said}{more})"


def _settings(**settings: float | None) -> str:
    """Return ``, name=value`` for every setting that is given."""
    return "".join(f", {name}={value!r}" for name, value in settings.items() if value is not None)

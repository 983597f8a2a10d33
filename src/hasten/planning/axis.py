"""The axis that all curves of a plan share: tokens where they are known, else steps, else shares of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.planning.outlook import Curve

TOKENS, STEPS, SHARES = "tokens", "steps", "% of the run"
_LETTERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """What the curves are drawn against.

    Args:
        unit: ``tokens``, ``steps`` or ``% of the run``.
        last: where the longest run ends, above 0.
    """

    unit: str
    last: float

    def places(self, curve: Curve) -> Sequence[float]:
        """Return where the values of `curve` stand."""
        if self.unit == TOKENS:
            return curve.tokens
        return [(curve.total_steps if self.unit == STEPS else 100) * x for x in curve.progress]

    def ticks(self, most: int = 6) -> list[float]:
        """Return 0 and at most `most` places above it (2 or more): whole multiples of 1, 2 or 5 times a power of ten.

        Example:
            >>> Axis("tokens", 20_480_000).ticks(), Axis("steps", 3).ticks()
            ([0, 5000000, 10000000, 15000000, 20000000], [0, 1, 2, 3])
        """
        power = 10 ** max(math.floor(math.log10(self.last / (most + 1))), 0)
        steps = (power, 2 * power, 5 * power, 10 * power)
        apart = next(step for step in steps if self.last / step + 1e-9 < most + 1)
        return [apart * place for place in range(int(self.last / apart + 1e-9) + 1)]

    def number(self, place: float) -> str:
        """Return a place as a person writes it, without its unit.

        Example:
            >>> axis = Axis("tokens", 2e7)
            >>> [axis.number(place) for place in (0, 500, 2e4, 1.5e6, 2e7)], Axis("steps", 9e3).number(9e3)
            (['0', '500', '20k', '1.5M', '20M'], '9,000')
        """
        for size, letter in _LETTERS if self.unit == TOKENS else ():
            if place >= size:
                return f"{place / size:g}{letter}"
        return f"{place:,.0f}"

    def text(self, place: float) -> str:
        """Return a place with its unit.

        Example:
            >>> Axis("tokens", 2e7).text(2e7), Axis("steps", 100).text(50), Axis("% of the run", 100).text(50)
            ('20M tokens', '50 steps', '50% of the run')
        """
        return self.number(place) + ("" if self.unit == SHARES else " ") + self.unit


def axis_of(panels: Sequence[Sequence[Curve]]) -> Axis:
    """Return the axis on which all curves can stand: one run whose tokens or steps are not known decides for all.

    Example:
        >>> known = Curve("lr", "", (0.0, 1.0), (1.0, 0.0), total_steps=90, tokens=(0.0, 4500.0))
        >>> timed = Curve("lr", "", (0.0, 1.0), (1.0, 0.0))
        >>> axis_of([[known]]), axis_of([[known, timed]])
        (Axis(unit='tokens', last=4500.0), Axis(unit='% of the run', last=100.0))
    """
    curves = [curve for panel in panels for curve in panel]
    if all(curve.tokens for curve in curves):
        return Axis(TOKENS, max(curve.tokens[-1] for curve in curves))
    if all(curve.total_steps for curve in curves):
        return Axis(STEPS, max(curve.total_steps * curve.progress[-1] for curve in curves))
    return Axis(SHARES, 100.0 * max(curve.progress[-1] for curve in curves))

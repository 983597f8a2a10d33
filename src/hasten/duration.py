"""One type for every span of a run: steps, a share of it, tokens, seconds or epochs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from hasten.errors import RecipeError, printable

Unit = Literal["steps", "share", "tokens", "seconds", "epochs"]

_FACTORS = {
    "tok": ("tokens", 1.0),
    "ktok": ("tokens", 1e3),
    "Mtok": ("tokens", 1e6),
    "Gtok": ("tokens", 1e9),
    "Ttok": ("tokens", 1e12),
    "s": ("seconds", 1.0),
    "min": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    "d": ("seconds", 86400.0),
    "ep": ("epochs", 1.0),
    "%": ("share", 0.01),
    "": ("steps", 1.0),
    "steps": ("steps", 1.0),
}
_AMBIGUOUS = {"m": "min", "M": "Mtok", "k": "ktok", "K": "ktok", "G": "Gtok", "B": "Gtok", "b": "Gtok", "T": "Ttok"}
_TEXT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf)\s*([A-Za-z%]*)")
EXPECTED = "2000 (steps), 5%, 20Mtok, 60s, 15min, 2h or 1ep"


@dataclass(frozen=True)
class Duration:
    """A span of a run: `value` in `unit`; shares are fractions of the run (0.05 is 5 %).

    Example:
        >>> Duration.parse("15min")
        Duration(value=900.0, unit='seconds')
        >>> str(Duration.parse("20Mtok"))
        '20Mtok'
    """

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        assert math.isfinite(self.value), self.value
        assert self.value >= 0, self.value

    @classmethod
    def parse(cls, given: str | int, *, positive: bool = False) -> Duration:
        """Return the duration that `given` says.

        Args:
            given: a whole number of steps, or text such as ``2000``, ``5%``, ``20Mtok``, ``60s``, ``15min``, ``2h``.
            positive: refuse zero.

        Raises:
            RecipeError: it says nothing, two things (``15m``, ``20M``), or a negative span.
        """
        text = str(given).strip()
        shown = printable(text)
        match = _TEXT.fullmatch(text)
        if match is None:
            raise RecipeError(f"{shown!r} is no duration; write {EXPECTED}.")
        number, suffix = match.groups()
        if suffix in _AMBIGUOUS:
            other = _AMBIGUOUS[suffix]
            readings = f"{number}min (minutes)" if other == "min" else f"{number}{other} (tokens)"
            second = (
                f"{number}Mtok (tokens)" if other == "min" else f"a plain number of steps ({_steps(number, other)})"
            )
            raise RecipeError(f"{shown!r} can be read in two ways; write {readings} or {second}.")
        if suffix not in _FACTORS:
            raise RecipeError(f"{shown!r} has an unknown unit {suffix!r}; write {EXPECTED}.")
        unit, factor = _FACTORS[suffix]
        value = float(number) / 100 if unit == "share" else float(number) * factor
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise RecipeError(f"{shown!r} is not a span {'above' if positive else 'of at least'} zero.")
        if unit in ("steps", "tokens") and value != int(value):
            raise RecipeError(f"{shown!r} is not a whole number of {unit}.")
        return cls(value, unit)

    def __str__(self) -> str:
        if self.unit == "steps":
            return str(int(self.value))
        if self.unit == "share":
            return f"{float(repr(self.value)) * 100:.12g}%"
        sizes = [(suffix, factor) for suffix, (unit, factor) in _FACTORS.items() if unit == self.unit]
        for suffix, factor in sorted(sizes, key=lambda pair: -pair[1]):
            number = self.value / factor
            if number >= 1 and number == float(f"{number:.6g}") and number * factor == self.value:
                return f"{number:.6g}{suffix}"
        return f"{self.value!r}{sizes[0][0]}".replace(".0" + sizes[0][0], sizes[0][0])

    def to_steps(
        self, *, total_steps: int | None, tokens_per_step: int, steps_per_epoch: float | None = None
    ) -> int | None:
        """Return the optimizer steps that cover this span, rounded up, at least 1; None for a span of time.

        Args:
            total_steps: of the run; needed for a share.
            tokens_per_step: tokens of an optimizer step.
            steps_per_epoch: steps of one pass over the data; needed for epochs.
        """
        if self.unit == "seconds":
            return None
        if self.unit == "share":
            assert total_steps is not None, "a share of a run of unknown length"
            steps = self.value * total_steps
        elif self.unit == "tokens":
            steps = self.value / tokens_per_step
        elif self.unit == "epochs":
            assert steps_per_epoch is not None, "epochs of data of unknown length"
            steps = self.value * steps_per_epoch
        else:
            steps = self.value
        return max(1, math.ceil(steps - 1e-9))


def _steps(number: str, suffix: str) -> str:
    return f"{float(number) * _FACTORS[suffix][1]:.0f}"

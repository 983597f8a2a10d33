"""One type for every span of a run: steps, a share of it, tokens, seconds or epochs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from hasten.errors import RecipeError, nearest, printable

Unit = Literal["steps", "share", "tokens", "seconds", "epochs"]

# Decimal, because 0.07 * 100 and 8.2 * 3600 are not whole numbers in binary, and text must come back as it was.
_FACTORS: dict[str, tuple[Unit, Decimal]] = {
    "": ("steps", Decimal(1)),
    "steps": ("steps", Decimal(1)),
    "%": ("share", Decimal("0.01")),
    "tok": ("tokens", Decimal(1)),
    "ktok": ("tokens", Decimal(10**3)),
    "Mtok": ("tokens", Decimal(10**6)),
    "Gtok": ("tokens", Decimal(10**9)),
    "Ttok": ("tokens", Decimal(10**12)),
    "s": ("seconds", Decimal(1)),
    "min": ("seconds", Decimal(60)),
    "h": ("seconds", Decimal(3600)),
    "d": ("seconds", Decimal(86400)),
    "ep": ("epochs", Decimal(1)),
}
_MULTIPLES = {"k": "ktok", "K": "ktok", "M": "Mtok", "G": "Gtok", "b": "Gtok", "B": "Gtok", "T": "Ttok"}
_TEXT = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?|nan|inf)\s*([A-Za-z%]*)")
EXPECTED = "2000 (steps), 5%, 20Mtok, 60s, 15min, 2h or 1ep"


@dataclass(frozen=True)
class Duration:
    """A span of a run: `value` in `unit`.

    ``str`` gives the shortest usual text, and `parse` gives the same value back from it, bit for bit.

    Args:
        value: finite, at least 0; whole for steps and tokens. A share is a fraction: 0.05 is 5 %.
        unit: ``steps``, ``share``, ``tokens``, ``seconds`` or ``epochs``.

    Raises:
        RecipeError: `value` or `unit` is none of these.

    Example:
        >>> Duration.parse("15min")
        Duration(value=900.0, unit='seconds')
        >>> str(Duration(90.0, "seconds")), str(Duration(0.05, "share")), str(Duration(20e6, "tokens"))
        ('1.5min', '5%', '20Mtok')
    """

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise RecipeError(f"A duration has no unit {self.unit!r}; give {', '.join(get_args(Unit))}.")
        if not 0 <= self.value < math.inf:
            raise RecipeError(f"A span of {self.value} {self.unit} cannot be; give a finite number of at least 0.")
        if self.unit in ("steps", "tokens") and self.value != int(self.value):
            raise RecipeError(f"{self.value} is not a whole number of {self.unit}.")
        object.__setattr__(self, "value", float(self.value) + 0.0)  # + 0.0: minus zero is zero

    @classmethod
    def parse(cls, given: str | int, *, positive: bool = False) -> Duration:
        """Return the duration that `given` says.

        A bare ``15m``, ``20M`` or ``20k`` is refused: one reader sees minutes or steps where another sees tokens.

        Args:
            given: a whole number of steps, or text such as ``2000``, ``5%``, ``20Mtok``, ``60s``, ``15min``, ``2h``,
                ``1.5d``, ``0.5ep``; a space before the unit is fine.
            positive: refuse zero.

        Raises:
            RecipeError: it says nothing, two things, a negative or infinite span, or a part of a step or token.
        """
        text = str(given).strip()
        shown = printable(text[:60])
        match = _TEXT.fullmatch(text)
        if match is None:
            raise RecipeError(f"{shown!r} is no duration; write {EXPECTED}.")
        number, suffix = match.groups()
        if suffix == "m":
            raise RecipeError(
                f"{shown!r} can be read in two ways; write {number}min (minutes) or {number}Mtok (million tokens)."
            )
        if suffix in _MULTIPLES:
            written = _MULTIPLES[suffix]
            steps = _plain(Decimal(number) * _FACTORS[written][1])
            raise RecipeError(
                f"{shown!r} can be read in two ways; write {number}{written} (tokens) or {steps} (steps)."
            )
        if suffix not in _FACTORS:
            same = [known for known in _FACTORS if known.lower() == suffix.lower()]
            hint = f", did you mean {same[0]!r}?" if same else nearest(suffix, _FACTORS)
            raise RecipeError(f"{shown!r} has an unknown unit {suffix!r}{hint}; write {EXPECTED}.")
        unit, factor = _FACTORS[suffix]
        value = float(Decimal(number) * factor)
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise RecipeError(
                f"{shown!r} is not a span {'above' if positive else 'of at least'} zero; write {EXPECTED}."
            )
        if unit in ("steps", "tokens") and value != int(value):
            raise RecipeError(f"{shown!r} is not a whole number of {unit}; write {EXPECTED}.")
        return cls(value, unit)

    def __str__(self) -> str:
        exact = Decimal(repr(self.value))
        factors = [(suffix, factor) for suffix, (unit, factor) in _FACTORS.items() if unit == self.unit]
        for suffix, factor in sorted(factors, key=lambda pair: -pair[1]):
            number = exact / factor
            if number >= 1 and number * factor == exact and len(number.normalize().as_tuple().digits) <= 6:
                return _plain(number) + suffix
        suffix, factor = factors[0]  # the unit's own, in which every value has an exact text
        return _plain(exact / factor) + suffix

    def to_steps(
        self, *, total_steps: int | None, tokens_per_step: int, steps_per_epoch: float | None = None
    ) -> int | None:
        """Return the optimizer steps that cover this span, rounded up; 0 for an empty span, None for a span of time.

        Args:
            total_steps: of the run; needed for a share.
            tokens_per_step: tokens of an optimizer step, at least 1.
            steps_per_epoch: steps of one pass over the data; needed for epochs.

        Raises:
            RecipeError: a share of a run, or epochs of data, of unknown length.

        Example:
            >>> Duration.parse("20ktok").to_steps(total_steps=None, tokens_per_step=8192)
            3
        """
        if self.unit == "seconds":
            return None
        if self.unit == "tokens":
            return -(-int(self.value) // tokens_per_step)
        per_unit = {"steps": 1, "share": total_steps, "epochs": steps_per_epoch}[self.unit]
        if per_unit is None:
            whole = "a run" if self.unit == "share" else "data"
            raise RecipeError(f"{self} of {whole} of unknown length is no number of steps; give steps or tokens.")
        steps = self.value * per_unit
        # A product that misses a whole number by rounding alone (7 % of 100) is that number.
        return round(steps) if math.isclose(steps, round(steps), rel_tol=1e-12) else math.ceil(steps)

    def share_of_run(
        self,
        what: str,
        *,
        total_steps: int,
        tokens_per_step: float,
        steps_per_epoch: float | None = None,
        seconds: float | None = None,
    ) -> float:
        """Return the share of a run that this span takes; above 1 where it is longer than the run.

        Args:
            what: the setting it belongs to, for messages.
            total_steps: optimizer steps of the run, at least 1.
            tokens_per_step: tokens of an optimizer step.
            steps_per_epoch: steps of one pass over the data; needed for epochs.
            seconds: the run's wall-clock budget; needed for a time.

        Raises:
            RecipeError: a time in a run without a wall-clock budget, or epochs of data of unknown length.

        Example:
            >>> Duration.parse("20").share_of_run("schedule.warmup", total_steps=100, tokens_per_step=8192)
            0.2
        """
        if self.value == 0 or self.unit == "share":
            return self.value
        if self.unit == "seconds":
            if not seconds:
                raise RecipeError(
                    f"{what}={self} is a time, but the budget is not: give it in steps, tokens or percent."
                )
            return self.value / seconds
        if self.unit == "epochs" and steps_per_epoch is None:
            raise RecipeError(f"{what}={self} of data of unknown length is no share of a run: give steps or percent.")
        steps = {"steps": 1.0, "tokens": 1.0 / tokens_per_step, "epochs": steps_per_epoch}[self.unit] * self.value
        return steps / total_steps


def _plain(number: Decimal) -> str:
    return f"{number.normalize():f}" if number.is_finite() else str(number)

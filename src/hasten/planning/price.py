"""What an hour of the machine costs, in whatever currency it was given."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hasten.errors import RecipeError, printable

_TEXT = re.compile(r"\s*([^\d\s.,+-]*)\s*(\d+(?:\.\d+)?|\.\d+)\s*([^\d]*?)\s*")


@dataclass(frozen=True)
class Price:
    """An amount for an hour; `before` and `after` are what was written around the number."""

    per_hour: float
    before: str = ""
    after: str = ""

    @classmethod
    def parse(cls, given: str | float) -> Price:
        """Return the price that `given` says.

        Raises:
            RecipeError: it says no number of at least 0.

        Example:
            >>> Price.parse("2.50 EUR").of(1800)
            '1.25 EUR'
            >>> Price.parse("$3").of(7200), Price.parse(2).of(60)
            ('$6.00', '0.033')
        """
        match = _TEXT.fullmatch(str(given))
        if match is None:
            raise RecipeError(
                f"price={printable(str(given)[:40])!r} is no price of an hour: give a number, as 2.5, or '2.50 EUR'."
            )
        before, number, after = match.groups()
        return cls(float(number), printable(before), printable(after).removesuffix("/h").strip())

    def of(self, seconds: float) -> str:
        """Return what `seconds` cost, as text."""
        amount = self.amount(seconds)
        number = f"{amount:,.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.2g}"
        return f"{self.before}{number}{' ' if self.after else ''}{self.after}"

    def amount(self, seconds: float) -> float:
        """Return what `seconds` cost, as a number."""
        return self.per_hour * seconds / 3600

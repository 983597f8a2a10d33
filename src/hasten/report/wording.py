"""Numbers as a reader wants to see them."""

from __future__ import annotations

import math
from typing import Any

UNKNOWN = "–"
# A number and its unit stay on one line.
SPACE = "\N{NO-BREAK SPACE}"


def number(value: Any, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits; text passes through, nothing becomes a dash.

    Example:
        >>> number(0.0030000001), number(1234567), number(float("nan")), number(None)
        ('0.003', '1,234,567', 'not a number', '–')
    """
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    if value and not 1e-4 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def fixed(value: Any, digits: int = 3) -> str:
    """Return `value` with `digits` places after the point, so that columns line up; no number becomes a dash."""
    return f"{value:.{digits}f}" if is_finite(value) else (UNKNOWN if value is None else number(value))


def short(value: Any) -> str:
    """Return a large number in three digits and a letter.

    Example:
        >>> [short(value).replace(SPACE, " ") for value in (4_915_200, 27_613.4, 950, 2.5)]
        ['4.92 M', '27.6 k', '950', '2.5']
    """
    if not is_finite(value):
        return UNKNOWN if value is None else number(value)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            places = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{places}f}{SPACE}{letter}"
    return f"{value:.3g}"


def byte_size(value: Any) -> str:
    """Return a number of bytes with its unit.

    Example:
        >>> [byte_size(value).replace(SPACE, " ") for value in (12_345_678, 12)]
        ['12.3 MB', '12 B']
    """
    return f"{short(value)}B" if is_finite(value) and value >= 1000 else f"{short(value)}{SPACE}B"


def seconds(value: Any) -> str:
    """Return a span of time in its two largest units.

    Example:
        >>> [seconds(value).replace(SPACE, " ") for value in (0.42, 58.2, 178.4, 11_100)]
        ['0.42 s', '58.2 s', '2 min 58 s', '3 h 05 min']
    """
    if not is_finite(value):
        return UNKNOWN
    if value < 59.95:
        return f"{value:.3g}{SPACE}s"
    if value < 3599.5:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes}{SPACE}min{SPACE}{rest:02d}{SPACE}s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours}{SPACE}h{SPACE}{minutes:02d}{SPACE}min"


def percent(share: float) -> str:
    """Return a share as a percentage; a share that is not zero never reads as zero.

    Example:
        >>> [percent(share).replace(SPACE, " ") for share in (0.0571, 0.00001, 0.0, 1.0)]
        ['5.7 %', '< 0.1 %', '0 %', '100 %']
    """
    if 0 < share < 0.001:
        return f"<{SPACE}0.1{SPACE}%"
    return f"{100 * share:.{1 if 0 < share < 0.0995 else 0}f}{SPACE}%"


def is_finite(value: Any) -> bool:
    """Say whether `value` is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

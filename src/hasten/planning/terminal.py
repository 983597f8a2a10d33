"""Curves in a terminal: braille dots where it can show them, letters where it cannot."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.planning.outlook import Curve
from hasten.planning.picture import places

# A braille character is two dots wide and four high; these are their bits, by column and by row from above.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800
LETTERS = "*+ox#@%&"


@dataclass(frozen=True)
class Cell:
    """One character, and the number of the curve that it belongs to; None for axes and their labels."""

    text: str
    curve: int | None = None


def chart(
    panel: Sequence[Curve], panels: Sequence[Sequence[Curve]], *, width: int = 72, height: int = 10, plain: bool = False
) -> list[list[Cell]]:
    """Return a chart of the curves of one quantity as lines of cells: y-axis, curves, x-axis with its labels.

    Args:
        panel: the curves of one quantity.
        panels: those of all, which share the axis of the run.
        width: characters of a line, at least 30.
        height: lines of the curves themselves, odd, at least 3.
        plain: ASCII alone, a letter for each curve.

    Example:
        >>> falling = Curve("learning rate", "", (0.0, 1.0), (1.0, 0.0), total_steps=90)
        >>> for line in chart([falling], [[falling]], width=30, height=5, plain=True):
        ...     print("".join(cell.text for cell in line).rstrip())
           1 |****
             |   ******
         0.5 |        ********
             |               ******
           0 |                    ****
             +------------------------
             0          45     90 step
    """
    low, high = 0.0, max(value for curve in panel for value in curve.values) or 1.0
    labels = _labels(low, high, height)
    margin = max(map(len, labels)) + 2
    columns = max(width, 30) - margin - 1
    last = max(places(curve, panels)[0][-1] for other in panels for curve in other)
    grid = [[Cell(" ") for _ in range(columns)] for _ in range(height)]
    wide, tall = (1, 1) if plain else (2, 4)
    masks: dict[tuple[int, int], int] = {}
    for number, curve in enumerate(panel):
        for column, (bottom, top) in enumerate(_spans(curve, panels, columns * wide, last)):
            first, final = (_row(value / high, height * tall) for value in (top, bottom))
            for row in range(first, final + 1):
                place = (row // tall, column // wide)
                masks[place] = masks.get(place, 0) | (0 if plain else _DOTS[column % 2][row % 4])
                text = LETTERS[number % len(LETTERS)] if plain else chr(_BRAILLE | masks[place])
                grid[place[0]][place[1]] = Cell(text, number)
    bar, corner, line = ("|", "+", "-") if plain else ("│", "└", "─")
    lines = [[Cell(f"{label:>{margin - 1}} {bar}"), *cells] for label, cells in zip(labels, grid, strict=True)]
    lines.append([Cell(" " * margin + corner + line * columns)])
    lines.append([Cell(" " * margin + _x_axis(last, places(panel[0], panels)[1], columns + 1))])
    return lines


def _labels(low: float, high: float, height: int) -> list[str]:
    """Return the labels of the lines: the highest value, the one in the middle, the lowest."""
    labels = [""] * height
    for row, value in ((0, high), (height // 2, (low + high) / 2), (height - 1, low)):
        labels[row] = f"{value:,.0f}" if high >= 100 else f"{value:.3g}"
    return labels


def _row(share: float, rows: int) -> int:
    """Return the row from above in which a share of the height stands."""
    return min(max(round((1.0 - share) * (rows - 1)), 0), rows - 1)


def _spans(curve: Curve, panels: Sequence[Sequence[Curve]], columns: int, last: float) -> list[tuple[float, float]]:
    """Return the lowest and highest value of `curve` in every column; none after its end."""
    x, _ = places(curve, panels)
    spans = []
    for column in range(columns):
        begin, end = (last * edge / columns for edge in (column, column + 1))
        if begin > x[-1]:
            break
        inside = curve.values[bisect.bisect_left(x, begin) : bisect.bisect_right(x, end)]
        values = (*inside, _at(curve, x, begin), _at(curve, x, min(end, x[-1])))
        spans.append((min(values), max(values)))
    return spans


def _at(curve: Curve, x: Sequence[float], place: float) -> float:
    right = min(max(bisect.bisect_right(x, place), 1), len(x) - 1)
    low, high = curve.values[right - 1], curve.values[right]
    if place >= x[right]:
        return high
    return low if curve.by_steps else low + (high - low) * (place - x[right - 1]) / (x[right] - x[right - 1])


def _x_axis(last: float, counts: str, width: int) -> str:
    """Return the line under the x-axis: zero, the middle and the end."""
    end = f"{last:,.0f} {counts}" if counts == "step" else f"{last:,.0f}{counts}"
    middle = f"{last / 2:,.0f}"
    line = f"0{middle:>{width // 2 + len(middle) // 2 - 1}}"
    return f"{line}{end:>{width - len(line)}}" if width - len(line) > len(end) else f"0{end:>{width - 1}}"

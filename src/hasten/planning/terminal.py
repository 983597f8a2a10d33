"""Curves in a terminal: braille dots where it can show them, letters where it cannot."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.planning.axis import Axis, axis_of
from hasten.planning.outlook import Curve

# A braille character is two dots wide and four high; these are their bits, by column and by row from above.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800
LETTERS = "*+ox#@%&"
# Values of a quantity that holds them in steps, up to which each is written beside its line.
FEW = 5


@dataclass(frozen=True)
class Cell:
    """One character, and the number of the curve that it belongs to; None for axes and their labels."""

    text: str
    curve: int | None = None


def chart(
    panel: Sequence[Curve], panels: Sequence[Sequence[Curve]], *,
    width: int = 72, height: int = 10, plain: bool = False, is_last: bool = True,
) -> list[list[Cell]]:  # fmt: skip
    """Return a chart of the curves of one quantity as lines of cells: y-axis, curves, x-axis with its labels.

    The charts of all panels, drawn in the same width, stand over each other: the same place is in the same column.

    Args:
        panel: the curves of one quantity.
        panels: those of all, which share the axis of the run.
        width: characters of a line, at least 30.
        height: lines of the curves themselves, odd, at least 3.
        plain: ASCII alone, a letter for each curve.
        is_last: whether the labels of the axis stand below it; where charts are stacked, those of the last are enough.

    Example:
        >>> falling = Curve("learning rate", "", (0.0, 1.0), (1.0, 0.0), total_steps=90)
        >>> for line in chart([falling], [[falling]], width=30, height=5, plain=True):
        ...     print("".join(cell.text for cell in line).rstrip())
           1 |****
             |   ******
         0.5 |        ********
             |               ******
           0 |                    ****
             +-------------+----------
             0            50 steps
    """
    axis = axis_of(panels)
    high = _highest(panel)
    margin = max(len(_number(value, _highest(other))) for other in panels for value in _marked(other)) + 2
    columns = max(width, 30) - margin - 1
    grid = [[Cell(" ") for _ in range(columns)] for _ in range(height)]
    wide, tall = (1, 1) if plain else (2, 4)
    labels = _labels(panel, height, tall)
    masks: dict[tuple[int, int], int] = {}
    for number, curve in enumerate(panel):
        for column, (bottom, top) in enumerate(_spans(curve, axis, columns * wide)):
            first, final = (_row(value / high, height * tall) for value in (top, bottom))
            for row in range(first, final + 1):
                place = (row // tall, column // wide)
                masks[place] = masks.get(place, 0) | (0 if plain else _DOTS[column % 2][row % 4])
                text = LETTERS[number % len(LETTERS)] if plain else chr(_BRAILLE | masks[place])
                grid[place[0]][place[1]] = Cell(text, number)
    bar = "|" if plain else "│"
    lines = [[Cell(f"{label:>{margin - 1}} {bar}"), *cells] for label, cells in zip(labels, grid, strict=True)]
    line, marks = _x_axis(axis, columns + 1, plain=plain)
    return [*lines, *([Cell(" " * margin + text)] for text in ((line, marks) if is_last else (line,)))]


def _highest(panel: Sequence[Curve]) -> float:
    return max(value for curve in panel for value in curve.values) or 1.0


def _number(value: float, high: float) -> str:
    return f"{value:,.0f}" if high >= 100 else f"{value:.3g}"


def _marked(panel: Sequence[Curve]) -> list[float]:
    """Return the values that are written beside a chart: those of a quantity of few steps, else three of the range."""
    high = _highest(panel)
    told = sorted({value for curve in panel for value in curve.values if curve.by_steps}, reverse=True)
    return [*told, 0.0] if 0 < len(told) <= FEW and told[0] else [high, high / 2, 0.0]


def _labels(panel: Sequence[Curve], height: int, tall: int) -> list[str]:
    """Return the labels of the lines; where two values share a line, the higher one is written."""
    high = _highest(panel)
    labels = [""] * height
    for value in _marked(panel):
        row = _row(value / high, height * tall) // tall
        labels[row] = labels[row] or _number(value, high)
    return labels


def _row(share: float, rows: int) -> int:
    """Return the row from above in which a share of the height stands."""
    return min(max(round((1.0 - share) * (rows - 1)), 0), rows - 1)


def _spans(curve: Curve, axis: Axis, columns: int) -> list[tuple[float, float]]:
    """Return the lowest and highest value of `curve` in every column; none after its end."""
    x = axis.places(curve)
    spans = []
    for column in range(columns):
        begin, end = (axis.last * edge / columns for edge in (column, column + 1))
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


def _x_axis(axis: Axis, width: int, *, plain: bool) -> tuple[str, str]:
    """Return the x-axis with its ticks, and the line of labels under it; the last label has the unit."""
    corner, along, tick = "+-+" if plain else "└─┬"
    line, marks = [corner, *along * (width - 1)], [" "] * width
    *others, last = axis.ticks(max(2, min(6, width // 11)))
    where = {place: 1 + min(int(place / axis.last * (width - 1)), width - 2) for place in (*others, last) if place}
    for column in where.values():
        line[column] = tick
    end = axis.text(last)
    free = min(where.get(last, 0) - len(axis.number(last)) // 2, width - len(end))
    marks[free:] = f"{end:<{width - free}}"
    for place in reversed(others):
        text = axis.number(place)
        begin = max(where.get(place, 0) - len(text) // 2, 0)
        if begin + len(text) < free:
            marks[begin : begin + len(text)] = text
            free = begin
    return "".join(line), "".join(marks).rstrip()

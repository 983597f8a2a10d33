"""Curves as a picture, PNG or SVG: one panel for each quantity, one colour for each recipe."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hasten.errors import RecipeError, RunError, printable
from hasten.planning.axis import Axis, axis_of
from hasten.planning.outlook import Curve

# Okabe and Ito's colours, which the common colour blindnesses tell apart, the light ones darkened to 3:1 on white.
PALETTE = ("#0072b2", "#d55e00", "#00866a", "#b14a8d", "#a87400", "#3a90c5", "#2d3138", "#7b7b0b")
DASHES = ("solid", (0, (6, 2.5)), (0, (1.5, 1.8)), (0, (7, 2, 1.5, 2)))
INK, MUTED, GRID = "#1c1f24", "#5d6671", "#e3e6eb"
ENDINGS = (".png", ".svg")
WIDTH, TALL, LOW, AROUND = 7.5, 3.0, 1.4, 0.75
SETTINGS = {"font.size": 10, "svg.hashsalt": "hasten", "axes.unicode_minus": False, "svg.fonttype": "none"}


def draw(curves: Sequence[Curve], path: Path, *, title: str = "") -> Path:
    """Write a picture of `curves` and return its path: the learning rate large, what else changes below it.

    Quantities that no recipe changes are left out, but for the learning rate. The same curves give the same file.

    Args:
        curves: of one recipe or several, told apart by their labels.
        path: ends in ``.png`` or ``.svg``.
        title: stands above the picture.

    Raises:
        RecipeError: another ending.
        RunError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise RecipeError(f"{printable(str(path))} is no picture: let its name end in {' or '.join(ENDINGS)}.")
    import matplotlib

    panels = panels_of(curves)
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = _figure(panels, title)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160, metadata=metadata)
        except OSError as error:
            raise RunError(f"Could not write {printable(str(path))}: {error.strerror}; give another --out.") from error
    return path


def panels_of(curves: Sequence[Curve]) -> list[list[Curve]]:
    """Return the curves by quantity; one that never changes is left out, but for the first."""
    by_name: dict[str, list[Curve]] = {}
    for curve in curves:
        by_name.setdefault(curve.name, []).append(curve)
    is_told = {name: number == 0 or _changes(same) for number, (name, same) in enumerate(by_name.items())}
    return [same for name, same in by_name.items() if is_told[name]]


def _changes(same: Sequence[Curve]) -> bool:
    return len({value for curve in same for value in curve.values}) > 1


def _figure(panels: Sequence[Sequence[Curve]], title: str) -> Any:
    from matplotlib.figure import Figure

    heights = [TALL, *(LOW for _ in panels[1:])]
    columns, rows = _legend_shape([curve.label for curve in panels[0]])
    top = 0.35 + 0.3 * bool(title) + 0.24 * rows
    height = sum(heights) + AROUND * len(panels) - 0.15 + top
    figure = Figure(figsize=(WIDTH, height))
    left, right, upper = 0.85 / WIDTH, 1 - 0.3 / WIDTH, height - top
    colours = {curve.label: number for number, curve in enumerate(panels[0])}
    axis = axis_of(panels)
    for number, panel in enumerate(panels):
        bottom = upper - heights[number]
        axes = figure.add_axes((left, bottom / height, right - left, heights[number] / height))
        _plot(axes, panel, axis, colours)
        axes.set_title(panel[0].name, loc="left", color=INK, fontsize=10, pad=6)
        if number == len(panels) - 1:
            axes.set_xlabel(axis.unit, color=MUTED, loc="right")
        upper = bottom - AROUND
    if rows:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(left, 1 - (0.08 + 0.3 * bool(title)) / height),
            ncols=columns, frameon=False, labelcolor=INK, handlelength=2.4, columnspacing=1.6, borderaxespad=0,
            borderpad=0,
        )  # fmt: skip
    if title:
        figure.text(left, 1 - 0.18 / height, printable(title), color=INK, fontsize=11, weight="bold", va="top")
    return figure


def _legend_shape(labels: Sequence[str]) -> tuple[int, int]:
    """Return the columns and rows of a legend that is no wider than the picture; no rows for a single curve."""
    if len(labels) < 2:
        return 1, 0
    widest = 0.65 + 0.09 * max(map(len, labels))
    columns = max(1, min(len(labels), int((WIDTH - 1.15) / widest)))
    return columns, -(-len(labels) // columns)


def _plot(axes: Any, panel: Sequence[Curve], axis: Axis, colours: dict[str, int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    for curve in panel:
        number = colours.get(curve.label, 0)
        axes.plot(
            axis.places(curve), curve.values, label=printable(curve.label), color=PALETTE[number % len(PALETTE)],
            linestyle=DASHES[number // len(PALETTE) % len(DASHES)], linewidth=1.9,
            drawstyle="steps-post" if curve.by_steps else "default", solid_joinstyle="round",
        )  # fmt: skip
    highest = max(value for curve in panel for value in curve.values)
    axes.set_xlim(0, axis.last)
    axes.set_ylim(0, highest * 1.06 or 1.0)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED, pad=5)
    axes.xaxis.set_major_locator(FixedLocator(axis.ticks()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: axis.number(x)))
    _heights(axes, panel, highest)


def _heights(axes: Any, panel: Sequence[Curve], highest: float) -> None:
    """Write the values that tell: those of a quantity that changes in a few steps, else zero, half and the highest."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    told = {value for curve in panel for value in curve.values}
    apart = min((b - a for a, b in pairwise(sorted({0.0, *told}))), default=0.0)
    is_stepped = panel[0].by_steps and apart > 0.1 * highest
    axes.yaxis.set_major_locator(FixedLocator(sorted({0.0, *told} if is_stepped else {0.0, highest / 2, highest})))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if highest >= 100 else f"{y:.4g}"))

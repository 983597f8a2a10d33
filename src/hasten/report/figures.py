"""Charts as pictures: SVG that takes its colours from the page, PNG for everywhere else.

A chart is drawn once. Its colours are placeholders that the SVG swaps for CSS variables, so one picture serves light
and dark; its texts stay texts, in the reader's fonts, and a style sheet sets their size. Matplotlib is imported on use.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import printable
from hasten.report.charts import Chart, Curve
from hasten.report.wording import SPACE, number, seconds, short

# Okabe and Ito's colours (safe for the common colour blindnesses), the light ones darkened to 3:1 on white.
PALETTE = ("#0072b2", "#d55e00", "#00866a", "#b14a8d", "#a87400", "#3a90c5", "#2d3138", "#7b7b0b")
INK, MUTED, GRID = "#1c1f24", "#5d6671", "#e3e6eb"
GOOD, BAD, WARN = "#1c6b3c", "#b3261e", "#8a5a00"
VARIABLES = {**{colour: f"var(--c{i})" for i, colour in enumerate(PALETTE)}} | {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    WARN: "var(--warn)",
}
# One unit of the view box is one CSS pixel of a chart at its natural width.
WIDTH, HEIGHT = 540, 288
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 48
PNG_TOP = 64
PNG_DPI = 160
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hasten",
    "font.size": 12,
    "axes.unicode_minus": False,
    "path.simplify_threshold": 0.25,
}


def draw(chart: Chart, png: Path | None = None) -> str:
    """Return `chart` as an SVG element for an HTML page and, where `png` names a file, write it there as well."""
    with quiet_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes(_place(HEIGHT, TOP))
        handles = _plot(axes, chart)
        element = svg_element(figure, chart.name, WIDTH, HEIGHT)
        if png is not None:
            _write_png(figure, axes, chart, handles, png)
    return element


@contextmanager
def quiet_matplotlib() -> Iterator[None]:
    """Hold our settings, whatever the user's matplotlibrc says, and let a missing glyph in a PNG be a box."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _place(height: float, top: float) -> tuple[float, float, float, float]:
    return LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + RIGHT) / WIDTH, 1 - (top + BOTTOM) / height


def _plot(axes: Any, chart: Chart) -> list[tuple[Any, str]]:
    """Put the series on the axes; return artists and names for a legend."""
    handles = []
    for curve in chart.curves:
        artist = _plot_curve(axes, curve)
        if curve.label:
            handles.append((artist, curve.label))
    for mark in chart.marks:
        axes.axvline(mark, color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    _set_limits(axes, chart)
    for label, y in chart.references:
        axes.axhline(y, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=4)
        below = _is_crowded(axes, chart, y, 1) and not _is_crowded(axes, chart, y, -1)
        axes.annotate(
            f"{printable(label)} {number(y, 3)}", (0.995, y), xytext=(0, -4 if below else 3),
            xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right",
            va="top" if below else "bottom", color=INK, parse_math=False, zorder=5,
        )  # fmt: skip
    _dress(axes, chart)
    return handles


def _plot_curve(axes: Any, curve: Curve) -> Any:
    colour = PALETTE[curve.colour % len(PALETTE)]
    dash = (0, (6, 2.5)) if curve.dashed else "solid"
    if curve.kind == "band":
        return axes.fill_between(curve.x, curve.y, curve.high, color=colour, alpha=0.22, linewidth=0, zorder=2)
    if curve.kind == "points":
        return axes.plot(
            curve.x, curve.y, "o", color=colour, markersize=4.5, markeredgewidth=0, clip_on=False, zorder=3.5
        )[0]
    if curve.kind == "faint":
        return axes.plot(curve.x, curve.y, color=colour, alpha=0.32, linewidth=0.8, zorder=2)[0]
    step = "steps-post" if curve.kind == "steps" else "default"
    return axes.plot(
        curve.x, curve.y, color=colour, linewidth=1.8, linestyle=dash, drawstyle=step, solid_joinstyle="round", zorder=3
    )[0]


def _is_crowded(axes: Any, chart: Chart, y: float, side: int) -> bool:
    """Say whether a curve runs where the label of a line at `y` would stand: above (`side` 1) or below it (-1)."""
    place = axes.transData - axes.transAxes
    line = place.transform((axes.get_xlim()[1], y))[1]
    if side < 0 and line < 0.1:
        return True
    for curve in chart.curves:
        x, height = place.transform(np.column_stack([curve.x, curve.y])).T
        distance = side * (height[x > 0.68] - line)
        if ((distance > -0.01) & (distance < 0.1)).any():
            return True
    return False


def _set_limits(axes: Any, chart: Chart) -> None:
    """Give the values room, and keep a few wild ones from pressing the rest flat."""
    xs = _finite([curve.x for curve in chart.curves])
    axes.set_xlim(0, xs.max() * 1.01 if len(xs) and xs.max() > 0 else 1)
    pale = [curve for curve in chart.curves if curve.kind in ("faint", "band")]
    calm = [curve for curve in chart.curves if curve.kind not in ("faint", "band")]
    values = _finite([curve.y for curve in calm])
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    wild = _finite([y for curve in pale for y in (curve.y, curve.high) if y is not None])
    if len(wild):
        # A spike of the loss or of the gradients is news and stays in the frame; one slow step is not.
        highest = np.quantile(wild, 0.995) if chart.from_zero else wild.max()
        low, high = min(low, float(np.quantile(wild, 0.005))), max(high, float(highest))
    for _, y in chart.references:
        low, high = min(low, y), max(high, y)
    if chart.log:
        room = (high / low) ** 0.06
        axes.set_yscale("log")
        axes.set_ylim(low / room, high * room)
    elif chart.from_zero and low >= 0:
        axes.set_ylim(0, high * 1.12 or 1)
    else:
        room = 0.08 * (high - low) or max(abs(high) * 0.1, 1e-12)
        axes.set_ylim(low - room, high + room)


def _finite(arrays: list[np.ndarray]) -> np.ndarray:
    everything = np.concatenate([np.asarray(a, dtype=float) for a in arrays]) if arrays else np.array([])
    return everything[np.isfinite(everything)]


def _dress(axes: Any, chart: Chart) -> None:
    """Take away everything but the values, a few quiet lines and their numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED, pad=6)
    axes.patch.set_visible(False)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator(_ticks(*axes.get_ylim(), log=chart.log)))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick_text))
    by_time = chart.x_label.endswith("time")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator(_time_ticks(high) if by_time else _ticks(low, high, least=1)))
    axes.xaxis.set_major_formatter(FuncFormatter((lambda x, _: _time_text(x)) if by_time else _tick_text))
    axes.set_xlabel(chart.x_label, color=MUTED, loc="right", labelpad=7)


def _ticks(low: float, high: float, *, log: bool = False, about: int = 5, least: float = 0.0) -> list[float]:
    """Return about `about` round numbers from `low` to `high`, at least `least` apart."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 6, 8)):
            ticks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
            if len(ticks) >= about - 1:
                return ticks[:: math.ceil(len(ticks) / (about + 2))]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    sizes = (1, 2, 5, 10) if power <= least else (1, 2, 2.5, 5, 10)
    size = max(least, next(s * power for s in sizes if s * power >= raw * 0.999))
    return [i * size for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def _tick_text(value: float, _: object = None) -> str:
    if value and abs(value) < 1e-3:
        return number(float(value), 3)
    if abs(value) < 1e4:
        return f"{value:,.10g}"
    digits, _, letter = short(float(value)).partition(SPACE)
    return f"{float(digits):g}{SPACE}{letter}"


def _time_ticks(high: float) -> list[float]:
    sizes = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
    size = next((s for s in sizes if high / s <= 6), 86400 * math.ceil(high / 86400 / 6))
    return [i * size for i in range(math.floor(high / size) + 1)] if high > 1 else _ticks(0, high)


def _time_text(value: float) -> str:
    if value < 60:
        return f"{value:g}{SPACE}s"
    if value < 3600:
        return f"{value / 60:g}{SPACE}min" if value % 60 == 0 else seconds(value)
    return f"{value / 3600:g}{SPACE}h"


def _write_png(figure: Any, axes: Any, chart: Chart, handles: list[tuple[Any, str]], path: Path) -> None:
    labels = [shortened(printable(label), 28) for _, label in handles]
    longest = max(map(len, labels), default=0)
    columns = min(4, len(labels), max(1, 100 // (longest + 8))) or 1
    size, line = (11, 17) if len(labels) <= 4 else (8, 12.5)
    top = max(PNG_TOP, 38 + line * math.ceil(len(labels) / columns)) if len(labels) > 1 else PNG_TOP
    height = HEIGHT - TOP + top
    figure.set_size_inches(WIDTH / 72, height / 72)
    axes.set_position(_place(height, top))
    title = chart.title + (f" ({chart.unit})" if chart.unit else "")
    figure.text(12 / WIDTH, 1 - 22 / height, title, color=INK, fontsize=14, weight="bold", parse_math=False)
    if len(handles) > 1:
        legend = figure.legend(
            [artist for artist, _ in handles],
            [f" {label}" for label in labels],  # a leading "_" would hide the entry
            loc="upper left", bbox_to_anchor=(6 / WIDTH, 1 - 26 / height), ncols=columns, frameon=False,
            fontsize=size, labelcolor=MUTED, borderpad=0.2, columnspacing=1.2,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    write_png(figure, path)


def write_png(figure: Any, path: Path) -> None:
    """Write a figure as a picture on white."""
    figure.patch.set_visible(True)
    figure.savefig(path, format="png", dpi=PNG_DPI, facecolor="white", pil_kwargs={"compress_level": 3})


def shortened(label: str, limit: int) -> str:
    """Return a name that fits: names often begin alike and end apart, so the middle goes.

    Example:
        >>> shortened("muon-with-a-long-name-0", 12)
        'muon-w…ame-0'
    """
    half = limit // 2
    return label if len(label) <= limit else f"{label[:half]}…{label[half + 1 - limit :]}"


def svg_element(figure: Any, name: str, width: float, height: float) -> str:
    """Return a figure as an element that fits a page: no ids of its own, no fonts, no fixed colours."""
    figure.patch.set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = stream.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r'(?<=[ "])font(-[a-z]+)?: [^;"]*;? ?', "", body)
    body = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\.\d)\d+", r"\1", m.group().replace(" \n", " ")), body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r'<g id="[^"]*"(?: ?/>|>\s*</g>)', "", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"\n\s*", "\n", body)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title" '
        f'aria-describedby="{name}-caption">{body}</svg>'
    )

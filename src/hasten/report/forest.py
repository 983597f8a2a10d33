"""The forest plot of a study: every arm's effects with their intervals, best first, around a line of no effect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hasten.errors import printable
from hasten.report.figures import BAD, GOOD, GRID, INK, MUTED, WARN, quiet_matplotlib, shortened, svg_element, write_png
from hasten.report.study import Arm, Effect, Study
from hasten.report.verdicts import MINUS, TO_LOSS, beside, counted, plain_percent
from hasten.report.wording import SPACE

NAME = "forest"
# One unit of the view box is a CSS pixel at the natural width of the page.
ROW, PANEL, GAP, EDGE = 24, 250, 34, 14
TOP, BOTTOM = 34, 46
MAX_LABEL = 42
COLOURS = {"pays": GOOD, "costs": BAD, "unknown": WARN, "diverged": BAD}
TITLES = {
    "bits_per_byte": "Held-out bits per byte",
    "train_seconds": "Training time per run",
    "seconds_to_loss": "Time to the base's loss",
    "tokens_to_loss": "Tokens to the base's loss",
    "steps_to_loss": "Steps to the base's loss",
}


@dataclass(frozen=True)
class Forest:
    """What the plot shows: the arms from top to bottom, the effects from left to right, and the words under it."""

    arms: Sequence[Arm]
    labels: Sequence[str]
    effects: Sequence[str]
    margin: float
    caption: str


def forest(study: Study) -> Forest | None:
    """Return the forest plot of a study; None where no arm has an effect to show."""
    if not any(_mean(arm, "bits_per_byte") is not None for arm in study.arms):
        return None
    arms = sorted(study.arms, key=lambda arm: (_mean(arm, "bits_per_byte") is None, _mean(arm, "bits_per_byte") or 0.0))
    known = [key for key in TO_LOSS if any(_mean(arm, key) is not None or _censored(arm, key) for arm in study.arms)]
    if {"steps_to_loss", "tokens_to_loss"} <= set(known) and _alike(study.arms):
        known.remove("steps_to_loss")
    caption = (
        f"Change against {study.base.name}, less is better; lines are {plain_percent(study.level)} intervals."
        " Green pays, red costs, amber cannot be told yet, grey is no difference."
    )
    if study.margin:
        caption += f" Shaded: differences of at most {plain_percent(study.margin)}, which count as none."
    if "tokens_to_loss" in known and "steps_to_loss" not in known:
        caption += " Steps change as tokens do."
    timed = ["train_seconds"] if "train_seconds" in study.primaries else []
    labels = [f"{arm.name}{beside(arm, study)}" for arm in arms]
    return Forest(arms, labels, ["bits_per_byte", *timed, *known], study.margin, caption)


def _mean(arm: Arm, key: str) -> float | None:
    effect = arm.effects.get(key)
    return None if effect is None else effect.mean


def _censored(arm: Arm, key: str) -> int:
    effect = arm.effects.get(key)
    return 0 if effect is None else effect.censored


def _alike(arms: Sequence[Arm]) -> bool:
    """Say whether steps and tokens tell the same story, as they do where every step has as many tokens."""
    pairs = [(_mean(arm, "steps_to_loss"), _mean(arm, "tokens_to_loss")) for arm in arms]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    both = all((one is None) == (other is None) for one, other in pairs)
    return both and all(abs(one - other) < 0.005 for one, other in known)


def draw_forest(plot: Forest, png: Path | None = None) -> str:
    """Return the plot as an SVG element and, where `png` names a file, write it there as well."""
    labels = [shortened(printable(re.sub(r"\s", " ", label)), MAX_LABEL) for label in plot.labels]
    left = 24 + 7.2 * max(len(label) for label in labels)
    width = left + len(plot.effects) * (PANEL + GAP) + EDGE
    height = TOP + ROW * len(plot.arms) + BOTTOM
    with quiet_matplotlib():
        from matplotlib.figure import Figure
        from matplotlib.patheffects import withStroke

        figure = Figure(figsize=(width / 72, height / 72))
        for index, key in enumerate(plot.effects):
            place = (left + index * (PANEL + GAP)) / width, BOTTOM / height, PANEL / width
            axes = figure.add_axes((*place, ROW * len(plot.arms) / height))
            _panel(axes, plot, key)
            if index == 0:
                for row, (arm, label) in enumerate(zip(plot.arms, labels, strict=True)):
                    axes.annotate(
                        label, (0, row), xytext=(8 - left, 0), xycoords=axes.get_yaxis_transform(),
                        textcoords="offset points", ha="left", va="center", parse_math=False,
                        color=INK if arm.verdict in ("pays", "costs") else MUTED,
                    )  # fmt: skip
        element = svg_element(figure, NAME, width, height)
        if png is not None:
            for text in [text for axes in figure.axes for text in axes.texts]:  # on the page the style sheet does this
                text.set_path_effects([withStroke(linewidth=3.5, foreground="white")])
            write_png(figure, png)
    return element


def _panel(axes: Any, plot: Forest, key: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    effects = [arm.effects.get(key) for arm in plot.arms]
    low, high = _limits([effect for effect in effects if effect is not None], plot.margin)
    axes.set_xlim(low, high)
    axes.set_ylim(len(plot.arms) - 0.5, -0.5)
    if plot.margin and key == "bits_per_byte":
        axes.axvspan(-plot.margin, plot.margin, color=MUTED, alpha=0.13, linewidth=0, zorder=0)
    for row in range(len(plot.arms)):
        axes.axhline(row, color=GRID, linewidth=1, zorder=0.5)
    axes.axvline(0, color=INK, linewidth=1.2, zorder=1)
    for row, (arm, effect) in enumerate(zip(plot.arms, effects, strict=True)):
        _row(axes, row, arm, effect, key)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.patch.set_visible(False)
    axes.tick_params(length=0, colors=MUTED, pad=6)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_title(TITLES[key], loc="left", color=INK, fontsize=12, pad=10)


def _limits(effects: Sequence[Effect], margin: float) -> tuple[float, float]:
    """Return a frame around zero for all means; intervals that are far wider than the rest do not set it."""
    means = [effect.mean for effect in effects if effect.mean is not None]
    ends = [
        end for effect in effects if effect.mean is not None for end in (effect.low, effect.high) if end is not None
    ]
    usual = min(4 * median(map(abs, ends)), 1.5 * max([1.0, *map(abs, means)])) if ends else 0.0
    reach = [1.25 * mean for mean in means] + [max(-usual, min(usual, end)) for end in ends]
    low, high = min([-1.6 * margin, *reach]), max([1.6 * margin, *reach])
    room = 0.05 * (high - low) or 0.01
    return low - room, high + room


def _row(axes: Any, row: int, arm: Arm, effect: Effect | None, key: str) -> None:
    colour = COLOURS.get(arm.verdict, MUTED)
    if effect is None or effect.mean is None or effect.method == "identical":
        low, high = axes.get_xlim()
        has_room_left = -low > high  # the words stand where the line of no effect is not
        axes.annotate(
            _why(arm, effect, key), (0.02 if has_room_left else 0.98, row), xycoords=axes.get_yaxis_transform(),
            ha="left" if has_room_left else "right", va="center",
            color=MUTED, zorder=4, parse_math=False,
        )  # fmt: skip
        return
    if effect.low is None or effect.high is None:
        axes.plot([effect.mean], [row], "o", markersize=7, markerfacecolor="none", markeredgecolor=colour, zorder=3)
        return
    low, high = axes.get_xlim()
    axes.plot(
        [max(low, effect.low), min(high, effect.high)], [row, row], color=colour, linewidth=2.2, zorder=2,
        solid_capstyle="butt",
    )  # fmt: skip
    for is_out, end, marker in ((effect.low < low, low, "<"), (effect.high > high, high, ">")):
        if is_out:  # goes on beyond the frame
            axes.plot([end], [row], marker, color=colour, markersize=7, markeredgewidth=0, clip_on=False, zorder=3)
    axes.plot([effect.mean], [row], "s", color=colour, markersize=6.5, markeredgewidth=0, zorder=3)


def _why(arm: Arm, effect: Effect | None, key: str) -> str:
    if effect is not None and effect.censored:
        return f"not reached in {effect.censored} of {counted(effect.n or effect.censored, 'seed')}"
    if effect is not None and effect.method == "identical":
        return "equal in every digit"
    if key == "bits_per_byte" and arm.count("diverged"):
        return f"diverged in {arm.count('diverged')} of {counted(len(arm.runs), 'seed')}"
    return "not measured"


def _tick(value: float, _: object = None) -> str:
    text = f"{abs(100 * value):.6g}"
    return f"{'' if not value else MINUS if value < 0 else '+'}{text}{SPACE}%"

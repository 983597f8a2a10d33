"""The charts that lay several runs over each other; runs that differ only in the seed are one curve with a band."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hasten.report.charts import NUM_COLOURS, Chart, Curve, evaluations, has_series, spans
from hasten.report.curves import overlay, smooth, smoothing_window, thin
from hasten.report.runs import Run, flat

SEED_KEYS = ("seed", "out")


@dataclass(frozen=True)
class Group:
    """Runs that are drawn as one: `label` names them, `colour` counts from 0 and goes beyond the palette."""

    label: str
    runs: Sequence[Run]
    colour: int


def groups(runs: Sequence[Run]) -> list[Group]:
    """Return the runs by what they trained: those whose recipes and data differ in nothing but the seed together.

    Runs with the same seed too, or without a recipe, stay apart.
    """
    alike: dict[object, list[int]] = {}
    for index, run in enumerate(runs):
        alike.setdefault(_trained(run) or index, []).append(index)
    parts: list[list[int]] = []
    for members in alike.values():
        is_paired = len({runs[index].setting("seed") for index in members}) == len(members)
        parts += [members] if is_paired else [[index] for index in members]
    return [_group([runs[index] for index in part], colour) for colour, part in enumerate(sorted(parts))]


def _group(members: Sequence[Run], colour: int) -> Group:
    alone = len(members) == 1
    return Group(members[0].name if alone else f"{_shared_name(members)}, {len(members)} seeds", members, colour)


def colours(runs: Sequence[Run]) -> list[int]:
    """Return the colour of each run in the charts."""
    shown = [(run, group.colour % NUM_COLOURS) for group in groups(runs) for run in group.runs]
    return [next(colour for one, colour in shown if one is run) for run in runs]


def _trained(run: Run) -> tuple[object, ...] | None:
    recipe = {key: value for key, value in flat(run.recipe).items() if key not in SEED_KEYS}
    if not recipe or run.setting("seed") is None:
        return None
    return (*sorted((key, repr(value)) for key, value in recipe.items()), repr(run.result.get("corpus_sha256")))


def _shared_name(runs: Sequence[Run]) -> str:
    """Return the words that the names of the runs begin with alike: ``muon`` for ``muon-s0-1a`` and ``muon-s1-2b``."""
    words = [re.split(r"([-_./ ]+)", run.name) for run in runs]
    shared = []
    for same in zip(*words, strict=False):
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    return "".join(shared).rstrip("-_./ ") or runs[0].name


def comparison_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts that lay several runs over each other, against what they cost: tokens and time."""
    loss, norm, by_tokens, by_seconds, rates, speeds = [], [], [], [], [], []
    grouped = groups(runs)
    for group in grouped:
        for into, name in ((by_tokens, "tokens"), (by_seconds, "seconds")):
            into += _group_curves(group, [_held_out(run, name) for run in group.runs], with_points=True)
        for into, name, is_noisy in (
            (loss, "loss", True),
            (rates, "lr", False),
            (norm, "grad_norm", True),
            (speeds, "tokens_per_second", True),
        ):
            series = [_series(run, name, is_noisy) for run in group.runs if has_series(run, name)]
            into += _group_curves(group, series, with_points=False)
    band = " Bands reach from the lowest to the highest seed." if len(grouped) < len(runs) else ""
    smoothed = f"Means over neighbouring steps.{band}"
    named = [
        Chart("validation", "Held-out text by tokens", "bits per byte", f"What a token buys.{band}", by_tokens),
        Chart("validation_time", "Held-out text by time", "bits per byte", f"What a second buys.{band}", by_seconds,
              x_label="time"),
        Chart("loss", "Training loss", "nats per token", smoothed, loss),
        Chart("learning_rate", "Learning rate", "", f"As applied.{band}", rates, from_zero=True),
        Chart("gradient_norm", "Gradient norm", "before clipping", smoothed, norm),
        Chart("throughput", "Throughput", "tokens per second", smoothed, speeds, from_zero=True),
    ]  # fmt: skip
    charts = []
    for chart in named:
        if not chart.curves:
            continue
        everything = np.concatenate([curve.y for curve in chart.curves])
        log = not chart.from_zero and spans(everything, 2.0)
        unit = chart.unit + (", log scale" if log else "")
        x_label = "tokens" if chart.x_label == "step" else chart.x_label
        charts.append(replace(chart, log=log, unit=unit, x_label=x_label))
    return charts


def _held_out(run: Run, against: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = evaluations(run)
    # What the untrained model scores would press the differences flat; the bars above the charts show it.
    steps, values = steps[steps > 0], values[steps > 0]
    return run.at_step(against, steps), values


def _series(run: Run, name: str, is_noisy: bool) -> tuple[np.ndarray, np.ndarray]:
    thinned = thin(run.series["tokens"], run.series[name])
    window = smoothing_window(len(thinned.x)) if is_noisy else 1
    return thinned.x, smooth(thinned.mean, window)


def _group_curves(group: Group, series: Sequence[tuple[np.ndarray, np.ndarray]], *, with_points: bool) -> list[Curve]:
    """Return one line with a band for runs that have a stretch in common, else a line for each."""
    series = [(x, y) for x, y in series if np.isfinite(y).any()]
    dashed = (group.colour // NUM_COLOURS) % 2 == 1
    colour = group.colour % NUM_COLOURS
    together = overlay(series) if len(series) > 1 else None
    if together is not None:
        return [
            Curve("", together.x, together.low, "band", colour, high=together.high),
            Curve(group.label, together.x, together.mean, "line", colour, dashed=dashed),
        ]
    curves = []
    for index, (x, y) in enumerate(series):
        label = group.label if index == 0 else ""
        kind = "line" if with_points or len(x) > 1 else "points"
        curves.append(Curve(label, x, y, kind, colour, dashed=dashed))
        if with_points:
            curves.append(Curve("", x, y, "points", colour, dashed=dashed))
    return curves

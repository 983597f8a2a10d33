"""The curves of a study: one per arm, a band over its seeds, the finished values as points; nothing here draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hasten.report.charts import NUM_COLOURS, Chart, Curve
from hasten.report.curves import overlay
from hasten.report.study import Arm, Study
from hasten.report.trajectories import Trajectories, Trajectory
from hasten.report.verdicts import counted, plain_percent

CURVES = "curves"
BY_TIME = "curves_time"
NOT_SHOWN = 0.2
BASE_COLOUR = 6  # the ink of the palette: the base is what the colours are told from


def study_curves(study: Study, trajectories: Trajectories) -> list[Chart]:
    """Return held-out bits per byte against training tokens and against training time; none where nothing is known."""
    drawn = [(arm, runs) for arm, runs in trajectories.by_arm if runs]
    coloured = _coloured(study, [arm for arm, _ in drawn])
    charts = []
    for name, title, axis in (
        (CURVES, "Held-out text by training tokens", "tokens"),
        (BY_TIME, "Held-out text by training time", "seconds"),
    ):
        curves: list[Curve] = []
        for arm, runs in sorted(drawn, key=lambda pair: pair[0].variant in coloured):  # grey ones below the others
            series = [_late(run.tokens if axis == "tokens" else run.seconds, run.bits_per_byte) for run in runs]
            curves += _arm_curves(arm, series, coloured.get(arm.variant))
        if curves:
            x_label = "training tokens" if axis == "tokens" else "training time"
            said = _caption(study, trajectories, coloured, len(drawn))
            charts.append(Chart(name, title, "bits per byte", said, curves, x_label=x_label))
    return charts


def _late(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out the start of a run, whose steep fall would press the differences at the end flat."""
    late = x >= NOT_SHOWN * x[-1]
    return x[late], y[late]


def _coloured(study: Study, arms: Sequence[Arm]) -> dict[str, int]:
    """Return the colour of the base and of as many arms as there are colours, the largest gains first."""
    colours = [colour for colour in range(NUM_COLOURS) if colour != BASE_COLOUR]
    others = [arm for arm in arms if arm is not study.base]
    if len(others) > len(colours):
        others.sort(key=lambda arm: np.inf if arm.mean_bits_per_byte is None else arm.mean_bits_per_byte)
    chosen = {arm.variant for arm in others[: len(colours)]}
    kept = [arm.variant for arm in arms if arm.variant in chosen]
    return {study.base.variant: BASE_COLOUR} | dict(zip(kept, colours))


def _arm_curves(arm: Arm, series: Sequence[tuple[np.ndarray, np.ndarray]], colour: int | None) -> list[Curve]:
    together = overlay(series)
    if colour is None:
        return [] if together is None else [Curve("", together.x, together.mean, "faint", BASE_COLOUR)]
    curves = []
    if together is not None:
        if len(series) > 1:
            curves.append(Curve("", together.x, together.low, "band", colour, high=together.high))
        curves.append(Curve(arm.variant, together.x, together.mean, "line", colour, dashed=colour == BASE_COLOUR))
    ends = np.array([(x[-1], y[-1]) for x, y in series])
    curves.append(Curve("" if curves else arm.variant, ends[:, 0], ends[:, 1], "points", colour))
    return curves


def _caption(study: Study, trajectories: Trajectories, coloured: dict[str, int], num_drawn: int) -> str:
    runs: list[Trajectory] = [run for _, found in trajectories.by_arm for run in found]
    parts = [
        "Lines are means over the seeds, bands reach from the lowest to the highest seed, points are finished runs."
        if len(runs) > num_drawn
        else "One run per arm; points are finished runs.",
        "Only the points are results: curves that cross while the learning rate still decays are not. "
        f"The first {plain_percent(NOT_SHOWN)} of each run is not shown.",
    ]
    grey = sum(arm.variant not in coloured for arm, found in trajectories.by_arm if found)
    if grey > 0:
        parts.append(f"{counted(grey, 'arm')} with smaller gains are drawn in grey without names.")
    if trajectories.unfinished:
        parts.append(f"{counted(trajectories.unfinished, 'run')} that did not finish are left out.")
    if trajectories.is_spaced:
        parts.append("Points before the last are placed by their step number.")
    return " ".join(parts)

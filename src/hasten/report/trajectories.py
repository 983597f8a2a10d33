"""The way of every run of a study: its held-out figures against tokens and training time, from its events alone.

``metrics.jsonl``, a line per step, is never opened: 200 runs would take a minute to read, and the evaluations hold all
that the curves show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.errors import HastenError
from hasten.record import RunFolder, read_events
from hasten.report.runs import that_count
from hasten.report.study import Arm, Study, StudyRun
from hasten.report.wording import is_finite


@dataclass(frozen=True)
class Trajectory:
    """Held-out bits per byte of one finished run after `tokens` and `seconds` of training, the final figure last."""

    tokens: np.ndarray
    seconds: np.ndarray
    bits_per_byte: np.ndarray


@dataclass(frozen=True)
class Trajectories:
    """The trajectories of a study by arm, and what the reader should know about them.

    `unread`: finished runs whose folder is gone or damaged. `unfinished`: runs that did not finish. `is_spaced`: some
    evaluations were placed by their step number, because their events do not say how much had been trained.
    """

    by_arm: Sequence[tuple[Arm, Sequence[Trajectory]]]
    unread: int
    unfinished: int
    is_spaced: bool


def read_trajectories(study: Study, folder: Path) -> Trajectories:
    """Return the trajectories of the finished runs of every arm; what cannot be read is counted, never an error."""
    by_arm, unread, unfinished, is_spaced = [], 0, 0, False
    for arm in study.variants:
        found = []
        for run in arm.runs:
            if run.status != "finished":
                unfinished += 1
                continue
            read = _read(run, folder / "runs")
            if read is None:
                unread += 1
                continue
            found.append(read[0])
            is_spaced = is_spaced or not read[1]
        by_arm.append((arm, found))
    return Trajectories(by_arm, unread, unfinished, is_spaced)


def _read(run: StudyRun, runs: Path) -> tuple[Trajectory, bool] | None:
    """Return the trajectory and whether every point of it is where the run itself put it; None where there is none."""
    folder = runs / run.run
    if not run.run or folder.name != run.run or not RunFolder(folder).events_path.is_file():
        return None  # a name that leads out of the study is no run of it
    try:
        events = that_count(read_events(RunFolder(folder)))
    except (OSError, HastenError):
        return None
    points: dict[float, tuple[float, float, float]] = {}
    is_exact = True
    for event in events:
        step, value = event.get("step"), event.get("val_bpb")
        if event.get("kind") != "evaluation" or not (is_finite(step) and is_finite(value)) or step <= 0:
            continue
        tokens, seconds = event.get("trained_tokens"), event.get("train_seconds")
        if not (is_finite(tokens) and is_finite(seconds)):
            share = step / run.steps if run.steps else 0.0
            tokens, seconds = (run.tokens or 0) * share, (run.train_seconds or 0.0) * share
            is_exact = is_exact and step == run.steps
        points[step] = (tokens, seconds, value)
    if run.steps and run.val_bpb is not None:
        points[run.steps] = (run.tokens or 0, run.train_seconds or 0.0, run.val_bpb)
    if not points:
        return None
    tokens, seconds, values = np.array([points[step] for step in sorted(points)], dtype=float).T
    return Trajectory(tokens, seconds, values), is_exact

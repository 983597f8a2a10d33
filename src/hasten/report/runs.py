"""A run folder as the report sees it: what `train` wrote, read without trusting that it got to the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import HastenError, RunError, printable
from hasten.files import read_bytes
from hasten.record import RunFolder, read_events, read_metrics, read_result
from hasten.report.wording import is_finite

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COLUMNS = (
    "step",
    "seconds",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "clipped",
    "skipped",
    "loss_scale",
    "seq_len",
    "tokens_per_second",
)


@dataclass(frozen=True)
class Run:
    """Everything that one run folder says. Missing parts are empty, and `problems` says which could not be read.

    `series` holds one float array per name in `COLUMNS`, all of the same length, ordered by step; what a line lacks
    is NaN. `events` are those that still count: what a later attempt went back over is left out.
    """

    name: str
    recipe_text: str
    recipe: Mapping[str, Any]
    series: Mapping[str, np.ndarray]
    events: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]
    problems: Sequence[str]

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """Return the events of one kind, oldest first."""
        return [event for event in self.events if event.get("kind") == kind]

    def latest(self, kind: str) -> Mapping[str, Any]:
        """Return the newest event of one kind, or an empty mapping."""
        return next((event for event in reversed(self.events) if event.get("kind") == kind), {})

    def setting(self, path: str) -> Any:
        """Return the value of the recipe at a dotted path, or None."""
        value: Any = self.recipe
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def num_steps(self) -> int:
        """Optimizer steps on record."""
        return len(self.series["step"])

    @property
    def last_step(self) -> int:
        """The newest optimizer step on record; 0 before the first."""
        return int(self.series["step"][-1]) if self.num_steps else 0

    @property
    def status(self) -> str:
        """``finished``, ``diverged``, ``stopped``, or ``unfinished`` where nothing says how it ended."""
        if self.result.get("status"):
            return str(self.result["status"])
        return "stopped" if self.events and self.events[-1].get("kind") == "stop" else "unfinished"

    def measured(self, name: str) -> float | int | None:
        """Return a number of the result; for a run without one, the newest on record, or None."""
        for value in (self.result.get(name), self._so_far(name)):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return value
        return None

    def _so_far(self, name: str) -> Any:
        if name == "untrained_val_bpb":
            return self.latest("untrained").get("val_bpb")
        if name in ("val_bpb", "val_loss"):
            return self.latest("evaluation").get(name)
        if name == "params":
            return self.latest("start").get("params")
        if name == "steps":
            return self.last_step
        if name in ("seconds", "tokens") and self.num_steps:
            value = float(self.series[name][-1])
            return value if is_finite(value) else None
        if name == "tokens_per_second" and self.measured("seconds"):
            return (self.measured("tokens") or 0) / self.measured("seconds")
        return None

    def at_step(self, name: str, steps: Sequence[float]) -> np.ndarray:
        """Return what the series `name` (``tokens``, ``seconds``) had come to at `steps`; 0 at step 0."""
        known = np.isfinite(self.series[name])
        at = np.concatenate([[0.0], self.series["step"][known]])
        values = np.concatenate([[0.0], self.series[name][known]])
        return np.interp(np.asarray(steps, dtype=float), at, values)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs at `paths`, each under a name of its own.

    Raises:
        RunError: no path given, or one that is no run folder.
    """
    if not paths:
        raise RunError("No run folder was given; name at least one that `hasten train` wrote, such as runs/NAME.")
    folders = [Path(path) for path in paths]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]
    counts: dict[str, int] = {}
    runs = []
    for folder, name in zip(folders, names, strict=True):
        counts[name] = counts.get(name, 0) + 1
        runs.append(_read_run(folder, name if counts[name] == 1 else f"{name} ({counts[name]})"))
    return runs


def _read_run(path: Path, name: str) -> Run:
    folder = RunFolder(path)
    written = (folder.recipe_path, folder.metrics_path, folder.events_path, folder.result_path)
    if not any(file.is_file() for file in written):
        raise RunError(
            f"{printable(str(path))!r} is not a run folder: it has no recipe.toml, metrics.jsonl, events.jsonl or "
            "result.json; give a folder that `hasten train` wrote, such as runs/NAME."
        )
    problems: list[str] = []

    def attempt(file: Path, read: Any, otherwise: Any) -> Any:
        if not file.is_file():
            return otherwise
        try:
            return read() or otherwise
        except (OSError, ValueError, RecursionError, HastenError) as error:
            said = str(error).replace(printable(str(file)), file.name)  # the page may be passed on: no paths in it
            problems.append(f"{file.name} could not be read and is left out: {said}")
            return otherwise

    recipe_text = attempt(folder.recipe_path, lambda: read_bytes(folder.recipe_path).decode("utf-8"), "")
    events = attempt(folder.events_path, lambda: read_events(folder), [])
    result = attempt(folder.result_path, lambda: read_result(folder), {})
    if _goes_on(events):
        result = {}
    return Run(
        name=name,
        recipe_text=recipe_text,
        recipe=attempt(folder.recipe_path, lambda: tomllib.loads(recipe_text), {}),
        series=_columns(attempt(folder.metrics_path, lambda: read_metrics(folder), [])),
        events=that_count(events),
        result=result,
        problems=tuple(problems),
    )


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    columns = {name: _numbers([line.get(name) for line in lines]) for name in COLUMNS}
    steps = columns["step"]
    # A step that was trained twice (a crash before the lines were cut back) counts as it was the second time.
    newest_first, index = np.unique(steps[::-1], return_index=True)
    keep = (len(steps) - 1 - index)[np.isfinite(newest_first)]
    return {name: values[keep] for name, values in columns.items()}


def _numbers(values: list[Any]) -> np.ndarray:
    try:
        return np.array(values, dtype=float)
    except (TypeError, ValueError):
        return np.array([float(v) if isinstance(v, (int, float)) else np.nan for v in values], dtype=float)


def _goes_on(events: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a run that once wrote a result was taken up again since, so that the result is out of date."""
    ends = [event.get("kind") for event in events if event.get("kind") in ("finish", "resume")]
    return "finish" in ends and ends[-1] == "resume"


def that_count(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out what a resumed run did again: measurements after the step that it went back to."""
    counting: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("kind") == "resume":
            back_to = event.get("step")
            back_to = back_to if is_finite(back_to) else 0
            counting = [
                e for e in counting if e.get("kind") not in ("evaluation", "sample") or (e.get("step") or 0) <= back_to
            ]
        counting.append(event)
    return counting


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as dotted paths.

    Example:
        >>> flat({"lr": 1, "clip": {"name": "norm"}})
        {'lr': 1, 'clip.name': 'norm'}
    """
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def left_out_steps(run: Run) -> tuple[int, int]:
    """Return how many steps had no update because of the guard, and because a half-precision gradient overflowed."""
    skipped = {int(step) for step, out in zip(run.series["step"], run.series["skipped"], strict=True) if out == 1}
    bad: set[int] = set()
    for event in run.events:
        step = event.get("step")
        if event.get("kind") == "bad_step" and type(step) is int:
            bad.add(step)
        elif event.get("kind") == "rollback" and type(step) is int:  # what came after it was done again
            bad = {one for one in bad if one <= step}
    return len(skipped & bad), len(skipped - bad)

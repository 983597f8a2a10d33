"""What ten real steps take: measured in a process of their own, so that nothing else counts as their memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import printable
from hasten.recipe import Recipe

# Seconds that a measurement aims at, the multiple of them after which it is given up, and seconds to begin in.
SECONDS, PATIENCE, BEGINNING = 20.0, 9.0, 60.0


@dataclass(frozen=True)
class Point:
    """Steps of one kind.

    Attributes:
        length: of their rows.
        micro_batches: that each of them had.
        window: how far back a token saw; None: without limit.
        steps: that were timed, those that warmed up left out.
        seconds: of a step, the median; what some steps take more, because the optimizer does more in them, is spread
            over all. On a CPU that is shared with other work, the median of its CPU-seconds at the pace of all steps.
        cpu_seconds: of a step, over all threads.
    """

    length: int
    micro_batches: int
    window: int | None
    steps: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Measured:
    """What a measurement found.

    Attributes:
        points: the longest rows first.
        micro_batches: of a step of full size.
        peak_bytes: the most memory that was held; None where nobody counts it.
        evaluation_seconds: for each held-out token.
        checkpoint_seconds: of one checkpoint.
        float32_ratio: seconds of a step over those of a float32 step; None where that was not asked.
        threads: of the CPU.
        spent: seconds that all of it took.
        failure: why there is nothing else in here; empty where there is.
        is_slow: whether it was given up, and might have succeeded.
        notes: how it was done, where that is not as usual.
    """

    points: tuple[Point, ...] = ()
    micro_batches: int = 1
    peak_bytes: int | None = None
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    float32_ratio: float | None = None
    threads: int = 0
    spent: float = 0.0
    failure: str = ""
    is_slow: bool = False
    notes: tuple[str, ...] = ()

    def step_seconds(self, length: int, share: float = 1.0, window: int | None = None) -> float:
        """Return about the seconds of a step.

        Args:
            length: of its rows; one of those measured.
            share: of its rows in those of a step of full size.
            window: how far back a token sees; None: without limit.
        """
        free = [point for point in self.points if point.window is None]
        same = [point for point in free if point.length == length] or free
        seconds = self._of_size(max(same, key=lambda point: point.micro_batches), self.micro_batches * share)
        least = next((point for point in self.points if point.window is not None), None)
        if window is None or least is None:
            return seconds
        limited = self._of_size(least, self.micro_batches * share)
        grown = min(1.0, max(0.0, (window - least.window) / max(length - least.window, 1)))
        return limited * (1 - grown) + seconds * grown

    def _of_size(self, point: Point, micro_batches: float) -> float:
        """Return seconds of a step like `point` with another number of micro-batches; the update costs the same."""
        fixed = min(self.update_seconds, point.seconds)
        return fixed + (point.seconds - fixed) * micro_batches / point.micro_batches

    @property
    def update_seconds(self) -> float:
        """Seconds of a step that do not depend on its size; 0 where steps of one size alone were timed."""
        longest = [point for point in self.points if point.length == self.points[0].length and point.window is None]
        small, large = (pick(longest, key=lambda point: point.micro_batches) for pick in (min, max))
        if small.micro_batches == large.micro_batches:
            return 0.0
        slope = (large.seconds - small.seconds) / (large.micro_batches - small.micro_batches)
        return min(max(0.0, small.seconds - slope * small.micro_batches), small.seconds)


def measure(recipe: Recipe, folder: Path, *, seconds: float = SECONDS) -> Measured:
    """Return what real steps of `recipe` take here, done in a fresh process that is thrown away.

    Args:
        recipe: of the run.
        folder: of its prepared data.
        seconds: to aim at; a single step may take longer.
    """
    request = {"recipe": recipe.to_toml(), "data": str(folder), "seconds": seconds}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_home(), os.environ.get("PYTHONPATH")]))}
    limit = BEGINNING + PATIENCE * seconds
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hasten.planning.trial"],
            input=json.dumps(request), capture_output=True, text=True, env=environment, check=False,
            timeout=limit, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Measured(failure=f"a few of them took more than {limit:.0f} s", is_slow=True)
    except OSError as error:
        return Measured(failure=f"no process could be started ({error.strerror})")
    if done.returncode == 0:
        return read(json.loads(done.stdout.splitlines()[-1]))
    if done.returncode == -signal.SIGKILL:
        return Measured(failure="the machine ended it, as it does when memory runs out")
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return Measured(failure=printable(said[-1][:300]))


def read(values: Mapping[str, Any]) -> Measured:
    """Return what a trial wrote as JSON."""
    points = tuple(Point(**point) for point in values["points"])
    return Measured(**{**values, "points": points, "notes": tuple(values["notes"])})


def _home() -> str:
    """Return where this package lies, so that the other process finds the same one."""
    import hasten

    return str(Path(hasten.__file__).parent.parent)

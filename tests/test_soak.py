"""A long run: memory, open files and the cost of a step stay what they were at its beginning."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sizes import size
from small_runs import small_settings

from hasten.loop import train
from hasten.recipe import resolve

psutil = pytest.importorskip("psutil")

SOAK_STEPS = 100_000
WARM_STEPS = 5_000


def long_run(folder: Path, text: str, steps: int, save_every: int = 500) -> list[str]:
    changed = {"budget": steps, "checkpoint.every": save_every, "evaluate.every": 1000, "out": folder / "run"}
    kept = [word for word in small_settings(folder, text) if word.partition("=")[0] not in changed]
    return [*kept, *(f"{key}={value}" for key, value in changed.items())]


def test_steps_and_saves_leave_no_objects_and_no_open_files_behind(library_text: str, own_folder: Path) -> None:
    counts: list[tuple[int, int]] = []

    def count(event: Any) -> None:
        if event.kind == "step" and event.step in (299, 499, 699):
            gc.collect()
            counts.append((sys.getallocatedblocks(), psutil.Process().num_fds()))

    train(resolve(None, long_run(own_folder, library_text, 720, save_every=50)).recipe, hooks=[count])
    (objects, descriptors), *later = counts
    for more, open_now in later:
        assert more - objects < 600  # a list of one tuple of numbers a step would be 1,200 by the end
        assert open_now == descriptors


@dataclass
class Watched:
    """A run in a process of its own, looked at from outside: its step, CPU-seconds, bytes of memory, open files."""

    out: Path
    process: Any
    seen: list[tuple[int, float, int, int]] = field(default_factory=list)

    def look(self) -> int:
        """Take note of what it has and return its step."""
        try:
            cpu, memory = self.process.cpu_times(), own_memory(self.process.pid)
            self.seen.append((last_step(self.out), cpu.user + cpu.system, memory, self.process.num_fds()))
        except (psutil.Error, KeyError, OSError):  # it has just ended
            return SOAK_STEPS
        return self.seen[-1][0]


def started(folder: Path, text: str) -> Watched:
    folder.mkdir()
    words = long_run(folder, text, SOAK_STEPS)
    command = [sys.executable, "-m", "hasten", "train", "--no-report", *words]
    return Watched(folder / "run", psutil.Popen(command, stdout=subprocess.DEVNULL))


@pytest.mark.heavy
@pytest.mark.torture
@pytest.mark.timeout(6 * 3600)
@pytest.mark.skipif(not size(0, 1), reason="a hundred thousand steps: make torture")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_thousand_steps_cost_no_more_memory_files_or_time_at_the_end(
    library_text: str, own_folder: Path
) -> None:
    """The cost of its last steps is held against that of a run just begun, which shares a core with it."""
    old, new = started(own_folder / "old", library_text), None
    pairs: list[tuple[tuple[int, float], tuple[int, float]]] = []
    while old.process.poll() is None:
        time.sleep(1.0)
        step = old.look()
        if new is None and step >= 0.85 * SOAK_STEPS:
            new = started(own_folder / "new", library_text)
            for run in (old, new):  # one core in turns, a few milliseconds each: what is the matter there hits both
                run.process.cpu_affinity([min(os.sched_getaffinity(0))])
        if new is not None and WARM_STEPS // 2 < new.look() < SOAK_STEPS and step < SOAK_STEPS:
            pairs.append((old.seen[-1][:2], new.seen[-1][:2]))
    new.process.terminate()
    assert old.process.returncode == 0
    assert new.process.wait() == 143
    figures = {**growth(old.seen), "seconds of a step": drift(pairs), "windows": len(pairs)}
    print(f"\n{SOAK_STEPS:,} steps: {figures}")
    if kept := os.environ.get("HASTEN_SOAK_LOOKS"):
        Path(kept).write_text(json.dumps({"old": old.seen, "new": new.seen}))
    assert figures["memory"] < 1.01
    assert figures["descriptors"] == 0
    assert abs(figures["seconds of a step"] - 1) < 0.03


def growth(seen: Sequence[tuple[int, float, int, int]]) -> dict[str, float]:
    """Return memory and open files in the last tenth of a run over those in its first, warm-up and end left out."""
    inside = [look for look in seen if WARM_STEPS <= look[0] < SOAK_STEPS]
    first, last = inside[: len(inside) // 10], inside[-(len(inside) // 10) :]
    return {
        "memory": statistics.median(look[2] for look in last) / statistics.median(look[2] for look in first),
        "descriptors": min(look[3] for look in last) - min(look[3] for look in first),
    }


def drift(pairs: Sequence[tuple[tuple[int, float], tuple[int, float]]]) -> float:
    """Return CPU-seconds a step of the old run over those of the new one: the median over windows of twenty looks."""
    ratios = []
    for begin in range(0, len(pairs) - 20, 20):
        costs = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(pairs[begin], pairs[begin + 20])]
        ratios.append(costs[0] / costs[1])
    return statistics.median(ratios)


def own_memory(pid: int) -> int:
    """Return the bytes of memory that a process wrote itself, in RAM and swapped out.

    What it maps of files counts or does not, as other processes map the same libraries: 8 % of a run's memory here.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def last_step(run: Path) -> int:
    """Return the step of the last whole line of the metrics; 0 while there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    return json.loads(whole.rpartition(b"\n")[2])["step"] if whole else 0

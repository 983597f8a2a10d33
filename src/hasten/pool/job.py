"""A job of a pool: a command with a log, what it needs, and how it ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import RecipeError, RunError, printable

# A run that is asked to stop finishes its step and writes a checkpoint.
PATIENCE_SECONDS = 120.0
# How the command line begins an error, which may have several lines.
_PREFIX = "hasten: "
_TAIL_BYTES = 1 << 14
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Places:
    """How many runs go side by side, and what each of them has.

    Args:
        workers: runs at a time.
        threads: CPU threads of a run.
        gpus: GPUs that a run is to be given; 0 where nobody hands them out.
        memory_bytes: memory that all runs share; None: that of this machine, 0: not known.
    """

    workers: int
    threads: int
    gpus: int = 0
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Job:
    """One process to run.

    Args:
        name: for people.
        command: the program and its arguments. Its standard input stays open for as long as it may run and is closed
            to ask it to stop (``hasten train --attached`` then saves and leaves).
        log: the file that its output is appended to.
        threads: CPU threads that its libraries are given.
        gpus: GPUs it is to be given, where the engine hands them out.
        needs: files that must be there before it starts, wherever that is.
        folder: the run folder it writes; on another machine it starts when nobody holds that any more.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    threads: int = 1
    gpus: int = 0
    needs: tuple[Path, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code (negative: the signal that killed it) and the seconds it ran."""

    job: Job
    code: int
    seconds: float


@dataclass(frozen=True)
class Engine:
    """Where jobs run.

    Args:
        places: (device, workers, threads) -> `Places`, as `hasten.pool.places` takes and gives them.
        run_all: as `hasten.pool.run_all`.
    """

    places: Callable[[str, int | None, int | None], Places]
    run_all: Callable[..., Iterator[Outcome]]


def refuse_none(workers: int | None, threads: int | None) -> None:
    """Refuse a number of workers or threads below one.

    Raises:
        RecipeError: it is; the number is named.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise RecipeError(f"{name}={value} is no number of {name}: give at least 1.")


def wait_until_free(folder: Path) -> None:
    """Wait for a trainer that is still saving into a run folder, because its owner was killed a moment ago.

    Raises:
        RunError: it does not leave.
    """
    from hasten.record import RunFolder

    if not folder.is_dir():
        return
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with RunFolder(folder).lock():
                return
        except RunError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def train_command(recipe: Path, *, until: str | int | None = None, allow: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the command that trains, or goes on training, the recipe in a file; it stops with its owner.

    Args:
        recipe: the file.
        until: where it pauses, if it does.
        allow: what may have changed since the run began, such as ``code``.
    """
    pause = () if until is None else ("--until", str(until))
    allowed = tuple(word for name in allow for word in ("--allow", name))
    return (sys.executable, "-m", "hasten", "train", str(recipe), "--attached", "--no-report", *pause, *allowed)


def last_words(log: Path) -> str:
    """Return what a job said last, on one line: an error of hasten's whole, else its last line; empty for nothing.

    Example:
        >>> last_words(Path("no such log"))
        ''
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    begin = len(lines) - 2  # an error of several lines: its head, indented lines, what to do
    while begin > 0 and lines[begin].startswith("  "):
        begin -= 1
    is_long = begin >= 0 and lines[begin].startswith(_PREFIX) and lines[begin].endswith(":")
    said = lines[begin:] if is_long else lines[-1:]
    return printable(" ".join(line.strip() for line in said).removeprefix(_PREFIX))

"""Runs side by side on this machine: processes with pinned threads, a few at a time; none outlives its owner."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hasten.errors import RecipeError, RunError, printable

POLL_SECONDS = 0.05
# A run that is asked to stop finishes its step and writes a checkpoint.
PATIENCE_SECONDS = 120.0
# How the command line begins an error, which may have several lines.
_PREFIX = "hasten: "
_TAIL_BYTES = 1 << 14
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Places:
    """How many runs go side by side, and the CPU threads each of them has."""

    workers: int
    threads: int


@dataclass(frozen=True)
class Job:
    """One process to run.

    Args:
        name: for people.
        command: the program and its arguments. Its standard input stays open for as long as it may run and is closed
            to ask it to stop (``hasten train --attached`` then saves and leaves).
        log: the file that its output is appended to.
        threads: CPU threads that its libraries are given.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    threads: int = 1


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code (negative: the signal that killed it) and the seconds it ran."""

    job: Job
    code: int
    seconds: float


def places(device: str = "auto", workers: int | None = None, threads: int | None = None) -> Places:
    """Return how many runs to do side by side, and with how many CPU threads each.

    On a CPU one thread each and a run for every core: steps of one thread waste nothing on waiting for
    each other. On a GPU one run at a time, with all cores, since two would share one device and disturb each other's
    time.

    Args:
        device: as in a recipe.
        workers: runs at a time; None decides.
        threads: CPU threads of a run; None decides.

    Raises:
        RecipeError: a number below one.

    Example:
        >>> places("cpu", workers=2, threads=3)
        Places(workers=2, threads=3)
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise RecipeError(f"{name}={value} is no number of {name}: give at least 1.")
    cores = num_cores()
    if _has_gpu(device):
        workers = workers or 1
        return Places(workers, threads or max(1, cores // workers))
    threads = threads or (max(1, cores // workers) if workers else 1)
    return Places(workers or max(1, cores // threads), threads)


def num_cores() -> int:
    """Return the CPU cores that this process may use."""
    with contextlib.suppress(AttributeError):  # only Linux counts what a container or taskset leaves
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _has_gpu(device: str) -> bool:
    if device != "auto":
        return device != "cpu"
    import torch

    return torch.cuda.is_available()


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


def run_all(jobs: Iterable[Job], *, workers: int, on_start: Callable[[Job], None] | None = None) -> Iterator[Outcome]:
    """Run jobs, `workers` at a time, in their order, and yield how each ended as it ends.

    A job is taken from `jobs` only when there is room for it. Where the caller leaves early, by an exception, Ctrl-C or
    by closing the generator, the jobs under way are asked to save and stop, and are waited for; where the caller is
    killed, they notice by themselves.

    Raises:
        RunError: a program cannot be started, or a log cannot be written.
    """
    waiting, running = iter(jobs), []
    try:
        while True:
            while len(running) < workers and (job := next(waiting, None)) is not None:
                running.append(_Running(job))
                if on_start is not None:
                    on_start(job)
            if not running:
                return
            ended = [one for one in running if one.process.poll() is not None]
            if not ended:
                time.sleep(POLL_SECONDS)
            for one in ended:
                running.remove(one)
                yield one.outcome()
    finally:
        for one in running:
            one.ask_to_stop()
        for one in running:
            one.wait()


class _Running:
    """A job under way."""

    def __init__(self, job: Job) -> None:
        self.job, self.began = job, time.monotonic()
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(job.threads)), "PYTHONUNBUFFERED": "1"}
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("ab") as log:
                self.process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    **_own_group(),
                )
        except OSError as error:
            raise RunError(f"{printable(job.name)} cannot be started: {printable(str(error))}.") from error

    def outcome(self) -> Outcome:
        """Return how it ended."""
        self.ask_to_stop()
        return Outcome(self.job, self.process.returncode, time.monotonic() - self.began)

    def ask_to_stop(self) -> None:
        """Close its standard input."""
        stdin: IO[bytes] | None = self.process.stdin
        if stdin is not None:
            with contextlib.suppress(OSError):
                stdin.close()

    def wait(self) -> None:
        """Wait until it has stopped; one that does not is killed."""
        try:
            self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _own_group() -> dict[str, Any]:
    """Keep Ctrl-C of the terminal from the jobs: it is their owner that asks them to stop, once."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}

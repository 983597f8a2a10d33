"""Runs side by side on this machine: processes with pinned threads, a few at a time; none outlives its owner."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from hasten.errors import RunError, printable
from hasten.pool.job import PATIENCE_SECONDS, THREAD_VARIABLES, Engine, Job, Outcome, Places, refuse_none

POLL_SECONDS = 0.05


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
    refuse_none(workers, threads)
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


def run_all(
    jobs: Iterable[Job],
    *,
    workers: int,
    on_start: Callable[[Job], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Outcome]:
    """Run jobs, `workers` at a time, in their order, and yield how each ended as it ends.

    A job is taken from `jobs` only when there is room for it. Where the caller leaves early, by an exception, Ctrl-C or
    by closing the generator, the jobs under way are asked to save and stop, and are waited for; where the caller is
    killed, they notice by themselves.

    Args:
        jobs: what to run.
        workers: how many at a time.
        on_start: called with every job that starts.
        tell: called with a sentence where a job is started again by the engine; this one never does that.

    Raises:
        RunError: a program cannot be started, or a log cannot be written.
    """
    waiting, running = iter(jobs), []
    try:
        while True:
            while len(running) < workers and (job := next(waiting, None)) is not None:
                running.append(Process(job))
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


class Process:
    """A job under way on this machine.

    Args:
        job: what to run.
        home: its current folder; None: ours.
        variables: of its environment, on top of ours.

    Raises:
        RunError: its program cannot be started, or its log cannot be written.
    """

    def __init__(self, job: Job, *, home: Path | None = None, variables: Mapping[str, str] | None = None) -> None:
        self.job, self.began = job, time.monotonic()
        pinned = {**dict.fromkeys(THREAD_VARIABLES, str(job.threads)), "PYTHONUNBUFFERED": "1"}
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("ab") as log:
                self.process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(variables or {}), **pinned},
                    cwd=home,
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


@contextlib.contextmanager
def opened() -> Iterator[Engine]:
    """Yield the engine of this machine; there is nothing to open."""
    yield LOCAL


LOCAL = Engine(places, run_all)

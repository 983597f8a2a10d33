"""Fetching: blocks of remote shards brought into the cache by a few threads, those that are waited for first."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

# Each waits for one answer at a time: sixteen at 100 ms an answer bring 160 MiB a second, 80 million tokens of text.
THREADS = 16


class _Job:
    """A block on its way."""

    def __init__(self, number: int) -> None:
        self.number, self.is_begun = number, False
        self.is_done = threading.Event()
        self.error: Exception | None = None


class Fetcher:
    """Brings blocks by number, each once however often it is asked for.

    Threads are started when there is something to do and end when there is not; in a forked process there are none,
    and nothing is on its way there.

    Args:
        bring: brings a block; called by several threads.

    Example:
        >>> brought = []
        >>> fetcher = Fetcher(brought.append)
        >>> fetcher.ask([3])
        >>> fetcher.wait(3)
        >>> brought
        [3]
    """

    def __init__(self, bring: Callable[[int], None]) -> None:
        self._bring = bring
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        """In a copy nothing is on its way."""
        return {"_bring": self._bring}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def _begin(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._urgent: deque[_Job] = deque()
        self._later: deque[_Job] = deque()
        self._num_threads = 0

    def ask(self, numbers: Iterable[int], *, urgent: bool = False) -> None:
        """Have blocks brought that are not on their way, behind those asked for before; `urgent` ones first."""
        self._here()
        with self._lock:
            queue = self._urgent if urgent else self._later
            for number in numbers:
                job = self._jobs.get(number)
                if job is None:
                    job = self._jobs[number] = _Job(number)
                elif not urgent or job.is_begun:
                    continue
                queue.append(job)
            waiting = len(self._urgent) + len(self._later)
            while self._num_threads < min(THREADS, waiting):
                self._num_threads += 1
                threading.Thread(target=self._work, name="hasten-stream", daemon=True).start()

    def wait(self, number: int) -> None:
        """Return when a block is not on its way any more; raise what went wrong with it."""
        self._here()
        job = self._jobs.get(number)
        if job is None:
            return
        if not job.is_begun:
            self.ask([number], urgent=True)
        job.is_done.wait()
        if job.error is not None:
            raise job.error

    def forget(self) -> None:
        """Leave out blocks that are not urgent and not begun."""
        self._here()
        with self._lock:
            urgent = set(map(id, self._urgent))
            for job in self._later:
                if not job.is_begun and id(job) not in urgent:
                    self._jobs.pop(job.number, None)
                    job.is_begun = True
                    job.is_done.set()
            self._later.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                job = None
                while job is None and (queue := self._urgent or self._later):
                    job = queue.popleft()
                    job = None if job.is_begun else job  # it was in both queues
                if job is None:
                    self._num_threads -= 1
                    return
                job.is_begun = True
            try:
                self._bring(job.number)
            except Exception as error:  # of interest only to who waits for the block
                job.error = error
            finally:
                with self._lock:
                    self._jobs.pop(job.number, None)
                job.is_done.set()

    def _here(self) -> None:
        if self._pid != os.getpid():
            self._begin()

"""Workers: a loader that counts what it hands out, and notices a worker that was killed or stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader

from hasten.data.items import Item
from hasten.errors import DataError, RunError

if TYPE_CHECKING:
    from hasten.data.dataset import PackedBatches

# After waiting so long for an item the workers are looked at. Slow ones are waited for.
LOOK_SECONDS = 4
# A worker is stopped if it is at two looks: after Ctrl-Z and `fg` this process may run before its workers do.
_BETWEEN_LOOKS = 0.5
# A worker whose pipe is broken is dead; the system takes a moment to say so.
_GONE_SECONDS = 2


class CountingLoader(DataLoader[Item]):
    """A `DataLoader` that tells the dataset of this process what it has handed out.

    `torch` notices a worker that was killed, but waits for ever for one that was stopped (SIGSTOP, a debugger): even
    its `timeout` does not end the wait for a tensor that a worker has promised and not delivered. So a thread looks at
    the workers when an item does not come, and ends one that is stopped. Whether a process is stopped is read from
    ``/proc``, on Linux; elsewhere a stopped worker is waited for, as by `torch`.
    """

    dataset: PackedBatches

    def __iter__(self) -> Iterator[Item]:  # type: ignore[override]
        data = self.dataset
        begin = data._item
        data._is_counted = True  # as workers are copied from here, they need not tell
        try:
            iterator = super().__iter__()
        finally:
            data._is_counted = False
        with closing(_Watch(getattr(iterator, "_workers", ()))) as watch:
            number = 0
            while (item := watch.next(iterator)) is not None:
                if isinstance(item, DataError):
                    try:
                        raise item
                    finally:
                        del item  # else the error and this frame would keep each other, and the workers, alive
                number += 1
                data._moved(begin + number)
                yield item


def told(items: Iterator[Item]) -> Iterator[Item | DataError]:
    """Yield items, then, where they end in an error about the data, that error.

    Raised in a worker it would arrive as the text of a traceback, cut off before it says what is wrong.
    """
    try:
        yield from items
    except DataError as error:
        yield error


class _Watch:
    """Waits for items, and says which worker is to blame when there will be none."""

    def __init__(self, workers: Sequence[BaseProcess]) -> None:
        self._workers = workers
        self._waits_since: float | None = None
        self._stopped: set[int] = set()
        self._ended = threading.Event()
        if workers:
            threading.Thread(target=self._look, name="hasten-workers", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def next(self, iterator: Iterator[Item]) -> Item | None:
        """Return the next item; None after the last.

        Raises:
            RunError: a worker was killed or stopped.
        """
        self._waits_since = time.monotonic()
        try:
            return next(iterator, None)
        except (RuntimeError, OSError, EOFError) as error:
            if (how := self._blamed(error)) is None:
                raise
            raise RunError(
                f"{how}: make a new loader of the same dataset, which goes on after the last item that was handed out."
            ) from error
        finally:
            self._waits_since = None

    def _blamed(self, error: Exception) -> str | None:
        """Return what became of the first worker that is gone; None where all are there, and the error is another."""
        patience = time.monotonic() + (0 if isinstance(error, RuntimeError) else _GONE_SECONDS)
        while True:
            for number, worker in enumerate(self._workers):
                if worker.exitcode:
                    return f"Worker {number} of the loader (process {worker.pid}) {self._end_of(number)}"
            if time.monotonic() >= patience:
                return None
            time.sleep(0.05)

    def _end_of(self, number: int) -> str:
        code = self._workers[number].exitcode
        if number in self._stopped:
            return "was stopped, gave nothing more and was ended"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _look(self) -> None:
        before: set[int] = set()
        while not self._ended.wait(_BETWEEN_LOOKS):
            since = self._waits_since
            if since is None or time.monotonic() - since < LOOK_SECONDS:
                before = set()
                continue
            now = {number for number, worker in enumerate(self._workers) if _is_stopped(worker)}
            self._stopped |= now & before
            for number in now & before:
                # It heeds no other signal, and alive it would keep this process from ending.
                with suppress(ProcessLookupError):
                    os.kill(self._workers[number].pid, signal.SIGKILL)
            before = now


def _is_stopped(worker: BaseProcess) -> bool:
    try:
        status = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "Tt"

"""Checkpoints written by a thread of their own, one at a time, while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hasten.checkpoint.steps import Groups, save
from hasten.distributed import ALONE, Ranks
from hasten.errors import CheckpointError, RunError


@dataclass(frozen=True)
class Written:
    """What became of a checkpoint.

    Attributes:
        step: that it is of.
        path: its folder; None if it could not be written.
        error: one sentence that says why; None if it was written.
        seconds: that writing took, in its thread.
    """

    step: int
    path: Path | None
    error: RunError | CheckpointError | None
    seconds: float


class Writer:
    """Writes the checkpoints of one run, in the order in which they are handed over.

    One is written at a time: a second one waits until the first is on the disk, so a slow disk slows training down
    instead of filling the memory. What cannot be written is reported, never raised here: the older checkpoints are
    whole, and the next one is tried as if nothing had been.

    Args:
        root: folder of the run's checkpoints; no one else may save into it meanwhile.
        keep: checkpoints to leave in place, at least 1.
        ranks: that write each checkpoint together, all of which make the same calls of `write` in the same order.
            The thread speaks through it, so it needs a group that nothing else uses, with a time limit that the
            slowest disk keeps. What `done` returns is what has ended as this rank sees it: another one may be told
            of it a step later. `wait` returns the same steps, written or not, on all.

    Example:
        >>> import tempfile, torch
        >>> writer = Writer(Path(tempfile.mkdtemp()), keep=2)
        >>> writer.write(10, {"model": {"w": torch.ones(3)}}, {"tokens": 5})
        >>> [(written.step, written.path.name, written.error) for written in writer.wait()]
        [(10, 'step-00000010', None)]
    """

    def __init__(self, root: Path, keep: int, ranks: Ranks = ALONE) -> None:
        self.root, self._keep, self._ranks = root, keep, ranks
        self._thread: threading.Thread | None = None
        self._written: list[Written] = []
        self._failure: Exception | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Ctrl-C leaves at once; anything else may still have a good checkpoint on its way.
        if error is None or isinstance(error, Exception):
            self._join()

    def write(self, step: int, tensors: Groups | Callable[[], Groups], state: Mapping[str, Any] | None) -> None:
        """Begin to write a checkpoint, once the one before is through.

        Args:
            step: optimizer steps done.
            tensors: groups of named tensors, or a function that returns them and is called in the thread; nobody may
                change them until the checkpoint is written. Of several ranks each gives whole tensors that no other
                one gives.
            state: plain data, likewise; that of the first rank is taken.
        """
        self._join()
        # A daemon: a second Ctrl-C ends the process at once, and a save that was cut off does no harm.
        self._thread = threading.Thread(target=self._write, args=(step, tensors, state), name="save", daemon=True)
        self._thread.start()

    def done(self) -> list[Written]:
        """Return what has ended since this was last asked, without waiting."""
        if self._thread is not None and self._thread.is_alive():
            return []
        self._join()
        taken, self._written = self._written, []
        return taken

    def wait(self) -> list[Written]:
        """Return what has ended since `done` or this was last asked, once everything has."""
        self._join()
        return self.done()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, step: int, tensors: Groups | Callable[[], Groups], state: Mapping[str, Any] | None) -> None:
        began = time.perf_counter()
        path, error = None, None
        try:
            path = save(self.root, step, tensors, state, keep=self._keep, ranks=self._ranks)
        except (RunError, CheckpointError) as failure:
            error = failure
        except MemoryError:
            error = RunError(f"Could not save step {step}: there is no memory left; older checkpoints are untouched.")
        except Exception as failure:  # a fault of ours: raised where the run can see it, never lost with the thread
            self._failure = failure
            return
        self._written.append(Written(step, path, error, time.perf_counter() - began))

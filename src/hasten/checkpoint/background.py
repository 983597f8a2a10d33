"""Checkpoints written by a thread of their own, one at a time, while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from hasten.checkpoint.steps import save
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

    Example:
        >>> import tempfile, torch
        >>> writer = Writer(Path(tempfile.mkdtemp()), keep=2)
        >>> writer.write(10, {"model": {"w": torch.ones(3)}}, {"tokens": 5})
        >>> [(written.step, written.path.name, written.error) for written in writer.wait()]
        [(10, 'step-00000010', None)]
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self._keep = root, keep
        self._thread: threading.Thread | None = None
        self._written: list[Written] = []
        self._failure: Exception | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Ctrl-C leaves at once; anything else may still have a good checkpoint on its way.
        if error is None or isinstance(error, Exception):
            self._join()

    def write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint, once the one before is through.

        Args:
            step: optimizer steps done.
            tensors: groups of named tensors; nobody may change them until the checkpoint is written.
            state: plain data, likewise.
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

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        path, error = None, None
        try:
            path = save(self.root, step, tensors, state, keep=self._keep)
        except (RunError, CheckpointError) as failure:
            error = failure
        except MemoryError:
            error = RunError(f"Could not save step {step}: there is no memory left; older checkpoints are untouched.")
        except Exception as failure:  # a fault of ours: raised where the run can see it, never lost with the thread
            self._failure = failure
            return
        self._written.append(Written(step, path, error, time.perf_counter() - began))

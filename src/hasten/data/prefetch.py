"""Prefetching: the next step is prepared by a thread while the model works on this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from hasten.data.batches import Batch, Batches, Buffers

# One batch is being used, the one before it is still valid, and the next is being written.
_BUFFERS = 3

_Taken = tuple[list[Batch], tuple[int, ...]]
_Asked = tuple[tuple[int, ...], int, "int | None"]


class Prefetched:
    """`Batches` whose next step is ready when it is asked for, in memory that is used again.

    The same batches, bit for bit. The step after the one handed out is prepared by one thread; whoever then asks for
    another one (because a schedule was planned anew, or data was skipped) gets that instead, prepared at once. An
    error in the thread is raised where its step is asked for.

    A batch stays as it is until the one after next is asked for; keep a copy for longer. There is one thread, started
    by the first `take` and ended by `close`, at the end of a ``with`` block, or with this object.

    What is gained is the time that the loader takes while the processor has nothing else to do: on a GPU all of it,
    on a CPU whose cores the model keeps busy nothing.

    Args:
        batches: what is prepared. Nobody else may take from it or its source meanwhile.

    Example:
        >>> from hasten.data.batches import RowSource
        >>> from hasten.data.documents import documents_of
        >>> from hasten.data.rows import ChunkedRows
        >>> rows = ChunkedRows(documents_of([[5, 6, 7], [8]], document_token=0), seq_len=4)
        >>> with Prefetched(Batches(RowSource(rows, seed=0), seq_len=4, micro_rows=2)) as prefetched:
        ...     step, position = prefetched.take((0,), rows=2)
        >>> position
        (2,)
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self._buffers = [Buffers(batches.document_mask) for _ in range(_BUFFERS)]
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[_Asked, Future[_Taken]] | None = None

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def take(
        self,
        position: tuple[int, ...],
        *,
        rows: int,
        length: int | None = None,
        then: tuple[int, int | None] | None = None,
    ) -> _Taken:
        """Return what `Batches.take` returns, and begin with the step after it.

        Args:
            position: where the step begins.
            rows: of the step.
            length: tokens of a row as the model sees it.
            then: rows and length that the next step will be asked for with; None: the same ones.
        """
        asked = (position, rows, length)
        taken = self._awaited(asked)
        if taken is None:
            taken = self.batches.take(position, rows=rows, length=length, into=self._buffers[0])
        self._buffers = [*self._buffers[1:], self._buffers[0]]
        next_rows, next_length = then or (rows, length)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="hasten-batches")
        # A bound method of this object would keep it, and with it the thread, alive.
        future = self._thread.submit(
            self.batches.take, taken[1], rows=next_rows, length=next_length, into=self._buffers[0]
        )
        self._ahead = ((taken[1], next_rows, next_length), future)
        return taken

    def close(self) -> None:
        """End the thread, after what it is doing. `take` may be called again and starts another."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._ahead = None

    def _awaited(self, asked: _Asked) -> _Taken | None:
        """Return what the thread has prepared if it is what is asked for, and wait for it in any case.

        Packed windows are kept in the rows themselves, which two threads may not change at once.
        """
        if self._ahead is None:
            return None
        (prepared, future), self._ahead = self._ahead, None
        if prepared == asked:
            return future.result()
        if not future.cancel():
            future.exception()
        return None

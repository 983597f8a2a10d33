"""Windows: runs of consecutive documents, each packed by itself into rows.

How a window's documents lie in rows is a pure function of their lengths: it is made again whenever it is needed, and
kept for as long as the order stays near it. Stored are only the rows that each window has. So a row number leads to its
tokens in constant memory, whatever the size of the corpus.

Dimensions: W windows, K classes of row length, N documents of a window, R rows, T tokens of a row, P pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hasten.data.ahead import far_of
from hasten.data.documents import DocumentPart, Documents, parts_of
from hasten.data.fitting import OVERFLOWS, PACKINGS, Packing, bucketed
from hasten.data.order import GROUP, EndlessOrder, WindowOrder
from hasten.data.row_counts import RowCounts, cached_counts, keep_counts
from hasten.data.rows import Order, Pieces, blocks, lay
from hasten.data.shard_files import spread
from hasten.errors import DataError, RecipeError, nearest

# Packing within 65,536 documents costs 0.01 % of utilisation against packing them all at once, and takes 9 ms.
WINDOW_DOCUMENTS = 1 << 16
WINDOW_TOKENS = 1 << 26
# What is kept of a window is 24 bytes for each piece, and long documents are a piece for each row: 8 MB at most.
WINDOW_ROWS = 1 << 18


@dataclass(frozen=True)
class Pack:
    """How a window of documents becomes rows, as a value: ``pack(lengths)`` gives one `Packing` for each capacity.

    Args:
        packing: a name of `hasten.data.fitting.PACKINGS`, or ``bucketed`` for rows of several lengths.
        capacities: tokens of a row, ascending; one of them unless bucketed.
        overflow: what becomes of documents longer than the longest row: ``split``, ``truncate`` or ``drop``.

    Raises:
        RecipeError: an unknown name, or settings that contradict each other.

    Example:
        >>> (packing,) = Pack("best_fit", (4,))(np.array([3, 1, 5]))
        >>> packing.num_rows
        3
    """

    packing: str
    capacities: tuple[int, ...]
    overflow: str = "split"

    def __post_init__(self) -> None:
        known = sorted([*PACKINGS, "bucketed"])
        if self.packing not in known:
            guess = nearest(self.packing, known)
            raise RecipeError(f"packing={self.packing!r} is unknown{guess}: give one of {', '.join(known)}.")
        if self.overflow not in OVERFLOWS:
            guess = nearest(self.overflow, OVERFLOWS)
            raise RecipeError(f"overflow={self.overflow!r} is unknown{guess}: give one of {', '.join(OVERFLOWS)}.")
        if self.packing == "chunk" and self.overflow != "split":
            raise RecipeError(
                f"overflow={self.overflow!r} has no effect with packing='chunk', which cuts documents wherever a row "
                "ends: leave it out."
            )
        if self.packing != "bucketed" and len(self.capacities) != 1:
            raise RecipeError(f"packing={self.packing!r} makes rows of one length; got {len(self.capacities)} of them.")

    def __call__(self, lengths_N: np.ndarray) -> tuple[Packing, ...]:
        """Return the rows of documents with `lengths_N` tokens."""
        if self.packing == "bucketed":
            return bucketed(lengths_N, self.capacities, overflow=self.overflow)
        if self.packing == "chunk":
            return (PACKINGS["chunk"](lengths_N, self.capacities[0]),)
        return (PACKINGS[self.packing](lengths_N, self.capacities[0], overflow=self.overflow),)


@dataclass(frozen=True)
class Report:
    """What became of the tokens of a corpus in one epoch; every token is in exactly one of the counts.

    Attributes:
        documents: in the corpus.
        tokens: in the corpus, document tokens included.
        rows: rows of all lengths.
        room: positions in them, padding included.
        targets: tokens that are an input and have one to predict.
        lost: the other tokens by cause: ``truncated``, ``dropped``, and ``last``, after which nothing follows, so that
            they are predicted but predict nothing.
        cuts: documents in more than one piece although a row could hold them.
    """

    documents: int
    tokens: int
    rows: int
    room: int
    targets: int
    lost: dict[str, int]
    cuts: int

    @property
    def utilisation(self) -> float:
        """Share of the positions that carry loss."""
        return self.targets / self.room if self.room else 1.0


@dataclass(frozen=True)
class _Plan:
    """The rows of one window and class: where in the stream their pieces begin."""

    starts_P: np.ndarray
    lengths_P: np.ndarray
    firsts_R1: np.ndarray


class Windows:
    """The rows of a corpus, packed window by window.

    Every token that has one after it is in one row, or is counted in `report`. A document's last token is followed by
    the token that begins the next document; the very last token of the stream, and the last of each document where
    documents have no first token in common, are targets only.

    Args:
        documents: the corpus.
        pack: how a window becomes rows, one packing for each class of row length; a pure function.
        counts: what packing makes of every window. Left out, it is looked up in the cache, or found by packing every
            window once (7 million documents a CPU-second) and kept there.
        group: windows whose rows are mixed with each other.
        window_documents: documents of a window; left out, what makes about `window_tokens`
            and at most about `WINDOW_ROWS`.
        window_tokens: tokens of a window.

    Raises:
        DataError: there is nothing to predict.
    """

    def __init__(
        self,
        documents: Documents,
        pack: Callable[[np.ndarray], tuple[Packing, ...]],
        *,
        counts: RowCounts | None = None,
        group: int = GROUP,
        window_documents: int | None = None,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        if documents.num_tokens < 2:
            raise DataError(
                f"The text has {documents.num_tokens} token{'s' * (documents.num_tokens != 1)}, and there is nothing "
                "to predict in fewer than 2; give more text."
            )
        mean = max(1, documents.num_tokens // documents.num_documents)
        self.documents, self.pack, self.group = documents, pack, group
        self.capacities = tuple(packing.capacity for packing in pack(np.empty(0, np.int64)))
        room = min(window_tokens, WINDOW_ROWS * self.capacities[-1])
        self.window_documents = window_documents or max(1, min(WINDOW_DOCUMENTS, room // mean))
        self.num_windows = -(-documents.num_documents // self.window_documents)
        self._packed: dict[int, tuple[_Plan, ...]] = {}
        self.counts = counts or self._counted()
        assert self.counts.rows_WK.shape == (self.num_windows, len(self.capacities)), self.counts.rows_WK.shape
        if not self.counts.rows_WK.any():
            raise DataError(f"No token of the text has another to predict or is kept: {self.report}.")

    @property
    def report(self) -> Report:
        """What became of the tokens, by cause."""
        counts, documents = self.counts, self.documents
        rows_K, targets = counts.rows_WK.sum(axis=0), int(counts.tokens_WK.sum())
        lost = dict(counts.lost)
        lost["last"] = documents.num_tokens - targets - sum(lost.values())
        return Report(
            documents=documents.num_documents,
            tokens=documents.num_tokens,
            rows=int(rows_K.sum()),
            room=sum(int(rows) * length for rows, length in zip(rows_K, self.capacities)),
            targets=targets,
            lost={cause: count for cause, count in lost.items() if count},
            cuts=counts.cuts,
        )

    def rows(self, number: int = 0) -> WindowRows:
        """Return the rows of one class; it may have none."""
        return WindowRows(self, number)

    def plan(self, window: int, number: int) -> _Plan:
        """Return the rows of one window and class."""
        if (known := self._packed.pop(window, None)) is None:
            known = self._planned(window)[1]
        # Least recently used first. Two groups are in use where one passes into the next.
        self._packed[window] = known
        while len(self._packed) > 2 * self.group + 1:
            self._packed.pop(next(iter(self._packed)))
        return known[number]

    def __getstate__(self) -> dict[str, object]:
        """A copy in another process packs for itself."""
        return {**vars(self), "_packed": {}}

    def _planned(self, window: int) -> tuple[tuple[Packing, ...], tuple[_Plan, ...]]:
        starts_N, lengths_N = self._lengths(window)
        packings = self.pack(lengths_N)
        plans = tuple(
            _Plan(starts_N[packing.documents_P] + packing.offsets_P, packing.lengths_P, packing.firsts_R1)
            for packing in packings
        )
        return packings, plans

    def _lengths(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the documents of a window begin and how many of their tokens have one after them."""
        first = window * self.window_documents
        stop = min(first + self.window_documents, self.documents.num_documents)
        starts_N1 = self.documents.starts(first, stop)
        if self.documents.document_token is None:
            ends_N = starts_N1[1:] - 1
        else:
            ends_N = np.minimum(starts_N1[1:], self.documents.num_tokens - 1)
        return starts_N1[:-1], np.maximum(ends_N - starts_N1[:-1], 0)

    def _counted(self) -> RowCounts:
        packings = (self._planned(window)[0] for window in range(self.num_windows))
        # Few windows are counted faster than looked up, and a function of the user's has no name to be kept under.
        if self.num_windows <= self.group or not isinstance(self.pack, Pack):
            return RowCounts.of(packings)
        key = f"{self.documents.fingerprint} {self.pack} {self.window_documents}"
        if (counts := cached_counts(key)) is None:
            counts = RowCounts.of(packings)
            keep_counts(key, counts)
        return counts


class WindowRows:
    """The rows of one class of `Windows`."""

    def __init__(self, windows: Windows, number: int) -> None:
        rows_W = windows.counts.rows_WK[:, number]
        self._windows, self._number = windows, number
        self._first_rows_W1 = np.concatenate([[0], np.cumsum(rows_W)])
        self.seq_len = windows.capacities[number]
        self.num_rows = int(self._first_rows_W1[-1])
        self.num_targets = int(windows.counts.tokens_WK[:, number].sum())
        self.most_pieces = windows.counts.most_pieces_K[number]
        self.filler = windows.documents.document_token or 0
        self.far = far_of(windows.documents)
        self._table = self._empty()

    def fill(
        self, row_numbers_R: np.ndarray, tokens_RT: np.ndarray, labels_RT: np.ndarray, ids_RT: np.ndarray | None = None
    ) -> np.ndarray:
        """Write rows into arrays of shape ``(R, seq_len)``; return each row's number of real targets."""
        targets_R = np.empty(len(row_numbers_R), np.int64)
        for cut in blocks(len(row_numbers_R), self.seq_len):
            ids = None if ids_RT is None else ids_RT[cut]
            pieces = self._pieces(row_numbers_R[cut])
            targets_R[cut] = lay(self._windows.documents, pieces, tokens_RT[cut], labels_RT[cut], ids, self.filler)
        return targets_R

    def __getstate__(self) -> dict[str, object]:
        """A copy in another process packs for itself."""
        return {**vars(self), "_table": self._empty()}

    def order(self, seed: int, purpose: str = "rows") -> Order:
        """Return an endless shuffled order of the row numbers, in which rows near in time lie in few windows."""
        windows = self._windows
        if windows.num_windows <= windows.group:
            return EndlessOrder(self.num_rows, seed=seed, purpose=purpose)
        return WindowOrder(np.diff(self._first_rows_W1), seed=seed, purpose=purpose, group=windows.group)

    def blocks(self, row_numbers_R: np.ndarray) -> np.ndarray:
        """Return the numbers of the blocks of `far` that hold rows, int64."""
        pieces = self._pieces(row_numbers_R)
        return self.far.blocks(pieces.starts_P, pieces.lengths_P + 1)

    def parts(self, row_number: int) -> list[DocumentPart]:
        """Return what a row holds of which documents, in order."""
        pieces = self._pieces(np.array([row_number]))
        found = (
            parts_of(self._windows.documents, start, length)
            for start, length in zip(pieces.starts_P.tolist(), pieces.lengths_P.tolist())
        )
        return [part for parts in found for part in parts]

    def _pieces(self, row_numbers_R: np.ndarray) -> Pieces:
        window_R = self._first_rows_W1.searchsorted(row_numbers_R, side="right") - 1
        rows = row_numbers_R + self._table.shift_W[window_R]
        if (rows < 0).any():
            self._table = self._joined(window_R)
            rows = row_numbers_R + self._table.shift_W[window_R]
        table = self._table
        firsts_R = table.firsts_R1[rows]
        counts_R = table.firsts_R1[rows + 1] - firsts_R
        chosen = spread(firsts_R, counts_R)
        return Pieces(table.starts_P[chosen], table.lengths_P[chosen], counts_R)

    def _empty(self) -> _Table:
        nothing = np.empty(0, np.int64)
        return _Table((), np.full(len(self._first_rows_W1) - 1, -self.num_rows), nothing, nothing, nothing)

    def _joined(self, window_R: np.ndarray) -> _Table:
        """Return the table of the windows that are needed now, and of those used last as far as they are kept.

        Looking rows up in each window by itself took as long as the gather of their tokens.
        """
        needed = np.unique(window_R).tolist()
        kept = [window for window in self._table.windows if window not in needed]
        room = max(0, 2 * self._windows.group - len(needed))
        windows = kept[len(kept) - min(room, len(kept)) :] + needed
        plans = [self._windows.plan(window, self._number) for window in windows]
        shift_W = np.full(len(self._first_rows_W1) - 1, -self.num_rows)
        firsts, num_rows, num_pieces = [], 0, 0
        for window, plan in zip(windows, plans):
            shift_W[window] = num_rows - self._first_rows_W1[window]
            firsts.append(plan.firsts_R1[:-1] + num_pieces)
            num_rows, num_pieces = num_rows + len(plan.firsts_R1) - 1, num_pieces + len(plan.starts_P)
        return _Table(
            windows=tuple(windows),
            shift_W=shift_W,
            starts_P=np.concatenate([plan.starts_P for plan in plans]),
            lengths_P=np.concatenate([plan.lengths_P for plan in plans]),
            firsts_R1=np.concatenate([*firsts, [num_pieces]]),
        )


@dataclass(frozen=True)
class _Table:
    """The rows of several windows behind each other. Row r of window w has the number ``r + shift_W[w]`` here."""

    windows: tuple[int, ...]
    shift_W: np.ndarray
    starts_P: np.ndarray
    lengths_P: np.ndarray
    firsts_R1: np.ndarray

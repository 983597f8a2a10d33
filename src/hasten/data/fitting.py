"""Which documents share a row: packers from document lengths to rows.

Letters at the end of names: N documents, P pieces, R rows, D distinct lengths, I documents or their rests waiting for
a row, longest first, S strips (pieces of one length, one in each of several neighbouring rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from hasten.errors import DataError, RecipeError, nearest

OVERFLOWS = ("split", "truncate", "drop")

_LARGEST_RADIX = 1 << 16  # numpy's stable sort is a radix sort for keys of up to 16 bits, 5x faster than for 64


@dataclass(frozen=True, eq=False)
class Packing:
    """Rows of pieces of documents: row r is the pieces ``firsts_R1[r]`` to ``firsts_R1[r + 1]``, one after another.

    Args:
        documents_P: int64, the document of each piece, as an index into the given lengths.
        offsets_P: int64, tokens of the document in front of the piece.
        lengths_P: int64, tokens of the piece, at least 1.
        firsts_R1: int64, one more than there are rows.
        capacity: tokens that a row holds.
        lost: tokens in no piece by cause, ``truncated`` and ``dropped``.
        cuts: documents in more than one piece although a row would hold them.

    Example:
        >>> packing = best_fit([3, 6, 2], 5)
        >>> packing.num_rows, packing.num_tokens, round(packing.utilisation, 3)
        (3, 11, 0.733)
    """

    documents_P: np.ndarray
    offsets_P: np.ndarray
    lengths_P: np.ndarray
    firsts_R1: np.ndarray
    capacity: int
    lost: dict[str, int]
    cuts: int

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return len(self.firsts_R1) - 1

    @property
    def num_tokens(self) -> int:
        """Return the tokens in all pieces."""
        return int(self.lengths_P.sum())

    @property
    def utilisation(self) -> float:
        """Return the share of the rows that holds tokens; 1.0 without rows, where nothing is wasted."""
        return self.num_tokens / (self.num_rows * self.capacity) if self.num_rows else 1.0


def best_fit(lengths_N: np.ndarray | Sequence[int], capacity: int, *, overflow: str = "split") -> Packing:
    """Return rows packed by best-fit-decreasing: the longest first, each into the fullest row that has room.

    Exact: the rows are as full as those of the textbook's loop over documents, but it is run over the histogram: all
    documents of one length go to all rows of one free space at once, so the cost beside a radix sort depends on the
    number of distinct lengths. No document that fits a row is cut. A longer one gives full rows and a rest, which is
    packed like a document.

    Rows come long to short, and so do the pieces of a row: permute the rows before training on them.

    Args:
        lengths_N: tokens of each document, 0 or more; an empty one gives no piece.
        capacity: tokens of a row, at least 1.
        overflow: what becomes of a document longer than a row: ``split`` keeps all of it, ``truncate`` its first
            `capacity` tokens, ``drop`` nothing.

    Raises:
        DataError: `lengths_N` are no lengths.
        RecipeError: a capacity below 1, or an unknown `overflow`.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973; for documents, Ding et al., arXiv:2404.10830; the
    histogram, Krell et al., arXiv:2107.02027 (theirs approximates best fit, this does not).

    Example:
        >>> packing = best_fit([3, 6, 2], 5)
        >>> packing.documents_P.tolist(), packing.offsets_P.tolist(), packing.lengths_P.tolist()
        ([1, 0, 2, 1], [0, 0, 0, 5], [5, 3, 2, 1])
        >>> packing.firsts_R1.tolist()
        [0, 1, 3, 4]
    """
    (packing,) = bucketed(lengths_N, (capacity,), overflow=overflow)
    return packing


def bucketed(
    lengths_N: np.ndarray | Sequence[int], capacities: Sequence[int], *, overflow: str = "split"
) -> tuple[Packing, ...]:
    """Return rows of several lengths: a document opens a row of the smallest capacity that holds it.

    From the largest capacity to the smallest: the documents of its class are packed by best-fit-decreasing, then
    shorter ones fill the gaps, the longest first, each the smallest gap that has room. What finds no gap waits for its
    own class. With one capacity this is `best_fit`. A document longer than the largest capacity gives full rows of
    that, and a rest of whatever class.

    Args:
        lengths_N: tokens of each document, 0 or more; an empty one gives no piece.
        capacities: tokens of a row in each class, ascending from at least 1.
        overflow: ``split``, ``truncate`` or ``drop``: documents longer than the largest capacity.

    Returns:
        A packing for each capacity, maybe without rows. What was lost is counted in the last.

    Raises:
        DataError: `lengths_N` are no lengths.
        RecipeError: capacities that do not ascend from at least 1, or an unknown `overflow`.

    Example:
        >>> short, long = bucketed([3, 6, 2, 2], (4, 8))
        >>> long.documents_P.tolist(), short.documents_P.tolist(), short.firsts_R1.tolist()
        ([1, 2], [0, 3], [0, 1, 2])
    """
    lengths_N, capacities = _checked(lengths_N, capacities, overflow)
    kept_N, lost = _kept(lengths_N, capacities[-1], overflow)
    whole_rows, rests_N = _whole_rows(kept_N, capacities[-1])
    documents_I = _longest_first(rests_N)
    lengths_D, counts_D = _histogram(rests_N, documents_I)
    packings = []
    for capacity, shorter in zip(reversed(capacities), [*capacities[-2::-1], 0]):
        strips = _fitted(lengths_D, counts_D, capacity, opens_above=shorter)
        taken_I, documents_I = _parted(documents_I, counts_D, strips.taken_D)
        lengths_I = np.repeat(lengths_D, strips.taken_D)
        columns = _placed(strips, whole_rows, (taken_I, kept_N[taken_I] - lengths_I, lengths_I))
        packings.append(Packing(*columns, capacity=capacity, lost=lost, cuts=0))
        counts_D = counts_D - strips.taken_D
        whole_rows, lost = tuple(column[:0] for column in whole_rows), dict.fromkeys(lost, 0)
    return tuple(reversed(packings))


def chunk(lengths_N: np.ndarray | Sequence[int], capacity: int) -> Packing:
    """Return the documents one after another in the given order, cut every `capacity` tokens.

    Nothing is lost and only the last row has room left, but documents that would fit a row are cut.

    Args:
        lengths_N: tokens of each document, 0 or more; an empty one gives no piece.
        capacity: tokens of a row, at least 1.

    Raises:
        DataError: `lengths_N` are no lengths.
        RecipeError: a capacity below 1.

    Example:
        >>> packing = chunk([3, 6, 2], 5)
        >>> packing.lengths_P.tolist(), packing.firsts_R1.tolist(), packing.cuts
        ([3, 2, 4, 1, 1], [0, 2, 4, 5], 1)
    """
    lengths_N, (capacity,) = _checked(lengths_N, (capacity,), "split")
    return _sliced(lengths_N, np.cumsum(lengths_N) - lengths_N, capacity, lost={"truncated": 0, "dropped": 0})


def pad(lengths_N: np.ndarray | Sequence[int], capacity: int, *, overflow: str = "split") -> Packing:
    """Return a row for every document, and for every piece of a longer one, in the given order.

    Args:
        lengths_N: tokens of each document, 0 or more; an empty one gives no row.
        capacity: tokens of a row, at least 1.
        overflow: ``split``, ``truncate`` or ``drop``: documents longer than a row.

    Raises:
        DataError: `lengths_N` are no lengths.
        RecipeError: a capacity below 1, or an unknown `overflow`.

    Example:
        >>> pad([3, 6, 2], 5).lengths_P.tolist()
        [3, 5, 1, 2]
    """
    lengths_N, (capacity,) = _checked(lengths_N, (capacity,), overflow)
    kept_N, lost = _kept(lengths_N, capacity, overflow)
    rows_N = -(-kept_N // capacity)
    return _sliced(kept_N, (np.cumsum(rows_N) - rows_N) * capacity, capacity, lost=lost)


def _checked(
    lengths_N: np.ndarray | Sequence[int], capacities: Sequence[int], overflow: str
) -> tuple[np.ndarray, list[int]]:
    """Return the lengths as int64 and the capacities as ints; refuse what is neither."""
    if overflow not in OVERFLOWS:
        raise RecipeError(
            f"overflow={overflow!r} is unknown{nearest(str(overflow), OVERFLOWS)}; give {', '.join(OVERFLOWS)}."
        )
    ascending = all(low < high for low, high in zip([0, *capacities], capacities))
    if not len(capacities) or not ascending or any(capacity != int(capacity) for capacity in capacities):
        given = ", ".join(str(capacity) for capacity in capacities)
        raise RecipeError(f"Rows of ({given}) tokens cannot be filled; give whole numbers ascending from at least 1.")
    lengths_N = np.asarray(lengths_N)
    if lengths_N.ndim != 1 or (lengths_N.dtype.kind not in "iu" and len(lengths_N)):
        raise DataError(
            f"Lengths of documents are of type {lengths_N.dtype} and shape {lengths_N.shape}; give one whole number "
            "for each document."
        )
    lengths_N = lengths_N.astype(np.int64, copy=False)
    if len(lengths_N) and lengths_N.min() < 0:
        worst = int(lengths_N.argmin())
        raise DataError(f"Document {worst} has the length {lengths_N[worst]}; give lengths of at least 0.")
    return lengths_N, [int(capacity) for capacity in capacities]


def _kept(lengths_N: np.ndarray, capacity: int, overflow: str) -> tuple[np.ndarray, dict[str, int]]:
    """Return how many tokens of each document are packed, and what is lost."""
    lost = {"truncated": 0, "dropped": 0}
    is_longer_N = lengths_N > capacity
    if overflow == "split" or not is_longer_N.any():
        return lengths_N, lost
    kept = capacity if overflow == "truncate" else 0
    lost["truncated" if kept else "dropped"] = int((lengths_N[is_longer_N] - kept).sum())
    return np.where(is_longer_N, kept, lengths_N), lost


@dataclass(frozen=True, eq=False)
class _Strips:
    """Where pieces go: the longest come first, strip after strip.

    Strip s is one piece in each of ``nums_S[s]`` rows from row ``rows_S[s]`` on, behind the ``slots_S[s]`` pieces that
    each of them has; ``taken_D[d]`` pieces of length d found a row.
    """

    rows_S: np.ndarray
    nums_S: np.ndarray
    slots_S: np.ndarray
    num_rows: int
    taken_D: np.ndarray


def _whole_rows(kept_N: np.ndarray, capacity: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return documents, offsets and lengths of the pieces that are rows by themselves, and what is left of each."""
    longer_L = np.flatnonzero(kept_N >= capacity)
    counts_L = kept_N[longer_L] // capacity
    rests_N = kept_N.copy()
    rests_N[longer_L] -= counts_L * capacity
    documents_P = np.repeat(longer_L, counts_L)
    offsets_P = _ramps(np.zeros_like(counts_L), counts_L) * capacity
    return (documents_P, offsets_P, np.full_like(offsets_P, capacity)), rests_N


def _longest_first(rests_N: np.ndarray) -> np.ndarray:
    """Return the documents of which something is left, the longest first, in their order where equally long."""
    longest = int(rests_N.max(initial=0))
    keys_N = longest - rests_N
    if longest < _LARGEST_RADIX:
        keys_N = keys_N.astype(np.uint16)
    return np.argsort(keys_N, kind="stable")[: np.count_nonzero(rests_N)]


def _histogram(rests_N: np.ndarray, documents_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct lengths above 0, the longest first, and how many documents have each."""
    if rests_N.max(initial=0) < _LARGEST_RADIX:
        counts = np.bincount(rests_N)
        lengths_D = np.flatnonzero(counts[1:])[::-1] + 1
        return lengths_D, counts[lengths_D]
    # A table of every length up to the longest could be larger than the documents.
    lengths_I = rests_N[documents_I]
    begins_D = np.flatnonzero(np.diff(lengths_I, prepend=0))
    return lengths_I[begins_D], np.diff(begins_D, append=len(lengths_I))


def _fitted(lengths_D: np.ndarray, counts_D: np.ndarray, capacity: int, *, opens_above: int) -> _Strips:
    """Return best fit of lengths that descend; those of at most `opens_above` only fill what others left free.

    `runs` holds neighbouring rows with the same lengths in them, as (first row, rows, pieces in each), by free space.
    Free spaces that hold the length at hand are on the stack `fitting`, the smallest on top; the others in the heap
    `waiting`. What a length leaves of a row is either less than itself or the new smallest, so nothing is searched.
    """
    rows, nums, slots, copies, taken = [], [], [], [], []
    runs: dict[int, list[tuple[int, int, int]]] = {}
    fitting: list[int] = []
    waiting: list[int] = []  # negative, since a heap has its smallest on top
    num_rows = 0
    for length, left in zip(lengths_D.tolist(), counts_D.tolist()):
        while waiting and -waiting[0] >= length:
            fitting.append(-heappop(waiting))
        taken.append(left)
        while left:
            if not fitting and length <= opens_above:
                break
            if not fitting:
                needed = -(-left // (capacity // length))
                runs[capacity] = [(num_rows, needed, 0)]
                fitting.append(capacity)
                num_rows += needed
            # As many rows as take all they can, else one row that takes what is left.
            free = fitting[-1]
            row, num, slot = runs[free].pop()
            each = free // length
            filled, copy = (left // each, each) if left >= each else (1, left)
            if filled > num:
                filled = num
            if filled < num:
                runs[free].append((row + filled, num - filled, slot))
            elif not runs[free]:
                del runs[fitting.pop()]
            rows.append(row)
            nums.append(filled)
            slots.append(slot)
            copies.append(copy)
            left -= filled * copy
            rest = free - copy * length
            if rest in runs:
                runs[rest].append((row, filled, slot + copy))
            elif rest:
                runs[rest] = [(row, filled, slot + copy)]
                if rest >= length:
                    fitting.append(rest)
                else:
                    heappush(waiting, -rest)
        taken[-1] -= left
    copies_S = np.array(copies, np.int64)
    rows_S, nums_S = (np.repeat(np.array(column, np.int64), copies_S) for column in (rows, nums))
    slots_S = _ramps(np.array(slots, np.int64), copies_S)
    return _Strips(rows_S, nums_S, slots_S, num_rows, np.array(taken, np.int64))


def _parted(documents_I: np.ndarray, counts_D: np.ndarray, taken_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first ``taken_D[d]`` documents of each length, and the others."""
    if np.array_equal(counts_D, taken_D):
        return documents_I, documents_I[:0]
    is_taken_I = _ramps(np.zeros_like(counts_D), counts_D) < np.repeat(taken_D, counts_D)
    return documents_I[is_taken_I], documents_I[~is_taken_I]


def _placed(
    strips: _Strips, whole_rows: tuple[np.ndarray, ...], pieces: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, ...]:
    """Return documents, offsets, lengths of all pieces in the order of the rows, and the first piece of each row."""
    num_whole, num_rows = len(whole_rows[0]), strips.num_rows
    begin_R1, end_R1 = (
        np.bincount(at, minlength=num_rows + 1) for at in (strips.rows_S, strips.rows_S + strips.nums_S)
    )
    firsts_R1 = np.arange(num_whole + num_rows + 1)
    firsts_R1[num_whole + 1 :] = num_whole + np.cumsum(np.cumsum(begin_R1 - end_R1)[:-1])
    rows_I = _ramps(strips.rows_S + num_whole, strips.nums_S)
    places_I = firsts_R1[rows_I] + np.repeat(strips.slots_S, strips.nums_S)
    columns = []
    for whole, shorter_I in zip(whole_rows, pieces):
        column_P = np.empty(num_whole + len(shorter_I), np.int64)
        column_P[:num_whole] = whole
        column_P[places_I] = shorter_I
        columns.append(column_P)
    return *columns, firsts_R1


def _sliced(lengths_N: np.ndarray, begins_N: np.ndarray, capacity: int, *, lost: dict[str, int]) -> Packing:
    """Return documents that begin at places of a stream, ascending, cut where the stream's rows end."""
    ends_N = begins_N + lengths_N
    first_rows_N = begins_N // capacity
    counts_N = np.where(lengths_N, (ends_N - 1) // capacity - first_rows_N + 1, 0)
    rows_P = _ramps(first_rows_N, counts_N)
    begins_P, ends_P = rows_P * capacity, (rows_P + 1) * capacity
    documents_P, document_begins_P, document_ends_P = (
        np.repeat(column_N, counts_N) for column_N in (np.arange(len(lengths_N)), begins_N, ends_N)
    )
    np.maximum(begins_P, document_begins_P, out=begins_P)
    np.minimum(ends_P, document_ends_P, out=ends_P)
    firsts_R1 = np.flatnonzero(np.diff(rows_P, prepend=-1, append=-2))
    cuts = int(np.count_nonzero((counts_N > 1) & (lengths_N <= capacity)))
    return Packing(documents_P, begins_P - document_begins_P, ends_P - begins_P, firsts_R1, capacity, lost, cuts)


def _ramps(firsts_S: np.ndarray, counts_S: np.ndarray) -> np.ndarray:
    """Return ``firsts_S[0], firsts_S[0] + 1, ...`` (``counts_S[0]`` numbers), then the same of the next."""
    ends_S = np.cumsum(counts_S)
    return np.repeat(firsts_S - (ends_S - counts_S), counts_S) + np.arange(ends_S[-1] if len(ends_S) else 0)


PACKINGS: dict[str, Callable[..., Packing]] = {"best_fit": best_fit, "chunk": chunk, "pad": pad}

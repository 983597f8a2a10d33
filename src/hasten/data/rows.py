"""Rows: inputs and labels of one length, made from pieces of documents.

Dimensions: R rows, T tokens of a row, P pieces, N tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hasten.data.ahead import Far, far_of
from hasten.data.documents import DocumentPart, Documents, parts_of
from hasten.data.order import GROUP, EndlessOrder, WindowOrder
from hasten.errors import DataError

NO_TARGET = -100  # what `torch.nn.functional.cross_entropy` ignores

# So many tokens are laid at once: fewer pay more for the calls, more leave the processor's cache (141 instead of 148
# million tokens a second at twice as many, 114 at half).
_BLOCK_TOKENS = 1 << 16


class Order(Protocol):
    """Numbers without end: every number of ``range(size)`` once in each epoch, each epoch in another order."""

    size: int

    def at(self, place: int, count: int) -> np.ndarray:
        """Return the numbers at places ``place, ..., place + count - 1``, int64; `place` at least 0."""
        ...


class Rows(Protocol):
    """Rows of one length: how many there are, in which order, and inputs and labels by row number.

    Attributes:
        num_rows: rows of an epoch.
        seq_len: tokens of a row.
        num_targets: labels of an epoch that are real.
        filler: the token of padding.
        far: how to have their tokens brought here before they are read.
    """

    num_rows: int
    seq_len: int
    num_targets: int
    filler: int
    far: Far

    def fill(
        self, row_numbers_R: np.ndarray, tokens_RT: np.ndarray, labels_RT: np.ndarray, ids_RT: np.ndarray | None = None
    ) -> np.ndarray:
        """Write rows into C-contiguous arrays of shape ``(R, seq_len)``; return each row's number of real targets.

        Args:
            row_numbers_R: int64, below `num_rows`; any order, repeats allowed.
            tokens_RT: int64, for the inputs.
            labels_RT: int64, for the targets; `NO_TARGET` where there is none.
            ids_RT: int32, for a number per position that rises with every document of the row.
        """
        ...

    def blocks(self, row_numbers_R: np.ndarray) -> np.ndarray:
        """Return the numbers of the blocks of `far` that hold rows, int64."""
        ...

    def order(self, seed: int, purpose: str = "rows") -> Order:
        """Return an endless shuffled order of the row numbers, a pure function of the arguments."""
        ...

    def parts(self, row_number: int) -> list[DocumentPart]:
        """Return what a row holds of which documents, in order; no token is read."""
        ...


class ChunkedRows:
    """Concat-and-chunk: the stream cut every `seq_len` tokens, which takes no plan and no counting.

    Row r has the inputs ``stream[r*T : r*T + T]`` and the labels one token further. The last token has nothing after
    it to predict, so it gets no row of its own. A last row that is short is filled up with the document token, without
    targets; no row is without any.

    Args:
        documents: a stream of at least two tokens, whose documents begin with a token they have in common.
        seq_len: tokens of a row, at least 1.
        window_rows: rows that follow each other in the stream and stay near each other in the order, see `WindowOrder`;
            None: every row may come at any time.

    Raises:
        DataError: fewer than two tokens, or documents without a document token.
    """

    def __init__(self, documents: Documents, seq_len: int, *, window_rows: int | None = None) -> None:
        if documents.num_tokens < 2:
            raise DataError(
                f"The text has {documents.num_tokens} token{'s' * (documents.num_tokens != 1)}, and there is nothing "
                "to predict in fewer than 2; give more text."
            )
        if documents.document_token is None:
            raise DataError("Rows cut from a stream tell documents by their first token: give document_token.")
        self._documents, self._window_rows, self.far = documents, window_rows, far_of(documents)
        self.seq_len = seq_len
        self.num_targets = documents.num_tokens - 1
        self.num_rows = -(-self.num_targets // seq_len)
        self.filler = documents.document_token

    def fill(
        self, row_numbers_R: np.ndarray, tokens_RT: np.ndarray, labels_RT: np.ndarray, ids_RT: np.ndarray | None = None
    ) -> np.ndarray:
        """Write rows into arrays of shape ``(R, seq_len)``; return each row's number of real targets."""
        starts_R = row_numbers_R * self.seq_len
        targets_R = np.minimum(self.seq_len, self.num_targets - starts_R)
        for cut in blocks(len(row_numbers_R), self.seq_len):
            pieces = Pieces(starts_R[cut], targets_R[cut], np.ones_like(targets_R[cut]))
            lay(self._documents, pieces, tokens_RT[cut], labels_RT[cut], None, self.filler)
        if ids_RT is not None:
            np.cumsum(tokens_RT == self._documents.document_token, axis=1, dtype=np.int32, out=ids_RT)
        return targets_R

    def blocks(self, row_numbers_R: np.ndarray) -> np.ndarray:
        """Return the numbers of the blocks of `far` that hold rows, int64."""
        starts_R = row_numbers_R * self.seq_len
        return self.far.blocks(starts_R, np.minimum(self.seq_len, self.num_targets - starts_R) + 1)

    def order(self, seed: int, purpose: str = "rows") -> Order:
        """Return an endless shuffled order of the row numbers."""
        begins = np.arange(0, self.num_rows, self._window_rows or self.num_rows)
        if len(begins) <= GROUP:
            return EndlessOrder(self.num_rows, seed=seed, purpose=purpose)
        return WindowOrder(np.diff(begins, append=self.num_rows), seed=seed, purpose=purpose, group=GROUP)

    def parts(self, row_number: int) -> list[DocumentPart]:
        """Return what a row holds of which documents, in order."""
        start = row_number * self.seq_len
        return parts_of(self._documents, start, min(self.seq_len, self.num_targets - start))


@dataclass(frozen=True)
class Pieces:
    """The pieces of some rows, one row behind the other.

    Attributes:
        starts_P: where in the stream each begins.
        lengths_P: its tokens, at least 1.
        counts_R: how many pieces each row has, at least 1.
    """

    starts_P: np.ndarray
    lengths_P: np.ndarray
    counts_R: np.ndarray


def lay(
    documents: Documents,
    pieces: Pieces,
    tokens_RT: np.ndarray,
    labels_RT: np.ndarray,
    ids_RT: np.ndarray | None,
    filler: int,
) -> np.ndarray:
    """Write pieces into rows with labels and numbers, and padding behind them; return each row's tokens.

    The label of a piece's last token is the token behind the piece in the stream. One vectorised gather takes 1.5 to
    2.5 ns a token whatever the pieces; copying them one by one in Python took 1.4 ns for pieces of 500 tokens, but 39
    for pieces of 20.
    """
    length = tokens_RT.shape[1]
    starts_P, lengths_P, counts_R = pieces.starts_P, pieces.lengths_P, pieces.counts_R
    begins_R = np.cumsum(counts_R) - counts_R
    used_R = np.add.reduceat(lengths_P, begins_R)
    # The tokens behind the pieces come with the same gather, at its end.
    ends_P = np.cumsum(lengths_P)
    starts_2P = np.concatenate([starts_P, starts_P + lengths_P])
    tokens_N = documents.pieces(starts_2P, np.concatenate([lengths_P, np.ones_like(lengths_P)]))
    tokens_N, next_P = tokens_N[: ends_P[-1]], tokens_N[ends_P[-1] :]
    labels_N = np.empty_like(tokens_N)
    labels_N[:-1] = tokens_N[1:]
    labels_N[ends_P - 1] = next_P
    short = [(row, row * length + int(used_R[row])) for row in np.flatnonzero(used_R < length).tolist()]
    _place(tokens_N, short, filler, tokens_RT)
    _place(labels_N, short, NO_TARGET, labels_RT)
    if ids_RT is not None:
        numbers_P = (np.arange(len(starts_P)) - np.repeat(begins_R, counts_R)).astype(np.int32)
        _place(np.repeat(numbers_P, lengths_P), short, length, ids_RT)
    return used_R


def blocks(num_rows: int, seq_len: int) -> list[slice]:
    """Return `num_rows` rows as slices of some ten thousand tokens."""
    size = max(1, _BLOCK_TOKENS // seq_len)
    return [slice(begin, begin + size) for begin in range(0, num_rows, size)]


def _place(values_N: np.ndarray, short: list[tuple[int, int]], padding: int, out_RT: np.ndarray) -> None:
    """Write values into rows, one row after the other.

    Args:
        values_N: of all rows.
        short: rows that are not full, ascending, and where in the rows laid end to end their values end.
        padding: what is written behind those.
        out_RT: the rows.
    """
    length = out_RT.shape[1]
    out = out_RT.reshape(-1)
    place = done = 0
    # Full rows lie behind each other here and there, so all values up to the next padding are one slice.
    for row, stop in short:
        out[place:stop] = values_N[done : done + stop - place]
        out[stop : (row + 1) * length] = padding
        place, done = (row + 1) * length, done + stop - place
    out[place:] = values_N[done:]

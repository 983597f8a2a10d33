"""Documents that exist nowhere: computed from their position, so that a corpus of any size takes no memory."""

from __future__ import annotations

import numpy as np

from hasten.data.row_counts import RowCounts
from hasten.data.shard_files import spread
from hasten.data.windows import Pack, Windows

WINDOW_DOCUMENTS = 1 << 16
WINDOW_TOKENS = 46_000_000
KINDS = 4  # windows of that many different lists of lengths, over and over


class Places:
    """A stream whose tokens are their own places, in documents of given lengths.

    Each token is another one, so a test sees exactly which ones it was given.
    """

    def __init__(self, lengths, document_token: int | None) -> None:
        self.document_token = document_token
        self._starts = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int64)
        self.num_documents, self.num_tokens = len(self._starts) - 1, int(self._starts[-1])
        self.fingerprint = f"{document_token} {list(lengths)}"
        self.touched: list[tuple[int, int]] = []

    def starts(self, first: int, stop: int) -> np.ndarray:
        self.touched.append((first, stop))
        return self._starts[first : stop + 1]

    def pieces(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        assert starts_P.min() >= 0
        assert (starts_P + lengths_P).max() <= self.num_tokens
        return spread(starts_P, lengths_P)


class Synthetic:
    """A corpus of web-like documents, log-normal with a median of 400 tokens, of any number of windows.

    Every window ends with one document that fills it up. Tokens are a hash of their place.
    """

    document_token = 0

    def __init__(self, num_windows: int) -> None:
        self.num_documents, self.num_tokens = num_windows * WINDOW_DOCUMENTS, num_windows * WINDOW_TOKENS
        self.fingerprint = f"synthetic {num_windows}"
        self.touched: set[int] = set()

    def starts(self, first: int, stop: int) -> np.ndarray:
        windows = range(first // WINDOW_DOCUMENTS, -(-stop // WINDOW_DOCUMENTS))
        self.touched.update(windows)
        starts = [window * WINDOW_TOKENS + np.cumsum(lengths_of(window)) - lengths_of(window) for window in windows]
        whole = np.concatenate([*starts, [windows.stop * WINDOW_TOKENS]])
        offset = windows.start * WINDOW_DOCUMENTS
        return whole[first - offset : stop - offset + 1]

    def pieces(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        return ((spread(starts_P, lengths_P) * 2654435761) >> 7).astype(np.uint16)


def lengths_of(window: int) -> np.ndarray:
    """Return the lengths of a window's documents."""
    generator = np.random.default_rng(window % KINDS)
    lengths = 1 + generator.lognormal(np.log(400), 1.04, WINDOW_DOCUMENTS).astype(np.int64)
    lengths[-1] = WINDOW_TOKENS - lengths[:-1].sum()
    assert lengths[-1] > 0
    return lengths


def counts_of(num_windows: int, pack: Pack) -> RowCounts:
    """Return the rows of every window: those of the few different ones, over and over, and of the last one."""
    kinds = RowCounts.of(pack(lengths_of(kind)) for kind in range(KINDS))
    # The last token of all has nothing after it; the document it ends is longer than a row.
    lengths = lengths_of(num_windows - 1)
    lengths[-1] -= 1
    last = RowCounts.of([pack(lengths)])
    which = np.arange(num_windows) % KINDS
    rows_WK, tokens_WK = kinds.rows_WK[which], kinds.tokens_WK[which]
    rows_WK[-1], tokens_WK[-1] = last.rows_WK[0], last.tokens_WK[0]
    return RowCounts(rows_WK, tokens_WK, kinds.most_pieces_K)


def synthetic_windows(num_windows: int, pack: Pack) -> Windows:
    """Return the windows of a synthetic corpus, whose rows are known without packing it all."""
    return Windows(Synthetic(num_windows), pack, counts=counts_of(num_windows, pack))

"""How a stream of tokens becomes rows of one length."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hasten.data.shards import TokenShards
from hasten.errors import DataError

NO_TARGET = -100  # what `torch.nn.functional.cross_entropy` ignores


class Rows(Protocol):
    """Rows of a stream: how many there are, and inputs and labels by row number."""

    num_rows: int
    seq_len: int

    def fill(self, row_numbers_R: np.ndarray, tokens_RT: np.ndarray, labels_RT: np.ndarray) -> np.ndarray:
        """Write rows into int64 arrays of shape ``(R, seq_len)``; return each row's number of real targets."""
        ...


class ChunkedRows:
    """Concat-and-chunk: the stream cut every `seq_len` tokens.

    Row r has the inputs ``stream[r*T : r*T + T]`` and the labels one token further. Every token is an input once and,
    but for the very first, a target once; the last token has nothing after it to predict, so it gets no row of its
    own. The label at a document's end is the token that begins the next one: that is how a model learns to end. A
    last row that is short is filled up with the document token, without targets; no row is without any.

    Args:
        shards: a stream of at least two tokens.
        seq_len: tokens of a row, at least 1.

    Raises:
        DataError: fewer than two tokens, so nothing can be predicted.
    """

    def __init__(self, shards: TokenShards, seq_len: int) -> None:
        if shards.num_tokens < 2:
            raise DataError(
                f"The text has {shards.num_tokens} token{'s' * (shards.num_tokens != 1)}, and there is nothing to "
                "predict in fewer than 2; give more text."
            )
        self._shards = shards
        self.seq_len = seq_len
        self.num_targets = shards.num_tokens - 1
        self.num_rows = -(-self.num_targets // seq_len)

    def fill(self, row_numbers_R: np.ndarray, tokens_RT: np.ndarray, labels_RT: np.ndarray) -> np.ndarray:
        """Write rows into int64 arrays of shape ``(R, seq_len)``; return each row's number of real targets."""
        starts_R = row_numbers_R * self.seq_len
        targets_R = np.minimum(self.seq_len, self.num_targets - starts_R)
        is_whole_R = targets_R == self.seq_len
        whole = slice(None) if is_whole_R.all() else np.flatnonzero(is_whole_R)
        spans = self._shards.gather(starts_R[whole], self.seq_len + 1)
        tokens_RT[whole], labels_RT[whole] = spans[:, :-1], spans[:, 1:]
        if not is_whole_R.all():
            short_R = np.flatnonzero(~is_whole_R)
            tail = self._shards.read((self.num_rows - 1) * self.seq_len, self._shards.num_tokens)
            tokens_RT[short_R], labels_RT[short_R] = self._shards.document_token, NO_TARGET
            tokens_RT[short_R, : len(tail)] = tail
            labels_RT[short_R, : len(tail) - 1] = tail[1:]
        return targets_R

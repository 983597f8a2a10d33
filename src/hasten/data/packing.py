"""How a stream of tokens becomes rows of one length."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hasten.data.shards import TokenShards
from hasten.errors import DataError

NO_TARGET = -100


class Rows(Protocol):
    """Rows of a stream: a number of them, and their inputs and labels by row number."""

    num_rows: int

    def fill(self, row_numbers: np.ndarray, tokens_out: np.ndarray, labels_out: np.ndarray) -> int:
        """Write rows into ``(len(row_numbers), seq_len)`` int64 arrays; return how many labels are real targets."""
        ...


class ChunkedRows:
    """Concat-and-chunk: the stream cut every `seq_len` tokens.

    Row r has the inputs ``stream[r*T : r*T + T]`` and the labels one token further. Every token is an input once, and
    a target once but for the very first. The label at a document's end is the token that begins the next one: that
    is how a model learns to end. The last row may be short; it is filled up with the document token, without targets.

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

    def fill(self, row_numbers: np.ndarray, tokens_out: np.ndarray, labels_out: np.ndarray) -> int:
        """Write the rows and return the number of their real targets. Shapes: (R,), (R, T), (R, T)."""
        num_real = 0
        for place, row in enumerate(row_numbers.tolist()):
            begin = row * self.seq_len
            span = self._shards.read(begin, min(begin + self.seq_len + 1, self._shards.num_tokens))
            length = len(span) - 1
            tokens_out[place, :length] = span[:-1]
            labels_out[place, :length] = span[1:]
            if length < self.seq_len:
                tokens_out[place, length:] = self._shards.document_token
                labels_out[place, length:] = NO_TARGET
            num_real += length
        return num_real

"""Texts turned into token ids, many at once, the same wherever it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import tokenizers

from hasten.data import encoders
from hasten.data.corpus import Batch
from hasten.data.encoders import EncodeAll, Encoded
from hasten.data.tokenizer import Tokenizer
from hasten.errors import DataError

_LONG_PIECE = 256  # tokens
_CHECKED_CHARACTERS = 1 << 10  # of every batch: 4 % of the time where the encoder is ten times as fast


class TextEncoder:
    """Gives the ids of texts, by the fastest encoder whose ids are the tokenizer's own.

    Args:
        tokenizer: whose ids are asked for.
        is_plain: by the tokenizer itself, whatever else is installed.

    Attributes:
        name: of the encoder in use.
        is_fast: whether it is another than the tokenizer's own, so that its ids are checked along the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_plain: bool = False) -> None:
        self.tokenizer, self.is_plain = tokenizer, is_plain
        self.name, self._encode = ("tokenizers", tokenizer.encode) if is_plain else encoders.fastest(tokenizer)
        self.is_fast = self.name not in ("tokenizers", "bytes")

    @cached_property
    def _encode_all(self) -> EncodeAll:
        return encoders.in_bulk(self.name, self.tokenizer, self._encode)

    def __call__(self, texts: Sequence[str]) -> Encoded | None:
        """Return the ids of `texts`, or None where the beginning of them shows that a fast encoder differs."""
        if self.is_fast and self._differs(texts):
            return None
        return self._encode_all(texts)

    def _differs(self, texts: Sequence[str]) -> bool:
        beginning, room = [], _CHECKED_CHARACTERS
        for text in texts:
            beginning.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
        expected = [self.tokenizer.encode(text) for text in beginning]
        ids, lengths = self._encode_all(beginning)
        same = np.array_equal(lengths, [len(part) for part in expected])
        return not (same and np.array_equal(ids, np.concatenate(expected)))


class Shipment(NamedTuple):
    """What another process needs to encode as this one does; plain values.

    Attributes:
        document: of the tokenizer.
        document_text: of the tokenizer.
        is_plain: as in `TextEncoder`.
        version: of the package `tokenizers`; with another one the ids could be others.
    """

    document: str
    document_text: str
    is_plain: bool
    version: str = tokenizers.__version__


def shipment(encode: TextEncoder) -> Shipment:
    """Return what makes the same encoder elsewhere."""
    return Shipment(encode.tokenizer.document, encode.tokenizer.document_text, encode.is_plain)


def encode_shipped(shipped: Shipment, texts: Sequence[str]) -> Encoded | None:
    """Return the ids of `texts` in this process, in the narrowest type that holds them.

    Raises:
        DataError: this process has another version of `tokenizers`.
    """
    encoded = _unpacked(shipped)(texts)
    if encoded is None:
        return None
    highest = int(encoded.ids.max(initial=0))
    return Encoded(encoded.ids.astype(np.uint16 if highest < 1 << 16 else np.uint32), encoded.lengths)


@lru_cache(maxsize=2)
def _unpacked(shipped: Shipment) -> TextEncoder:
    if shipped.version != tokenizers.__version__:
        raise DataError(
            f"a worker has tokenizers {tokenizers.__version__} and this machine {shipped.version}; "
            "install the same version on every machine of the cluster, so that all give the same ids."
        )
    return TextEncoder(Tokenizer(shipped.document, shipped.document_text), is_plain=shipped.is_plain)


def streams(batch: Batch, encoded: Encoded, document_token: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, int]]:
    """Yield what a batch adds to each side: (side, its tokens, where among them documents start, bytes of source)."""
    ids, lengths_P = encoded
    dtype = np.promote_types(ids.dtype, np.min_scalar_type(document_token))
    begins_P = np.cumsum(lengths_P) - lengths_P
    for side in np.flatnonzero(np.bincount(batch.sides)).tolist():
        here = np.flatnonzero(batch.sides == side)
        starts_H = batch.starts[here]
        lengths_H = lengths_P[here] + starts_H
        starts_D = (np.cumsum(lengths_H) - lengths_H)[starts_H]
        if len(ids) > _LONG_PIECE * len(lengths_P):  # a copy per piece is less than a look at every token
            token, parts = np.array([document_token], dtype), []
            for piece, starts in zip(here.tolist(), starts_H.tolist()):
                text = ids[begins_P[piece] : begins_P[piece] + lengths_P[piece]]
                parts += [token, text] if starts else [text]
            tokens = np.concatenate(parts, dtype=dtype)
        else:
            tokens = np.full(int(lengths_H.sum()), document_token, dtype)
            is_text = np.ones(len(tokens), bool)
            is_text[starts_D] = False
            whole = len(here) == len(lengths_P)
            tokens[is_text] = ids if whole else ids[np.repeat(batch.sides == side, lengths_P)]
        yield side, tokens, starts_D, int(batch.sizes[here].sum())


Spread = Callable[[Iterator[Batch], TextEncoder], Iterator[tuple[Batch, "Encoded | None"]]]

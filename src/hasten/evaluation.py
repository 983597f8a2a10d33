"""How well a model predicts text it has not seen: loss per token, bits per byte, and what simpler coders reach.

The stream of all documents, each begun by the begin/end token, is cut into rows of `seq_len` without overlap and
without a document mask, as any tool outside would do it; every token but the very first is predicted exactly once.

Dimensions: B rows, T positions.
"""

from __future__ import annotations

import itertools
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hasten.data.corpus import CorpusSpec, Piece, open_corpus
from hasten.data.tokenizer import Tokenizer, load_tokenizer
from hasten.distributed import ALONE, Ranks
from hasten.errors import DataError, RunError
from hasten.model import NO_TARGET, Decoder, loss_sum, read_model

BASELINE_BYTES = 16_000_000  # xz -9 codes about 2 MB a second
LOGITS_PER_PASS = 2**23  # 32 MB in float32; larger passes were no faster


class Tokens(Protocol):
    """A stored stream of tokens, such as one split of prepared data."""

    num_tokens: int
    source_bytes: int

    def read(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Evaluation:
    """How well a text was predicted.

    `loss` is nats per predicted token, `bits_per_byte` all of the text's information over all of its source bytes,
    `tokens` how many tokens were predicted, and `bytes` the source bytes they stand for. For a sample,
    `bits_per_byte` assumes the whole's ratio of tokens to bytes.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate_shards(
    model: Decoder,
    shards: Tokens,
    *,
    seq_len: int,
    document_token: int,
    max_tokens: int | None = None,
    micro_rows: int | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Return how well `model` predicts a stored stream of tokens.

    `bits_per_byte = loss / ln 2 * (num_tokens - 1) / source_bytes`.

    Args:
        model: evaluated in the precision it is in; its training mode and gradients are left as they are.
        shards: the held-out split; at least two tokens.
        seq_len: tokens of a row.
        document_token: fills the last row up; never predicted there.
        max_tokens: predict about so many only, in whole rows spread evenly over the stream, the same ones every
            time. None: all.
        micro_rows: rows of one forward pass; chosen by the memory that logits take if None.
        ranks: that make this call at the same time, and share the rows.

    Raises:
        DataError: fewer than two tokens.
    """
    if shards.num_tokens < 2:
        raise DataError("the held-out text has no token to predict; give more text to evaluate on")
    num_rows = -(-(shards.num_tokens - 1) // seq_len)
    wanted = num_rows if max_tokens is None else min(num_rows, max(1, -(-max_tokens // seq_len)))
    rows = (number * num_rows // wanted for number in range(wanted))
    spans = (shards.read(row * seq_len, min(row * seq_len + seq_len + 1, shards.num_tokens)) for row in rows)
    nats, tokens = _predict(model, spans, seq_len, document_token, micro_rows, ranks)
    predictable = shards.num_tokens - 1
    return Evaluation(
        loss=nats / tokens,
        bits_per_byte=nats / tokens / math.log(2) * predictable / shards.source_bytes,
        tokens=tokens,
        bytes=round(shards.source_bytes * tokens / predictable),
    )


def evaluate(
    model: Decoder | str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    tokenizer: Tokenizer | None = None,
    seq_len: int | None = None,
    text_key: str = "text",
    separator: str | None = None,
) -> Evaluation:
    """Return how well a model predicts the whole of some text; every byte counts once.

    Args:
        model: a folder in Hugging Face format, or a `Decoder`, which needs its `tokenizer` too.
        data: files, folders or globs, as a recipe's `data.val`.
        tokenizer: None reads the one in the model's folder.
        seq_len: tokens of a row; None: the length the model was trained for.
        text_key, separator: as in a recipe's `data`.

    Raises:
        RunError: the folder holds no model that can be read, or the tokenizer of another one.
        DataError: the text or the tokenizer cannot be read, or there is nothing to predict.

    Example:
        >>> evaluate("runs/first/final", "notes.txt").bits_per_byte  # doctest: +SKIP
        1.62
    """
    decoder, tokenizer = _opened(model, tokenizer)
    sources = tuple(str(source) for source in ([data] if isinstance(data, (str, Path)) else data))
    spec = CorpusSpec(train=sources, val=sources, text_key=text_key, separator=separator)
    return evaluate_pieces(decoder, tokenizer, open_corpus(spec).pieces("val"), seq_len=seq_len)


def evaluate_pieces(
    model: Decoder, tokenizer: Tokenizer, pieces: Iterable[Piece], *, seq_len: int | None = None
) -> Evaluation:
    """Return how well `model` predicts a stream of text pieces, encoded as they come, in bounded memory.

    Raises:
        DataError: nothing to predict.
        RunError: the tokenizer gave an id that the model does not have.
    """
    seq_len = seq_len or model.config.seq_len
    source_bytes = 0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal source_bytes
        for piece in pieces:
            source_bytes += piece.source_bytes
            tokens = tokenizer.encode(piece.text).astype(np.int64)
            if piece.starts_document:
                tokens = np.insert(tokens, 0, tokenizer.document_token)
            if tokens.max(initial=0) >= model.config.vocab_size:
                raise RunError(
                    f"the tokenizer gave the id {tokens.max()}, and the model has {model.config.vocab_size}; "
                    "give the tokenizer that it was trained with"
                )
            yield tokens

    nats, tokens = _predict(model, _rows(chunks(), seq_len), seq_len, tokenizer.document_token, None)
    if tokens == 0 or source_bytes == 0:
        raise DataError("the text to evaluate has no token to predict; give more text")
    return Evaluation(nats / tokens, nats / math.log(2) / source_bytes, tokens, source_bytes)


def baselines(shards: Tokens, tokenizer: Tokenizer) -> dict[str, float | int]:
    """Return the bits per byte that coders without a trained model reach on the same held-out text.

    `xz_bpb`: size of `lzma.compress(text, preset=9)`, as `xz -9` makes it. `unigram_bpb`: entropy of the text's own
    byte frequencies, which no coder that sees one byte at a time can beat, not even one that knows them in advance.
    `baseline_bytes`: the bytes both were measured on, documents joined without separators: all of them, or the first
    16 MB (`baseline_is_capped` is then 1).
    """
    text = bytearray()
    start = 0
    while start < shards.num_tokens and len(text) < BASELINE_BYTES:
        stop = min(start + 2**18, shards.num_tokens)
        tokens = shards.read(start, stop)
        for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.document_token)):
            text += tokenizer.decode_bytes(document[document != tokenizer.document_token])
        start = stop
    is_capped = start < shards.num_tokens or len(text) > BASELINE_BYTES
    held_out = bytes(text[:BASELINE_BYTES])
    if not held_out:
        raise DataError("the held-out text is empty; give more text to validate on")
    counts = np.bincount(np.frombuffer(held_out, dtype=np.uint8))
    shares = counts[counts > 0] / len(held_out)
    return {
        "xz_bpb": 8 * len(lzma.compress(held_out, preset=9)) / len(held_out),
        "unigram_bpb": max(0.0, float(-(shares * np.log2(shares)).sum())),
        "baseline_bytes": len(held_out),
        "baseline_is_capped": int(is_capped),
    }


def _opened(model: Decoder | str | Path, tokenizer: Tokenizer | None) -> tuple[Decoder, Tokenizer]:
    if isinstance(model, (str, Path)):
        return read_model(model), tokenizer or load_tokenizer(model)
    if tokenizer is None:
        raise DataError("a model without a folder was given; give its tokenizer too")
    return model, tokenizer


def _rows(chunks: Iterable[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    """Cut a stream of token chunks into spans of `seq_len + 1` that overlap by one token."""
    held = np.empty(0, dtype=np.int64)
    for chunk in chunks:
        held = np.concatenate([held, chunk])
        num_rows = max(0, len(held) - 1) // seq_len
        for row in range(num_rows):
            yield held[row * seq_len : (row + 1) * seq_len + 1]
        held = held[num_rows * seq_len :]
    if len(held) > 1:
        yield held


@torch.no_grad()  # not inference mode: what FSDP gathers inside it could not be trained with afterwards
def _predict(
    model: Decoder,
    spans: Iterable[np.ndarray],
    seq_len: int,
    fill: int,
    micro_rows: int | None,
    ranks: Ranks = ALONE,
) -> tuple[float, int]:
    """Return the summed loss in nats of every token but the first of every span, and how many those are.

    Of several ranks each does every so manieth pass, all of them equally many.
    """
    micro_rows = micro_rows or max(1, LOGITS_PER_PASS // (seq_len * model.config.vocab_size))
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    nats, num_tokens = 0.0, 0
    try:
        for tokens_BT, labels_BT in _shared_out(_batches(spans, seq_len, fill, micro_rows), ranks):
            nats += loss_sum(model, tokens_BT.to(device), labels_BT.to(device)).item()
            num_tokens += int((labels_BT != NO_TARGET).sum())
    finally:
        model.train(was_training)
    nats, total = ranks.sums([nats, float(num_tokens)])
    return nats, round(total)


def _shared_out(batches: Iterator[tuple[Tensor, Tensor]], ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of this rank; where there is none left for it, one that counts nothing."""
    while turn := list(itertools.islice(batches, ranks.size)):
        if ranks.rank < len(turn):
            yield turn[ranks.rank]
        else:
            tokens_BT, labels_BT = turn[0]
            yield tokens_BT[:1], torch.full_like(labels_BT[:1], NO_TARGET)


def _batches(spans: Iterable[np.ndarray], seq_len: int, fill: int, micro_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    waiting: list[np.ndarray] = []
    for span in spans:
        waiting.append(span)
        if len(waiting) == micro_rows:
            yield _batch(waiting, seq_len, fill)
            waiting = []
    if waiting:
        yield _batch(waiting, seq_len, fill)


def _batch(spans: list[np.ndarray], seq_len: int, fill: int) -> tuple[Tensor, Tensor]:
    tokens_BT = np.full((len(spans), seq_len), fill, dtype=np.int64)
    labels_BT = np.full((len(spans), seq_len), NO_TARGET, dtype=np.int64)
    for row, span in enumerate(spans):
        tokens_BT[row, : len(span) - 1] = span[:-1]
        labels_BT[row, : len(span) - 1] = span[1:]
    return torch.from_numpy(tokens_BT), torch.from_numpy(labels_BT)

"""Reading: prepared text as a source of rows, chosen by plain settings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hasten.data.batches import RowSource, Source
from hasten.data.buckets import BucketSource
from hasten.data.documents import Documents
from hasten.data.mixture import MixtureSource
from hasten.data.order import GROUP
from hasten.data.rows import ChunkedRows, Rows
from hasten.data.shards import PreparedData
from hasten.data.windows import WINDOW_DOCUMENTS, WINDOW_TOKENS, Pack, Report, Windows
from hasten.errors import DataError, RecipeError, nearest

MODES = ("view", "bucket")


def read(
    data: PreparedData,
    *,
    seq_len: int,
    seed: int,
    packing: str = "best_fit",
    overflow: str = "split",
    mode: str = "view",
    lengths: Sequence[int] = (),
    weights: Sequence[float] | None = None,
    shuffle_tokens: int | None = None,
) -> Source:
    """Return which rows of `data` a run reads, step by step.

    Args:
        data: the prepared text.
        seq_len: tokens of a full row.
        seed: of the order.
        packing: how documents fill rows: ``best_fit``, ``chunk`` or ``pad``.
        overflow: what becomes of documents longer than a row: ``split``, ``truncate`` or ``drop``.
        mode: how rows are shorter than `seq_len` when that is asked for: ``view`` cuts full rows, ``bucket`` packs
            documents of similar length into rows of their own length.
        lengths: of the rows of each bucket, rising up to `seq_len`; only for ``bucket``.
        weights: shares of the sources of a mixture, one for each of ``data.trains``.
        shuffle_tokens: about how many tokens of a stream are mixed at a time; None: what the rows do by themselves,
            half a billion for packed ones and all of it for ``chunk``. Fewer than the stream has, and rows are read
            from near each other: what lies on object storage is then brought here once in an epoch, through a cache
            of about twice as many.

    Raises:
        RecipeError: an unknown setting, or settings that contradict each other.
        DataError: there is nothing to predict, or the weights are not those of a mixture of this text.
    """
    if mode not in MODES:
        raise RecipeError(f"mode={mode!r} is unknown{nearest(mode, MODES)}: give one of {', '.join(MODES)}.")
    if len(data.trains) > 1 and not weights:
        raise DataError(
            f"The text was prepared as a mixture of {len(data.trains)} sources, and no weights say how much to read "
            "from each: give data.weights, or prepare the text without them."
        )
    if mode == "bucket":
        _refuse_unbucketed(packing, weights)
        pack = Pack("bucketed", _widths(lengths, seq_len), overflow)
        windows = Windows(data.train, pack, window_tokens=_window(shuffle_tokens))
        return BucketSource([windows.rows(number) for number in range(len(lengths))], seed=seed)
    rows = [_packed(train, seq_len, packing, overflow, shuffle_tokens) for train in data.trains]
    if weights:
        return MixtureSource(rows, weights, seed=seed, names=data.train_names)
    return RowSource(rows[0], seed=seed)


def packing_reports(
    data: PreparedData,
    *,
    seq_len: int,
    packing: str = "best_fit",
    overflow: str = "split",
    mode: str = "view",
    lengths: Sequence[int] = (),
    shuffle_tokens: int | None = None,
) -> tuple[Report, ...]:
    """Return what becomes of the tokens of each of ``data.trains`` in rows that `read` gives; arguments as there."""
    pack = Pack(packing, (seq_len,), overflow)
    if mode == "bucket":
        pack = Pack("bucketed", _widths(lengths, seq_len), overflow)
    if pack.packing == "chunk":
        return tuple(_chunk_report(train, seq_len) for train in data.trains)
    return tuple(Windows(train, pack, window_tokens=_window(shuffle_tokens)).report for train in data.trains)


def _refuse_unbucketed(packing: str, weights: Sequence[float] | None) -> None:
    if weights:
        raise RecipeError(
            "A mixture (data.weights) cannot be read in buckets: its sources have different shares of short and long "
            "documents, so steps of one length could not keep the weights; give lengths.mode=view."
        )
    if packing != "best_fit":
        raise RecipeError(
            f"packing={packing!r} has no meaning in buckets, which are packed by best fit: leave it out, or give "
            "lengths.mode=view."
        )


def _widths(lengths: Sequence[int], seq_len: int) -> tuple[int, ...]:
    if not lengths or lengths[-1] != seq_len:
        raise RecipeError(f"The buckets' row lengths {list(lengths)} must end with seq_len={seq_len}.")
    return tuple(lengths)


def _packed(documents: Documents, seq_len: int, packing: str, overflow: str, shuffle_tokens: int | None) -> Rows:
    pack = Pack(packing, (seq_len,), overflow)
    if packing != "chunk":
        return Windows(documents, pack, window_tokens=_window(shuffle_tokens)).rows()
    # Cutting the stream itself needs no plan, and no row but the last is short.
    window_rows = None if shuffle_tokens is None else max(1, _window(shuffle_tokens) // seq_len)
    return ChunkedRows(documents, seq_len, window_rows=window_rows)


def _window(shuffle_tokens: int | None) -> int:
    """Return the tokens of a window, of which `GROUP` are mixed with each other."""
    return WINDOW_TOKENS if shuffle_tokens is None else max(1, shuffle_tokens // GROUP)


def _chunk_report(documents: Documents, seq_len: int) -> Report:
    rows, cuts = ChunkedRows(documents, seq_len), 0
    for first in range(0, documents.num_documents, WINDOW_DOCUMENTS):
        starts_N1 = documents.starts(first, min(first + WINDOW_DOCUMENTS, documents.num_documents))
        begins_N, ends_N = starts_N1[:-1], np.minimum(starts_N1[1:], rows.num_targets)
        lengths_N = ends_N - begins_N
        is_cut_N = (lengths_N > 0) & (lengths_N <= seq_len) & (begins_N // seq_len < (ends_N - 1) // seq_len)
        cuts += int(is_cut_N.sum())
    return Report(
        documents=documents.num_documents,
        tokens=documents.num_tokens,
        rows=rows.num_rows,
        room=rows.num_rows * seq_len,
        targets=rows.num_targets,
        lost={"last": 1},
        cuts=cuts,
    )

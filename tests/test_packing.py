"""Concat-and-chunk rows: every token an input once and, but for the first, a target once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import DOCUMENT, write

from hasten.data.packing import NO_TARGET, ChunkedRows
from hasten.data.shards import PreparedData, TokenShards
from hasten.errors import DataError


def stored(folder, num_tokens: int, *, shard_tokens: int = 1 << 20) -> tuple[np.ndarray, TokenShards]:
    """Return a stream of one document whose tokens are all different, and its shards."""
    stream = np.concatenate([[DOCUMENT], 1000 + np.arange(num_tokens - 1)])
    folder = write(folder, [stream[1:]], vocab_size=60_000, shard_tokens=shard_tokens)
    return stream, PreparedData.open(folder).train


def filled(rows: ChunkedRows, numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    numbers = np.asarray(numbers, np.int64)
    tokens = np.full((len(numbers), rows.seq_len), -7)
    labels = tokens.copy()
    return tokens, labels, rows.fill(numbers, tokens, labels)


def check_law(stream: np.ndarray, rows: ChunkedRows) -> None:
    """Check an epoch of rows against the stream, token by token."""
    tokens, labels, targets = filled(rows, range(rows.num_rows))
    is_target = labels.ravel() != NO_TARGET
    assert labels.ravel()[is_target].tolist() == stream[1:].tolist()
    assert tokens.ravel()[is_target].tolist() == stream[:-1].tolist()
    assert targets.tolist() == (labels != NO_TARGET).sum(axis=1).tolist()
    assert targets.min() >= 1
    assert targets.sum() == rows.num_targets == len(stream) - 1
    # What is left over is the last token, if there is room for it, and filling.
    assert set(tokens.ravel()[~is_target].tolist()) <= {stream[-1], DOCUMENT}


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(2, 80), seq_len=st.integers(1, 90), shard_tokens=st.integers(5, 60))
def test_every_token_is_an_input_and_a_target_once(tmp_path_factory, num_tokens, seq_len, shard_tokens):
    stream, shards = stored(tmp_path_factory.mktemp("data"), num_tokens, shard_tokens=shard_tokens)
    check_law(stream, ChunkedRows(shards, seq_len))


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(2, 1), (8, 1), (9, 1), (10, 2), (16, 2), (17, 2), (18, 3)])
def test_rows_at_and_around_exact_multiples(tmp_path, num_tokens, num_rows):
    stream, shards = stored(tmp_path, num_tokens)
    rows = ChunkedRows(shards, 8)
    assert rows.num_rows == num_rows
    check_law(stream, rows)


def test_a_short_text_gives_one_filled_row(tmp_path):
    _, shards = stored(tmp_path, 3)
    tokens, labels, targets = filled(ChunkedRows(shards, 6), [0])
    assert tokens.tolist() == [[DOCUMENT, 1000, 1001, DOCUMENT, DOCUMENT, DOCUMENT]]
    assert labels.tolist() == [[1000, 1001] + [NO_TARGET] * 4]
    assert targets.tolist() == [2]


def test_the_label_at_the_end_of_a_document_is_the_token_that_begins_the_next(tmp_path):
    shards = PreparedData.open(write(tmp_path, [np.array([1, 2]), np.array([3])])).train
    tokens, labels, _ = filled(ChunkedRows(shards, 4), [0])
    assert tokens.tolist() == [[DOCUMENT, 1, 2, DOCUMENT]]
    assert labels.tolist() == [[1, 2, DOCUMENT, 3]]


@pytest.mark.parametrize("numbers", [[], [2], [2, 2], [1, 2, 0], [2, 0, 2, 1], [0, 1]])
def test_rows_come_in_the_order_asked_for(tmp_path, numbers):
    _, shards = stored(tmp_path, 20)
    rows = ChunkedRows(shards, 8)
    epoch = filled(rows, range(3))
    for got, whole in zip(filled(rows, numbers), epoch):
        assert got.tolist() == whole[numbers].tolist()


@pytest.mark.parametrize("documents", [[], [np.array([], int)]])
def test_a_text_without_anything_to_predict_is_refused(tmp_path, documents):
    shards = PreparedData.open(write(tmp_path, documents)).train
    with pytest.raises(DataError, match=f"has {len(documents)} token.*; give more text"):
        ChunkedRows(shards, 8)

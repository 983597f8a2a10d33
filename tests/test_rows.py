"""Rows: every token once or counted by cause, labels that never cross a boundary, windows packed when needed."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic_documents import Places, synthetic_windows
from test_shards import DOCUMENT, some_documents, stream, write

from hasten.cache import cache_root
from hasten.data.documents import documents_of
from hasten.data.fitting import best_fit
from hasten.data.rows import NO_TARGET, ChunkedRows, Rows
from hasten.data.shards import PreparedData
from hasten.data.windows import WINDOW_TOKENS, Pack, WindowRows, Windows
from hasten.errors import DataError, RecipeError


def filled(rows: Rows, numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, labels, document ids and targets of some rows."""
    numbers = np.asarray(numbers, np.int64)
    tokens = np.full((len(numbers), rows.seq_len), -7)
    labels, ids = tokens.copy(), tokens.astype(np.int32)
    return tokens, labels, ids, rows.fill(numbers, tokens, labels, ids)


def inputs_of(lengths: list[int], document_token: int | None, overflow: str, longest: int) -> list[list[int]]:
    """Return which places of each document are to be inputs: those with a token to predict, as far as they are kept."""
    ends = list(itertools.accumulate(lengths))
    kept = []
    for end, length in zip(ends, lengths):
        places = list(range(end - length, end))
        if document_token is None or end == ends[-1]:
            places = [place for place in places if place + 1 < end]
        if len(places) > longest and overflow != "split":
            places = places[:longest] if overflow == "truncate" else []
        kept.append(places)
    return kept


corpora = st.one_of(
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
    st.lists(st.just(1), min_size=2, max_size=30),
    st.tuples(st.integers(0, 2), st.integers(100, 300)).map(list),
    st.tuples(st.integers(1, 30), st.integers(0, 20)).map(lambda pair: [pair[0]] * pair[1]),
).filter(lambda lengths: sum(lengths) >= 2)


@settings(max_examples=150, deadline=None)
@given(
    lengths=corpora,
    document_token=st.sampled_from([None, 77]),
    packing=st.sampled_from(["best_fit", "chunk", "pad", "bucketed"]),
    overflow=st.sampled_from(["split", "truncate", "drop"]),
    seq_len=st.sampled_from([4, 8, 12, 64]),
    window_documents=st.integers(1, 50),
)
@example([0, 0, 500, 0], 77, "bucketed", "split", 8, 1)
@example([3, 0, 0], 77, "best_fit", "split", 8, 2)
def test_every_token_is_an_input_once_or_counted_by_cause(
    lengths, document_token, packing, overflow, seq_len, window_documents
):
    overflow = "split" if packing == "chunk" else overflow
    capacities = (seq_len // 4, seq_len // 2, seq_len) if packing == "bucketed" else (seq_len,)
    expected = inputs_of(lengths, document_token, overflow, seq_len)
    documents = Places(lengths, document_token)
    pack = Pack(packing, capacities, overflow)
    if not any(expected):
        with pytest.raises(DataError, match="No token of the text"):
            Windows(documents, pack, window_documents=window_documents)
        return
    windows = Windows(documents, pack, window_documents=window_documents)
    seen, room, num_rows = Counter(), 0, 0
    for number, capacity in enumerate(capacities):
        rows = windows.rows(number)
        tokens, labels, ids, targets = filled(rows, range(rows.num_rows))
        assert rows.seq_len == capacity
        is_input = labels != NO_TARGET
        assert targets.tolist() == is_input.sum(axis=1).tolist()
        assert targets.sum() == rows.num_targets
        assert targets.min(initial=1) >= 1
        # The label is the next token of the stream, padding comes last, and tokens that may see each other are of one
        # piece: places that follow each other.
        assert (labels[is_input] == tokens[is_input] + 1).all()
        assert (np.diff(is_input.astype(int), axis=1) <= 0).all()
        assert (tokens[~is_input] == (document_token or 0)).all()
        together, both = np.diff(ids, axis=1) == 0, is_input[:, 1:] & is_input[:, :-1]
        assert (np.diff(tokens, axis=1)[together & both] == 1).all()
        assert (together | both)[~is_input[:, 1:] & ~is_input[:, :-1]].all()
        assert not together[is_input[:, :-1] & ~is_input[:, 1:]].any()
        assert (np.diff(ids, axis=1) >= 0).all()
        document = np.searchsorted(np.cumsum(lengths), tokens, side="right")
        assert not (together & both & (np.diff(document, axis=1) != 0)).any()
        seen.update(tokens[is_input].tolist())
        room, num_rows = room + tokens.size, num_rows + rows.num_rows
    assert seen == Counter(place for places in expected for place in places)
    report = windows.report
    assert (report.documents, report.tokens, report.rows, report.room) == (len(lengths), sum(lengths), num_rows, room)
    assert report.targets == sum(seen.values())
    assert report.targets + sum(report.lost.values()) == report.tokens
    whole = inputs_of(lengths, document_token, "split", seq_len)
    assert report.lost.get("last", 0) == sum(lengths) - sum(map(len, whole))
    assert report.utilisation == report.targets / room


def test_rows_are_what_the_packing_says_piece_by_piece():
    lengths = np.random.default_rng(0).integers(0, 40, 300)
    rows = Windows(Places(lengths, 77), Pack("best_fit", (16,)), window_documents=100).rows()
    begins, trimmed = np.cumsum(lengths) - lengths, lengths.copy()
    trimmed[-1] -= 1
    expected = []
    for first in (0, 100, 200):
        packing = best_fit(trimmed[first : first + 100], 16)
        for row in range(packing.num_rows):
            pieces = range(packing.firsts_R1[row], packing.firsts_R1[row + 1])
            starts = [int(begins[first + packing.documents_P[p]] + packing.offsets_P[p]) for p in pieces]
            expected.append([s + i for s, p in zip(starts, pieces) for i in range(packing.lengths_P[p])])
    order = np.random.default_rng(1).permutation(rows.num_rows)
    tokens, labels, _, _ = filled(rows, order)
    got = [row[label != NO_TARGET].tolist() for row, label in zip(tokens, labels)]
    assert got == [expected[number] for number in order]


def test_rows_of_stored_text_are_its_tokens(tmp_path):
    texts = some_documents([100, 3, 0, 250, 77, 1, 64, 200, 30, 150, 90, 10])
    shards = PreparedData.open(write(tmp_path, texts, shard_tokens=333)).train
    whole = stream(texts)
    rows = Windows(shards, Pack("best_fit", (32,))).rows()
    tokens, labels, ids, _ = filled(rows, range(rows.num_rows))
    is_input = labels != NO_TARGET
    pairs = Counter(zip(tokens[is_input].tolist(), labels[is_input].tolist()))
    assert pairs == Counter(zip(whole[:-1].tolist(), whole[1:].tolist()))
    # A document begins at its document token alone; a cut piece begins elsewhere, at the beginning of a row or a piece.
    begins = np.diff(ids, axis=1, prepend=-1) != 0
    assert begins[(tokens == DOCUMENT) & is_input].all()


@pytest.mark.parametrize("rows", [[], [5], [5, 5, 0], [3, 2, 1]])
def test_rows_come_in_the_order_asked_for_and_large_steps_are_the_same(rows):
    made = Windows(Places([3000] * 200, 77), Pack("best_fit", (1024,)), window_documents=16).rows()
    whole = filled(made, range(made.num_rows))
    assert made.num_rows > 300
    for got, all_rows in zip(filled(made, rows), whole):
        assert got.tolist() == all_rows[rows].tolist()


def test_without_document_numbers_the_rest_is_the_same():
    rows = Windows(Places([30, 5, 9], 77), Pack("best_fit", (16,))).rows()
    tokens, labels = np.empty((2, rows.num_rows, 16), np.int64)
    rows.fill(np.arange(rows.num_rows), tokens, labels)
    expected = filled(rows, range(rows.num_rows))
    assert tokens.tolist() == expected[0].tolist()
    assert labels.tolist() == expected[1].tolist()


@pytest.mark.parametrize(("lengths", "document_token"), [([1], 0), ([0, 1], 0), ([0], 0), ([1, 1, 0], None)])
def test_a_text_without_anything_to_predict_is_refused(lengths, document_token):
    with pytest.raises(DataError, match=r"nothing to predict|No token"):
        Windows(Places(lengths, document_token), Pack("best_fit", (4,)))


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_hold_so_many_documents_that_their_tokens_stay_bounded():
    assert Windows(Places([2] * 10, 0), Pack("best_fit", (4,))).num_windows == 1
    large = Places([WINDOW_TOKENS // 3] * 4, 0)
    assert Windows(large, Pack("best_fit", (WINDOW_TOKENS // 6,))).window_documents == 3
    assert Windows(Places([1 << 19] * 9, 0), Pack("best_fit", (8,))).window_documents == 4
    assert Windows(Places([3 * WINDOW_TOKENS] * 2, 0), Pack("best_fit", (WINDOW_TOKENS,))).window_documents == 1


def test_the_order_of_an_epoch_has_every_row_once_and_goes_through_few_windows_at_a_time():
    windows = Windows(Places([10] * 600, 0), Pack("best_fit", (8,)), window_documents=20, group=4)
    rows = windows.rows()
    for epoch in range(2):
        numbers = rows.order(seed=1).at(epoch * rows.num_rows, rows.num_rows)
        assert sorted(numbers.tolist()) == list(range(rows.num_rows))
    per_window = windows.counts.rows_WK[0, 0]
    assert len(set((numbers[: 4 * per_window] // per_window).tolist())) <= 8


def test_only_the_windows_that_a_step_reads_are_packed_and_they_are_kept():
    documents = Places([10] * 600, 0)
    windows = Windows(documents, Pack("best_fit", (8,)), window_documents=20, group=4)
    rows, per_window = windows.rows(), windows.counts.rows_WK[0, 0]
    documents.touched.clear()
    filled(rows, [0, per_window * 5, 1])
    filled(rows, [2, per_window * 5 + 1])
    assert documents.touched == [(0, 20), (100, 120)]
    # As many windows as two groups stay known, those read last.
    filled(rows, per_window * np.arange(6, 6 + 8))
    documents.touched.clear()
    filled(rows, per_window * np.arange(6, 6 + 8) + 1)
    assert documents.touched == []
    filled(rows, [0])
    assert documents.touched == [(0, 20)]


def test_a_step_of_more_windows_than_are_kept_is_filled_all_the_same():
    documents = Places(list(range(1, 200)), 0)
    rows = Windows(documents, Pack("best_fit", (8,)), window_documents=5, group=1).rows()
    numbers = np.random.default_rng(0).permutation(rows.num_rows)
    whole = Windows(documents, Pack("best_fit", (8,)), window_documents=5, group=100).rows()
    for got, expected in zip(filled(rows, numbers), filled(whole, numbers)):
        assert got.tolist() == expected.tolist()


def test_rows_are_counted_once_and_looked_up_afterwards():
    lengths = np.random.default_rng(2).integers(1, 30, 200).tolist()

    def made(**changed) -> tuple[Places, WindowRows]:
        documents = Places(lengths, 0)
        settings = {"pack": Pack("best_fit", (16,)), "window_documents": 10, "group": 4, **changed}
        return documents, Windows(documents, **settings).rows()

    first, counted = made()
    assert len(first.touched) == 20
    second, looked_up = made()
    assert second.touched == []
    assert looked_up.num_rows == counted.num_rows
    assert (
        filled(looked_up, range(counted.num_rows))[0].tolist() == filled(counted, range(counted.num_rows))[0].tolist()
    )
    for changed in ({"pack": Pack("best_fit", (8,))}, {"pack": Pack("pad", (16,))}, {"window_documents": 20}):
        assert made(**changed)[0].touched
    # What is damaged is counted again.
    for path in (cache_root() / "rows").iterdir():
        path.write_text(path.read_text().replace('"cuts": 0', '"cuts": 1'))
    assert len(made()[0].touched) == 20
    for path in (cache_root() / "rows").iterdir():
        path.write_text("{")
    assert len(made()[0].touched) == 20
    assert made()[0].touched == []


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    assert Windows(Places([5] * 100, 0), Pack("best_fit", (16,)), window_documents=5).num_windows == 20


def test_a_corpus_of_a_trillion_tokens_is_read_at_any_place_through_a_group_of_windows():
    windows = synthetic_windows(22_000, Pack("best_fit", (1024,)))
    rows = windows.rows()
    assert windows.report.tokens == 22_000 * 46_000_000 > 10**12
    assert windows.report.utilisation > 0.999
    order = rows.order(seed=0)
    for place in (0, rows.num_rows // 3, rows.num_rows - 4, 5 * rows.num_rows + 12345):
        windows.documents.touched.clear()
        tokens, labels, _, targets = filled(rows, order.at(place, 8))
        assert 1 <= len(windows.documents.touched) <= 8 + 4
        assert targets.sum() > 0.99 * tokens.size
    assert labels.shape == (8, 1024)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("bestfit", (8,)), "packing='bestfit' is unknown, did you mean 'best_fit'"),
        (("best_fit", (8,), "cut"), "overflow='cut' is unknown.*drop"),
        (("chunk", (8,), "drop"), "overflow='drop' has no effect with packing='chunk'"),
        (("pad", (4, 8)), "rows of one length; got 2"),
    ],
)
def test_settings_that_make_no_rows_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        Pack(*settings)


# --- concat and chunk -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lengths=corpora, seq_len=st.integers(1, 90))
def test_a_chunked_stream_is_cut_every_row(lengths, seq_len):
    rows = ChunkedRows(Places(lengths, 77), seq_len)
    tokens, labels, _, targets = filled(rows, range(rows.num_rows))
    is_input = labels != NO_TARGET
    assert tokens[is_input].tolist() == list(range(sum(lengths) - 1))
    assert labels[is_input].tolist() == list(range(1, sum(lengths)))
    assert (tokens[~is_input] == 77).all()
    assert targets.tolist() == is_input.sum(axis=1).tolist()
    assert rows.num_targets == targets.sum()
    assert targets.min() >= 1


def test_chunked_rows_number_their_documents_by_document_tokens():
    rows = ChunkedRows(documents_of([[5, 6], [7], [8, 9, 4, 3]], document_token=0), 4)
    tokens, labels, ids, _ = filled(rows, range(rows.num_rows))
    assert tokens.tolist() == [[0, 5, 6, 0], [7, 0, 8, 9], [4, 0, 0, 0]]
    assert labels.tolist() == [[5, 6, 0, 7], [0, 8, 9, 4], [3, -100, -100, -100]]
    assert ids.tolist() == [[1, 1, 1, 2], [0, 1, 1, 1], [0, 1, 2, 3]]
    with pytest.raises(DataError, match="give document_token"):
        ChunkedRows(documents_of([[5, 6]]), 4)
    with pytest.raises(DataError, match="has 1 token, and there is nothing to predict"):
        ChunkedRows(documents_of([[]], document_token=0), 4)

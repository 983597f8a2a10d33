"""Documents: whatever holds them, the same starts and the same tokens; only what is asked for is touched."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import DOCUMENT, some_documents, stream, write

from hasten.data.documents import ArrayDocuments, Documents, documents_of
from hasten.data.manifest import MANIFEST, read_manifest
from hasten.data.shard_files import spread
from hasten.data.shards import PreparedData, TokenShards
from hasten.errors import DataError


def all_of(documents: Documents) -> list[list[int]]:
    """Return every document's tokens."""
    starts = documents.starts(0, documents.num_documents)
    lengths = np.diff(starts)
    kept = np.flatnonzero(lengths)
    tokens = iter(documents.pieces(starts[kept], lengths[kept]).tolist())
    return [[next(tokens) for _ in range(length)] for length in lengths.tolist()]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    shard_tokens=st.integers(1, 60),
    data=st.data(),
)
def test_shards_give_the_starts_and_spans_of_the_stream(tmp_path_factory, sizes, shard_tokens, data):
    texts = some_documents(sizes)
    shards = PreparedData.open(write(tmp_path_factory.mktemp("data"), texts, shard_tokens=shard_tokens)).train
    whole = stream(texts)
    begins = [*np.flatnonzero(whole == DOCUMENT).tolist(), len(whole)]
    first = data.draw(st.integers(0, len(sizes)))
    stop = data.draw(st.integers(first, len(sizes)))
    assert shards.starts(first, stop).tolist() == begins[first : stop + 1]
    spans = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8))
    lengths = [data.draw(st.integers(1, len(whole) - start)) for start in spans]
    expected = [token for start, length in zip(spans, lengths) for token in whole[start : start + length].tolist()]
    assert shards.pieces(np.array(spans, int), np.array(lengths, int)).tolist() == expected


@pytest.mark.parametrize(("first", "stop"), [(-1, 1), (0, 4), (2, 1)])
def test_documents_that_are_not_there_are_refused(tmp_path, first, stop):
    shards = PreparedData.open(write(tmp_path, some_documents([3, 4, 5]))).train
    with pytest.raises(IndexError, match="of 3"):
        shards.starts(first, stop)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 16), (15, 1), (3, 0)])
def test_spans_that_are_not_there_are_refused(tmp_path, start, length):
    shards = PreparedData.open(write(tmp_path, some_documents([3, 4, 5]))).train
    assert shards.num_tokens == 15
    with pytest.raises(IndexError, match="stream of 15"):
        shards.pieces(np.array([0, start]), np.array([1, length]))


def test_a_window_of_starts_touches_the_shards_that_hold_it_alone(tmp_path):
    folder = write(tmp_path, some_documents([10] * 30), shard_tokens=100)
    for number in (0, 3):
        (folder / f"train-{number:05d}.idx").unlink()
        (folder / f"train-{number:05d}.idx").touch()
    shards = TokenShards(folder, read_manifest(folder / MANIFEST), "train")
    assert shards.starts(10, 18).tolist() == [11 * document for document in range(10, 19)]
    with pytest.raises(DataError, match=r"train-00000\.idx.*has 0 bytes"):
        shards.starts(9, 18)


def test_shards_in_another_process_are_read_anew_and_not_copied(tmp_path):
    texts = some_documents([5000, 20, 7000])
    shards = PreparedData.open(write(tmp_path, texts)).train
    before = all_of(shards)
    content = pickle.dumps(shards)
    assert len(content) < 5000
    assert all_of(pickle.loads(content)) == before


def test_the_fingerprint_is_the_same_only_for_the_same_stream(tmp_path):
    texts = some_documents([50, 20, 70])
    prints = [
        PreparedData.open(write(tmp_path / "a", texts)).train.fingerprint,
        PreparedData.open(write(tmp_path / "b", texts)).train.fingerprint,
        PreparedData.open(write(tmp_path / "c", texts[::-1])).train.fingerprint,
        PreparedData.open(write(tmp_path / "d", [*texts[:1], np.concatenate(texts[1:])])).train.fingerprint,
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# --- lists, arrays and datasets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_a_document_token_is_put_in_front_where_it_is_missing(kind):
    documents = documents_of([kind([5, 6]), kind([]), kind([9, 7]), kind([9])], document_token=9)
    assert all_of(documents) == [[9, 5, 6], [9], [9, 7], [9]]
    assert (documents.num_documents, documents.num_tokens, documents.document_token) == (4, 7, 9)


def test_without_a_document_token_documents_stay_as_they_are():
    documents = documents_of([[5, 6], [], [9, 7]])
    assert all_of(documents) == [[5, 6], [], [9, 7]]
    assert documents.document_token is None


@pytest.mark.parametrize("largest", [65_535, 65_536, 2**32 - 1])
def test_ids_of_every_size_are_kept(largest):
    documents = documents_of([[1], [largest, 2], [3]], document_token=0)
    assert all_of(documents) == [[0, 1], [0, largest, 2], [0, 3]]
    assert documents.pieces(np.array([0]), np.array([1])).dtype.itemsize == (2 if largest < 65_536 else 4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no documents"),
        ([[1, -2]], "the id -2"),
        ([[1], [2.5]], "After document 1 there is values of the type float64"),
        ([["a"]], "values of the type"),
        (["text"], "Document 0 has the type str"),
        ([[1], {"input_ids": [1]}], "Document 1 has the type dict"),
        ([[1 << 32]], "no vocabulary is that large"),
        ([[[1, 2]]], "Document 0 has the type list"),
    ],
)
def test_what_holds_no_token_ids_is_refused(source, message):
    with pytest.raises(DataError, match=message):
        documents_of(source)


def test_documents_pass_through_and_keep_their_document_token(tmp_path):
    shards = PreparedData.open(write(tmp_path, some_documents([5]))).train
    assert documents_of(shards) is documents_of(shards, document_token=DOCUMENT) is shards
    with pytest.raises(DataError, match="document_token=3 was given for documents that begin with 300"):
        documents_of(shards, document_token=3)
    with pytest.raises(DataError, match="document_token=-1 is no token id"):
        documents_of([[1]], document_token=-1)


@pytest.mark.parametrize("starts", [[], [0], [1, 3], [0, 2], [0, 4], [0, 2, 1, 3]])
def test_starts_that_are_not_those_of_the_stream_are_refused(starts):
    with pytest.raises(DataError, match="rise from 0 to the 3 tokens"):
        ArrayDocuments(np.array([1, 2, 3]), np.array(starts))


def test_an_array_whose_documents_begin_otherwise_is_refused():
    assert ArrayDocuments(np.array([0, 2, 0]), np.array([0, 2, 2, 3]), document_token=0).num_documents == 3
    with pytest.raises(DataError, match="begin with the document token 0, and one begins with 2"):
        ArrayDocuments(np.array([0, 2, 0]), np.array([0, 1, 3]), document_token=0)


def test_the_fingerprint_of_an_array_knows_tokens_starts_and_the_document_token():
    made = [
        documents_of([[0, 1], [0, 2]], document_token=0),
        documents_of([[1], [2]], document_token=0),
        documents_of([[0, 1], [0, 2]]),
        documents_of([[0, 1, 0, 2]]),
        documents_of([[0, 1], [0, 3]], document_token=0),
    ]
    assert made[0].fingerprint == made[1].fingerprint
    assert len({documents.fingerprint for documents in made}) == 4


def test_a_dataset_of_hugging_face_is_read_column_wise():
    datasets = pytest.importorskip("datasets")
    rows = [[5, 6, 7], [], [9], [8, 4]]
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "text": ["a", "b", "c", "d"]})
    assert all_of(documents_of(dataset)) == rows
    assert all_of(documents_of(dataset, document_token=9)) == [[9, 5, 6, 7], [9], [9], [9, 8, 4]]
    chosen = dataset.select([3, 0]).rename_column("input_ids", "ids")
    assert all_of(documents_of(chosen, column="ids")) == [rows[3], rows[0]]
    with pytest.raises(DataError, match="no column 'input_ids', but ids, text"):
        documents_of(chosen)
    with pytest.raises(DataError, match="holds string, not lists"):
        documents_of(dataset, column="text")
    with pytest.raises(DataError, match="is null"):
        documents_of(datasets.Dataset.from_dict({"input_ids": [[1], None]}))


# --- spans ----------------------------------------------------------------------------------------------------------


@given(spans=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 30)), max_size=20))
def test_spread_spans_are_their_numbers_one_behind_the_other(spans):
    starts, lengths = np.array(spans, int).reshape(-1, 2).T
    assert spread(starts, lengths).tolist() == [start + i for start, length in spans for i in range(length)]

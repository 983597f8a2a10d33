"""Which documents a step reads, told without reading a token, is what its tokens say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_documents import Places, Synthetic, counts_of
from test_damaged_data import batches_of, damage
from test_shards import some_documents, write

from hasten.data.batches import Batches, RowSource
from hasten.data.buckets import BucketSource
from hasten.data.corpus import CorpusSpec
from hasten.data.documents import DocumentPart, documents_of
from hasten.data.mixture import MixtureSource
from hasten.data.preparation import prepare
from hasten.data.reading import read
from hasten.data.rows import NO_TARGET, ChunkedRows
from hasten.data.windows import Pack, Windows
from hasten.errors import DamagedData

ALL = 10**9


def read_tokens(batches: Batches, position, rows: int, length: int) -> list[int]:
    """Return the inputs of a step that have a target: what documents gave, without padding."""
    step, _ = batches.take(position, rows=rows, length=length)
    return [token for batch in step for token in batch.tokens_BT[batch.labels_BT != NO_TARGET].tolist()]


def told_tokens(parts: list[DocumentPart], starts: dict[str, list[int]], firsts: dict[str, int]) -> list[int]:
    """Return the same from where documents start, in sources whose tokens are their places behind a first one."""
    return [
        firsts[part.source] + starts[part.source][part.document] + place
        for part in parts
        for place in range(part.begin, part.begin + part.tokens)
    ]


lengths_of = st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda lengths: sum(lengths) >= 2)


@pytest.mark.parametrize("kind", ["stream", "chunk", "best_fit", "pad", "bucketed"])
@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of, rows=st.integers(1, 6), length=st.sampled_from([4, 8, 16]), where=st.integers(0, 50))
def test_documents_of_a_step_are_those_of_its_tokens(kind, lengths, rows, length, where):
    documents = Places(lengths, 99)
    if kind == "bucketed":
        windows = Windows(documents, Pack(kind, (4, 8, 16)))
        source = BucketSource([windows.rows(number) for number in range(3)], seed=0)
    else:
        made = ChunkedRows(documents, 16) if kind == "stream" else Windows(documents, Pack(kind, (16,))).rows()
        source = RowSource(made, seed=0)
    batches, position = Batches(source, seq_len=16, micro_rows=2), source.begin
    for _ in range(where % 5):
        position = batches.skip(position, rows=rows, length=length).position
    parts = batches.documents(position, rows=rows, length=length, most=ALL)
    starts = {"": np.cumsum([0, *lengths]).tolist()}
    assert told_tokens(parts, starts, {"": 0}) == read_tokens(batches, position, rows, length)
    assert all(part.begin + part.tokens <= lengths[part.document] for part in parts)


def test_documents_of_a_mixture_have_the_name_of_their_source():
    sources = {name: [np.arange(9) + first for _ in range(30)] for name, first in (("a.txt", 100), ("b.txt", 500))}
    rows = [Windows(documents_of(texts, document_token=0), Pack("pad", (16,))).rows() for texts in sources.values()]
    batches = Batches(MixtureSource(rows, [3, 1], seed=0, names=list(sources)), seq_len=16, micro_rows=4)
    parts = batches.documents((40,), rows=8)
    assert [part.source for part in parts].count("b.txt") == 2
    expected = [token for part in parts for token in [0, *sources[part.source][part.document]][: part.tokens]]
    assert expected == read_tokens(batches, (40,), 8, 16)


def test_documents_decode_to_the_text_that_was_prepared(tmp_path, library_text):
    texts = [text for text in library_text[:60_000].split("\n\n") if text.strip()]
    for name, some in (("a", texts[::2]), ("b", texts[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    spec = CorpusSpec((str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")), apart=True)
    data = prepare(spec, vocab_size=500, cache=tmp_path / "cache")
    batches = Batches(read(data, seq_len=64, seed=0, weights=[2, 1]), seq_len=64, micro_rows=4)
    seen = 0
    for part in batches.documents((0,), rows=16, most=200):
        shards = data.trains[data.train_names.index(part.source)]
        begin, end = shards.starts(part.document, part.document + 1).tolist()
        whole = data.tokenizer.decode(shards.read(begin + 1, end).tolist())
        assert whole in texts
        seen += part.tokens == end - begin
        assert part.begin + part.tokens <= end - begin
    assert seen > 5  # some of them whole


def test_no_more_than_asked_for_and_in_order():
    batches = Batches(RowSource(ChunkedRows(Places([3] * 500, 99), 30), seed=0), seq_len=30, micro_rows=8)
    whole = batches.documents((0,), rows=8, most=ALL)
    assert len(whole) == 80
    assert batches.documents((0,), rows=8) == whole[:64]
    assert batches.documents((0,), rows=8, most=7) == whole[:7]


def test_documents_of_a_damaged_step_are_told(tmp_path):
    folder = write(tmp_path / "data", some_documents([300, 20, 5000]))
    batches = batches_of(folder, "best_fit")
    damage("truncated", folder / "train-00000.bin", np.random.default_rng(0))
    with pytest.raises(DamagedData):
        batches.take((0,), rows=5)
    assert {part.document for part in batches.documents((0,), rows=64)} == {0, 1, 2}


def test_documents_of_a_step_in_a_trillion_tokens_are_found_in_few_windows():
    windows, pack = 22_000, Pack("best_fit", (1024,))
    documents = Synthetic(windows)
    source = RowSource(Windows(documents, pack, counts=counts_of(windows, pack)).rows(), seed=0)
    documents.touched.clear()
    batches = Batches(source, seq_len=1024, micro_rows=8)
    parts = batches.documents((10**8,), rows=8, most=3)
    assert len(parts) == 3
    assert 0 < sum(part.tokens for part in parts) <= 3 * 1024
    assert len(documents.touched) < 150  # a window to pack and some 30 looks for each part

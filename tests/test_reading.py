"""Plain settings choose what reads the text; what contradicts itself is refused with a reason."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from hasten.data.batches import Batches, RowSource
from hasten.data.buckets import BucketSource
from hasten.data.corpus import CorpusSpec
from hasten.data.mixture import MixtureSource
from hasten.data.preparation import prepare
from hasten.data.reading import packing_reports, read
from hasten.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def folder(library_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    parts = library_text[:60_000].split("\n\n")
    for name, some in (("a", parts[:60]), ("b", parts[60:90]), ("val", parts[90:100])):
        (folder / name).mkdir()
        for number, part in enumerate(some):
            (folder / name / f"{number:03d}.txt").write_text(f"{part}\n")
    return folder


def prepared(folder, *, apart):
    spec = CorpusSpec((f"{folder}/a", f"{folder}/b"), val=(f"{folder}/val",), apart=apart)
    return prepare(spec, tokenizer="bytes")


@pytest.fixture(scope="module")
def data(folder):
    return prepared(folder, apart=False)


@pytest.fixture(scope="module")
def mixture(folder):
    return prepared(folder, apart=True)


def pairs_of(batches):
    for batch in batches:
        has_target = batch.labels_BT >= 0
        yield from zip(batch.tokens_BT[has_target].tolist(), batch.labels_BT[has_target].tolist())


def an_epoch(source, **more):
    batches, position, found = Batches(source, seq_len=64, micro_rows=2), source.begin, Counter()
    while source.epochs(position) < 1:
        step, position = batches.take(position, rows=1, **more)
        found.update(pairs_of(step))
    return found


SETTINGS = {
    "best_fit": {},
    "chunk": {"packing": "chunk"},
    "pad": {"packing": "pad"},
    "bucket": {"mode": "bucket", "lengths": (16, 32, 64)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_token_of_an_epoch_is_read_once_under_every_setting(name, data):
    source = read(data, seq_len=64, seed=1, **SETTINGS[name])
    assert isinstance(source, BucketSource if name == "bucket" else RowSource)
    stream = data.train.read(0, data.train.num_tokens).tolist()
    assert an_epoch(source) == Counter(pairwise(stream))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", [16, 32])
def test_short_lengths_read_every_token_too(name, length, data):
    source = read(data, seq_len=64, seed=1, **SETTINGS[name])
    stream = data.train.read(0, data.train.num_tokens).tolist()
    assert an_epoch(source, length=length) == Counter(pairwise(stream))


def test_a_mixture_reads_both_sources_in_proportion(mixture):
    source = read(mixture, seq_len=64, seed=0, weights=(1, 3))
    assert isinstance(source, MixtureSource)
    batches = Batches(source, seq_len=64, micro_rows=40)
    steps, position = [], source.begin
    for _ in range(6):
        (batch,), position = batches.take(position, rows=40)
        steps.append(batch)
    first, second = (Counter(pairwise(train.read(0, train.num_tokens).tolist())) for train in mixture.trains)
    only_first, only_second = first.keys() - second.keys(), second.keys() - first.keys()
    seen = Counter(pairs_of(steps))
    assert all(seen[pair] for pair in only_second)
    assert sum(seen[pair] for pair in only_first) > 0
    assert source.component_epochs(position) == (
        60 / source.rows.components[0].num_rows,
        180 / source.rows.components[1].num_rows,
    )


def test_the_same_step_is_read_whatever_the_number_of_ranks(mixture):
    source = read(mixture, seq_len=64, seed=0, weights=(1, 3))
    whole, _ = Batches(source, seq_len=64, micro_rows=16).take((5,), rows=12)
    parts = [
        Batches(source, seq_len=64, micro_rows=16, rank=rank, world_size=3).take((5,), rows=12)[0] for rank in range(3)
    ]
    together = np.concatenate([batch.tokens_BT.numpy() for step in parts for batch in step])
    assert np.array_equal(together, whole[0].tokens_BT.numpy())


@pytest.mark.parametrize("name", SETTINGS)
def test_reports_say_what_became_of_the_tokens(name, data):
    settings = SETTINGS[name]
    (report,) = packing_reports(data, seq_len=64, **settings)
    assert (report.documents, report.tokens) == (data.train.num_documents, data.train.num_tokens)
    assert report.tokens == report.targets + sum(report.lost.values())
    source = read(data, seq_len=64, seed=0, **settings)
    num_rows = source.num_rows if name == "bucket" else source.rows.num_rows
    assert report.room == num_rows * 64
    assert (report.cuts > 0) == (name == "chunk")


def test_cuts_of_chunks_are_documents_that_would_have_fitted(data):
    starts = [*data.train.document_starts.tolist(), data.train.num_tokens - 1]
    rows = [{place // 64 for place in range(begin, end)} for begin, end in pairwise(starts)]
    (report,) = packing_reports(data, seq_len=64, packing="chunk")
    assert report.cuts == sum(end - begin <= 64 and len(r) > 1 for r, (begin, end) in zip(rows, pairwise(starts)))


def test_lost_tokens_are_counted(data):
    (report,) = packing_reports(data, seq_len=64, overflow="drop")
    assert report.lost["dropped"] > 0
    source = read(data, seq_len=64, seed=0, overflow="drop")
    assert sum(an_epoch(source).values()) == report.targets


def test_a_mixture_has_a_report_for_each_source(mixture):
    reports = packing_reports(mixture, seq_len=64)
    assert [report.tokens for report in reports] == [train.num_tokens for train in mixture.trains]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "buckets", "lengths": (64,)}, "mode='buckets' is unknown, did you mean 'bucket'"),
        ({"mode": "bucket"}, r"row lengths \[\] must end with seq_len=64"),
        ({"mode": "bucket", "lengths": (16, 32)}, r"row lengths \[16, 32\] must end with seq_len=64"),
        ({"mode": "bucket", "lengths": (32, 64), "packing": "pad"}, "packing='pad' has no meaning in buckets"),
        ({"packing": "bestfit"}, "packing='bestfit' is unknown, did you mean 'best_fit'"),
        ({"packing": "chunk", "overflow": "drop"}, "overflow='drop' has no effect with packing='chunk'"),
        ({"overflow": "cut"}, "overflow='cut' is unknown"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, match, data):
    with pytest.raises(RecipeError, match=match):
        read(data, seq_len=64, seed=0, **settings)


def test_a_mixture_in_buckets_is_refused_with_the_reason(mixture):
    with pytest.raises(RecipeError, match="different shares of short and long documents"):
        read(mixture, seq_len=64, seed=0, mode="bucket", lengths=(32, 64), weights=(1, 1))


def test_weights_and_sources_have_to_be_as_many(mixture, data):
    with pytest.raises(DataError, match="3 weights for 2 sources"):
        read(mixture, seq_len=64, seed=0, weights=(1, 1, 1))
    with pytest.raises(DataError, match="no weights say how much to read"):
        read(mixture, seq_len=64, seed=0)
    with pytest.raises(DataError, match="2 weights for 1 sources of a mixture"):
        read(data, seq_len=64, seed=0, weights=(1, 1))

"""Sources kept apart for a mixture: a split each, one tokenizer, one held-out stream with a share of every source."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hasten.data import encoders, preparation
from hasten.data.corpus import CorpusSpec, open_corpus
from hasten.data.preparation import prepare
from hasten.data.shards import PreparedData
from hasten.errors import DataError


@pytest.fixture
def sources(library_text, tmp_path):
    """Forty short documents, one long document, records."""
    parts = library_text[:120_000].split("\n\n")
    (tmp_path / "many").mkdir()
    for number in range(40):
        text = "\n\n".join(parts[number * 4 : number * 4 + 4])
        (tmp_path / "many" / f"{number}.txt").write_text(text or "more\n")
    (tmp_path / "one.txt").write_text(library_text[120_000:150_000])
    records = [json.dumps({"text": part}) for part in parts[200:300]]
    (tmp_path / "records.jsonl").write_text("\n".join(records))
    return tuple(str(tmp_path / name) for name in ("many", "one.txt", "records.jsonl"))


@pytest.fixture
def spec(sources):
    return CorpusSpec(sources, apart=True)


def everything(shards):
    return shards.read(0, shards.num_tokens)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_source_is_a_split_with_its_own_text(tokenizer, spec, tmp_path):
    data = prepare(spec, tokenizer=tokenizer, vocab_size=500, cache=tmp_path / "cache")
    assert data.train_names == ("many", "one.txt", "records.jsonl")
    assert len(data.trains) == 3
    for number, shards in enumerate(data.trains):
        alone = open_corpus(CorpusSpec((spec.train[number],)))
        expected = []
        for piece in alone.pieces("train"):
            expected += [[data.document_token]] * piece.starts_document + [data.tokenizer.encode(piece.text)]
        assert np.array_equal(everything(shards), np.concatenate(expected))
        assert shards.source_bytes == sum(piece.source_bytes for piece in alone.pieces("train"))
    data.verify()


def test_held_out_text_is_a_share_of_every_source(spec, tmp_path):
    data = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    expected = []
    for source in spec.train:
        part = list(open_corpus(CorpusSpec((source,))).pieces("val"))
        assert part
        for piece in part:
            expected += [[data.document_token]] * piece.starts_document + [data.tokenizer.encode(piece.text)]
    assert np.array_equal(everything(data.val), np.concatenate(expected))


def test_a_source_of_one_short_document_gives_a_share_too(spec, library_text, tmp_path):
    (tmp_path / "little.txt").write_text(library_text[:600])
    data = prepare(
        CorpusSpec((*spec.train, str(tmp_path / "little.txt")), apart=True), tokenizer="bytes", cache=tmp_path / "cache"
    )
    held_out = bytes(everything(data.val)[everything(data.val) < 256].astype(np.uint8)).decode()
    lines = [line for line in library_text[:600].split("\n") if len(line) > 30]
    assert any(line in held_out for line in lines)
    assert not all(line in held_out for line in lines)


def test_a_validation_file_leaves_all_of_the_sources_to_training(sources, tmp_path):
    data = prepare(CorpusSpec(sources[:2], val=sources[2:], apart=True), tokenizer="bytes", cache=tmp_path / "cache")
    joined = prepare(CorpusSpec(sources[:2], val=sources[2:]), tokenizer="bytes", cache=tmp_path / "cache")
    assert np.array_equal(np.concatenate([everything(train) for train in data.trains]), everything(joined.train))
    assert np.array_equal(everything(data.val), everything(joined.val))


def test_one_tokenizer_is_learned_from_the_text_of_all_sources(sources, tmp_path):
    val = (sources[2],)
    apart = prepare(CorpusSpec(sources[:2], val=val, apart=True), vocab_size=400, cache=tmp_path / "a")
    joined = prepare(CorpusSpec(sources[:2], val=val), vocab_size=400, cache=tmp_path / "b")
    assert apart.tokenizer_sha256 == joined.tokenizer_sha256
    assert apart.corpus_sha256 != joined.corpus_sha256


def test_the_sizes_of_all_streams_together_are_known(spec, tmp_path):
    data = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    assert data.train_size.num_tokens == sum(train.num_tokens for train in data.trains)
    assert data.train_size.num_documents == sum(train.num_documents for train in data.trains)
    assert data.train_size.source_bytes == sum(train.source_bytes for train in data.trains)
    with pytest.raises(DataError, match="mixture of 3 sources, so there is no single stream"):
        _ = data.train


def test_a_corpus_that_is_not_a_mixture_has_one_stream(sources, tmp_path):
    data = prepare(CorpusSpec(sources), tokenizer="bytes", cache=tmp_path / "cache")
    assert data.trains == (data.train,)
    assert data.train_names == ("many, one.txt, records.jsonl",)
    assert data.train_size == (data.train.num_tokens, data.train.num_documents, data.train.source_bytes)


def test_mixtures_and_joined_corpora_lie_beside_each_other_and_are_reused(sources, tmp_path):
    cache, seen = tmp_path / "cache", []
    specs = [CorpusSpec(sources), CorpusSpec(sources, apart=True), CorpusSpec(sources[::-1], apart=True)]
    first = [prepare(spec, tokenizer="bytes", cache=cache) for spec in specs]
    assert len({data.folder for data in first}) == 3
    again = [prepare(spec, tokenizer="bytes", cache=cache, on_progress=seen.append) for spec in specs]
    assert [data.folder for data in again] == [data.folder for data in first]
    assert {progress.stage for progress in seen} == {"reading", "reused"}
    opened = PreparedData.open(first[1].folder)
    assert [train.num_tokens for train in opened.trains] == [train.num_tokens for train in first[1].trains]


def test_shards_are_the_same_whatever_the_number_of_workers(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 1000)
    made = [
        content(prepare(spec, vocab_size=400, cache=tmp_path / str(workers), workers=workers).folder)
        for workers in (1, 3)
    ]
    assert made[0] == made[1]
    assert {"train-0-00000.bin", "train-1-00000.bin", "train-2-00000.bin", "val-00000.bin"} < set(made[0])


def test_another_encoder_is_fallen_back_from_in_a_mixture_too(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 1000)
    plain = content(prepare(spec, vocab_size=400, cache=tmp_path / "plain").folder)

    def sly(tokenizer):
        return lambda text: tokenizer.encode(text)[: None if "self" not in text else -1]

    monkeypatch.setattr(encoders, "ENCODERS", {"sly": sly})
    assert content(prepare(spec, vocab_size=400, cache=tmp_path / "sly").folder) == plain


@pytest.mark.parametrize("damage", ["missing file", "short file", "manifest"])
def test_a_damaged_mixture_is_made_again(damage, spec, tmp_path):
    folder = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache").folder
    whole = content(folder)
    if damage == "missing file":
        (folder / "train-2-00000.bin").unlink()
    elif damage == "short file":
        (folder / "train-0-00000.idx").write_bytes(b"")
    else:
        (folder / "manifest.json").write_text("{}")
    assert content(prepare(spec, tokenizer="bytes", cache=tmp_path / "cache").folder) == whole


class Stop(Exception):
    pass


def test_an_interrupted_mixture_leaves_nothing(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(preparation, "_SECONDS_BETWEEN_REPORTS", 0)

    def stop(progress):
        if progress.stage == "encoding" and progress.done_bytes > progress.total_bytes // 2:
            raise Stop

    with pytest.raises(Stop):
        prepare(spec, tokenizer="bytes", cache=tmp_path / "cache", on_progress=stop)
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["prepared"]


def test_names_in_the_manifest_do_not_say_where_the_sources_lie(spec, tmp_path):
    data = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    assert str(tmp_path) not in (data.folder / "manifest.json").read_text()


def test_a_file_in_two_sources_is_refused(sources, tmp_path):
    both = (str(tmp_path / "many"), str(tmp_path / "many" / "3*.txt"))
    with pytest.raises(DataError, match=r"3\.txt is in two sources of the mixture, .*many and .*3\*\.txt; leave it"):
        open_corpus(CorpusSpec(both, apart=True))
    open_corpus(CorpusSpec(both))


def test_a_source_without_text_is_named(sources, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n \n")
    with pytest.raises(DataError, match=r"blank\.txt holds no text"):
        open_corpus(CorpusSpec((*sources, str(tmp_path / "blank.txt")), apart=True))
    given = CorpusSpec((sources[0], str(tmp_path / "blank.txt")), val=(sources[1],), apart=True)
    with pytest.raises(DataError, match=r"blank\.txt holds no text; expected at least one line"):
        list(open_corpus(given).sides())
    (tmp_path / "word.txt").write_text("word")
    with pytest.raises(DataError, match=r"word\.txt holds too little text to set a validation part aside"):
        open_corpus(CorpusSpec((*sources, str(tmp_path / "word.txt")), apart=True))

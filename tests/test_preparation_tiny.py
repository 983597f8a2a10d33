"""Many tiny documents are prepared in one step, into the very bytes that preparing them one by one gives."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.data import encoders, formats, preparation
from hasten.data.corpus import CorpusSpec, open_corpus
from hasten.data.encoding import TextEncoder
from hasten.data.preparation import prepare
from hasten.data.shards import ShardWriter
from hasten.data.tokenizer import byte_tokenizer, train_bpe


def lines(count=5000):
    rng = random.Random(0)
    words = ["the", "of", "and", "in", "a", "is", "it's", "we'll", "12", "3.5", "naïve", "你好", "\U0001f600", "f(x)"]
    words += ["\\", '"', "/", "<|endoftext|>", "\t"]
    return [" ".join(rng.choices(words, k=rng.randrange(0, 12))) for _ in range(count)]


def as_json_lines():
    return "".join(json.dumps({"text": line}) + "\n" for line in lines())


CORPORA = {
    "tiny.jsonl": (lambda: as_json_lines().encode(), {}),
    "compact.jsonl": (
        lambda: "".join(
            json.dumps({"text": line}, ensure_ascii=False, separators=(",", ":")) + "\r\n" for line in lines()
        ).encode(),
        {},
    ),
    "keys.jsonl": (
        lambda: (
            b"\xef\xbb\xbf"
            + "\n".join(
                json.dumps({"id": i, "text": line}) + "\n \n" * (i % 99 == 0) for i, line in enumerate(lines())
            ).encode()
        ),
        {},
    ),
    "lines.txt": (lambda: "\n".join(lines()).encode(), {"separator": "\n"}),
    "damaged.txt": (lambda: "\n\n".join(lines()).encode().replace(b"12", b"\xff\0", 40), {"separator": "\n\n"}),
    "array.json": (lambda: json.dumps([{"text": line} for line in lines()], indent=1).encode(), {}),
    "whole.txt": (lambda: "\n".join(lines()).encode(), {}),
    "mixed.jsonl": (
        lambda: (as_json_lines() + json.dumps({"text": "long " * 50_000}) + "\n" + as_json_lines()).encode(),
        {},
    ),
}
# Of the shards that the one-by-one preparation of version 0.1.0 wrote, with the bytes tokenizer.
BEFORE = {
    "tiny.jsonl": ("386592b79f3453fb", "9e2ab67096a8fd52"),
    "compact.jsonl": ("ffbd8cd5cdbab38e", "e87516f438ad8e30"),
    "keys.jsonl": ("5abaa459884ff90b", "3333362d41565487"),
    "lines.txt": ("543053ffd5b9a824", "d23d01812c76a0b6"),
    "damaged.txt": ("558361b5960d041b", "950dfa59bf6958c4"),
    "array.json": ("a990537754231037", "73dbdd3156baef32"),
    "whole.txt": ("9bfab1feb92f11f6", "daa09c65a3418dbf"),
    "mixed.jsonl": ("47501a50d2b041af", "c911dd16ba9ab16c"),
}


def shards_hash(data):
    files = sorted(path for path in data.folder.iterdir() if path.suffix in (".bin", ".idx"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()[:16]


@pytest.mark.parametrize("name", CORPORA)
def test_shards_are_those_of_preparing_one_by_one(name, tmp_path):
    content, how = CORPORA[name]
    (tmp_path / name).write_bytes(content())
    data = prepare(CorpusSpec((str(tmp_path / name),), **how), tokenizer="bytes", cache=tmp_path / "cache")
    assert (data.corpus_sha256[:16], shards_hash(data)) == BEFORE[name]


@pytest.mark.parametrize("name", CORPORA)
def test_tokens_are_those_of_each_document_by_itself(name, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 5000)
    content, how = CORPORA[name]
    (tmp_path / name).write_bytes(content())
    spec = CorpusSpec((str(tmp_path / name),), **how)
    data = prepare(spec, vocab_size=400, cache=tmp_path / "cache", workers=2)
    corpus = open_corpus(spec)
    for split, shards in (("train", data.train), ("val", data.val)):
        expected = []
        for piece in corpus.pieces(split):
            expected += [[data.document_token]] * piece.starts_document + [data.tokenizer.encode(piece.text)]
        assert np.array_equal(shards.read(0, shards.num_tokens), np.concatenate(expected))


@pytest.mark.parametrize("name", ["kitoken", "tiktoken", "tokenizers", "bytes"])
def test_texts_encoded_together_have_the_ids_of_each(name):
    tokenizer = byte_tokenizer() if name == "bytes" else train_bpe([" ".join(lines())], 500)
    if name in ("kitoken", "tiktoken"):
        pytest.importorskip(name)
    encode = tokenizer.encode if name == "bytes" else encoders.ENCODERS[name](tokenizer)
    together = encoders.in_bulk(name, tokenizer, encode)
    awkward = [*encoders.AWKWARD, *lines(500), "", "a\n'tis", "\U0010fffe", "", "x\t's y", "'s", " ", "\n", "."]
    for texts in (awkward, awkward[:-8], [""], ["", ""], ["a\n'tis"], ["b", "a\n'tis", "", "a\n're", "c"]):
        ids, lengths = together(texts)
        assert lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]
        assert np.array_equal(ids, np.concatenate([tokenizer.encode(text) for text in texts]))


@pytest.mark.parametrize("name", ["kitoken", "tiktoken"])
def test_fast_encoders_take_tiny_texts_together(name):
    pytest.importorskip(name)
    tokenizer = train_bpe([" ".join(lines())], 500)
    seen = []

    def encode(text):
        seen.append(text)
        return tokenizer.encode(text)

    ids, _ = encoders.in_bulk(name, tokenizer, encode)(["some", "tiny", "texts"])
    assert len(ids)
    assert seen == list(encoders.AWKWARD)  # by itself only what is verified


def test_difference_in_a_later_tiny_text_is_found():
    tokenizer = train_bpe([" ".join(lines())], 500)
    encode = TextEncoder(tokenizer)
    encode.is_fast, encode._encode_all = True, encoders.in_bulk("sly", tokenizer, lambda t: tokenizer.encode(t)[::-1])
    assert encode(["a", "b", "the and of is"]) is None
    encode._encode_all = encoders.in_bulk("honest", tokenizer, tokenizer.encode)
    assert encode(["a", "b", "the and of is"]) is not None


KEY = st.sampled_from(
    ['{"text": "', '{"text":"', '{ "text": "', '{"a": 1, "text": "', '"', '{"text": ""', "", "[", "\ufeff"]
)
BODY = st.text(st.sampled_from('ab"\\u00e9n/\t\ud800é\n'), max_size=8)
END = st.sampled_from(['"}', '" }', '"}}', '"', '", "text": "x"}', '"}\r', '"} ', '","a":2}'])


@given(parts=st.lists(st.tuples(KEY, BODY, END), max_size=6))
@settings(deadline=None, max_examples=300)
def test_line_read_in_bulk_is_the_line_parsed(parts, tmp_path_factory):
    content = "".join("".join(part) + "\n" for part in parts)
    file = tmp_path_factory.mktemp("json") / "a.jsonl"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    found = read(file)
    whole, formats._TINY_RECORD = formats._TINY_RECORD, -1  # never in bulk
    try:
        assert found == read(file)
    finally:
        formats._TINY_RECORD = whole


def read(path):
    from hasten.data.counts import Counts
    from hasten.data.sources import hashed_files

    (file,) = hashed_files([(path, "a.jsonl")])
    tally = Counts()
    found = list(formats.fragments(file, text_key="text", separator=None, tally=tally))
    return found, tally.records_read, tally.to_json()


@pytest.mark.parametrize("shard_tokens", [1, 2, 7, 100])
def test_many_documents_at_once_make_the_shards_of_one_by_one(shard_tokens, tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, rng.integers(0, 9)) for _ in range(40)]
    results = []
    for how in ("one", "many"):
        folder = tmp_path / how
        folder.mkdir()
        with ShardWriter(folder, "train", vocab_size=257, document_token=256, shard_tokens=shard_tokens) as writer:
            if how == "one":
                for text in texts:
                    writer.start_document()
                    writer.append(text, source_bytes=len(text))
            else:
                for begin in range(0, 40, 8):
                    some = texts[begin : begin + 8]
                    starts = np.cumsum([0, *(len(text) + 1 for text in some)])[:-1]
                    tokens = np.concatenate([np.append(256, text) for text in some])
                    writer.extend(tokens, starts, source_bytes=sum(map(len, some)))
            entry = writer.close()
        results.append((entry, {path.name: path.read_bytes() for path in folder.iterdir()}))
    assert results[0] == results[1]

"""Tokenizers give back every byte they were given, and a file that other tools read."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.data.cutting import cut
from hasten.data.tokenizer import DOCUMENT_TEXT, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from hasten.errors import DataError

TEXTS = ["def add(a, b):\n    return a + b\n" * 50, "It was a bright cold day; the clocks struck 13.\r\n" * 50]
BYTES = byte_tokenizer()
BPE = train_bpe(TEXTS, vocab_size=300)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


@BOTH
@given(text=st.text())
@settings(deadline=None, max_examples=300)
def test_any_unicode_text_comes_back_byte_for_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.uint32


@BOTH
@given(data=st.binary())
@settings(deadline=None)
def test_any_bytes_can_be_spelled_and_decoded(tokenizer, data):
    spelled = {piece: index for index, piece in enumerate(tokenizer.token_bytes) if len(piece) == 1}
    assert len(spelled) == 256
    assert tokenizer.decode_bytes(spelled[bytes([byte])] for byte in data) == data


@BOTH
def test_every_code_point_comes_back(tokenizer):
    points = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    assert tokenizer.decode_bytes(tokenizer.encode(points)) == points.encode()


@BOTH
def test_special_token_in_a_text_is_text(tokenizer):
    ids = tokenizer.encode(f"a{DOCUMENT_TEXT}b")
    assert tokenizer.document_token not in ids
    assert tokenizer.decode(ids) == f"a{DOCUMENT_TEXT}b"
    assert tokenizer.decode([*ids, tokenizer.document_token]) == f"a{DOCUMENT_TEXT}b"


@BOTH
def test_lone_surrogate_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@BOTH
def test_batch_equals_single_texts(tokenizer):
    texts = ["", "a", "a b", *TEXTS]
    for ids, text in zip(tokenizer.encode_batch(texts), texts):
        assert np.array_equal(ids, tokenizer.encode(text))


def test_byte_ids_are_the_bytes():
    assert BYTES.encode("é\0").tolist() == [0xC3, 0xA9, 0]
    assert (BYTES.vocab_size, BYTES.document_token) == (257, 256)
    assert BYTES.encode("é\0").tolist() == BYTES._inner.encode("é\0", add_special_tokens=False).ids


def test_training_twice_gives_the_same_file():
    assert train_bpe(iter(TEXTS), vocab_size=300).document == BPE.document
    assert BPE.vocab_size == 300


@pytest.mark.parametrize("vocab_size", [256, (1 << 20) + 1, 0, -1])
def test_vocabulary_out_of_range_is_refused(vocab_size):
    with pytest.raises(DataError, match="expected 257"):
        train_bpe(TEXTS, vocab_size=vocab_size)


def test_smallest_vocabulary_has_bytes_only():
    tokenizer = train_bpe(TEXTS, vocab_size=257)
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("ab").tolist() == [tokenizer.encode("a")[0], tokenizer.encode("b")[0]]


@pytest.mark.parametrize("word", ["ab" * 50_000, " " * 100_000, "()[]" * 25_000, "\n" * 100_000])
def test_hundred_thousand_characters_without_a_break_are_linear(word):
    # A quadratic encoder needs minutes; the bound is generous because the machine may be busy.
    start = time.process_time()
    train_bpe([word], vocab_size=300)
    assert BPE.decode(BPE.encode(word)) == word
    assert time.process_time() - start < 5


def test_cut_text_has_the_tokens_of_the_whole():
    text = "".join(TEXTS) + "\n\n    indented,\n    twice\n" * 200 + "one line of words " * 500
    parts = list(cut([text[:10], text[10:]], 1000))
    assert "".join(parts) == text
    assert np.array_equal(np.concatenate(BPE.encode_batch(parts)), BPE.encode(text))


@BOTH
def test_saved_tokenizer_loads_as_itself(tokenizer, tmp_path):
    tokenizer.save(tmp_path, model_max_length=64)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (loaded.document, loaded.sha256) == (tokenizer.document, tokenizer.sha256)
        assert loaded.document_token == tokenizer.document_token


@BOTH
def test_transformers_reads_the_saved_tokenizer(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, model_max_length=1 << 20)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "é\0 \U0001f600 ,  .", "a .  b 's"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
        assert theirs.decode(tokenizer.encode(text).tolist()) == text
    assert (theirs.eos_token_id, theirs.model_max_length) == (tokenizer.document_token, 1 << 20)


def test_foreign_tokenizer_keeps_its_own_end_token(tmp_path):
    document = BPE.document.replace(DOCUMENT_TEXT, "<|finis|>")
    (tmp_path / "tokenizer.json").write_text(document)
    with pytest.raises(DataError, match="no begin/end token"):
        load_tokenizer(tmp_path)
    config = {"eos_token": {"content": "<|finis|>"}, "auto_map": {"AutoTokenizer": "evil.py"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.document_text, tokenizer.document_token) == ("<|finis|>", 0)
    tokenizer.save(tmp_path)
    assert "evil" not in (tmp_path / "tokenizer_config.json").read_text()


def test_tokenizer_without_bytes_decodes_through_its_library(tmp_path):
    description = json.loads(BPE.document) | {"decoder": None, "pre_tokenizer": {"type": "Whitespace"}}
    tokenizer = Tokenizer(json.dumps(description))
    assert not tokenizer.is_byte_level
    assert tokenizer.decode_bytes(tokenizer.encode("return")).replace(b" ", b"") == b"return"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"added_tokens": 3}', b"[" * 100_000])
def test_file_that_is_no_tokenizer_is_refused_in_one_sentence(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json|begin/end"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer_names_the_nearest_file(tmp_path):
    BPE.save(tmp_path)
    with pytest.raises(DataError, match=r"did you mean 'tokenizer\.json'"):
        load_tokenizer(tmp_path / "tokeniser.json")

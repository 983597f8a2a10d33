"""Text to token ids and back: bytes, a byte-pair vocabulary of our own, or any ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hasten.errors import DataError, nearest, one_line, printable
from hasten.files import read_bytes

DOCUMENT_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 1 << 20
_MOST_BYTES = 256 << 20  # the largest in use have some 35 MB
# What ends a document in vocabularies of other tools, most telling first.
_KNOWN_ENDS = (DOCUMENT_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]", "<s>", "<bos>")
# Learning merges inside one word costs its length times the merges, so longer ones are learned from in parts.
# Encoding needs no such limit (a heap per word; pieces of 64 Ki characters bound it), so the file keeps the plain
# GPT-2 rule: a limit inside the pattern cost 1.6x (tokenizers) to 3x (kitoken) of the encoding speed.
_TRAINED_RUN = 256
_LONG_RUN = re.compile(rf"\S{{{_TRAINED_RUN + 1},}}|\s{{{_TRAINED_RUN + 1},}}")


class Tokenizer:
    """A ``tokenizers.Tokenizer`` whose special tokens are never read out of text.

    Args:
        document: the content of a ``tokenizer.json``.
        document_text: the special token that stands at the beginning of a document and ends a generated one.
        config: what else its ``tokenizer_config.json`` should say.

    Attributes:
        document: the content of its ``tokenizer.json``, byte for byte.
        document_text: the begin/end token as text.
        document_token: the begin/end token as id.
        vocab_size: highest id + 1.
        sha256: of `document`.

    Raises:
        DataError: `document` is no tokenizer, lacks `document_text`, or has ids above 1,048,575.
    """

    def __init__(self, document: str, document_text: str = DOCUMENT_TEXT, config: dict | None = None) -> None:
        with _library_errors("this is not a tokenizer.json that can be read"):
            inner = tokenizers.Tokenizer.from_str(document)
        token = inner.token_to_id(document_text)
        if token is None:
            raise DataError(f"the tokenizer has no begin/end token {printable(document_text)!r}; name another one.")
        inner.encode_special_tokens = True  # "<|endoftext|>" in a document is text like any other
        inner.no_truncation()
        inner.no_padding()
        self.document, self.document_text, self.document_token = document, document_text, token
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise DataError(
                f"the tokenizer has the id {self.vocab_size - 1}; expected ids below {LARGEST_VOCABULARY}: "
                "whatever is made for each of them would fill the memory."
            )
        self.sha256 = hashlib.sha256(document.encode()).hexdigest()
        self._inner, self._config = inner, dict(config or {})

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` as uint32, without special tokens; lone surrogates count as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return `encode` of each text, over all cores when there are several."""
        texts = [_valid(text) for text in texts]
        if self.is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        with _library_errors("the tokenizer cannot encode this text"):
            batch = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special tokens are left out, bytes that form no character become U+FFFD."""
        if self.is_byte_level:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        with _library_errors("the tokenizer cannot decode what was written"):
            return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`: exactly those encoded, when the tokenizer is byte-level."""
        if not self.is_byte_level:
            return self.decode(ids).encode()
        table = self.token_bytes
        return b"".join(table[i] for i in ids)

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which `transformers.AutoTokenizer` reads.

        Args:
            folder: an existing folder.
            model_max_length: the longest row the model was trained on; None: no limit is stated.
        """
        config = {
            "bos_token": self.document_text,
            "eos_token": self.document_text,
            "pad_token": self.document_text,
            "clean_up_tokenization_spaces": False,
            **self._config,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        Path(folder, FILE).write_bytes(self.document.encode())
        Path(folder, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for a fixed string of bytes, so that decoding is exact."""
        decoder = self._description.get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        model = self._description["model"]
        marks = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        return [step.get("type") for step in steps] == ["ByteLevel"] and not marks

    @cached_property
    def is_bytes(self) -> bool:
        """Whether the ids of text are its bytes."""
        model = self._description["model"]
        simple = self.is_byte_level and not model.get("merges") and not self._description.get("normalizer")
        return simple and self.vocab_size == SMALLEST_VOCABULARY and self.token_bytes[:256] == _EACH_BYTE

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id of a byte-level tokenizer; nothing for special and unused ids."""
        table = [b""] * self.vocab_size
        for word, index in self._inner.get_vocab(with_added_tokens=False).items():
            table[index] = bytes(_BYTE_OF[c] for c in word) if all(c in _BYTE_OF for c in word) else b""
        # Not the ids that the file states for them: the library gives its own where those are taken or make no sense.
        for index, added in self._inner.get_added_tokens_decoder().items():
            table[index] = b"" if added.special else added.content.encode()
        return table

    @cached_property
    def _description(self) -> dict[str, Any]:
        return json.loads(self.document)


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids are the 256 byte values, and 256 for the begin/end token."""
    inner = tokenizers.Tokenizer(models.BPE(vocab=dict(_BYTE_OF), merges=[]))
    _make_byte_level(inner)
    inner.add_special_tokens([DOCUMENT_TEXT])
    return Tokenizer(inner.to_str())


def train_bpe(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Return a byte-level byte-pair tokenizer learned from `texts`: id 0 begins a document, 1 to 256 are the bytes.

    The same texts in the same order give the same file. A small text may give fewer than `vocab_size` tokens.

    Args:
        texts: what to learn from, read once; words are never joined across two of them.
        vocab_size: from 257 (the bytes and the begin/end token) to 1,048,576.

    Raises:
        DataError: `vocab_size` is out of range.
    """
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise DataError(
            f"vocab_size is {vocab_size}; expected {SMALLEST_VOCABULARY} (every byte and the begin/end token) "
            f"to {LARGEST_VOCABULARY}."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    _make_byte_level(inner)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_without_long_runs(texts), trainer)
    return Tokenizer(inner.to_str())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a ``tokenizer.json``, or of a folder that holds one beside its settings.

    Raises:
        DataError: there is none, it cannot be read, or it has no known begin/end token.
    """
    path = Path(path).expanduser()
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        beside = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(
            f"there is no tokenizer at {printable(str(file))}{nearest(file.name, beside)}; "
            "name 'bytes', 'bpe', a tokenizer.json or a folder that holds one."
        )
    try:
        document = read_bytes(file, _MOST_BYTES).decode("utf-8")
        config = _read_config(file.parent)
        added = [token["content"] for token in json.loads(document).get("added_tokens", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise DataError(f"{printable(str(file))} is not a tokenizer.json that can be read: {reason}.") from error
    stated = [_token_text(config.get(key)) for key in ("eos_token", "bos_token")]
    known = [text for text in (*stated, *_KNOWN_ENDS) if text in added]
    if not known:
        raise DataError(f"{printable(str(file))} has no begin/end token; state eos_token in a {CONFIG_FILE} beside it.")
    return Tokenizer(document, known[0], config)


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Say in one sentence what the library found wrong; it raises `Exception` itself, and panics beyond that."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{what}: {one_line(str(error), 200)}.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {one_line(str(error), 200)}.") from None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    config = json.loads(read_bytes(file)) if file.exists() else {}
    # Names of code to run are nothing a tokenizer needs, and a limit belongs to the model it came with.
    return {key: value for key, value in config.items() if key not in ("auto_map", "model_max_length")}


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _make_byte_level(inner: tokenizers.Tokenizer) -> None:
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()


def _without_long_runs(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        done = 0
        for run in _LONG_RUN.finditer(text):
            yield text[done : run.start()]
            yield from (run[0][i : i + _TRAINED_RUN] for i in range(0, len(run[0]), _TRAINED_RUN))
            done = run.end()
        yield text[done:] if done else text


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _byte_characters() -> dict[str, int]:
    """The printable character that GPT-2's vocabulary format writes for each byte, in the order of the bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    named = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {named[byte]: byte for byte in range(256)}


_BYTE_OF = _byte_characters()
_EACH_BYTE = [bytes([byte]) for byte in range(256)]

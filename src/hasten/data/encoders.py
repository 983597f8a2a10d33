"""Faster encoders for a tokenizer, used only where their ids are verified to be the tokenizer's own."""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hasten.data.tokenizer import Tokenizer

Encode = Callable[[str], np.ndarray]
EncodeAll = Callable[[Sequence[str]], "Encoded"]

# GPT-2's rule as tiktoken writes it: possessive, so that its engine does not go back.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Where encoders tend to differ: special tokens as text, runs of space, line ends, joined and right-to-left characters.
AWKWARD = (
    "",
    " ",
    "<|endoftext|> <s></s> [SEP] <|im_start|> ' <|endoftext|>'<|endoftext|>'\n",
    "a  b   c\t\td \n\n\n e\r\n\r\nf \u00a0\u2003g\u200b",
    "it's IT'S we'll they've 'tis ''quoted'' a\n's\t't\n\n're \n'd\u00a0'll\r\n've 'm\n''s\n 's",
    "0 12 123 1234 12345 3.14159 1e-5 0xFF \u0664\u0662",
    "e\u0301 \u00e9 \ufb01 \U0001f469\u200d\U0001f680 \u05e9\u05dc\u05d5\u05dd \u4f60\u597d\u3002\ud55c\uad6d\uc5b4",
    "x" * 1000 + " " * 1000 + "\n" * 100 + "()[]{}" * 100,
    "".join(map(chr, range(0x20, 0x250))),
    "\x01\x02\x7f\ufffd\ufeff\u2028\u0085",
)


# kitoken 0.11 does not see a contraction that follows a line end, a tab or another space that is not U+0020
# ("\\n'tis"). Of the bytes of Python sources 0.2 % are in pieces that hold one; the tokenizer encodes those pieces.
_MISSED_BY_KITOKEN = re.compile(r"'(?<=[^\S ]')(?:[sdmt]|ll|ve|re)")


# Stands between texts that are encoded in one call. It is no character: Unicode keeps it for programs.
_BETWEEN = "\U0010fffe"


class Encoded(NamedTuple):
    """The ids of several texts, one behind the other, and how many each has, ``int64[T]``."""

    ids: np.ndarray
    lengths: np.ndarray


def plain(tokenizer: Tokenizer) -> Encode:
    """Return the reference: the tokenizer itself."""
    return tokenizer.encode


def kitoken(tokenizer: Tokenizer) -> Encode:
    """Return an encoder of the package kitoken; one instance per thread, since threads on one slow each other down.

    Raises:
        ImportError: not installed.
        Exception: it cannot represent this tokenizer.
    """
    encoder = _per_thread(tokenizer, [])

    def encode(text: str) -> np.ndarray:
        if _MISSED_BY_KITOKEN.search(text):
            return tokenizer.encode(text)
        return np.array(encoder().encode(text, False), dtype=np.uint32)

    return encode


def _per_thread(tokenizer: Tokenizer, specials: list[dict]) -> Callable[[], Any]:
    build = importlib.import_module("kitoken").Kitoken.from_tokenizers
    description, own = json.loads(tokenizer.document), threading.local()
    # It splits a text at special tokens even when told to read them as text, so it is not told of them.
    others = [token for token in description.get("added_tokens", []) if not token["special"]]
    description["added_tokens"] = [*others, *specials]
    document = json.dumps(description).encode()
    build(document)

    def encoder() -> Any:
        if not hasattr(own, "encoder"):
            own.encoder = build(document)
        return own.encoder

    return encoder


def _kitoken_joined(tokenizer: Tokenizer) -> Encode:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {"id": tokenizer.vocab_size, "content": _BETWEEN, "special": True, **flags}
    encoder = _per_thread(tokenizer, [special])
    return lambda text: np.array(encoder().encode(text, True), dtype=np.uint32)


def tiktoken(tokenizer: Tokenizer) -> Encode:
    """Return an encoder of the package tiktoken, for byte-level tokenizers with one splitting rule.

    Raises:
        ImportError: not installed.
        ValueError: it cannot represent this tokenizer.
    """
    encoding = _tiktoken(tokenizer)
    return lambda text: encoding.encode_to_numpy(text, disallowed_special=())


def _tiktoken_joined(tokenizer: Tokenizer) -> Encode:
    encoding, allowed = _tiktoken(tokenizer), {_BETWEEN}
    return lambda text: encoding.encode_to_numpy(text, allowed_special=allowed)


def _tiktoken(tokenizer: Tokenizer) -> Any:
    package = importlib.import_module("tiktoken")
    pattern = _pattern(json.loads(tokenizer.document))
    if not tokenizer.is_byte_level or pattern is None:
        raise ValueError("not byte-level with one splitting rule")
    ranks = {word: index for index, word in enumerate(tokenizer.token_bytes) if word}
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("not every byte has a token")
    between = {_BETWEEN: tokenizer.vocab_size}
    return package.Encoding("hasten", pat_str=pattern, mergeable_ranks=ranks, special_tokens=between)


def _pattern(description: dict) -> str | None:
    if description.get("normalizer") or any(not token["special"] for token in description.get("added_tokens", [])):
        return None
    step = description.get("pre_tokenizer") or {}
    if step.get("type") == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space"):
        return _GPT2_PATTERN
    match step.get("pretokenizers"):
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            return pattern
    return None


def disagrees(encode: Encode, tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    """Say whether `encode` gives other ids than `tokenizer` for any of `texts`."""
    return any(not np.array_equal(encode(text), tokenizer.encode(text)) for text in texts)


def fastest(tokenizer: Tokenizer, sample: Sequence[str] = ()) -> tuple[str, Encode]:
    """Return the first of `ENCODERS` that is installed and gives the tokenizer's own ids, with its name.

    Verified on `AWKWARD` and `sample`. A text on which a fast encoder fails is encoded by the tokenizer; so is text
    beyond ASCII when the tokenizer normalizes, because packages carry the tables of different Unicode versions
    (kitoken 0.11 and tokenizers 0.23 compose differently).
    """
    if tokenizer.is_bytes:
        return "bytes", tokenizer.encode
    only_ascii = bool(json.loads(tokenizer.document).get("normalizer"))
    for name, make in ENCODERS.items():
        try:
            encode = make(tokenizer)
            if name != "tokenizers":
                encode = _or_else(encode, tokenizer.encode, only_ascii)
            if not disagrees(encode, tokenizer, [*AWKWARD, *sample]):
                return name, encode
        except Exception:  # not installed, or it cannot represent this tokenizer: each package has errors of its own
            continue
    return "tokenizers", tokenizer.encode


def in_bulk(name: str, tokenizer: Tokenizer, encode: Encode) -> EncodeAll:
    """Return what encodes many texts at once as `encode`, the encoder called `name`, does each of them.

    A call per text is most of the time where texts are tiny, so a fast encoder is given many as one, with a special
    token between them: only one that no text holds, for tokenizers whose rule for splitting is known to begin
    afresh behind it, and only where its ids are verified to be those of the single texts.
    """

    def each(texts: Sequence[str]) -> Encoded:
        parts = [encode(text) for text in texts]
        return Encoded(np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts)))

    if tokenizer.is_bytes:
        return _all_bytes
    make = _JOINED.get(name)
    if make is None or not tokenizer.is_byte_level or _pattern(json.loads(tokenizer.document)) is None:
        return each
    try:
        together = _together(make(tokenizer), tokenizer, each)
        if _equal(together(AWKWARD), each(AWKWARD)):
            return together
    except Exception:  # as in `fastest`
        pass
    return each


def _together(encode: Encode, tokenizer: Tokenizer, each: EncodeAll) -> EncodeAll:
    def together(texts: Sequence[str]) -> Encoded:
        joined = _BETWEEN.join(texts)
        if joined.count(_BETWEEN) != len(texts) - 1:
            return each(texts)
        # Those that are not for this encoder; nearly none, so the places in the whole tell which.
        ends = np.cumsum([len(text) + 1 for text in texts])
        missed = [match.start() for match in _MISSED_BY_KITOKEN.finditer(joined)]
        apart = sorted(set(ends.searchsorted(missed, side="right").tolist()))
        if apart:
            texts_left = list(texts)
            for index in apart:
                texts_left[index] = ""
            joined = _BETWEEN.join(texts_left)
        try:
            ids = encode(joined)
        except Exception:  # as in `_or_else`
            return each(texts)
        places = np.flatnonzero(ids == tokenizer.vocab_size)
        if len(places) != len(texts) - 1:
            return each(texts)
        lengths = np.diff(places, prepend=-1, append=len(ids)) - 1
        ids = np.delete(ids, places)
        if apart:
            parts, before = [], 0
            offsets = np.cumsum(lengths) - lengths
            for index in apart:
                own = tokenizer.encode(texts[index])
                parts += [ids[before : offsets[index]], own]
                before, lengths[index] = offsets[index], len(own)
            ids = np.concatenate([*parts, ids[before:]])
        return Encoded(ids, lengths)

    return together


def _all_bytes(texts: Sequence[str]) -> Encoded:
    joined = "".join(texts)
    sizes = map(len, texts if joined.isascii() else (text.encode() for text in texts))
    return Encoded(np.frombuffer(joined.encode(), np.uint8), np.fromiter(sizes, np.int64, len(texts)))


def _equal(some: Encoded, others: Encoded) -> bool:
    return all(map(np.array_equal, some, others))


def _or_else(encode: Encode, otherwise: Encode, only_ascii: bool) -> Encode:
    def safe(text: str) -> np.ndarray:
        if only_ascii and not text.isascii():
            return otherwise(text)
        try:
            return encode(text)
        except Exception:  # such as a limit of its regular-expression engine on a very long run
            return otherwise(text)

    return safe


# By speed, measured in benchmarks/bench_prepare.py.
ENCODERS: dict[str, Callable[[Tokenizer], Encode]] = {"kitoken": kitoken, "tiktoken": tiktoken, "tokenizers": plain}
_JOINED = {"kitoken": _kitoken_joined, "tiktoken": _tiktoken_joined}

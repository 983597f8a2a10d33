"""MinHash signatures of texts: the share of equal places of two signatures estimates how alike the texts are.

Broder 1997, "On the resemblance and containment of documents": the resemblance of two documents is the Jaccard index of
their sets of shingles, here of five words in a row, and the chance that a random order of all shingles has the same
first one in both. Of each of 128 first ones a byte is kept (Li and König 2010, "b-Bit minwise hashing"), so a document
takes 128 bytes whatever its length, and eight bytes in a row are the key of a band for locality-sensitive hashing.

Dimensions: P texts, B bytes, W words, S shingles, H hashes, D documents.
"""

from __future__ import annotations

import numpy as np

SHINGLE_WORDS = 5
HASHES = 128
BANDS = HASHES // 8
_SAME_BY_CHANCE = 1 / 256
_NOTHING = np.uint32(0xFFFFFFFF)

_rng = np.random.default_rng(0)
_MULTIPLIERS_H = _rng.integers(1 << 64, size=HASHES, dtype=np.uint64) | np.uint64(1)
_OFFSETS_H = _rng.integers(1 << 64, size=HASHES, dtype=np.uint64)
_VALUE_OF_BYTE = _rng.integers(1 << 64, size=256, dtype=np.uint64)
_OF_PLACE = _rng.integers(1 << 64, size=SHINGLE_WORDS, dtype=np.uint64) | np.uint64(1)
_BASE = 0x9E3779B97F4A7C15
_BYTES = np.arange(256)
_IS_WORD = (_BYTES >= 0x80) | np.isin(_BYTES, np.frombuffer(b"0123456789_abcdefghijklmnopqrstuvwxyz", np.uint8))
# Chinese, Japanese, Korean and whatever else begins with these bytes has no spaces: a character counts as a word.
_BEGINS_WORD = _BYTES >= 0xE3


def minima(texts: list[str]) -> np.ndarray:
    """Return the least value of each hash over the shingles of each text, ``uint32[P, H]``; the largest if it has none.

    Case and whatever is not part of a word make no difference. A text of fewer than five words is one shingle. The
    minimum of several rows is the row of their texts together, but for the shingles across two of them.
    """
    words_W, text_W = _words(texts)
    shingles_S, text_S = _shingles(words_W, text_W)
    minima_PH = np.full((len(texts), HASHES), _NOTHING)
    if not len(shingles_S):
        return minima_PH
    first_T = np.flatnonzero(np.append(True, text_S[1:] != text_S[:-1]))
    minima_HT = np.empty((HASHES, len(first_T)), np.uint32)
    for number, (multiplier, offset) in enumerate(zip(_MULTIPLIERS_H, _OFFSETS_H)):
        hashes_S = ((shingles_S * multiplier + offset) >> np.uint64(32)).astype(np.uint32)
        np.minimum.reduceat(hashes_S, first_T, out=minima_HT[number])
    minima_PH[text_S[first_T]] = minima_HT.T
    return minima_PH


def signatures(minima_DH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the signatures of minima, ``uint8[D, H]``, and which have any shingle, ``bool[D]``."""
    return minima_DH.astype(np.uint8), (minima_DH != _NOTHING).any(axis=1)


def resemblance(some_DH: np.ndarray, others_DH: np.ndarray) -> np.ndarray:
    """Return the estimated Jaccard index of each pair of signatures; its standard error is at most 0.045."""
    same_D = (some_DH == others_DH).mean(axis=1)
    return np.maximum(0.0, (same_D - _SAME_BY_CHANCE) / (1 - _SAME_BY_CHANCE))


def _words(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of each word and the text that it is in."""
    parts = [text.lower().encode() for text in texts]
    content = np.frombuffer(b" ".join([*parts, b""]), np.uint8)
    ends_P = np.cumsum([len(part) + 1 for part in parts])
    is_word_B = _IS_WORD[content]
    begins_B = is_word_B & (np.append(True, ~is_word_B[:-1]) | _BEGINS_WORD[content])
    ends_B = is_word_B & np.append(~is_word_B[1:] | begins_B[1:], True)
    begins_W, ends_W = np.flatnonzero(begins_B), np.flatnonzero(ends_B) + 1
    # A word is the polynomial of its bytes modulo 2**64: a difference of sums, divided by the power of its place.
    sums_B = np.cumsum(np.append(np.uint64(0), _VALUE_OF_BYTE[content] * _powers(_BASE, len(content))))
    words_W = (sums_B[ends_W] - sums_B[begins_W]) * _powers(pow(_BASE, -1, 1 << 64), len(content))[begins_W]
    return words_W, ends_P.searchsorted(begins_W, side="right")


def _powers(base: int, length: int) -> np.ndarray:
    powers = np.full(length, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _shingles(words_W: np.ndarray, text_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of every five words in a row of a text and the text; of all its words where it has fewer."""
    sums_W = np.zeros(len(words_W), np.uint64)
    is_whole_W = np.zeros(len(words_W), bool)
    for place, factor in enumerate(_OF_PLACE):
        stop = max(0, len(words_W) - place)
        same_W = text_W[place:] == text_W[:stop]
        sums_W[:stop] += words_W[place:] * factor * same_W
        if place == SHINGLE_WORDS - 1:
            is_whole_W[:stop] = same_W
    is_first_W = np.append(True, text_W[1:] != text_W[:-1])[: len(words_W)]
    kept_W = is_whole_W | is_first_W
    return _mixed(sums_W[kept_W]), text_W[kept_W]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return the values with every bit depending on every other (the finisher of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""The shuffled order of rows: a keyed permutation of any size, computed, never stored."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


def order_key(seed: int, epoch: int, purpose: str) -> int:
    """Return 64 bits that depend on all three arguments; sums such as ``seed + epoch`` would collide."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permuted(indexes: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return where a keyed random permutation of ``range(size)`` sends `indexes`.

    A Feistel network over the smallest even number of bits that holds `size`, walked until the value is inside: a
    bijection for every size, in no memory. Source: Black & Rogaway, "Ciphers with arbitrary finite domains", 2002.

    Args:
        indexes: any shape, ``0 <= index < size``.
        size: of the permutation, 1 to 2**62.
        key: 64 bits, from `order_key`.

    Returns:
        int64 of the same shape.

    Example:
        >>> sorted(permuted(np.arange(5), 5, key=7).tolist())
        [0, 1, 2, 3, 4]
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    values = _mix(np.asarray(indexes).astype(np.uint64), half, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _mix(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def _round_keys(key: int) -> np.ndarray:
    text = key.to_bytes(8, "little")
    digests = (hashlib.blake2b(text, digest_size=8, salt=bytes([number])).digest() for number in range(ROUNDS))
    return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)


def _mix(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_scrambled(right, key) & mask)
    return (left << shift) | right


def _scrambled(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return `values` hashed with `key`: the finaliser of splitmix64 (Steele et al., 2014), modulo 2**64."""
    with np.errstate(over="ignore"):
        z = values + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

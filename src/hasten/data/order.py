"""The shuffled order of rows: a keyed permutation of any size, computed, never stored."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

# With 6 rounds, permutations of 5 to 16 numbers show a bias (chi-squared 15 to 38 sigma off); with 8, none does.
ROUNDS = 8
# Places of the endless order that are computed together: one vectorised call for many small steps.
BLOCK_PLACES = 4096
# Windows whose rows are mixed: a step then reads from all over half a billion tokens, and resuming packs 8 windows.
GROUP = 8
# Blocks kept by an order: two of them hold a step that is not larger than one, and a mixture has several orders.
_BLOCKS_KEPT = 4

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class EndlessOrder:
    """Numbers 0 to `size` - 1 without end: every number once in each epoch, each epoch in another order.

    A pure function of its arguments, so any place can be asked for at any time, at the same cost.

    Args:
        size: numbers of an epoch, at least 1.
        seed: any whole number.
        purpose: keeps orders of different things with one seed apart.

    Example:
        >>> order = EndlessOrder(3, seed=0, purpose="rows")
        >>> sorted(order.at(0, 3).tolist()), sorted(order.at(3, 3).tolist())
        ([0, 1, 2], [0, 1, 2])
    """

    def __init__(self, size: int, *, seed: int, purpose: str) -> None:
        self.size, self.seed, self.purpose = size, seed, purpose
        self._blocks: dict[int, np.ndarray] = {}

    def at(self, place: int, count: int) -> np.ndarray:
        """Return the numbers at places ``place, ..., place + count - 1``, int64; `place` at least 0."""
        first, last = place // BLOCK_PLACES, (place + max(count, 1) - 1) // BLOCK_PLACES
        blocks = [self._block(number) for number in range(first, last + 1)]
        whole = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return whole[place - first * BLOCK_PLACES :][:count]

    def _block(self, number: int) -> np.ndarray:
        # Kept by each order, not in one cache for all: a mixture of more sources than that holds would miss each time.
        if (known := self._blocks.get(number)) is None:
            known = _kept(self._blocks, number, _block(self.size, self.seed, self.purpose, number), _BLOCKS_KEPT)
        return known


class WindowOrder:
    """Numbers 0 to ``sum(sizes) - 1`` without end, near each other in time where they are near each other in space.

    The numbers lie in windows of given sizes, one window after the other. An epoch goes through the windows in a
    shuffled order, a group of `group` windows at a time, and mixes the numbers of a group. So every number comes once
    in each epoch, and no more than two groups of windows are needed at any moment.

    Args:
        sizes_W: numbers of each window, at least 0 each and at least 1 in all.
        seed: any whole number.
        purpose: keeps orders of different things with one seed apart.
        group: windows that are mixed with each other.

    Example:
        >>> order = WindowOrder(np.array([2, 0, 3]), seed=0, purpose="rows", group=1)
        >>> sorted(order.at(0, 5).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, sizes_W: np.ndarray, *, seed: int, purpose: str, group: int) -> None:
        self.seed, self.purpose, self.group = seed, purpose, group
        self._sizes_W = np.asarray(sizes_W, np.int64)
        self._begins_W = np.cumsum(self._sizes_W) - self._sizes_W
        self.size = int(self._sizes_W.sum())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._blocks: dict[tuple[int, int, int], np.ndarray] = {}

    def at(self, place: int, count: int) -> np.ndarray:
        """Return the numbers at places ``place, ..., place + count - 1``, int64; `place` at least 0."""
        parts = []
        while count > 0:
            epoch, index = divmod(place, self.size)
            ends_G = self._epoch(epoch)[1]
            group = int(ends_G.searchsorted(index, side="right"))
            begin = int(ends_G[group - 1]) if group else 0
            block, offset = divmod(index - begin, BLOCK_PLACES)
            part = self._block(epoch, group, block)[offset : offset + count]
            parts.append(part)
            place, count = place + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the windows in the order of an epoch, and where each group of them ends."""
        if (known := self._epochs.get(epoch)) is None:
            num_windows = len(self._sizes_W)
            key = order_key(self.seed, epoch, f"{self.purpose}/windows")
            windows_W = permuted(np.arange(num_windows), num_windows, key)
            ends_W = np.cumsum(self._sizes_W[windows_W])
            lasts_G = np.minimum(np.arange(self.group, num_windows + self.group, self.group), num_windows) - 1
            known = _kept(self._epochs, epoch, (windows_W, ends_W[lasts_G]), 2)
        return known

    def _block(self, epoch: int, group: int, block: int) -> np.ndarray:
        """Return a run of `BLOCK_PLACES` numbers of a group; the last of a group is shorter."""
        if (known := self._blocks.get((epoch, group, block))) is None:
            windows = self._epoch(epoch)[0][group * self.group : (group + 1) * self.group]
            ends = np.cumsum(self._sizes_W[windows])
            size = int(ends[-1])
            indexes = np.arange(block * BLOCK_PLACES, min(size, (block + 1) * BLOCK_PLACES))
            mixed = permuted(indexes, size, order_key(self.seed, epoch, f"{self.purpose}/{group}"))
            which = ends.searchsorted(mixed, side="right")
            numbers = mixed + (self._begins_W[windows] - (ends - self._sizes_W[windows]))[which]
            numbers.flags.writeable = False
            known = _kept(self._blocks, (epoch, group, block), numbers, _BLOCKS_KEPT)
        return known


def order_key(seed: int, epoch: int, purpose: str) -> int:
    """Return 64 bits that depend on all three arguments; sums such as ``seed + epoch`` would collide."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def permuted(indexes: np.ndarray, size: int, keys: int | np.ndarray) -> np.ndarray:
    """Return where a keyed random permutation of ``range(size)`` sends `indexes`.

    A Feistel network over the smallest even number of bits that holds `size`, walked until the value is inside: a
    bijection for every size, in no memory. Source: Black & Rogaway, "Ciphers with arbitrary finite domains", 2002.

    Args:
        indexes: any shape, ``0 <= index < size``.
        size: of the permutation, 1 to 2**62.
        keys: 64 bits, from `order_key`; or one for each index, as uint64 of the same shape.

    Returns:
        int64 of the same shape.

    Example:
        >>> sorted(permuted(np.arange(5), 5, keys=7).tolist())
        [0, 1, 2, 3, 4]
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shape = np.shape(indexes)
    values = np.asarray(indexes).astype(np.uint64).reshape(-1)
    keys = np.asarray(keys, np.uint64).reshape(-1)
    rounds = [_scrambled(keys, (number + 1) * _GOLDEN & _WORD) for number in range(ROUNDS)]
    values = _mixed(values, half, rounds)
    while len(outside := np.flatnonzero(values >= np.uint64(size))):
        values[outside] = _mixed(values[outside], half, [key if len(key) == 1 else key[outside] for key in rounds])
    return values.astype(np.int64).reshape(shape)


def _kept(cache: dict, key: object, value: Any, most: int) -> Any:
    """Return `value` after putting it into `cache`, which forgets its oldest entry beyond `most`."""
    cache[key] = value
    while len(cache) > most:
        cache.pop(next(iter(cache)))
    return value


def _block(size: int, seed: int, purpose: str, number: int) -> np.ndarray:
    places = np.arange(number * BLOCK_PLACES, (number + 1) * BLOCK_PLACES)
    epochs, indexes = np.divmod(places, size)
    first = int(epochs[0])
    keys = np.array([order_key(seed, epoch, purpose) for epoch in range(first, int(epochs[-1]) + 1)], np.uint64)
    numbers = permuted(indexes, size, keys if len(keys) == 1 else keys[epochs - first])
    numbers.flags.writeable = False
    return numbers


def _mixed(values: np.ndarray, half: int, rounds: list[np.ndarray]) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in rounds:
        left, right = right, left ^ (_scrambled(right, key) & mask)
    return (left << shift) | right


def _scrambled(values: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Return `values` hashed with `key`: the finaliser of splitmix64 (Steele et al., 2014), modulo 2**64."""
    z = values + np.asarray(key, np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

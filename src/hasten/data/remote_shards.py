"""Shards on object storage: their tokens and their indexes, through a cache on this machine.

Tokens come in blocks of 1 MiB, the unit of their checksums: no smaller part can be checked. A block that is kept is
read again only where tokens are asked for.
"""

from __future__ import annotations

import atexit
import hashlib
import weakref
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from hasten.data.fetching import Fetcher
from hasten.data.range_cache import RangeCache
from hasten.data.shard_files import spread, token_dtype
from hasten.data.shard_index import BLOCK_BYTES, num_blocks, read_starts, read_table, table_bytes
from hasten.data.transfer import Remote
from hasten.errors import DamagedData, DataError

# Of the cache, what may be asked for ahead: what comes while that is read through then drives none of it out.
_AHEAD_SHARE = 0.45
_TABLES_KEPT = 4096


def fault_of(sha256: str, content: bytes) -> str:
    """Return what is wrong with the content of a file, or an empty text."""
    return "" if hashlib.sha256(content).hexdigest() == sha256 else "its sha256 is not the manifest's"


def shards_of(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the entries of all shards, split by split."""
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]


class Store:
    """All blocks of prepared data, counted through its shards, and their way here."""

    def __init__(self, remote: Remote, cache: RangeCache, manifest: Mapping[str, Any]) -> None:
        self._remote, self._cache, self._shards = remote, cache, shards_of(manifest)
        self._ats = {id(shard): at for at, shard in enumerate(self._shards)}
        self._vocab_size = manifest["vocab_size"]
        self._dtype = token_dtype(self._vocab_size)
        counts = [num_blocks(shard["num_tokens"], self._dtype.itemsize) for shard in self._shards]
        self._firsts = np.cumsum([0, *counts])
        self._names = [_plain(shard["tokens"]["sha256"]) for shard in self._shards]
        self.room = max(1, int(cache.most_bytes * _AHEAD_SHARE) // BLOCK_BYTES)
        self._fetcher = Fetcher(self._bring)
        self._tables = lru_cache(_TABLES_KEPT)(self._read_table)
        self._is_told = False
        _close_at_exit(remote)

    def shard(self, folder: Path, entry: Mapping[str, Any], vocab_size: int) -> RemoteShard:
        """Return the shard of an entry of the manifest."""
        at = self._ats[id(entry)]
        return RemoteShard(self, at, int(self._firsts[at]), entry, self._dtype)

    def blocks(self, manifest: Mapping[str, Any], split: str) -> Blocks:
        """Return the blocks of a split."""
        shards = manifest["splits"][split]["shards"]
        firsts = [int(self._firsts[self._ats[id(shard)]]) for shard in shards]
        return Blocks(self, firsts, [shard["num_tokens"] for shard in shards], BLOCK_BYTES // self._dtype.itemsize)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_tables", "_ats")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tables = lru_cache(_TABLES_KEPT)(self._read_table)

    def read(self, number: int, begin: int, end: int) -> np.ndarray:
        """Return tokens of a block, checked: those in its bytes from `begin` up to `end`."""
        name, check = self._name(number), partial(self._block_fault, number)
        content = self._cache.read(name, begin, end, check)
        if content is None:
            self._fetcher.ask([number], urgent=True)
            self._fetcher.wait(number)
            content = self._cache.read(name, begin, end, check)
        if content is None:  # there was no place for it, or none any more
            content = self._fetch(number)[begin:end]
        return np.frombuffer(content, self._dtype)

    def fetch(self, numbers: Iterable[int], *, urgent: bool = False) -> None:
        """Begin to bring blocks that are not here."""
        self._fetcher.ask([number for number in numbers if not self._cache.has(self._name(number))], urgent=urgent)

    def forget(self) -> None:
        """Leave out blocks that were asked for ahead and are not on their way."""
        self._fetcher.forget()

    def starts(self, at: int, first: int, stop: int) -> np.ndarray:
        """Return where documents `first` up to `stop` of shard `at` start."""
        entry = self._shards[at]
        if first >= stop:
            return np.empty(0, np.int64)
        begin = table_bytes(entry["num_tokens"], self._dtype.itemsize)
        return np.frombuffer(self._index(at, begin + 8 * first, begin + 8 * stop), "<i8")

    def _bring(self, number: int) -> None:
        if self._cache.has(self._name(number)):  # another process was faster
            return
        if not self._cache.put(self._name(number), self._fetch(number)) and not self._is_told:
            self._is_told = True
            self._remote.tell(
                f"{self._cache.folder} has no room on its disk, so text is fetched each time it is read: make room "
                "there, or name another folder with HASTEN_CACHE."
            )

    def _fetch(self, number: int) -> bytes:
        at, block = self._place(number)
        entry = self._shards[at]["tokens"]
        begin = block * BLOCK_BYTES
        end = min(entry["bytes"], begin + BLOCK_BYTES)
        try:
            content = self._remote.read(entry["file"], begin, end, lambda content: self._crc_fault(number, content))
        except DamagedData as error:
            raise DamagedData(str(error), file=entry["file"], block=block) from None
        if fault := self._id_fault(content):
            raise DataError(f"{self._remote.where(entry['file'])} is damaged: {fault}; prepare the data again.")
        return content

    def _block_fault(self, number: int, content: bytes) -> str:
        return self._crc_fault(number, content) or self._id_fault(content)

    def _crc_fault(self, number: int, content: bytes) -> str:
        at, block = self._place(number)
        if zlib.crc32(content) == self._tables(at)[block]:
            return ""
        return f"the block of 1 MiB at byte {block * BLOCK_BYTES} fails its checksum"

    def _id_fault(self, content: bytes) -> str:
        highest = int(np.frombuffer(content, self._dtype).max())
        return f"it holds the id {highest}, outside a vocabulary of {self._vocab_size}" * (highest >= self._vocab_size)

    def _place(self, number: int) -> tuple[int, int]:
        """Return which shard a block is in, and which block of it it is."""
        at = int(self._firsts.searchsorted(number, side="right")) - 1
        return at, number - int(self._firsts[at])

    def _name(self, number: int) -> str:
        at, block = self._place(number)
        return f"{self._names[at]}-{block}"

    def _read_table(self, at: int) -> np.ndarray:
        entry = self._shards[at]
        table = self._index(at, 0, table_bytes(entry["num_tokens"], self._dtype.itemsize))
        return read_table(table, entry, self._dtype.itemsize)[0]

    def _index(self, at: int, begin: int, end: int) -> bytes:
        """Return bytes of an index that was checked as a whole."""
        entry = self._shards[at]
        index, check = entry["index"], partial(_index_fault, entry, self._dtype.itemsize)
        name = f"{_plain(index['sha256'])}.idx"
        content = self._cache.read(name, begin, end, check)
        if content is None:
            whole = self._remote.read_all(index["file"], index["bytes"], check)
            self._cache.put(name, whole)
            content = whole[begin:end]
        return content


def _index_fault(entry: Mapping[str, Any], token_bytes: int, content: bytes) -> str:
    """Return what is wrong with the content of an index, or an empty text."""
    if fault := fault_of(entry["index"]["sha256"], content):
        return fault
    begin = table_bytes(entry["num_tokens"], token_bytes)
    try:
        _, checksum = read_table(content[:begin], entry, token_bytes)
        read_starts(content[begin:], entry, checksum)
    except ValueError as error:
        return str(error)
    return ""


def _plain(text: str) -> str:
    """Return a name for what a manifest calls a hash: it may be any text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _close_at_exit(remote: Remote) -> None:
    """End waits for another try when the process ends, which threads would hold up."""
    reference = weakref.ref(remote)
    atexit.register(lambda: (kept := reference()) and kept.close())


class Blocks:
    """The blocks of one stream, by the places of its tokens; see `hasten.data.ahead.Far`.

    Args:
        store: which brings them.
        firsts: the number of the first block of each shard.
        sizes: tokens of each shard.
        block_tokens: tokens of a block.
    """

    def __init__(self, store: Store, firsts: list[int], sizes: list[int], block_tokens: int) -> None:
        self._store, self.room = store, store.room
        self._firsts, self._bounds = np.array(firsts, np.int64), np.cumsum([0, *sizes])
        self._block_tokens = block_tokens

    def blocks(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Return the numbers of the blocks that hold the spans of `lengths_P` tokens, at least 1, at `starts_P`."""
        first_P = self._numbers(starts_P)
        last_P = self._numbers(np.minimum(starts_P + lengths_P, self._bounds[-1]) - 1)
        # The shards of a stream follow each other, and so do the numbers of their blocks.
        return np.unique(spread(first_P, last_P - first_P + 1))

    def fetch(self, blocks: np.ndarray, *, urgent: bool = False) -> None:
        """Begin to bring blocks here."""
        self._store.fetch(blocks.tolist(), urgent=urgent)

    def forget(self) -> None:
        """Leave out what was asked for and was not begun."""
        self._store.forget()

    def _numbers(self, places_P: np.ndarray) -> np.ndarray:
        at_P = self._bounds.searchsorted(places_P, side="right") - 1
        return self._firsts[at_P] + (places_P - self._bounds[at_P]) // self._block_tokens


class RemoteShard:
    """One shard on object storage; see `hasten.data.shards.Shard`."""

    # Whoever reads a stretch goes on behind it: blocks that are brought meanwhile.
    _BEHIND = 4

    def __init__(self, store: Store, at: int, first: int, entry: Mapping[str, Any], dtype: np.dtype[Any]) -> None:
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self._store, self._at, self._first, self._entry, self._dtype = store, at, first, entry, dtype
        self._block_tokens = BLOCK_BYTES // dtype.itemsize

    @property
    def hashes(self) -> tuple[str, str]:
        """The sha256 of the ``.bin`` and of the ``.idx``, from the manifest."""
        return self._entry["tokens"]["sha256"], self._entry["index"]["sha256"]

    def view(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to `stop`."""
        if start >= stop:
            return np.empty(0, self._dtype)
        last = (self.num_tokens - 1) // self._block_tokens
        first, behind = start // self._block_tokens, (stop - 1) // self._block_tokens + self._BEHIND
        self._store.fetch(range(self._first + first, self._first + min(last, behind) + 1))
        return self.pieces(np.array([start]), np.array([stop - start]))

    def spans(self, starts_R: np.ndarray, length: int) -> np.ndarray:
        """Return the spans of `length` tokens at `starts_R`."""
        return self.pieces(starts_R, np.full_like(starts_R, length)).reshape(len(starts_R), length)

    def pieces(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Return the spans of `lengths_P` tokens, at least 1 each, at `starts_P`: one behind the other."""
        tokens_N = np.empty(int(lengths_P.sum()), self._dtype)
        # Cut where blocks end, so that each piece lies in one; then block after block, each opened once.
        first_P, last_P = starts_P // self._block_tokens, (starts_P + lengths_P - 1) // self._block_tokens
        counts_P = last_P - first_P + 1
        block_Q, of_Q = spread(first_P, counts_P), np.repeat(np.arange(len(starts_P)), counts_P)
        low_Q = np.maximum(starts_P[of_Q], block_Q * self._block_tokens)
        high_Q = np.minimum((starts_P + lengths_P)[of_Q], (block_Q + 1) * self._block_tokens)
        place_Q = (np.cumsum(lengths_P) - lengths_P)[of_Q] + low_Q - starts_P[of_Q]
        order_Q = np.argsort(block_Q, kind="stable")
        cuts = np.flatnonzero(np.diff(block_Q[order_Q])) + 1
        groups = np.split(order_Q, cuts)
        self._store.fetch([self._first + int(block_Q[group[0]]) for group in groups], urgent=True)
        size = self._dtype.itemsize
        for group in groups:
            block, low_G, lengths_G = int(block_Q[group[0]]), low_Q[group], (high_Q - low_Q)[group]
            low, high, begin = int(low_G.min()), int(high_Q[group].max()), block * self._block_tokens
            tokens = self._store.read(self._first + block, (low - begin) * size, (high - begin) * size)
            tokens_N[spread(place_Q[group], lengths_G)] = tokens[spread(low_G - low, lengths_G)]
        return tokens_N

    def starts(self, first: int, stop: int) -> np.ndarray:
        """Return where documents `first` up to `stop` start, counted from the beginning of the shard."""
        return self._store.starts(self._at, first, min(stop, self.num_documents))

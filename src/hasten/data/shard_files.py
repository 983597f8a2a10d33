"""One shard on disk: a ``.bin`` of token ids with its ``.idx``.

``train-00000.bin`` holds the ids, little-endian uint16 or uint32, and nothing else; for its index see
`hasten.data.shard_index`.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

import numpy as np

from hasten.data.mapped import MappedFile
from hasten.data.shard_index import BLOCK_BYTES, packed_index, read_starts, read_table, table_bytes
from hasten.errors import DamagedData, DataError, printable
from hasten.files import open_regular

SHARD_TOKENS = 1 << 27
_AT_ITS_BEGINNING, _NOWHERE = np.zeros(1, np.int64), np.zeros(0, np.int64)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the narrowest stored type for ids below `vocab_size`: little-endian uint16, or uint32 above 65,536."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes the token stream of one split, shard after shard.

    Use it as a context manager, or call `close`; leaving the context without `close` only closes the file in hand.

    Args:
        folder: an existing folder.
        split: ``"train"`` or ``"val"``; becomes the beginning of the file names.
        vocab_size: ids must be below it; decides the stored type.
        document_token: the id that `start_document` writes.
        shard_tokens: tokens of a shard, at least 1; the last one is shorter.

    Raises:
        DataError: a token id is not in ``[0, vocab_size)``.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with ShardWriter(folder, "train", vocab_size=257, document_token=256) as writer:
        ...     writer.start_document()
        ...     writer.append(np.array([104, 105]), source_bytes=2)
        ...     writer.close()["num_tokens"]
        3
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str,
        *,
        vocab_size: int,
        document_token: int,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self._folder, self._split, self._vocab_size = Path(folder), split, vocab_size
        self._shard_tokens = shard_tokens
        dtype = token_dtype(vocab_size)
        self._document_token = np.array([document_token], dtype)
        self._block = np.empty(BLOCK_BYTES // dtype.itemsize, dtype)
        self._in_block = self._in_shard = self._source_bytes = 0
        self._file: BinaryIO | None = None
        self._entries: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def start_document(self) -> None:
        """Begin the next document by writing the document token."""
        self.extend(self._document_token, _AT_ITS_BEGINNING, source_bytes=0)

    def append(self, tokens: np.ndarray, *, source_bytes: int) -> None:
        """Add `tokens` (whole numbers, 1-D) to the document in hand; they stand for `source_bytes` bytes of text."""
        self.extend(tokens, _NOWHERE, source_bytes=source_bytes)

    def extend(self, tokens: np.ndarray, starts_D: np.ndarray, *, source_bytes: int) -> None:
        """Add `tokens` of many documents: a new one begins, with its document token, at each of the rising `starts_D`.

        The same file as `start_document` and `append` for each document, in one step.
        """
        self._source_bytes += source_bytes
        if not tokens.size:
            return
        lowest = int(tokens.min()) if tokens.dtype.kind != "u" else 0
        highest = int(tokens.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise DataError(
                f"The tokenizer gave the id {lowest if lowest < 0 else highest}, outside its vocabulary of "
                f"{self._vocab_size}; use a tokenizer whose ids are below its vocabulary size."
            )
        done = 0
        while done < len(tokens):
            if self._file is None:
                self._open_shard()
            room = min(len(self._block) - self._in_block, self._shard_tokens - self._in_shard)
            part = tokens[done : done + room]
            first, stop = starts_D.searchsorted((done, done + room)).tolist()
            self._starts.extend((starts_D[first:stop] + (self._in_shard - done)).tolist())
            self._block[self._in_block : self._in_block + len(part)] = part
            done += len(part)
            self._in_block += len(part)
            self._in_shard += len(part)
            if self._in_block == len(self._block):
                self._write_block()
            if self._in_shard == self._shard_tokens:
                self._close_shard()

    def close(self) -> dict[str, Any]:
        """Finish the last shard and return the manifest's entry for the split."""
        if self._file is not None:
            self._close_shard()
        entries = self._entries
        return {
            "num_tokens": sum(entry["num_tokens"] for entry in entries),
            "num_documents": sum(entry["num_documents"] for entry in entries),
            "source_bytes": self._source_bytes,
            "shards": entries,
        }

    def _open_shard(self) -> None:
        self._name = f"{self._split}-{len(self._entries):05d}"
        self._file = open(self._folder / f"{self._name}.bin", "wb")  # noqa: SIM115 - closed by _close_shard
        self._hash, self._checksums, self._starts = hashlib.sha256(), array("I"), array("Q")

    def _write_block(self) -> None:
        content = self._block[: self._in_block].tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._checksums.append(zlib.crc32(content))
        self._in_block = 0

    def _close_shard(self) -> None:
        if self._in_block:
            self._write_block()
        sync(self._file)
        self._file.close()
        self._file = None
        table, starts = packed_index(self._in_shard, self._checksums, self._starts)
        index = self._folder / f"{self._name}.idx"
        with open(index, "wb") as file:
            file.write(table + starts)
            sync(file)
        self._entries.append(
            {
                "num_tokens": self._in_shard,
                "num_documents": len(self._starts),
                "tokens": {
                    "file": f"{self._name}.bin",
                    "bytes": self._in_shard * self._block.itemsize,
                    "sha256": self._hash.hexdigest(),
                },
                "index": {
                    "file": index.name,
                    "bytes": len(table) + len(starts),
                    "sha256": hashlib.sha256(table + starts).hexdigest(),
                    "crc32": zlib.crc32(table),
                },
            }
        )
        self._in_shard = 0


class ShardFile:
    """One ``.bin`` with its ``.idx``; nothing is opened before it is used."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], vocab_size: int) -> None:
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self._entry, self._vocab_size = entry, vocab_size
        self._path, self._index = folder / entry["tokens"]["file"], folder / entry["index"]["file"]
        self._dtype = token_dtype(vocab_size)
        self._block_tokens = BLOCK_BYTES // self._dtype.itemsize

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process maps the files again: pickling what is mapped would copy it."""
        mapped = ("_mapped", "_tokens", "_checksums", "_is_checked", "_mapped_index", "_starts")
        return {name: value for name, value in vars(self).items() if name not in mapped}

    @property
    def hashes(self) -> tuple[str, str]:
        """The sha256 of the ``.bin`` and of the ``.idx``, from the manifest."""
        return self._entry["tokens"]["sha256"], self._entry["index"]["sha256"]

    def view(self, start: int, stop: int) -> np.ndarray:
        """Return a checked, read-only view of the file."""
        self._refresh()
        self._check(start // self._block_tokens, -(-stop // self._block_tokens))
        return self._tokens[start:stop]

    def spans(self, starts_R: np.ndarray, length: int) -> np.ndarray:
        """Return a copy of the spans of `length` tokens at `starts_R`."""
        self._check_spans(starts_R, starts_R + length)
        # Every span of the file as a row that overlaps the next; indexing copies only the rows asked for.
        stride = self._dtype.itemsize
        shape = (self.num_tokens - length + 1, length)
        return np.ndarray(shape, self._dtype, self._tokens, strides=(stride, stride))[starts_R]

    def pieces(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Return a copy of the spans of `lengths_P` tokens, at least 1 each, at `starts_P`: one behind the other."""
        self._check_spans(starts_P, starts_P + lengths_P)
        indexes_N = spread(starts_P, lengths_P)
        # With another mode numpy would write into a buffer first; every index is inside.
        return np.take(self._tokens, indexes_N, out=np.empty(len(indexes_N), self._dtype), mode="clip")

    def starts(self, first: int, stop: int) -> np.ndarray:
        """Return where documents `first` up to `stop` start, ``int64``, counted from the beginning of the shard.

        A view of the index, which is mapped, not read; its checksums are checked once, and again when it was changed.
        """
        if "_starts" in vars(self) and self._mapped_index.has_changed():
            self._forget("_starts", "_mapped_index")
        return self._starts[first:stop]

    @cached_property
    def _mapped_index(self) -> MappedFile:
        check_size(self._index, self._entry["index"]["bytes"])
        with opened(self._index) as file:
            return MappedFile(file, self._index)

    @cached_property
    def _starts(self) -> np.ndarray:
        self._forget("_mapped_index")  # of an earlier look at it that failed
        content = self._mapped_index.content
        begin = table_bytes(self.num_tokens, self._dtype.itemsize)
        try:
            _, checksum = read_table(content[:begin], self._entry, self._dtype.itemsize)
            return read_starts(content[begin:], self._entry, checksum)
        except ValueError as error:
            raise damaged(self._index, str(error)) from None

    @cached_property
    def _mapped(self) -> MappedFile:
        check_size(self._path, self._entry["tokens"]["bytes"], damaged_tokens)
        with opened(self._path) as file:
            return MappedFile(file, self._path)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.frombuffer(self._mapped.content, self._dtype)

    def _refresh(self) -> None:
        """Map the file again and trust none of its blocks, if it was changed, replaced or removed since it was mapped.

        Asked before every read: reading what was cut off a mapped file ends the process. What is left is a file cut
        short between this and the read, most often less than a millisecond later.
        """
        if self._mapped.has_changed():
            self._forget("_mapped", "_tokens", "_is_checked")
            _ = self._mapped

    def _forget(self, *names: str) -> None:
        for name in names:
            vars(self).pop(name, None)

    @cached_property
    def _checksums(self) -> np.ndarray:
        with opened(self._index) as file:
            content = file.read(table_bytes(self.num_tokens, self._dtype.itemsize))
        try:
            return read_table(content, self._entry, self._dtype.itemsize)[0]
        except ValueError as error:
            raise damaged(self._index, str(error)) from None

    @cached_property
    def _is_checked(self) -> np.ndarray:
        return np.zeros(len(self._checksums), bool)

    def _check_spans(self, starts_R: np.ndarray, stops_R: np.ndarray) -> None:
        """Check the blocks that hold the tokens from `starts_R` up to `stops_R`, at least one token each."""
        self._refresh()
        first_R, last_R = starts_R // self._block_tokens, (stops_R - 1) // self._block_tokens
        is_checked = self._is_checked
        if is_checked[first_R].all() and is_checked[last_R].all() and int((last_R - first_R).max(initial=0)) < 2:
            return
        for first, last in zip(first_R.tolist(), last_R.tolist()):
            self._check(first, last + 1)

    def _check(self, first: int, stop: int) -> None:
        """Check the blocks from `first` up to `stop` that have not been checked before."""
        if self._is_checked[first:stop].all():
            return
        for number in first + np.flatnonzero(~self._is_checked[first:stop]):
            block = self._tokens[number * self._block_tokens : (number + 1) * self._block_tokens]
            if zlib.crc32(block) != self._checksums[number]:
                how = f"the block of 1 MiB at byte {number * BLOCK_BYTES} fails its checksum"
                raise damaged_tokens(self._path, how, int(number))
            if int(block.max()) >= self._vocab_size:
                raise damaged(self._path, f"it holds the id {block.max()}, outside a vocabulary of {self._vocab_size}")
            self._is_checked[number] = True


def spread(starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
    """Return ``start, start + 1, ...`` of every span, one behind the other.

    Example:
        >>> spread(np.array([7, 2]), np.array([2, 3])).tolist()
        [7, 8, 2, 3, 4]
    """
    ends_P = np.cumsum(lengths_P)
    indexes_N = np.repeat(starts_P - (ends_P - lengths_P), lengths_P)
    indexes_N += _counting(len(indexes_N).bit_length())[: len(indexes_N)]
    return indexes_N


@lru_cache(maxsize=4)
def _counting(bits: int) -> np.ndarray:
    """Return 0 to ``2**bits - 1``; counting anew takes as long as the gather it serves."""
    return np.arange(1 << bits)


def check_size(path: Path, expected: int, error: Callable[[Path, str], DataError] | None = None) -> None:
    """Refuse a file that is missing or has another size than `expected` bytes, with what `error` makes of it."""
    error = error or damaged
    try:
        size = path.stat().st_size
    except OSError:
        raise error(path, "it is missing") from None
    if size != expected:
        raise error(path, f"it has {size:,} bytes instead of {expected:,}")


def opened(path: Path) -> BinaryIO:
    """Open a file for reading bytes, or say that it is damaged."""
    try:
        return open_regular(path)
    except OSError as error:
        raise damaged(path, f"it cannot be opened ({error.strerror})") from None


def sync(file: BinaryIO | TextIO) -> None:
    """Bring what was written to a file onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def damaged(path: Path, how: str) -> DataError:
    """Return the error for a file of prepared data that cannot be trusted."""
    return DataError(_damage(path, how))


def damaged_tokens(path: Path, how: str, block: int | None = None) -> DamagedData:
    """Return the error for a block of tokens, or a whole file of them, that cannot be trusted."""
    return DamagedData(_damage(path, how), file=path.name, block=block)


def _damage(path: Path, how: str) -> str:
    return (
        f"{printable(str(path))} is damaged: {printable(how)}; delete the folder {printable(str(path.parent))} and "
        "prepare the data again."
    )

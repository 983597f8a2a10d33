"""Prepared data on disk: token shards, their index, their manifest.

A folder holds, for each split, ``train-00000.bin`` (the token ids, little-endian uint16 or uint32, nothing else) and
``train-00000.idx`` (checksums of its 1 MiB blocks, then where its documents start), the tokenizer, and
``manifest.json``, which names every file with its size and sha256. A split is one stream of tokens: each document is
the document token followed by its own tokens, documents back to back; shards cut that stream anywhere.

What is checked, and when: sizes and the manifest's own hash when the folder is opened, the table of checksums when a
shard is first used, each block when it is first touched, everything in `PreparedData.verify`.

Such a folder may lie on object storage, too: see `hasten.data.remote`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from hasten.data.ahead import NEAR, Far
from hasten.data.manifest import FORMAT_VERSION, MANIFEST, all_files, read_manifest, sha256_of, write_manifest
from hasten.data.shard_files import ShardFile, ShardWriter, check_size, damaged, spread, token_dtype
from hasten.errors import DataError

if TYPE_CHECKING:
    from hasten.data.tokenizer import Tokenizer

__all__ = ["FORMAT_VERSION", "PreparedData", "ShardWriter", "TokenShards", "token_dtype", "write_manifest"]


class SplitSize(NamedTuple):
    """How much text there is: tokens with the document tokens, documents, bytes of the source."""

    num_tokens: int
    num_documents: int
    source_bytes: int


class Shard(Protocol):
    """One shard, wherever it lies: spans of its tokens, checked, and where its documents start.

    Attributes:
        num_tokens: tokens in it.  num_documents: documents that start in it.
        hashes: the sha256 of the ``.bin`` and of the ``.idx``, from the manifest.
    """

    num_tokens: int
    num_documents: int

    @property
    def hashes(self) -> tuple[str, str]: ...

    def view(self, start: int, stop: int) -> np.ndarray: ...

    def spans(self, starts_R: np.ndarray, length: int) -> np.ndarray: ...

    def pieces(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray: ...

    def starts(self, first: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class PreparedData:
    """A corpus as tokens: the streams, and what they were made from. Made by `PreparedData.open`.

    Attributes:
        folder: where it lies; of data elsewhere, where its manifest and its tokenizer are kept here.
        manifest: everything known of it, as plain data.
        trains: the streams to train on: one, or one for each source that was kept apart for a mixture.
        val: the held-out stream.
        place: the folder or the URL to open it by again.
        check: reads one of its files and compares its sha256 with the manifest's entry.
    """

    folder: Path
    manifest: Mapping[str, Any]
    trains: tuple[TokenShards, ...]
    val: TokenShards
    place: str
    check: Callable[[Mapping[str, Any]], None]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> PreparedData:
        """Return the prepared data in `folder` after checking its manifest and the size of every file.

        A URL such as ``s3://bucket/folder`` is opened by `hasten.data.remote.open_remote`.

        Raises:
            DataError: not prepared data, of another version, or a file is missing or has another size.
        """
        if "://" in os.fspath(folder):
            from hasten.data.remote import open_remote

            return open_remote(os.fspath(folder))
        folder = Path(folder)
        manifest = read_manifest(folder / MANIFEST)
        for entry in all_files(manifest):
            check_size(folder / entry["file"], entry["bytes"])

        *trains, val = (TokenShards(folder, manifest, split) for split in (*train_splits(manifest), "val"))
        return cls(folder, manifest, tuple(trains), val, str(folder), partial(_check_file, folder))

    @property
    def train(self) -> TokenShards:
        """The stream to train on.

        Raises:
            DataError: there are several, one for each source of a mixture.
        """
        if len(self.trains) > 1:
            raise DataError(
                f"This text was prepared as a mixture of {len(self.trains)} sources, so there is no single stream; "
                "read them from `trains`."
            )
        return self.trains[0]

    @property
    def train_names(self) -> tuple[str, ...]:
        """What each stream of `trains` was made from, as a person knows it."""
        return tuple(self.manifest.get("train_names", [self.manifest["corpus"]]))

    @property
    def train_size(self) -> SplitSize:
        """Tokens, documents and bytes to train on, whether they are one stream or several."""
        return SplitSize(
            sum(shards.num_tokens for shards in self.trains),
            sum(shards.num_documents for shards in self.trains),
            sum(shards.source_bytes for shards in self.trains),
        )

    @property
    def corpus_sha256(self) -> str:
        """Hash of the text and of the rule that split it."""
        return self.manifest["corpus_sha256"]

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer."""
        return self.manifest["tokenizer_sha256"]

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return self.manifest["vocab_size"]

    @property
    def document_token(self) -> int:
        """The id that begins every document."""
        return self.manifest["document_token"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the text was encoded with, read from the folder when it is first asked for."""
        from hasten.data.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def verify(self) -> None:
        """Read every file and compare its sha256 with the manifest.

        Raises:
            DataError: names the first file that differs.
        """
        for entry in all_files(self.manifest):
            self.check(entry)


def _check_file(folder: Path, entry: Mapping[str, Any]) -> None:
    path = folder / entry["file"]
    check_size(path, entry["bytes"])
    if sha256_of(path) != entry["sha256"]:
        raise damaged(path, "its sha256 is not the manifest's")


def train_splits(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the splits to train on: ``train``, or ``train-0``, ``train-1`` and so on."""
    splits = manifest["splits"]
    return ("train",) if "train" in splits else tuple(f"train-{number}" for number in range(len(splits) - 1))


class TokenShards:
    """The token stream of one split, read from its shards.

    Positions count tokens from the beginning of the stream; no caller needs to know where a shard ends. What is
    returned is always a fresh array. A block of a shard is checked when it is first touched: its crc32, and that
    its ids are below the vocabulary size.

    Attributes:
        num_tokens: length of the stream, document tokens included.
        num_documents: documents in it.
        source_bytes: bytes of text that it stands for.
        vocab_size: every id is below it.
        document_token: the id that begins every document.
        far: how to have tokens brought here before they are read; `NEAR` where they lie here.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        split: str,
        *,
        shard_of: Callable[[Path, Mapping[str, Any], int], Shard] = ShardFile,
        far: Far = NEAR,
    ) -> None:
        entry = manifest["splits"][split]
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self.source_bytes: int = entry["source_bytes"]
        self.vocab_size: int = manifest["vocab_size"]
        self.document_token: int = manifest["document_token"]
        self._dtype = token_dtype(self.vocab_size)
        self._shards = [shard_of(folder, shard, self.vocab_size) for shard in entry["shards"]]
        self.far = far
        self._bounds = np.cumsum([0] + [shard.num_tokens for shard in self._shards])
        self._first_documents = np.cumsum([0] + [shard.num_documents for shard in self._shards])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to `stop`, ``0 <= start <= stop <= num_tokens``, of the stored type."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.num_tokens}")
        tokens = np.empty(stop - start, self._dtype)
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        done = 0
        while done < len(tokens):
            shard, offset = self._shards[number], start + done - int(self._bounds[number])
            part = shard.view(offset, min(shard.num_tokens, offset + len(tokens) - done))
            tokens[done : done + len(part)] = part
            done += len(part)
            number += 1
        return tokens

    def gather(self, starts_R: np.ndarray, length: int) -> np.ndarray:
        """Return the R spans of `length` tokens that begin at `starts_R`, as one ``(R, length)`` array.

        The same tokens as R calls of `read`, in one gather per shard.
        """
        if not len(starts_R):
            return np.empty((0, length), self._dtype)
        lowest, highest = int(starts_R.min()), int(starts_R.max())
        if lowest < 0 or highest > self.num_tokens - length:
            raise IndexError(f"spans of {length} tokens from {lowest} to {highest} of a stream of {self.num_tokens}")
        first_R = self._bounds.searchsorted(starts_R, side="right") - 1
        whole_R = starts_R + length <= self._bounds[first_R + 1]
        numbers, is_whole = set(first_R.tolist()), bool(whole_R.all())
        if is_whole and len(numbers) == 1:
            number = numbers.pop()
            return self._shards[number].spans(starts_R - self._bounds[number], length)
        spans_RL = np.empty((len(starts_R), length), self._dtype)
        for number in numbers:
            here = np.flatnonzero(whole_R & (first_R == number))
            if len(here):
                spans_RL[here] = self._shards[number].spans(starts_R[here] - self._bounds[number], length)
        for row in () if is_whole else np.flatnonzero(~whole_R):
            spans_RL[row] = self.read(int(starts_R[row]), int(starts_R[row]) + length)
        return spans_RL

    def pieces(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Return the spans of `lengths_P` tokens, at least 1 each, that begin at `starts_P`, one behind the other."""
        if not len(starts_P):
            return np.empty(0, self._dtype)
        stops_P = starts_P + lengths_P
        low, high = int(starts_P.min()), int(stops_P.max())
        if low < 0 or high > self.num_tokens or int(lengths_P.min()) < 1:
            raise IndexError(f"a span is empty or not within a stream of {self.num_tokens} tokens")
        number = int(self._bounds.searchsorted(low, side="right")) - 1
        if high <= self._bounds[number + 1]:
            return self._shards[number].pieces(starts_P - self._bounds[number], lengths_P)
        number_P = self._bounds.searchsorted(starts_P, side="right") - 1
        is_whole_P = stops_P <= self._bounds[number_P + 1]
        places_P = np.cumsum(lengths_P) - lengths_P
        tokens_N = np.empty(int(lengths_P.sum()), self._dtype)
        for number in np.unique(number_P).tolist():
            here = np.flatnonzero(is_whole_P & (number_P == number))
            if len(here):
                part = self._shards[number].pieces(starts_P[here] - self._bounds[number], lengths_P[here])
                tokens_N[spread(places_P[here], lengths_P[here])] = part
        for piece in np.flatnonzero(~is_whole_P).tolist():
            part = self.read(int(starts_P[piece]), int(stops_P[piece]))
            tokens_N[places_P[piece] : places_P[piece] + len(part)] = part
        return tokens_N

    def starts(self, first: int, stop: int) -> np.ndarray:
        """Return where documents `first` up to `stop` begin and where the last of them ends, int64.

        Only the shards that hold them are touched.
        """
        if not 0 <= first <= stop <= self.num_documents:
            raise IndexError(f"documents {first} to {stop} of {self.num_documents}")
        starts = np.empty(stop - first + 1, np.int64)
        starts[-1] = self.num_tokens
        last = min(stop + 1, self.num_documents)  # the end of a document is the beginning of the next
        number = int(self._first_documents.searchsorted(first, side="right")) - 1
        done = 0
        while first + done < last:
            begin = first + done - int(self._first_documents[number])
            part = self._shards[number].starts(begin, begin + last - first - done)
            np.add(part, self._bounds[number], out=starts[done : done + len(part)])
            done += len(part)
            number += 1
        return starts

    @property
    def document_starts(self) -> np.ndarray:
        """Where each document begins, ``int64[num_documents]``."""
        return self.starts(0, self.num_documents)[:-1]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens and of where documents start, as the manifest records them."""
        files = [shard.hashes for shard in self._shards]
        return hashlib.sha256(json.dumps([self.document_token, files]).encode()).hexdigest()[:32]

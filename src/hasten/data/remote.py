"""Prepared data on object storage: read where it lies, block by block, through a cache on this machine.

The same folder as `hasten.data.shards` describes, at a URL. Its manifest and its tokenizer are fetched when it is
opened, the index of a shard when the shard is first used, the tokens in blocks of 1 MiB, of which the manifest leads
to the checksums. Nothing is used or kept before its checksum was compared, so what is read is bit for bit what was
prepared, and in the same order as from a folder.

What a step needs is asked for before its turn: see `hasten.data.ahead`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hasten.cache import cache_root
from hasten.data.manifest import MANIFEST, all_files, read_manifest
from hasten.data.range_cache import BOUND, RangeCache, stream_cache
from hasten.data.remote_shards import Store, fault_of, shards_of
from hasten.data.shard_index import BLOCK_BYTES
from hasten.data.shards import PreparedData, TokenShards, train_splits
from hasten.data.transfer import NoSuchObject, Remote, Tell, to_stderr
from hasten.errors import DataError, printable

_MOST_MANIFEST_BYTES = 2 << 30
_MOST_FILE_BYTES = 256 << 20


def open_remote(url: str, *, cache: RangeCache | None = None, tell: Tell = to_stderr) -> PreparedData:
    """Return the prepared data at `url` after checking its manifest, its tokenizer and the size of every object.

    Args:
        url: of the folder that holds ``manifest.json``; see `Remote`.
        cache: of what is fetched; None: the one that this machine's user has for all data.
        tell: is given a sentence when the storage has failed several times in a row.

    Raises:
        DataError: no prepared data is there, it cannot be read, or something of it is missing or has another size.

    Example:
        >>> data = open_remote("s3://bucket/prepared/xyz")  # doctest: +SKIP
    """
    remote = Remote(url, tell=tell)
    cache = stream_cache() if cache is None else cache
    manifest, folder = _fetch_manifest(remote)
    _check_sizes(remote, manifest)
    for entry in manifest["files"]:
        _fetch_file(remote, entry, folder)
    largest = max((shard["index"]["bytes"] for shard in shards_of(manifest)), default=0)
    if cache.most_bytes < 2 * largest:
        raise DataError(
            f"The index of a shard of {remote.where('')} has {largest:,} bytes, and the cache may hold "
            f"{cache.most_bytes:,}: set {BOUND} to at least {2 * largest:,}."
        )
    store = Store(remote, cache, manifest)

    def stream(split: str) -> TokenShards:
        return TokenShards(folder, manifest, split, shard_of=store.shard, far=store.blocks(manifest, split))

    *trains, val = map(stream, (*train_splits(manifest), "val"))
    return PreparedData(folder, manifest, tuple(trains), val, remote.url, partial(_verify, remote))


def upload(folder: str | os.PathLike[str], url: str, *, tell: Tell = to_stderr) -> str:
    """Copy prepared data to `url`, its manifest last, and return the URL, which `open_remote` then opens.

    Every file is compared with the manifest before it leaves. What is there already is left as it is.

    Args:
        folder: of prepared data.
        url: of a folder that is empty, or holds the same data or an unfinished copy of it.
        tell: as in `open_remote`.

    Raises:
        DataError: the data is damaged, other data is there, or it cannot be written.

    Example:
        >>> upload("prepared/xyz", "s3://bucket/prepared/xyz")  # doctest: +SKIP
        's3://bucket/prepared/xyz'
    """
    data, remote = PreparedData.open(folder), Remote(url, tell=tell)
    data.verify()
    content = (data.folder / MANIFEST).read_bytes()
    try:
        there = remote.size(MANIFEST)
    except NoSuchObject:
        there = None
    if there is not None:
        if there != len(content) or remote.read_all(MANIFEST, there) != content:
            raise DataError(f"{remote.where('')} holds other prepared data: give another URL.")
        return remote.url
    for entry in all_files(data.manifest):
        remote.write(entry["file"], data.folder / entry["file"])
    _check_sizes(remote, data.manifest)
    remote.write(MANIFEST, content)
    return remote.url


def _fetch_manifest(remote: Remote) -> tuple[dict[str, Any], Path]:
    """Return the manifest, checked, and the folder that it was written to: one for each manifest."""
    try:
        size = remote.size(MANIFEST)
    except NoSuchObject:
        raise DataError(
            f"{remote.where('')} holds no {MANIFEST}; give the URL of a folder that `hasten prepare` made and that "
            "was copied there whole."
        ) from None
    if size > _MOST_MANIFEST_BYTES:
        raise DataError(f"{remote.where(MANIFEST)} has {size:,} bytes, too many for a manifest; check the URL.")
    content = remote.read_all(MANIFEST, size)
    folder = cache_root() / "remote" / hashlib.sha256(content).hexdigest()[:40]
    try:
        _write(folder / MANIFEST, content)
        return read_manifest(folder / MANIFEST), folder
    except OSError as error:
        raise DataError(
            f"{printable(str(folder))} cannot be written ({error.strerror or error}); make room there, or name another "
            "folder with HASTEN_CACHE."
        ) from None
    except DataError as error:
        # What it says of the copy here holds for the original.
        raise DataError(str(error).replace(str(folder), remote.url)) from None


def _fetch_file(remote: Remote, entry: Mapping[str, Any], folder: Path) -> None:
    """Bring a small file of the folder here, unless it is here."""
    if entry["file"] == MANIFEST or entry["bytes"] > _MOST_FILE_BYTES:
        raise DataError(f"{remote.where(MANIFEST)} is damaged: it names {entry['file']} as one of its small files.")
    path = folder / entry["file"]
    if path.is_file() and path.stat().st_size == entry["bytes"] and not fault_of(entry["sha256"], path.read_bytes()):
        return
    content = (
        remote.read_all(entry["file"], entry["bytes"], partial(fault_of, entry["sha256"])) if entry["bytes"] else b""
    )
    try:
        _write(path, content)
    except OSError as error:
        raise DataError(f"{printable(str(path))} cannot be written ({error.strerror or error}).") from None


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_sizes(remote: Remote, manifest: Mapping[str, Any]) -> None:
    sizes = remote.sizes()
    if sizes is None:  # not permitted to list: what is missing is noticed when it is first read
        return
    for entry in all_files(manifest):
        size = sizes.get(entry["file"])
        if size is None:
            raise DataError(
                f"{remote.where(entry['file'])} is missing; upload the whole folder of prepared data again."
            )
        if size != entry["bytes"]:
            raise DataError(
                f"{remote.where(entry['file'])} is damaged: it has {size:,} bytes instead of {entry['bytes']:,}; "
                "upload the prepared data again."
            )


def _verify(remote: Remote, entry: Mapping[str, Any]) -> None:
    """Read an object and compare its sha256 with the manifest."""
    digest, size = hashlib.sha256(), entry["bytes"]
    for begin in range(0, size, 8 * BLOCK_BYTES):
        digest.update(remote.read(entry["file"], begin, min(size, begin + 8 * BLOCK_BYTES)))
    if digest.hexdigest() != entry["sha256"]:
        raise DataError(f"{remote.where(entry['file'])} is damaged: its sha256 is not the manifest's; upload it again.")

"""The manifest of prepared data: which files there are, and what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hasten.data.shard_files import damaged, opened, sync, token_dtype
from hasten.data.shard_index import BLOCK_BYTES, index_bytes
from hasten.errors import DataError, one_line, printable
from hasten.files import MOST_VALUES, parse_json, read_bytes

FORMAT = "hasten tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_TEXTS = ("corpus", "corpus_sha256", "tokenizer_sha256")
_MOST_TOKENS = 1 << 62
_MOST_BYTES = 2 << 30  # some 15 million source files


def write_manifest(
    folder: str | os.PathLike[str],
    *,
    splits: Mapping[str, Mapping[str, Any]],
    corpus: str,
    corpus_sha256: str,
    tokenizer_sha256: str,
    vocab_size: int,
    document_token: int,
    sources: Iterable[Mapping[str, Any]] = (),
    counts: Mapping[str, int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write ``manifest.json`` whole or not at all, as the last file of the folder, and return what it says.

    Args:
        folder: where the shards are; its other files (the tokenizer's) are hashed and become part of the manifest.
        splits: ``{"train": ShardWriter.close(), "val": ...}``.
        corpus: the name a person knows the corpus by.
        corpus_sha256: hash of the text and the split rule.
        tokenizer_sha256: hash of the tokenizer.
        vocab_size: ids are below it.
        document_token: the id that begins every document.
        sources: what was read: name, bytes and sha256 of each file.
        counts: what was replaced or left out while reading, by cause.
        more: anything else worth keeping, as plain data.
    """
    folder = Path(folder)
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "corpus": corpus,
        "corpus_sha256": corpus_sha256,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "document_token": document_token,
        "dtype": token_dtype(vocab_size).name,
        "splits": {split: dict(entry) for split, entry in splits.items()},
        "sources": [dict(source) for source in sources],
        "counts": dict(counts or {}),
        **more,
    }
    in_shards = {entry["file"] for entry in _shard_files(manifest)}
    others = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in {MANIFEST, *in_shards})
    manifest["files"] = [
        {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in others
    ]
    manifest["manifest_sha256"] = _own_hash(manifest)
    unfinished = folder / f"{MANIFEST}.tmp"
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        sync(file)
    unfinished.replace(folder / MANIFEST)
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest at `path` once it is of this version, whole, and names only files of its own folder."""
    try:
        content = read_bytes(path, _MOST_BYTES)
        # Each source file of a corpus has an entry, of some 40 bytes a value.
        manifest = parse_json(content, max(MOST_VALUES, len(content) // 16))
    except FileNotFoundError:
        raise DataError(
            f"{printable(str(path.parent))} holds no {MANIFEST}; give a folder that `hasten prepare` finished."
        ) from None
    except (OSError, ValueError) as error:
        reason = (error.strerror or "") if isinstance(error, OSError) else str(error)
        raise damaged(path, f"it cannot be read as JSON ({one_line(reason, 200)})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(
            f"{printable(str(path))} does not describe prepared tokens; give a folder made by `hasten prepare`."
        )
    version = manifest.get("version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{printable(str(path))} is of format version {one_line(repr(version))} and this hasten reads version "
            f"{FORMAT_VERSION}; prepare the data again."
        )
    if manifest.get("manifest_sha256") != _own_hash(manifest):
        raise damaged(path, "its content is not what its own sha256 says")
    wrong = next(_faults(manifest), "")
    if wrong:
        raise damaged(path, wrong)
    return manifest


def _faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is not as `write_manifest` writes it: the sha256 says that nobody erred, not that nobody lied."""
    splits, files, counts = (manifest.get(key) for key in ("splits", "files", "counts"))
    for key in _TEXTS:
        if not isinstance(manifest.get(key), str):
            yield f"its {key} is no text"
    vocab_size, document_token = manifest.get("vocab_size"), manifest.get("document_token")
    if not (_is_count(vocab_size, 1, 1 << 32) and _is_count(document_token, 0, vocab_size - 1)):
        yield "its vocab_size or document_token is no such number"
    if not (isinstance(splits, dict) and isinstance(files, list) and isinstance(counts, dict)):
        yield "its splits, files or counts are missing"
    apart = {f"train-{number}" for number in range(len(splits) - 1)}
    if set(splits) - {"val"} not in ({"train"}, apart) or "val" not in splits or len(splits) < 2:
        yield "its splits are not those to train on and one to validate on"
    for name, amount in counts.items():
        if not _is_count(amount):
            yield f"its count of {name} is no number"
    for key in ("notes", "train_names"):
        given = manifest.get(key, [])
        if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
            yield f"its {key} are no texts"
    if "train_names" in manifest and len(manifest["train_names"]) != len(splits) - 1:
        yield "its train_names are not as many as its splits"
    for name, split in splits.items():
        yield from (f"its split {name} {fault}" for fault in _split_faults(split, token_dtype(vocab_size).itemsize))
    yield from (f"one of its files {fault}" for entry in files for fault in _file_faults(entry))


def _split_faults(split: Any, token_bytes: int) -> Iterator[str]:
    keys = ("num_tokens", "num_documents", "source_bytes")
    if not isinstance(split, dict) or not all(_is_count(split.get(key)) for key in keys):
        yield "lacks a number"
    shards = split.get("shards")
    if not isinstance(shards, list):
        yield "has no shards"
    for shard in shards:
        if not isinstance(shard, dict) or not _is_count(shard.get("num_tokens"), 1):
            yield "has a shard without tokens"
        if not _is_count(shard.get("num_documents"), 0, shard["num_tokens"]):
            yield "has a shard with more documents than tokens"
        for part in ("tokens", "index"):
            yield from (f"has a shard that {fault}" for fault in _file_faults(shard.get(part)))
        if not _is_count(shard["index"].get("crc32")):
            yield "has a shard without a checksum"
        if shard["tokens"]["bytes"] != shard["num_tokens"] * token_bytes:
            yield "has a shard of another size than its tokens"
        if shard["index"]["bytes"] != index_bytes(shard["num_tokens"], shard["num_documents"], token_bytes):
            yield "has an index of another size than its documents"
    for key in ("num_tokens", "num_documents"):
        if split[key] != sum(shard[key] for shard in shards):
            yield f"has other {key} than its shards together"


def _file_faults(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        yield "has no name"
    name = entry["file"]
    is_plain = name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..") and len(name) < 200
    if not is_plain:
        yield f"is a file outside its folder ({one_line(name)!r})"
    if not _is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
        yield "has no size or no sha256"


def _is_count(value: Any, least: int = 0, most: int = _MOST_TOKENS) -> bool:
    return type(value) is int and least <= value <= most


def _shard_files(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return [shard[part] for shard in shards for part in ("tokens", "index")]


def all_files(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the entry (``file``, ``bytes``, ``sha256``) of every file that a manifest names."""
    return [*_shard_files(manifest), *manifest["files"]]


def _own_hash(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while content := file.read(BLOCK_BYTES):
            digest.update(content)
    return digest.hexdigest()

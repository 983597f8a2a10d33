"""The manifest of prepared data: which files there are, and what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hasten.data.shard_files import BLOCK_BYTES, damaged, opened, sync, token_dtype
from hasten.errors import DataError, printable

FORMAT = "hasten tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


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
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{printable(str(path.parent))} holds no {MANIFEST}; give a folder that `hasten prepare` finished."
        ) from None
    except (OSError, ValueError) as error:
        raise damaged(path, f"it cannot be read as JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(
            f"{printable(str(path))} does not describe prepared tokens; give a folder made by `hasten prepare`."
        )
    if manifest.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{printable(str(path))} is of format version {manifest.get('version')!r} and this hasten reads version "
            f"{FORMAT_VERSION}; prepare the data again."
        )
    if manifest.get("manifest_sha256") != _own_hash(manifest):
        raise damaged(path, "its content is not what its own sha256 says")
    for entry in all_files(manifest):
        if Path(entry["file"]).name != entry["file"]:
            raise damaged(path, f"it names a file outside its folder ({entry['file']!r})")
    return manifest


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

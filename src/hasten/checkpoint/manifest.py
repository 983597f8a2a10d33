"""The manifest of a checkpoint: which files it has, their sizes and sha256, and its own sha256.

A group of tensors is one file, ``model.safetensors``, or the parts that the ranks of a run wrote,
``model.00000.safetensors``, ``model.00002.safetensors``: five digits of the rank, in ascending order, without those
that had nothing of the group. Every part holds whole tensors, so how many ranks there were means nothing to a reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hasten.checkpoint.folders import STEP, entries
from hasten.checkpoint.tensors import Damage, parse_json, read_bytes, write_bytes
from hasten.errors import CheckpointError, printable

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON_BYTES = 64 << 20
_GROUP = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TENSOR_FILE = re.compile(r"([A-Za-z0-9_-]{1,64})(?:\.([0-9]{5}))?\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_name(group: str, rank: int | None) -> str:
    """Return the name of the file of a group of tensors, or of the part of it that a rank wrote.

    Raises:
        CheckpointError: the group cannot have that name.

    Example:
        >>> file_name("model", None), file_name("model", 3)
        ('model.safetensors', 'model.00003.safetensors')
    """
    if not _GROUP.fullmatch(group):
        raise CheckpointError(f"{group!r} cannot name a group of tensors; use letters, digits, '_' and '-'.")
    return f"{group}.safetensors" if rank is None else f"{group}.{rank:05d}.safetensors"


def tensor_files(files: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and the group of every file of tensors in a manifest that was checked, in its order."""
    for name in files:
        if name != STATE:
            yield name, name.partition(".")[0]


def write_manifest(folder: Path, step: int, files: Mapping[str, Any]) -> None:
    """Write the manifest that lists `files`, name to size and sha256."""
    manifest = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
    write_bytes(folder / MANIFEST, [_sealed(manifest)])


def json_bytes(value: Any) -> bytes:
    """Return the JSON text of plain data.

    Raises:
        CheckpointError: something in it has no place in JSON.
    """
    try:
        return (json.dumps(value, indent=1) + "\n").encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The state cannot be written as JSON ({error}); give plain data, tensors apart."
        ) from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest, once it is whole and names exactly the files that are there.

    Raises:
        Damage: it is not.
        CheckpointError: a newer hasten wrote it.
        RunError: it cannot be read for a reason outside of it.
    """
    with named(MANIFEST):
        data = read_bytes(path / MANIFEST, MAX_JSON_BYTES)
        manifest = parse_json(data)
        if not isinstance(manifest, dict) or not _is_sealed(manifest, data):
            raise Damage("does not have the sha256 it says")
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{printable(str(path))} has format {printable(str(manifest.get('format')))[:20]}, "
                f"this hasten reads {FORMAT}; use the hasten that wrote it."
            )
        _check(manifest)
        match = STEP.match(path.name)
        if match and int(match[1]) != manifest["step"]:
            raise Damage(f"is of step {manifest['step']}")
    there = {entry.name for entry in entries(path) if not entry.name.startswith(".")}  # .DS_Store, .nfs000...
    expected = {*manifest["files"], MANIFEST}
    for name in sorted(expected - there):
        raise Damage(f"{name} is missing")
    for name in sorted(there - expected):
        raise Damage(f"{printable(name)} does not belong to it")
    return manifest


def read_state(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of the checkpoint in the folder `path`, verified against its manifest entry."""
    with named(STATE):
        data = read_bytes(path / STATE, MAX_JSON_BYTES)
        if {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} != entry:
            raise Damage("has another sha256 than when it was written")
        state = parse_json(data)
        if not isinstance(state, dict):
            raise Damage("is not an object")
    return state


@contextlib.contextmanager
def named(file: str) -> Iterator[None]:
    """Put the name of a file before what is wrong with it."""
    try:
        yield
    except Damage as damage:
        raise Damage(f"{file} {damage}") from None


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Return the one text of a manifest, with its own sha256 in it."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json_bytes({**manifest, "sha256": digest})


def _is_sealed(manifest: Mapping[str, Any], data: bytes) -> bool:
    try:
        return _sealed({key: value for key, value in manifest.items() if key != "sha256"}) == data
    except (RecursionError, CheckpointError):
        return False


def _check(manifest: Mapping[str, Any]) -> None:
    files = manifest.get("files")
    if set(manifest) != {"format", "step", "files", "sha256"} or not isinstance(files, dict) or STATE not in files:
        raise Damage("is malformed")
    if type(manifest["step"]) is not int or manifest["step"] < 0:
        raise Damage("is malformed")
    last: dict[str, str | None] = {}
    for name, entry in files.items():
        match = _TENSOR_FILE.fullmatch(name)
        # Only plain names pass, so no manifest can lead out of its folder.
        if name != STATE and not match:
            raise Damage(f"names the file {printable(name)[:80]!r}")
        if match:
            _check_order(last, *match.groups())
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"} or type(entry["size"]) is not int:
            raise Damage("is malformed")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise Damage("is malformed")


def _check_order(last: dict[str, str | None], group: str, part: str | None) -> None:
    """Refuse a group that is one file and parts too, or whose parts are out of order; `last` has those before."""
    if group in last and (part is None or last[group] is None):
        raise Damage(f"names {group} as one file and in parts")
    if group in last and part <= last[group]:
        raise Damage(f"names the parts of {group} out of order")
    last[group] = part

"""The checkpoints of a run: one folder per step, written whole or not at all, the newest good one found again.

    step-00001000/        model.safetensors, optimizer.safetensors, ..., state.json, manifest.json
    step-00001000.tmp     being written: never read, removed by the next save
    step-00001000.old     replaced by a new save of the same step: read only if that save did not get to its end
    step-00001000.gone    being deleted: never read
    step-00001000.bad     found damaged: kept for its owner to look at, never read

The manifest has the size and sha256 of every file and a sha256 of itself, so one changed bit anywhere is found. A
folder gets its name only after everything in it is on the disk and was read back, and an older checkpoint is deleted
only after that name is on the disk too: a crash or a power cut at any moment leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.checkpoint.tensors import (
    Damage,
    hash_file,
    parse_json,
    read_bytes,
    read_tensors,
    write_bytes,
    write_tensors,
)
from hasten.errors import CheckpointError, RunError, printable

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON_BYTES = 64 << 20
_STEP = re.compile(r"step-(\d{8,18})")
_GROUP = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TENSOR_FILE = re.compile(r"([A-Za-z0-9_-]{1,64})\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint: its step, groups of named tensors on the CPU, plain data, and where it was read."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint of `step` under `root` and return its folder; then delete those older than the last `keep`.

    Args:
        root: the folder of a run's checkpoints, created if needed. One process at a time may save into it.
        step: optimizer steps done, >= 0. A checkpoint of the same step is replaced.
        tensors: groups of named tensors, each group a file; group names are letters, digits, ``_`` and ``-``.
        state: plain data that JSON can hold (nan and infinity included; tuples come back as lists).
        keep: checkpoints to leave in place, this one included, >= 1.

    Raises:
        RunError: the disk is full or refuses; every older checkpoint is untouched and nothing half-written stays.
        CheckpointError: a value or a name that a checkpoint cannot hold.
    """
    root = Path(root)
    if keep < 1 or step < 0:
        raise CheckpointError(f"keep={keep}, step={step}: give keep of at least 1 and a step of at least 0.")
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"{group!r} cannot name a group of tensors; use letters, digits, '_' and '-'.")
    content = _json_bytes(state)
    final = root / f"step-{step:08d}"
    temporary = final.with_name(f"{final.name}.tmp")
    try:
        _make_root(root)
        _tidy(root)
        _write_folder(temporary, step, tensors, content)
        _read_manifest_and_hash(temporary)
        _put_in_place(temporary, final)
        _sync_folder(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"Could not save step {step} in {printable(str(root))}: {error.strerror or error}; "
            "free or repair the disk (older checkpoints are untouched)."
        ) from error
    except Damage as damage:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"Step {step} did not read back as written in {printable(str(root))} ({damage}); "
            "check the disk (older checkpoints are untouched)."
        ) from damage
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _point_latest(root, final)
    older = sorted(s for s, path in _found(root) if s < step and not path.suffix)
    for gone in older[: max(0, len(older) - (keep - 1))]:
        _delete(root / f"step-{gone:08d}")
    _delete(final.with_name(f"{final.name}.old"))
    return final


def load(path: Path) -> Loaded:
    """Read the checkpoint in the folder `path` and verify every byte of it.

    Raises:
        CheckpointError: something in it is not as it was written, or a newer hasten wrote it.
        RunError: it cannot be read for a reason outside of it (no permission, too many open files).
    """
    path = Path(path)
    try:
        return _load(path)
    except Damage as damage:
        raise CheckpointError(f"{printable(str(path))} is damaged ({damage}); use an older checkpoint.") from None


def newest(root: Path) -> tuple[Loaded | None, list[str]]:
    """Return the newest checkpoint under `root` that verifies, and a line for each damaged one that was passed over.

    A damaged one is renamed ``.bad``. No checkpoint at all gives None.

    Raises:
        CheckpointError: there are checkpoints, but none can be trusted: starting afresh is the user's decision.
    """
    root = Path(root)
    notes: list[str] = []
    for _, path in sorted(_found(root), key=lambda item: (item[0], not item[1].suffix), reverse=True):
        try:
            loaded = _load(path)
        except Damage as damage:
            if path.exists():  # else a running trainer has just deleted it
                notes.append(_set_aside(path, damage))
            continue
        if notes:
            _point_latest(root, path)
        return loaded, notes
    bad = sorted(path.name for path in _entries(root) if re.match(r"step-\d{8,18}\.bad", path.name))
    if notes or bad:
        raise CheckpointError(
            f"No checkpoint in {printable(str(root))} can be trusted: {' '.join(notes) or ', '.join(bad)} "
            "Restore one from a copy, or delete that folder to start afresh."
        )
    return None, []


def _json_bytes(value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=1) + "\n").encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The state cannot be written as JSON ({error}); give plain data, tensors apart."
        ) from None


def _write_folder(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes) -> None:
    folder.mkdir()
    files = {}
    for group, named in tensors.items():
        files[f"{group}.safetensors"] = write_tensors(folder / f"{group}.safetensors", named)
    files[STATE] = write_bytes(folder / STATE, [state])
    manifest = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
    write_bytes(folder / MANIFEST, [_sealed(manifest)])
    _sync_folder(folder)


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Return the one text of a manifest, with its own sha256 in it."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return _json_bytes({**manifest, "sha256": digest})


def _is_sealed(manifest: Mapping[str, Any], data: bytes) -> bool:
    try:
        return _sealed({key: value for key, value in manifest.items() if key != "sha256"}) == data
    except (RecursionError, CheckpointError):
        return False


def _load(path: Path) -> Loaded:
    manifest = _read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    state: Any = None
    for name, entry in manifest["files"].items():
        with _named(name):
            if name == STATE:
                data = read_bytes(path / name, MAX_JSON_BYTES)
                if {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} != entry:
                    raise Damage("has another sha256 than when it was written")
                state = parse_json(data)
                if not isinstance(state, dict):
                    raise Damage("is not an object")
            else:
                tensors[name.removesuffix(".safetensors")] = read_tensors(path / name, entry)
    return Loaded(manifest["step"], tensors, state, path)


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest, once it is whole and names exactly the files that are there, with their sizes."""
    with _named(MANIFEST):
        data = read_bytes(path / MANIFEST, MAX_JSON_BYTES)
        manifest = parse_json(data)
        if not isinstance(manifest, dict) or not _is_sealed(manifest, data):
            raise Damage("does not have the sha256 it says")
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{printable(str(path))} has format {printable(str(manifest.get('format')))[:20]}, "
                f"this hasten reads {FORMAT}; use the hasten that wrote it."
            )
        _check_manifest(manifest)
        named = _STEP.match(path.name)
        if named and int(named[1]) != manifest["step"]:
            raise Damage(f"is of step {manifest['step']}")
    there = {entry.name for entry in _entries(path) if not entry.name.startswith(".")}  # .DS_Store, .nfs000...
    expected = {*manifest["files"], MANIFEST}
    for name in sorted(expected - there):
        raise Damage(f"{name} is missing")
    for name in sorted(there - expected):
        raise Damage(f"{printable(name)} does not belong to it")
    return manifest


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    files = manifest.get("files")
    if set(manifest) != {"format", "step", "files", "sha256"} or not isinstance(files, dict) or STATE not in files:
        raise Damage("is malformed")
    if type(manifest["step"]) is not int or manifest["step"] < 0:
        raise Damage("is malformed")
    for name, entry in files.items():
        # Only plain names pass, so no manifest can lead out of its folder.
        if name != STATE and not _TENSOR_FILE.fullmatch(name):
            raise Damage(f"names the file {printable(name)[:80]!r}")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"} or type(entry["size"]) is not int:
            raise Damage("is malformed")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise Damage("is malformed")


def _read_manifest_and_hash(folder: Path) -> None:
    """Raise `Damage` unless every file of the folder reads back as its manifest says."""
    for name, entry in _read_manifest(folder)["files"].items():
        with _named(name):
            if hash_file(folder / name) != entry:
                raise Damage("has another content than was written")


@contextlib.contextmanager
def _named(file: str) -> Any:
    try:
        yield
    except Damage as damage:
        raise Damage(f"{file} {damage}") from None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(
            f"Could not list {printable(str(folder))}: {error.strerror}; put that right and try again."
        ) from error


def _found(root: Path) -> list[tuple[int, Path]]:
    """Return step and path of everything that may be read as a checkpoint."""
    found = []
    for path in _entries(root):
        match = _STEP.fullmatch(path.name.removesuffix(".old"))
        if match:
            found.append((int(match[1]), path))
    return found


def _make_root(root: Path) -> None:
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_folder(folder.parent)


def _tidy(root: Path) -> None:
    """Clear away what a save that was cut off left behind."""
    for path in _entries(root):
        if not _STEP.fullmatch(path.stem):
            continue
        if path.suffix in (".tmp", ".gone"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".old" and path.with_suffix("").exists():
            _delete(path)
        elif path.suffix == ".old":
            path.rename(path.with_suffix(""))


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():
        final.rename(final.with_name(f"{final.name}.old"))
    temporary.rename(final)


def _delete(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a crash half-way leaves nothing that looks like one."""
    gone = path.with_name(f"{path.name.removesuffix('.old')}.gone")
    # What cannot be deleted now is tried again by the next save; the checkpoint just written is what matters.
    with contextlib.suppress(OSError):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _set_aside(path: Path, damage: Damage) -> str:
    """Rename a damaged checkpoint and return the line that says so."""
    stem = f"{path.name.removesuffix('.old')}.bad"
    names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
    target = next((t for t in map(path.with_name, names) if not t.exists()), path.with_name(stem))
    try:
        path.rename(target)
    except OSError as error:
        return f"Checkpoint {path.name} is damaged ({damage}) and passed over (not renamed: {error.strerror})."
    return f"Checkpoint {path.name} is damaged ({damage}) and renamed {target.name}."


def _point_latest(root: Path, final: Path) -> None:
    """Let the link ``latest`` name a checkpoint: for people, and nothing here reads it, so that links are optional."""
    link = root / "latest.tmp"
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(final.name, target_is_directory=True)
        link.replace(root / "latest")


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk; Windows has no such call and orders them itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The folders under the root of a run's checkpoints: found, named, renamed and deleted so that no crash can confuse."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from hasten.checkpoint.tensors import Damage
from hasten.errors import RunError, printable

STEP = re.compile(r"step-(\d{8,18})")
_BAD = re.compile(r"step-\d{8,18}\.bad")


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing where there is none.

    Raises:
        RunError: it cannot be listed.
    """
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(
            f"Could not list {printable(str(folder))}: {error.strerror}; put that right and try again."
        ) from error


def found(root: Path) -> list[tuple[int, Path]]:
    """Return step and path of everything that may be read as a checkpoint."""
    pairs = []
    for path in entries(root):
        match = STEP.fullmatch(path.name.removesuffix(".old"))
        if match:
            pairs.append((int(match[1]), path))
    return pairs


def newest_first(root: Path) -> list[Path]:
    """Return everything that may be read as a checkpoint, in the order in which to try."""
    order = sorted(found(root), key=lambda item: (item[0], not item[1].suffix), reverse=True)
    return [path for _, path in order]


def set_aside_before(root: Path) -> list[str]:
    """Return the names of the damaged ones."""
    return sorted(path.name for path in entries(root) if _BAD.match(path.name))


def make_room(root: Path, temporary: Path) -> None:
    """Make the folder that a save writes into, and clear away what one that was cut off left behind."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)
    _tidy(root)
    temporary.mkdir()


def _tidy(root: Path) -> None:
    for path in entries(root):
        if not STEP.fullmatch(path.stem):
            continue
        if path.suffix in (".tmp", ".gone"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".old" and path.with_suffix("").exists():
            _delete(path)
        elif path.suffix == ".old":
            path.rename(path.with_suffix(""))


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a checkpoint that is whole on the disk its name, and that name to the disk."""
    if final.exists():
        final.rename(final.with_name(f"{final.name}.old"))
    temporary.rename(final)
    sync_folder(final.parent)


def prune(final: Path, step: int, keep: int) -> None:
    """Delete the checkpoints older than the last `keep`, of which `final`, of `step`, is one; ``latest`` names it."""
    point_latest(final)
    older = sorted(s for s, path in found(final.parent) if s < step and not path.suffix)
    for gone in older[: max(0, len(older) - (keep - 1))]:
        _delete(final.with_name(f"step-{gone:08d}"))
    _delete(final.with_name(f"{final.name}.old"))


def _delete(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a crash half-way leaves nothing that looks like one."""
    gone = path.with_name(f"{path.name.removesuffix('.old')}.gone")
    # What cannot be deleted now is tried again by the next save; the checkpoint just written is what matters.
    with contextlib.suppress(OSError):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def set_aside(path: Path, damage: Damage | str) -> str:
    """Rename a damaged checkpoint and return the line that says so."""
    stem = f"{path.name.removesuffix('.old')}.bad"
    names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
    target = next((t for t in map(path.with_name, names) if not t.exists()), path.with_name(stem))
    try:
        path.rename(target)
    except OSError as error:
        return f"Checkpoint {path.name} is damaged ({damage}) and passed over (not renamed: {error.strerror})."
    return f"Checkpoint {path.name} is damaged ({damage}) and renamed {target.name}."


def point_latest(final: Path) -> None:
    """Let the link ``latest`` name a checkpoint: for people, and nothing here reads it, so that links are optional."""
    link = final.with_name("latest.tmp")
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(final.name, target_is_directory=True)
        link.replace(final.with_name("latest"))


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk; Windows has no such call and orders them itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

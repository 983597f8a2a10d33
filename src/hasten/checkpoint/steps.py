"""The checkpoints of a run: one folder per step, written whole or not at all, the newest good one found again.

    step-00001000/        model.safetensors, optimizer.safetensors, ..., state.json, manifest.json
    step-00001000.tmp     being written: never read, removed by the next save
    step-00001000.old     replaced by a new save of the same step: read only if that save did not get to its end
    step-00001000.gone    being deleted: never read
    step-00001000.bad     found damaged: kept for its owner to look at, never read

The manifest has the size and sha256 of every file and a sha256 of itself, so one changed bit anywhere is found. A
folder gets its name only after everything in it is on the disk and was read back, and an older checkpoint is deleted
only after that name is on the disk too: a crash or a power cut at any moment leaves the old state or the new one.

Several ranks write one checkpoint together, each the whole tensors that it is given, in files of its own
(``model.00003.safetensors``); the first rank makes the folder, and the manifest once all are through. How many ranks
there were means nothing to who reads it: one process, or any other number of them.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hasten.checkpoint import folders
from hasten.checkpoint.agreement import agree
from hasten.checkpoint.manifest import (
    STATE,
    file_name,
    json_bytes,
    named,
    read_manifest,
    read_state,
    tensor_files,
    write_manifest,
)
from hasten.checkpoint.stored import Loaded, gather, open_verified, verify
from hasten.checkpoint.tensors import Damage, read_places, read_tensors, write_bytes, write_tensors
from hasten.distributed import ALONE, Ranks
from hasten.errors import CheckpointError, HastenError, RunError, printable

Groups = Mapping[str, Mapping[str, Tensor]]


def save(
    root: Path,
    step: int,
    tensors: Groups | Callable[[], Groups],
    state: Mapping[str, Any] | None,
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint of `step` under `root` and return its folder; then delete those older than the last `keep`.

    Args:
        root: the folder of a run's checkpoints, created if needed. One run at a time may save into it; all of its
            ranks see it.
        step: optimizer steps done, >= 0. A checkpoint of the same step is replaced.
        tensors: groups of named tensors, each group a file; group names are letters, digits, ``_`` and ``-``. Of
            several ranks each gives whole tensors that no other one gives. Or a function that returns them, which
            every rank calls before anything else; where it fails on one, the save ends on all.
        state: plain data that JSON can hold (nan and infinity included; tuples come back as lists). That of the first
            rank is taken.
        keep: checkpoints to leave in place, this one included, >= 1.
        ranks: that make this call at the same time.

    Raises:
        RunError: the disk is full or refuses; every older checkpoint is untouched and nothing half-written stays.
            Where there are several ranks, whatever failed on one of them is this error on all.
        CheckpointError: a value or a name that a checkpoint cannot hold.
    """
    root = Path(root)
    final = root / f"step-{step:08d}"
    temporary = final.with_name(f"{final.name}.tmp")
    told = functools.partial(_told_of_save, root, step, ranks)
    own = ranks.rank if ranks.size > 1 else None
    content: bytes = b""
    groups: Groups = {}

    def prepare() -> dict[str, bool]:
        nonlocal content, groups
        groups = tensors() if callable(tensors) else tensors
        if keep < 1 or step < 0:
            raise CheckpointError(f"keep={keep}, step={step}: give keep of at least 1 and a step of at least 0.")
        for group in groups:
            file_name(group, own)
        if ranks.is_main:
            content = json_bytes(state)
            folders.make_room(root, temporary)
        return {group: len(group_tensors) > 0 for group, group_tensors in groups.items()}

    def finish() -> None:
        if ranks.is_main:
            files = {name: entry for part in written for name, entry in part.items()}
            _finish(temporary, step, files, content)
            folders.put_in_place(temporary, final)
            folders.prune(final, step, keep)

    try:
        held = agree(ranks, f"preparation of step {step}", prepare, told)
        mine = _groups_of(ranks.rank, held)
        written = agree(ranks, f"writing of step {step}", lambda: _write_part(temporary, groups, mine, own), told)
        agree(ranks, f"completion of step {step}", finish, told)
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
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


def newest(root: Path, ranks: Ranks = ALONE) -> tuple[Loaded | None, list[str]]:
    """Return the newest checkpoint under `root` that verifies, and a line for each damaged one that was passed over.

    A damaged one is renamed ``.bad``. No checkpoint at all gives None. Several ranks share the work of verifying, all
    get the same one, and its tensors stay in their files (`hasten.checkpoint.Stored`).

    Args:
        root: the folder of a run's checkpoints, which all ranks see.
        ranks: that make this call at the same time.

    Raises:
        CheckpointError: there are checkpoints, but none can be trusted: starting afresh is the user's decision.
        RunError: one cannot be read for a reason outside of it. What is raised on one rank is raised on all.
    """
    root = Path(root)
    candidates = _candidates(root)
    damage: str | None = None
    while True:
        choose = functools.partial(candidates.send, damage) if ranks.is_main else lambda: ("", [])
        name, notes = agree(ranks, "choice of a checkpoint", choose, _told)[0]
        if not name:
            return None, notes
        path, found = root / name, []
        look = functools.partial(_look, path, ranks, found)
        views = agree(ranks, f"reading of {name}", look, functools.partial(_told_of_reading, ranks))
        _refuse_different_views(path, views)
        damage = next((view.damage for view in views if view.damage), "")
        if not damage:
            if notes and ranks.is_main:
                folders.point_latest(path)
            return found[0], notes


# How a save goes, phase by phase.


def _groups_of(rank: int, held: list[dict[str, bool]]) -> list[str]:
    """Return the groups of which a rank writes a file: those it has tensors of, and the first one all empty groups."""
    filled = {group for groups in held for group, has_tensors in groups.items() if has_tensors}
    mine = [group for group, has_tensors in held[rank].items() if has_tensors]
    return mine if rank else [*mine, *sorted({group for groups in held for group in groups} - filled)]


def _write_part(folder: Path, tensors: Groups, groups: list[str], rank: int | None) -> dict[str, Any]:
    """Write the files of one rank, read them back and return their manifest entries."""
    if not folder.is_dir():
        raise RunError(f"{printable(str(folder))} is not there; every rank has to see the same folder of checkpoints.")
    files = {}
    for group in groups:
        name = file_name(group, rank)
        files[name] = write_tensors(folder / name, tensors.get(group, {}))
    if rank:
        folders.sync_folder(folder)
    for name, entry in files.items():
        with named(name):
            verify(folder / name, entry)
    return files


def _finish(folder: Path, step: int, files: dict[str, Any], state: bytes) -> None:
    """Complete a folder in which all ranks have written their files, and read back what is added."""
    _refuse_shared_names(folder, files)
    files[STATE] = write_bytes(folder / STATE, [state])
    write_manifest(folder, step, files)
    folders.sync_folder(folder)
    read_manifest(folder)
    with named(STATE):
        verify(folder / STATE, files[STATE])


def _refuse_shared_names(folder: Path, files: Mapping[str, Any]) -> None:
    holders: dict[tuple[str, str], str] = {}
    for file, group in tensor_files(files):
        with named(file):
            places = read_places(folder / file, files[file]["size"])
        for place in places:
            other = holders.setdefault((group, place.name), file)
            if other != file:
                raise CheckpointError(
                    f"Both {other} and {file} got the tensor {place.name!r}; give each tensor on one rank."
                )


def _told_of_save(root: Path, step: int, ranks: Ranks, error: BaseException) -> HastenError | None:
    """Return what the user is told of an error in a save, the rank named where there are several."""
    where = printable(str(root))
    is_alone = ranks.size == 1
    rank = "" if is_alone else f"rank {ranks.rank}: "
    match error:
        case OSError():
            return RunError(
                f"Could not save step {step} in {where}: {rank}{error.strerror or error}; "
                "free or repair the disk (older checkpoints are untouched)."
            )
        case Damage():
            return RunError(
                f"Step {step} did not read back as written in {where} ({rank}{error}); "
                "check the disk (older checkpoints are untouched)."
            )
        case HastenError() if is_alone:
            return error
        case HastenError():
            return RunError(f"Could not save step {step} in {where} (older checkpoints are untouched): {rank}{error}")
        case MemoryError() if not is_alone:
            return RunError(
                f"Could not save step {step} in {where}: {rank}there is no memory left; "
                "free some (older checkpoints are untouched)."
            )
    return None


# How a checkpoint is read.


class _View(NamedTuple):
    """What a rank sees of a checkpoint: whether there is one, what is wrong with it, the seal of its manifest."""

    is_there: bool
    damage: str
    seal: str


def _candidates(root: Path) -> Generator[tuple[str, list[str]], str | None, None]:
    """Yield the name of every checkpoint, newest first, with a line for each damaged one before; "" behind the last.

    What is sent in is the damage of the one before, which is then set aside.
    """
    notes: list[str] = []
    for path in folders.newest_first(root):
        damage = yield path.name, notes
        if path.exists():  # else a running trainer has just deleted it
            notes.append(folders.set_aside(path, damage or ""))
    bad = folders.set_aside_before(root)
    if notes or bad:
        raise CheckpointError(
            f"No checkpoint in {printable(str(root))} can be trusted: {' '.join(notes) or ', '.join(bad)} "
            "Restore one from a copy, or delete that folder to start afresh."
        )
    yield "", []


def _look(path: Path, ranks: Ranks, found: list[Loaded]) -> _View:
    """Read this rank's share of a checkpoint; what is whole is put into `found`."""
    is_there = path.exists()
    try:
        if ranks.size == 1:
            loaded = _load(path)
        else:
            loaded = open_verified(path, lambda number: number % ranks.size == ranks.rank)
    except Damage as damage:
        return _View(is_there, str(damage), "")
    found.append(loaded)
    return _View(is_there, "", loaded.seal)


def _refuse_different_views(path: Path, views: list[_View]) -> None:
    """Refuse a folder that only some ranks see: a good checkpoint must not be set aside because of a missing mount."""
    for rank, view in enumerate(views):
        if views[0].is_there and not view.is_there:
            seen = f"Rank {rank} does not see {path.name}"
        elif not any(other.damage for other in views) and view.seal != views[0].seal:
            seen = f"Rank {rank} sees another {path.name} than rank 0"
        else:
            continue
        raise RunError(f"{seen}; give all ranks the same folder of checkpoints (nothing in it was changed).")


def _load(path: Path) -> Loaded:
    manifest = read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    files = manifest["files"]
    for name, group in tensor_files(files):
        with named(name):
            gather(tensors, group, read_tensors(path / name, files[name]))
    return Loaded(manifest["step"], tensors, read_state(path, files[STATE]), path, manifest["sha256"])


def _told(error: BaseException) -> HastenError | None:
    return error if isinstance(error, HastenError) else None


def _told_of_reading(ranks: Ranks, error: BaseException) -> HastenError | None:
    """Return what the user is told of an error of reading, the rank named where there are several."""
    match error:
        case HastenError() if ranks.size == 1:
            return error
        case HastenError():
            return type(error)(f"Rank {ranks.rank}: {error}")
        case MemoryError() if ranks.size > 1:
            return RunError(f"Rank {ranks.rank} has no memory left to read a checkpoint; free some and try again.")
    return None

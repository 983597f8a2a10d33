"""Tensors of a checkpoint that stay in their files until rows of them are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.checkpoint.manifest import STATE, named, read_manifest, read_state, tensor_files
from hasten.checkpoint.tensors import Damage, Place, hash_file, read_places, read_rows
from hasten.errors import CheckpointError, printable


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of a checkpoint.

    Example:
        >>> import tempfile
        >>> from hasten.checkpoint import open_stored, save
        >>> tensors = {"model": {"w": torch.arange(6).reshape(3, 2)}}
        >>> w = open_stored(save(Path(tempfile.mkdtemp()), 1, tensors, {}, keep=1)).tensors["model"]["w"]
        >>> w.shape, w.dtype, w.read(1, 3).tolist()
        (torch.Size([3, 2]), torch.int64, [[2, 3], [4, 5]])
    """

    path: Path
    place: Place
    size: int

    @property
    def shape(self) -> torch.Size:
        """The sizes of its dimensions."""
        return torch.Size(self.place.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its values."""
        return self.place.dtype

    def read(self, first: int | None = None, stop: int | None = None) -> Tensor:
        """Return rows `first` to `stop` (not included) of dimension 0, in memory of their own, and read nothing else.

        The file was verified when the checkpoint was opened; what is read here is not hashed again.

        Args:
            first: from 0; None: the first there is.
            stop: from `first` to the size of dimension 0; None: that size. A tensor without dimensions has no rows.

        Raises:
            CheckpointError: there are no such rows, or the file is no longer the one that was opened.
            RunError: it cannot be read for a reason outside of it.
        """
        rows = self.place.shape[0] if self.place.shape else 1
        begin, end = 0 if first is None else first, rows if stop is None else stop
        has_rows = self.place.shape or (first is None and stop is None)
        if not has_rows or not 0 <= begin <= end <= rows:
            raise CheckpointError(
                f"Rows {begin} to {end} of {self.place.name!r} of shape {tuple(self.place.shape)} do not exist; "
                "ask for rows that do."
            )
        try:
            return read_rows(self.path, self.size, self.place, begin, end)
        except Damage as damage:
            raise CheckpointError(
                f"{printable(str(self.path))} is damaged ({damage}); use an older checkpoint."
            ) from None


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint.

    Attributes:
        step: that it is of.
        tensors: groups of named tensors: on the CPU, or `Stored` where it was opened for rows.
        state: plain data.
        path: its folder.
        seal: the sha256 of its manifest.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]] | dict[str, dict[str, Stored]]
    state: dict[str, Any]
    path: Path
    seal: str = ""


def open_stored(path: Path) -> Loaded:
    """Verify every byte of the checkpoint in the folder `path` and return it with its tensors left where they are.

    Raises:
        CheckpointError: something in it is not as it was written, or a newer hasten wrote it.
        RunError: it cannot be read for a reason outside of it (no permission, too many open files).
    """
    path = Path(path)
    try:
        return open_verified(path, lambda number: True)
    except Damage as damage:
        raise CheckpointError(f"{printable(str(path))} is damaged ({damage}); use an older checkpoint.") from None


def open_verified(path: Path, is_mine: Callable[[int], bool]) -> Loaded:
    """Open a checkpoint whose files of tensors are hashed here only where `is_mine` of their number says so.

    Raises:
        Damage: something that was looked at is not as it was written.
    """
    manifest = read_manifest(path)
    files = manifest["files"]
    state = read_state(path, files[STATE])
    tensors: dict[str, dict[str, Stored]] = {}
    for number, (name, group) in enumerate(tensor_files(files)):
        with named(name):
            if is_mine(number):
                verify(path / name, files[name])
            size = files[name]["size"]
            gather(
                tensors,
                group,
                {place.name: Stored(path / name, place, size) for place in read_places(path / name, size)},
            )
    return Loaded(manifest["step"], tensors, state, path, manifest["sha256"])


def verify(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise `Damage` unless the file reads back as its manifest entry says."""
    if hash_file(path) != entry:
        raise Damage("has another content than was written")


def gather(groups: dict[str, dict[str, Any]], group: str, part: Mapping[str, Any]) -> None:
    """Add what a file holds of a group to what others hold of it; a tensor is in one of them."""
    whole = groups.setdefault(group, {})
    for name in part:
        if name in whole:
            raise Damage(f"has the tensor {printable(name)[:80]!r}, which another part has too")
    whole.update(part)

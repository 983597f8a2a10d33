"""A file of named tensors, in the safetensors format, with the sha256 of every byte of it.

The format: eight bytes that hold the length of the header, a JSON header that says dtype, shape and place of every
tensor, then the tensors' bytes. The `safetensors` package reads what is written here and the other way round (tested).
It is not used because it has no checksum, so that hashing would be a second pass over what is hoped to be the same
bytes; because its writer refuses shared and strided tensors and turns a full disk into an error of its own; and because
here one tensor at a time is in flight, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hasten import files
from hasten.errors import CheckpointError, RunError, one_line, printable

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
# 16 MiB hold the names of some 150,000 tensors; a longer header is an attack on memory.
MAX_HEADER_BYTES = 16 << 20
MAX_VALUES = 1 << 20
_MAX_DIMENSION = 1 << 48
# Errors of reading that say "this file is damaged". Others (too many open files, no permission, no memory) say
# nothing about the file, and a good checkpoint must not be set aside for them.
_DAMAGE = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ELOOP, errno.ENXIO}


class Damage(Exception):
    """What is wrong with a file, as a clause that fits behind its name."""


@dataclass(frozen=True)
class Place:
    """A tensor in a file: its name, dtype and shape, and where its first byte is, counted from that of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file, force it to the disk and return its manifest entry ``{"size", "sha256"}``."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            rest = memoryview(chunk)
            while len(rest):  # an unbuffered write may be a short one; the next then says why
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes`."""
    with _open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Damage(f"is larger than {max_bytes:,} bytes")
    return data


def hash_file(path: Path) -> dict[str, Any]:
    """Return the manifest entry of the file as the operating system reads it back."""
    digest, size, buffer = hashlib.sha256(), 0, bytearray(1 << 20)
    with _open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return {"size": size, "sha256": digest.hexdigest()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write named tensors to a new file, force it to the disk and return its manifest entry.

    Any layout in memory is taken: strided, expanded, shared (a shared tensor is written under each of its names).

    Raises:
        CheckpointError: a tensor is sparse or of a dtype that the format lacks.
    """
    # Widest elements first keeps every tensor aligned to its own element size, as the safetensors package does.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.layout != torch.strided or tensor.dtype not in _NAMES or tensor.is_meta or name == _METADATA:
            raise CheckpointError(
                f"Tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be saved; "
                f"give a dense tensor of one of {', '.join(sorted(_NAMES.values()))}."
            )
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{len(tensors):,} tensors are too many for one file of a checkpoint; split them.")

    def chunks() -> Iterable[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            if tensors[name].numel():
                yield _bytes_of(tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous())

    return write_bytes(path, chunks())


def read_tensors(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read named tensors, each into memory of its own, and check size and sha256 against the manifest `entry`.

    The bytes that are hashed are the bytes that are used: the file is read once.

    Raises:
        Damage: the file is not what was written.
    """
    digest = hashlib.sha256()
    tensors = {}
    with _open_regular(path) as file:
        head, places = _read_head(file, entry["size"])
        digest.update(head)
        for place in places:
            tensor = torch.empty(place.shape, dtype=place.dtype)
            if tensor.numel():
                digest.update(_read_fully(file, tensor))
            tensors[place.name] = tensor
    if digest.hexdigest() != entry["sha256"]:
        raise Damage("has another sha256 than when it was written")
    return tensors


def read_places(path: Path, size: int) -> list[Place]:
    """Return where the tensors of a file of `size` bytes are, in their order there; nothing but its header is read.

    Raises:
        Damage: it has another size, or its header does not describe it.
    """
    with _open_regular(path) as file:
        return _read_head(file, size)[1]


def read_rows(path: Path, size: int, place: Place, first: int, stop: int) -> Tensor:
    """Read rows `first` to `stop` of a tensor of a file of `size` bytes, in memory of their own.

    Args:
        path: the file.
        size: that it had when `place` was read.
        place: of the tensor.
        first: row of dimension 0, from 0; 0 for a tensor without dimensions.
        stop: the row behind the last; 1 for a tensor without dimensions.

    Raises:
        Damage: the file is gone or has another size.
    """
    tensor = torch.empty((stop - first, *place.shape[1:]) if place.shape else (), dtype=place.dtype)
    with _open_regular(path) as file:
        _check_size(file, size)
        if tensor.numel():
            file.seek(place.start + first * math.prod(place.shape[1:]) * place.dtype.itemsize)
            _read_fully(file, tensor)
    return tensor


def parse_json(data: bytes) -> Any:
    """Return the value of JSON text that may be hostile: broken, nested without end, with a key twice."""
    try:
        return files.parse_json(data, MAX_VALUES, below=1 << 1024)  # a state may hold any number that Python can
    except ValueError as error:
        raise Damage(f"is not JSON ({one_line(str(error), 120)})") from None


def _read_head(file: BinaryIO, size: int) -> tuple[bytes, list[Place]]:
    """Read a file of `size` bytes up to its first tensor; return these bytes and where the tensors are."""
    _check_size(file, size)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise Damage(f"claims a header of {length:,} bytes")
    text = file.read(length)
    return start + text, _parse_header(text, 8 + length, size)


def _check_size(file: BinaryIO, size: int) -> None:
    found = os.fstat(file.fileno()).st_size
    if found != size:
        raise Damage(f"has {found:,} bytes instead of {size:,}")


def _parse_header(text: bytes, start: int, size: int) -> list[Place]:
    """Return the tensors in file order, once they are known to tile the data from `start` on to `size` exactly."""
    header = parse_json(text)
    if not isinstance(header, dict):
        raise Damage("has a header that is not an object")
    header.pop(_METADATA, None)
    placed = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise Damage("has a malformed header")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2 and len(shape) <= 64):
            raise Damage("has a malformed shape or place in its header")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise Damage("has a tensor of an unknown dtype")
        if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise Damage("has a tensor whose shape and bytes disagree")
        placed.append((offsets, name, dtype, shape))
    placed.sort(key=lambda item: item[0])
    position = 0
    for offsets, *_ in placed:
        if offsets[0] != position:
            raise Damage("has tensors that overlap or leave gaps")
        position = offsets[1]
    if position != size - start:
        raise Damage(f"holds {size - start:,} bytes of tensors instead of {position:,}")
    return [Place(name, dtype, tuple(shape), start + offsets[0]) for offsets, name, dtype, shape in placed]


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _MAX_DIMENSION for n in value)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU that is not empty, as bytes that can be written to."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_fully(file: BinaryIO, tensor: Tensor) -> memoryview:
    """Fill a tensor that is not empty from a file; return its memory."""
    memory = rest = _bytes_of(tensor)
    while len(rest):
        count = file.readinto(rest)
        if not count:
            raise Damage("ends too early")
        rest = rest[count:]
    return memory


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read it; a link, a pipe or a device in its place is damage, never followed or waited for.

    An error of reading is damage, or a RunError, as one of opening is.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Damage("is not a regular file")
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        if error.errno in _DAMAGE:
            raise Damage(
                "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
            ) from None
        raise RunError(
            f"Could not read {printable(str(path))}: {error.strerror}; put that right and try again."
        ) from error

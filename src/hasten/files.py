"""Files that anyone may have put in their place, read without waiting for them and without believing their size."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TextIO

# What people and tools write by hand or in one piece: recipes, settings, results. A longer one is an attack on memory.
MOST_BYTES = 64 << 20
# A value of JSON takes up to 100 bytes of memory for the 2 that it has in a file.
MOST_VALUES = 1 << 18
# No number here is larger; arithmetic with one of thousands of digits fails in places that expect none.
LARGEST = 1 << 64


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading bytes, unbuffered; a link to one is followed.

    A pipe, a device or a folder in its place is an error at once: a pipe would be waited for, a device has no end.

    Raises:
        OSError: it cannot be opened, or is no regular file.

    Example:
        >>> open_regular(Path("/dev/null"))
        Traceback (most recent call last):
        OSError: [Errno 22] not a regular file: '/dev/null'
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: opening a device may already do something
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags), "rb", buffering=0)  # noqa: SIM115 - closed by who asked for it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # put there since
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
        chunks, left = [], most + 1
        while left and (chunk := file.read(left)):
            chunks.append(chunk)
            left -= len(chunk)
    if not left:  # it grew meanwhile
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
    return b"".join(chunks)


def create_text(path: Path) -> TextIO:
    """Open a new UTF-8 file for writing; what has its name, a link to somewhere else too, is removed first.

    Raises:
        OSError: it cannot be made, or a folder has its name.
    """
    path.unlink(missing_ok=True)
    return open(path, "x", encoding="utf-8", newline="\n")


def parse_json(data: bytes, most_values: int = MOST_VALUES, *, below: int = LARGEST) -> Any:
    """Return the value of JSON text that may be hostile.

    Args:
        data: UTF-8 text.
        most_values: how many values it may hold, about: commas are counted, before anything is made of them.
        below: what every whole number is below, whatever its sign.

    Raises:
        ValueError: it is broken, nested too deeply, of too many values, has a key twice in one object, or a whole
            number of `below` or beyond.

    Example:
        >>> parse_json(b'{"a": [1, 2]}')
        {'a': [1, 2]}
    """
    if data.count(b",") > most_values:
        raise ValueError(f"more than {most_values:,} values")

    def whole(digits: str) -> int:
        value = int(digits)  # which refuses more than 4,300 digits itself
        if abs(value) >= below:
            raise ValueError(f"a number of {len(digits):,} digits")
        return value

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key twice")
    return value

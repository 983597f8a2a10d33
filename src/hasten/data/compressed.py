"""Files opened as streams of bytes, decompressed on the way by the suffix of their name.

Decompression never holds more than one read and the decompressor's own window, so a bomb only takes time.
"""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hasten.errors import DataError, printable

SUFFIXES = (".gz", ".zst", ".xz")
_XZ_MEMORY = 128 << 20  # `xz -9` asks for 65 MiB; a file that asks for more than this is refused
_ZSTD_FEED = 1 << 11  # its decompressor takes no output bound: 2 KiB can become 64 MiB at the very worst
_BLOCK = 1 << 18


def stem(name: str) -> str:
    """Return `name` without a compression suffix."""
    return name[: name.rindex(".")] if name.lower().endswith(SUFFIXES) else name


@contextmanager
def open_stream(
    path: Path, name: str, on_read: Callable[[int], None] = lambda count: None
) -> Iterator[io.BufferedIOBase]:
    """Open `path` for reading its decompressed bytes; `on_read` hears of the bytes that were read on disk.

    Raises:
        DataError: the file cannot be opened, is damaged or cut short, or needs a package that is missing.
            The same holds for reads inside the ``with`` block.
    """
    suffix = name[name.rindex(".") :].lower() if name.lower().endswith(SUFFIXES) else ""
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    if suffix == ".zst":
        zstandard = _zstandard(name)
        damaged += (zstandard.ZstdError,)
    try:
        with io.BufferedReader(_Watched(path, on_read), _BLOCK) as file:
            if suffix == ".gz":
                stream = io.BufferedReader(gzip.GzipFile(fileobj=file), _BLOCK)
            elif suffix == ".xz":
                frames = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
                stream = io.BufferedReader(_FrameStream(file, frames, _BLOCK, bounded=True), _BLOCK)
            elif suffix == ".zst":
                frames = zstandard.ZstdDecompressor().decompressobj
                stream = io.BufferedReader(_FrameStream(file, frames, _ZSTD_FEED, bounded=False), _BLOCK)
            else:
                stream = file
            yield stream
    except damaged as error:
        raise DataError(
            f"{printable(name)} is damaged or cut short ({printable(str(error)) or 'early end'}); fetch it again."
        ) from error
    except OSError as error:
        raise DataError(f"{printable(name)} cannot be read: {error.strerror or error}.") from error


def _zstandard(name: str):
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise DataError(
            f"{printable(name)} is Zstandard-compressed, which needs one more package: `pip install zstandard`."
        ) from error


class _Watched(io.FileIO):
    def __init__(self, path: Path, on_read: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_read = on_read

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._on_read(count)
        return count


class _FrameStream(io.RawIOBase):
    """A file of compressed frames, one after another, as a raw stream; an end inside a frame is an error.

    The standard `LZMAFile` has no memory limit, and `zstandard`'s own reader ends silently when the file
    is cut short: hence one loop for both over their decompressor objects.
    """

    def __init__(self, file: io.BufferedIOBase, new_frame: Callable[[], Any], feed_bytes: int, bounded: bool):
        self._file, self._new_frame, self._feed_bytes, self._bounded = file, new_frame, feed_bytes, bounded
        self._frame = new_frame()
        self._pending = b""
        self._in_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._pending:
            if self._frame.eof:
                fresh = self._frame.unused_data
                self._frame, self._in_frame = self._new_frame(), False
            else:
                fresh = b""
            needs_input = not self._bounded or self._frame.needs_input
            fresh = fresh or (self._file.read(self._feed_bytes) if needs_input else b"")
            if not fresh and needs_input:
                if self._in_frame:
                    raise EOFError("early end")
                return 0
            self._in_frame = True
            most = {"max_length": len(buffer)} if self._bounded else {}
            self._pending = self._frame.decompress(fresh, **most)
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

"""A folder of ranges of bytes that were fetched: bounded in size, shared by processes, never believed unchecked."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hasten.cache import cache_root
from hasten.errors import DataError, one_line
from hasten.files import open_regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BOUND = "HASTEN_STREAM_CACHE"
DEFAULT_BYTES = 8 << 30
LEAST_BYTES = 4 << 20
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TOUCH_SECONDS = 1.0
# What is freed at once, so that the folder is seldom looked through.
_FREED_SHARE = 1 / 16


def cache_bound() -> int:
    """Return the bytes that fetched ranges may take on disk: HASTEN_STREAM_CACHE, as ``20GB``, else 8 GiB.

    Raises:
        DataError: it is no such size, or less than 4 MiB.
    """
    given = os.environ.get(BOUND)
    if not given:
        return DEFAULT_BYTES
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?|\d{1,15})\s*([kmgt]?i?)b?\s*", given.lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < LEAST_BYTES:
        raise DataError(f"{BOUND}={one_line(given)} is no size of at least 4MiB; give one such as 500MB or 20GiB.")
    return size


class RangeCache:
    """Ranges by name, of which the least recently used go when there are too many.

    All processes of a machine share the folder and one count of its bytes, so the bound holds for all of them
    together; each one keeps to the bound that it was given. (Where there is no ``flock``, on Windows, only for those
    of one process.) Whether content is what it should be is checked when it is first read, and again whenever the file
    is another one than it was.

    Args:
        folder: of the ranges; nothing else may lie there.
        most_bytes: that they take together.

    Example:
        >>> import tempfile
        >>> cache = RangeCache(Path(tempfile.mkdtemp()), 1 << 20)
        >>> cache.put("a", b"some bytes"), cache.read("a", 5, 10, check=lambda content: "")
        (True, b'bytes')
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._begin()

    def __getstate__(self) -> dict[str, object]:
        """A copy in another process trusts nothing yet."""
        return {"folder": self.folder, "most_bytes": self.most_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._begin()

    def _begin(self) -> None:
        self._trusted: dict[str, tuple[int, ...]] = {}
        self._used_at: dict[str, float] = {}
        self._lock, self._pid, self._is_counted = threading.Lock(), os.getpid(), False

    def read(self, name: str, begin: int, end: int, check: Callable[[bytes], str]) -> bytes | None:
        """Return the bytes from `begin` up to `end` of a range; None if it is not there or not what it should be.

        Args:
            name: of the range.
            begin, end: ``0 <= begin < end``.
            check: says what is wrong with the content of the whole range, or ``""``.
        """
        self._here()
        path = self.folder / name
        try:
            with open_regular(path) as file:
                stamp = _stamp(os.fstat(file.fileno()))
                if self._trusted.get(name) != stamp:
                    content = _read(file, stamp[2])
                    if check(content):
                        self.drop(name)
                        return None
                    self._trusted[name] = stamp
                    part = content[begin:end]
                else:
                    file.seek(begin)
                    part = _read(file, end - begin)
        except OSError:
            self._trusted.pop(name, None)
            self._used_at.pop(name, None)
            return None
        self._touch(name, stamp)
        return part if len(part) == end - begin else None

    def has(self, name: str) -> bool:
        """Say whether a range is there, and count it as used."""
        self._here()
        if time.monotonic() - self._used_at.get(name, float("-inf")) < _TOUCH_SECONDS:
            return True
        try:
            stamp = _stamp(os.stat(self.folder / name))
        except OSError:
            return False
        self._touch(name, stamp)
        return True

    def put(self, name: str, content: bytes) -> bool:
        """Keep a range; return False where there is no place for it on the disk, or within the bound."""
        self._here()
        try:
            return self._put(name, content)
        except OSError:
            return False

    def drop(self, name: str) -> None:
        """Forget a range."""
        self._trusted.pop(name, None)
        self._used_at.pop(name, None)
        with suppress(OSError), self._locked() as count:
            size = os.stat(self.folder / name).st_size
            os.unlink(self.folder / name)
            count.add(-size)

    def _put(self, name: str, content: bytes) -> bool:
        if len(content) > self.most_bytes:
            return False
        path, unfinished = self.folder / name, self.folder / f"{name}.tmp"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked() as count:
            if path.exists():  # another process was faster
                self._touch(name, _stamp(os.stat(path)))
                return True
            if not self._is_counted or count.used + len(content) > self.most_bytes:
                count.set(self._freed(len(content) if self._is_counted else 0, len(content)))
                self._is_counted = True
            try:
                with open(unfinished, "xb") as file:
                    file.write(content)
                stamp = _stamp(os.stat(unfinished))
                os.replace(unfinished, path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                count.set(self._freed(self.most_bytes // 4, len(content)))  # the disk is full: make room for the next
                return False
            count.add(len(content))
        self._trusted[name] = stamp  # what is written here was checked when it came
        self._touch(name, stamp)
        return True

    def _freed(self, least: int, coming: int) -> int:
        """Delete ranges, those used longest ago first, so that `coming` bytes fit; return the bytes that are left.

        Where any have to go, `least` bytes or a sixteenth of the bound go at once. The lock is held: an unfinished
        file belongs to a process that is gone.
        """
        found, used = [], 0
        for entry in os.scandir(self.folder):
            if entry.name == _Count.NAME:
                continue
            status = entry.stat(follow_symlinks=False)
            if entry.name.endswith(".tmp"):
                os.unlink(entry.path)
                continue
            used += status.st_size
            found.append((status.st_atime, entry.name, status.st_size))
        if used + coming <= self.most_bytes and least <= coming:
            return used
        goal = max(0, min(used - least, self.most_bytes - coming - int(self.most_bytes * _FREED_SHARE)))
        for _, name, size in sorted(found):
            if used <= goal:
                break
            with suppress(OSError):
                os.unlink(self.folder / name)
                used -= size
            self._trusted.pop(name, None)
            self._used_at.pop(name, None)
        return used

    def _touch(self, name: str, stamp: tuple[int, ...]) -> None:
        now = time.monotonic()
        if now - self._used_at.get(name, float("-inf")) >= _TOUCH_SECONDS:
            self._used_at[name] = now
            with suppress(OSError):  # the time of modification stays: it tells whether the content may be another
                os.utime(self.folder / name, ns=(time.time_ns(), stamp[3]))

    @contextmanager
    def _locked(self) -> Iterator[_Count]:
        """Hold the folder against other threads and processes."""
        with self._lock:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            descriptor = os.open(self.folder / _Count.NAME, flags, 0o600)
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield _Count(descriptor)
            finally:
                os.close(descriptor)

    def _here(self) -> None:
        if self._pid != os.getpid():  # a lock that a thread held at the fork is never given back here
            self._begin()


class _Count:
    """The bytes of all ranges, in the file that is also the lock."""

    NAME = "lock"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        text = os.read(descriptor, 32)
        self.used = int(text) if text.isdigit() else 1 << 62  # not known: whoever asks has to look

    def set(self, used: int) -> None:
        """Write another number."""
        self.used = max(0, used)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, str(self.used).encode())

    def add(self, size: int) -> None:
        """Count `size` bytes more."""
        self.set(self.used + size)


def stream_cache() -> RangeCache:
    """Return the cache that all streams of this machine's user share, in the folder ``stream`` of `cache_root`."""
    return RangeCache(cache_root() / "stream", cache_bound())


def _read(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    while len(content) < size and (more := file.read(size - len(content))):
        content += more
    return content


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

"""A mapped file: bytes that are read where they lie on disk, and whether they can have changed since.

Reading what has been cut off a mapped file ends the process with SIGBUS, and a file that is overwritten in place
changes under its readers. So whoever reads asks first.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path
from typing import BinaryIO

# Looking a file up takes some 20 us between gathers, asking for its size 3; the rows of a small step take 220. A step
# of training takes longer than this, so the file is looked up before each.
LOOK_SECONDS = 0.005


class MappedFile:
    """A file as it was when it was mapped.

    Args:
        file: open for reading, and not empty; it may be closed afterwards.
        path: where it was found.

    Attributes:
        content: all of it, read-only.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._path, self._stamp = str(path), _stamp(os.fstat(file.fileno()))
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._size, self._look_at = len(self._map), 0.0
        self.content = memoryview(self._map)

    def has_changed(self) -> bool:
        """Say whether the file may have been cut short, written to, replaced or removed since it was mapped.

        Its size is asked for at every call, the rest every 5 ms. A change moves the file's change time, which
        nobody can set back as one can the time of modification. So does what leaves its bytes alone, such as another
        link to it: look again at the content before crying damage.
        """
        if self._map.size() != self._size:
            return True
        if (now := time.monotonic()) < self._look_at:
            return False
        self._look_at = now + LOOK_SECONDS
        try:
            return _stamp(os.stat(self._path)) != self._stamp
        except OSError:
            return True


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns

"""A lock file that one process at a time holds, and that a dead one does not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import RunError, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
# A lock file without content belongs to a process that is just writing it, or was stopped there if it is older.
_EMPTY_SECONDS = 10.0
_descriptors: set[int] = set()
_at_fork: list[bool] = []


@dataclass(frozen=True)
class Held:
    """A lock that this process holds."""

    path: Path
    descriptor: int
    pid: int

    def release(self) -> None:
        """Give the lock back and remove its file; in a forked child, whose parent holds it, nothing happens."""
        if os.getpid() != self.pid:
            return
        _descriptors.discard(self.descriptor)
        with contextlib.suppress(OSError):  # gone with the whole folder, or (Windows) only removable once closed
            self.path.unlink()
        os.close(self.descriptor)
        if fcntl is None:
            self.path.unlink(missing_ok=True)


def take(path: Path) -> Held:
    """Take the lock whose file is `path`, its folder exists.

    Where there is `fcntl`, the kernel holds the lock and drops it with the process; elsewhere the file itself is the
    lock, and one whose process no longer lives is taken over.

    Raises:
        RunError: another process holds it; its id and start are named.
        OSError: the file cannot be written.
    """
    return take_by_kernel(path) if fcntl is not None else take_by_file(path)


def take_by_kernel(path: Path) -> Held:
    """Take the lock with ``flock``; a file system without it gets `take_by_file`."""
    while True:
        descriptor = os.open(path, _FLAGS, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The owner before may have removed the file between our open and our lock: then we hold nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
            os.close(descriptor)
        except FileNotFoundError:
            os.close(descriptor)
        except OSError as error:
            is_empty = os.fstat(descriptor).st_size == 0
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _refused(path) from None
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if is_empty:
                path.unlink(missing_ok=True)
            return take_by_file(path)
    _close_in_children(descriptor)
    return _sign(path, descriptor)


def take_by_file(path: Path) -> Held:
    """Take the lock by creating its file; the file of a dead process is taken over."""
    while True:
        try:
            return _sign(path, os.open(path, _FLAGS | os.O_EXCL, 0o644))
        except FileExistsError:
            pass
        content, owner = _read_owner(path)
        if _lives(path, owner):
            raise _refused(path)
        # Two processes may both have found it dead: what is moved away must be what was judged.
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
            if _read_owner(aside)[0] != content:
                aside.rename(path)
                raise _refused(path)
            aside.unlink()


def _sign(path: Path, descriptor: int) -> Held:
    """Write into the lock file who holds it."""
    owner = {"pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(owner).encode())
    return Held(path, descriptor, os.getpid())


def _read_owner(path: Path) -> tuple[bytes, dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(path, "rb") as file:
            content = file.read(1000)
        owner = json.loads(content) if content else {}
        if isinstance(owner, dict):
            return content, owner
    return b"", {}


def _refused(path: Path) -> RunError:
    owner = _read_owner(path)[1]
    who = f"process {owner.get('pid', 'unknown')}, which started at {owner.get('started', 'an unknown time')}"
    return RunError(
        f"{printable(str(path.parent))} is being written by {printable(who)[:120]}; "
        "wait until it has ended, or give another out=."
    )


def _lives(path: Path, owner: dict[str, Any]) -> bool:
    """Say whether the process that signed the lock file lives."""
    pid = owner.get("pid")
    if type(pid) is not int or not 0 < pid < 1 << 31:
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime < _EMPTY_SECONDS
        return False
    if sys.platform == "win32":  # os.kill(pid, 0) would send Ctrl-C there
        import ctypes

        kernel = ctypes.windll.kernel32
        process = kernel.OpenProcess(0x100000, False, pid)  # SYNCHRONIZE
        if not process:
            return bool(kernel.GetLastError() == 5)  # access denied: it lives, under another user
        is_running = kernel.WaitForSingleObject(process, 0) == 0x102  # WAIT_TIMEOUT
        kernel.CloseHandle(process)
        return bool(is_running)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _close_in_children(descriptor: int) -> None:
    """Keep forked children from holding the lock on after this process was killed."""
    _descriptors.add(descriptor)
    if not _at_fork:
        _at_fork.append(True)
        os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()

"""Source strings resolved to files: a file, a folder, a glob or standard input."""

from __future__ import annotations

import atexit
import functools
import glob
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hasten.data import compressed, counts
from hasten.data.counts import Counts
from hasten.errors import DataError, nearest, printable

READ_BYTES = 1 << 18
_SNIFFED_BYTES = 1 << 13
_BINARY_SHARE = 0.10
_MAGIC = {
    b"\x1f\x8b": "a gzip file (add .gz to its name)",
    b"\x28\xb5\x2f\xfd": "a Zstandard file (add .zst to its name)",
    b"\xfd7zXZ\x00": "an xz file (add .xz to its name)",
    b"PAR1": "a Parquet file (add .parquet to its name)",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"BZh": "a bzip2 file (unpack it first)",
    b"%PDF-": "a PDF file (extract its text first)",
    b"\x7fELF": "a program",
    b"\xff\xfe": "UTF-16 text (convert it: iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "UTF-16 text (convert it: iconv -f utf-16 -t utf-8)",
}


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    Attributes:
        path: where it is.
        name: what it is called in messages and in the corpus hash: relative to its folder, never absolute.
        bytes: its size on disk.
        sha256: of its content on disk.
        stamp: modification time in nanoseconds when it was hashed; a change while reading is an error.
    """

    path: Path
    name: str
    bytes: int
    sha256: str
    stamp: int

    def check_unchanged(self) -> None:
        """Raise DataError when the file is no longer the one that was hashed."""
        try:
            now = self.path.stat()
        except OSError:
            now = None
        if now is None or (now.st_size, now.st_mtime_ns) != (self.bytes, self.stamp):
            raise DataError(f"{printable(self.name)} changed while it was being read; run again when it is complete.")


def find_files(source: str, known_names: Iterable[str], skipped: Counts) -> list[SourceFile]:
    """Return the files that `source` stands for, in a fixed order.

    Args:
        source: a file, a folder (read recursively, sorted), a glob, or ``-`` for standard input.
        known_names: built-in corpora, for the "did you mean" of a missing path.
        skipped: counts hidden, binary and special files that a folder holds.

    Raises:
        DataError: nothing is there, it is no regular file or folder, or a named file is binary.
    """
    if source == "-":
        path = _spooled_stdin()
        return [_hashed(path, "standard input")] if _is_text(path, "standard input", ask=True) else []
    path = Path(source).expanduser()
    if path.is_dir():
        found = _in_folder(path, skipped)
        if not found:
            raise DataError(f"{printable(source)} holds no text file; name a folder with text in it.")
        return found
    if path.exists():
        _refuse_special(path, source)
        _is_text(path, path.name, ask=True)
        return [_hashed(path, path.name)]
    if glob.has_magic(source):
        return _matching(source, skipped)
    raise DataError(f"{printable(source)} does not exist{_near(path, known_names)}; name a file, a folder or a glob.")


def _in_folder(folder: Path, skipped: Counts) -> list[SourceFile]:
    relative = []
    for parent, folders, names in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        for hidden in [name for name in folders + names if name.startswith(".")]:
            skipped.add(counts.HIDDEN_FILES, str(inside / hidden))
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative.extend((inside / name).as_posix() for name in names if not name.startswith("."))
    found = []
    for name in sorted(relative):
        path = folder / name
        if not _is_regular(path):
            skipped.add(counts.SPECIAL_FILES, name)
        elif not _is_text(path, name, ask=False):
            skipped.add(counts.BINARY_FILES, name)
        else:
            found.append(_hashed(path, name))
    return found


def _matching(pattern: str, skipped: Counts) -> list[SourceFile]:
    root = Path(os.path.dirname(pattern.split("*")[0].split("?")[0].split("[")[0]) or ".")
    found = []
    for match in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
        path = Path(match)
        if path.is_dir():
            continue
        if not _is_regular(path):
            skipped.add(counts.SPECIAL_FILES, match)
            continue
        name = os.path.relpath(path, root.expanduser())
        _is_text(path, name, ask=True)
        found.append(_hashed(path, Path(name).as_posix()))
    if not found:
        raise DataError(f"{printable(pattern)} matches no file; check the pattern.")
    return found


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _refuse_special(path: Path, source: str) -> None:
    if not _is_regular(path):
        raise DataError(
            f"{printable(source)} is a device, pipe or socket, not a regular file; pipe text into `-` instead."
        )


def _is_text(path: Path, name: str, *, ask: bool) -> bool:
    """Say whether the file holds text, after decompression; with `ask`, binary is an error that says why."""
    if compressed.stem(name).lower().endswith(".parquet"):
        return True
    try:
        with compressed.open_stream(path, name) as stream:
            head = stream.read(_SNIFFED_BYTES)
    except DataError:
        if ask:
            raise
        return False
    reason = _binary_reason(head)
    if reason and ask:
        raise DataError(f"{printable(name)} is not text: it looks like {reason}.")
    return not reason


def _binary_reason(head: bytes) -> str:
    for magic, meaning in _MAGIC.items():
        if head.startswith(magic):
            return meaning
    text = head.decode("utf-8", "surrogateescape")
    odd = sum(1 for c in text if (c < " " and c not in "\t\n\r\f\v\b\x1b") or "\udc80" <= c <= "\udcff")
    # A character cut off at the end of the head looks invalid but is not.
    if odd - 3 > _BINARY_SHARE * len(head):
        return f"binary data ({odd} of its first {len(head)} bytes are not UTF-8 text)"
    return ""


def _hashed(path: Path, name: str) -> SourceFile:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{printable(name)} cannot be read: {error.strerror}.") from error
    return SourceFile(path, name, before.st_size, digest.hexdigest(), before.st_mtime_ns)


def hashed_files(named: Iterable[tuple[Path, str]]) -> Iterator[SourceFile]:
    """Yield a SourceFile for each (path, name)."""
    for path, name in named:
        yield _hashed(path, name)


def _near(path: Path, known_names: Iterable[str]) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does its folder {printable(str(parent))})"
    beside = [entry.name for entry in os.scandir(parent)]
    return nearest(path.name, [*beside, *(known_names if str(parent) == "." else [])])


@functools.lru_cache(maxsize=1)
def _spooled_stdin() -> Path:
    """Copy standard input to a file once per process: a corpus is read more than once."""
    folder = Path(tempfile.mkdtemp(prefix="hasten-stdin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "standard-input"
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, READ_BYTES)
    return path

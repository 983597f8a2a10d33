"""The record of a run: JSON lines for every step and event, and one JSON object for how it ended."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.errors import RunError, printable
from hasten.files import create_text, parse_json, read_bytes
from hasten.record.folder import RunFolder

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Errors that pass when someone frees space, and the bytes of a file's lines that wait in memory until then.
_FULL = {errno.ENOSPC, errno.EDQUOT}
MOST_WAITING = 64 << 20
MOST_RECORDED = 16 << 30  # 30 million steps
# Keys whose values are words: there "nan" is a word too.
_WORDS = frozenset({"text", "prompt", "message", "reason", "command", "path", "kind", "status"})


class Record:
    """Writes the metrics and events of one attempt at a run, every line passed on to the system at once.

    Where the disk is full, lines wait in memory, up to `MOST_WAITING` bytes of each file, and are written with the next
    ones that can be.

    Args:
        folder: of the run.
        attempt: number of this attempt, from 1.
        on_trouble: called with one sentence when lines begin to wait.

    Raises:
        RunError: a file cannot be written for another reason, or too many lines wait.
    """

    def __init__(self, folder: RunFolder, attempt: int, on_trouble: Callable[[str], None] | None = None) -> None:
        self._attempt, self._folder, self._on_trouble = attempt, folder, on_trouble
        self._metrics = _LineFile(folder.metrics_path, on_trouble)
        try:
            self._events = _LineFile(folder.events_path, on_trouble)
        except BaseException:
            self._metrics.close()
            raise

    def metric(self, *, step: int, **values: Any) -> None:
        """Write the line of a step."""
        self._metrics.append({"step": step, "attempt": self._attempt, "time": _now(), **values})

    def event(self, kind: str, /, *, step: int, **values: Any) -> None:
        """Write that something happened."""
        self._events.append({"kind": kind, "step": step, "attempt": self._attempt, "time": _now(), **values})

    def sync(self) -> None:
        """Force all lines so far to the disk, where it takes them: what a checkpoint then holds has its lines."""
        self._metrics.sync()
        self._events.sync()

    def cut_back(self, step: int) -> None:
        """Drop the metrics after `step`, to which the run went back."""
        self._metrics.close()
        cut_back(self._folder, step)
        self._metrics = _LineFile(self._folder.metrics_path, self._on_trouble)

    def close(self) -> None:
        """Write what waits and close both files; a second call changes nothing."""
        try:
            self._metrics.close()
        finally:
            self._events.close()


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the lines of the steps, oldest first; none where nothing was recorded. A torn last line is left out.

    Raises:
        RunError: another line is not a JSON object; file and line are named.
    """
    return _read_lines(folder.metrics_path)


def read_events(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the events, oldest first, as `read_metrics` does the steps."""
    return _read_lines(folder.events_path)


def cut_back(folder: RunFolder, step: int) -> None:
    """Drop the metrics after `step`, which a run that goes on from there will write again."""
    path = folder.metrics_path
    lines = read_metrics(folder)
    kept = [line for line in lines if line["step"] <= step]
    if len(kept) < len(lines):
        write_whole(path, "".join(map(_line, kept)))


def write_result(folder: RunFolder, result: Mapping[str, Any]) -> None:
    """Write ``result.json``, whole or not at all."""
    write_whole(folder.result_path, json.dumps(_plain(result), indent=2, allow_nan=False, default=_text) + "\n")


def read_result(folder: RunFolder) -> dict[str, Any] | None:
    """Return what ``result.json`` holds, None where there is none.

    Raises:
        RunError: it is not a JSON object.
    """
    try:
        return _parse(read_bytes(folder.result_path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        raise RunError(
            f"{printable(str(folder.result_path))} is damaged; delete it and give the same command again."
        ) from None


class _LineFile:
    """A file that lines are appended to, each whole or not at all."""

    def __init__(self, path: Path, on_trouble: Callable[[str], None] | None = None) -> None:
        self._path, self._on_trouble = path, on_trouble
        self._waiting = b""
        try:
            _mend_last_line(path)
            # Unbuffered: nothing that failed can be written later by a hidden second try.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise self._error(error) from error

    def append(self, values: Mapping[str, Any]) -> None:
        lines = self._waiting + _line(values).encode("ascii")
        try:
            self._write(lines)
        except OSError as error:
            if error.errno not in _FULL or len(lines) > MOST_WAITING:
                raise self._error(error) from error
            if not self._waiting and self._on_trouble is not None:
                self._on_trouble(
                    f"{printable(str(self._path))} cannot be written ({error.strerror}); its lines wait in memory, and "
                    "training goes on: free some space."
                )
            self._waiting = lines
        else:
            self._waiting = b""

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in _FULL:
                raise self._error(error) from error

    def close(self) -> None:
        waiting, self._waiting = self._waiting, b""
        try:
            self._write(waiting)
        except OSError as error:
            raise self._error(error) from error
        finally:
            self._file.close()

    def _write(self, lines: bytes) -> None:
        """Write all of `lines` or nothing."""
        if not lines:
            return
        before, rest = os.fstat(self._file.fileno()).st_size, memoryview(lines)
        try:
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise

    def _error(self, error: OSError) -> RunError:
        return RunError(
            f"Could not write {printable(str(self._path))}: {error.strerror}; "
            "free or repair the disk and give the same command again."
        )


def _mend_last_line(path: Path) -> None:
    """End or cut off a last line that a power cut left without its end, so that the next one does not run into it."""
    if not path.is_file():  # new, or a device, which has no end
        return
    with open(path, "r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        tail = b""
        while end > 0 and b"\n" not in tail:
            start = max(0, end - 65536)
            file.seek(start)
            tail, end = file.read(end - start) + tail, start
        tail = tail.rpartition(b"\n")[2]
        if not tail:
            return
        try:
            _parse(tail)
        except ValueError:
            file.truncate(size - len(tail))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _line(values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, allow_nan=False, default=_text) + "\n"
    except ValueError:
        return json.dumps(_plain(values), allow_nan=False, default=_text) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} in a record; give plain data")


def _plain(value: Any) -> Any:
    """Return `value` with nan and infinities as text, which strict JSON readers accept."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _parse(data: bytes) -> dict[str, Any]:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return _with_numbers(value) if b'"nan"' in data or b'inf"' in data else value


def _with_numbers(value: Any) -> Any:
    """Undo `_plain`."""
    if isinstance(value, dict):
        return {key: item if key in _WORDS else _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        *lines, last = read_bytes(path, MOST_RECORDED).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(
            f"{printable(str(path))} cannot be read ({error.strerror}); put that right and try again."
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_parse(line))
        except ValueError:
            raise RunError(
                f"{printable(str(path))}, line {number}, is not a JSON object; delete that line and try again."
            ) from None
    with contextlib.suppress(ValueError):
        found.append(_parse(last))
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, and force it to the disk.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with create_text(temporary) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"Could not write {printable(str(path))}: {error.strerror}; free or repair the disk and try again."
        ) from error


def _now() -> float:
    return round(time.time(), 3)

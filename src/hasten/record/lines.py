"""The record of a run: JSON lines for every step and event, and one JSON object for how it ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.errors import RunError, printable
from hasten.record.folder import RunFolder

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Keys whose values are words: there "nan" is a word too.
_WORDS = frozenset({"text", "prompt", "message", "reason", "command", "path", "kind", "status"})


class Record:
    """Writes the metrics and events of one attempt at a run, every line passed on to the system at once."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self._attempt = attempt
        self._metrics = _LineFile(folder.metrics_path)
        try:
            self._events = _LineFile(folder.events_path)
        except BaseException:
            self._metrics.close()
            raise

    def metric(self, *, step: int, **values: Any) -> None:
        """Write the line of a step."""
        self._metrics.append({"step": step, "attempt": self._attempt, "time": _now(), **values})

    def event(self, kind: str, /, *, step: int, **values: Any) -> None:
        """Write that something happened; with a ``checkpoint``, all lines so far are forced to the disk too."""
        self._events.append({"kind": kind, "step": step, "attempt": self._attempt, "time": _now(), **values})
        if kind == "checkpoint":  # a power cut then leaves no saved step without its lines
            self._metrics.sync()
            self._events.sync()

    def close(self) -> None:
        """Close both files; a second call changes nothing."""
        self._metrics.close()
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
        return _parse(folder.result_path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise RunError(
            f"{printable(str(folder.result_path))} is damaged; delete it and give the same command again."
        ) from None


class _LineFile:
    """A file that lines are appended to, each whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            _mend_last_line(path)
            # Unbuffered: nothing that failed can be written later by a hidden second try.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise self._error(error) from error

    def append(self, values: Mapping[str, Any]) -> None:
        rest = memoryview(_line(values).encode("ascii"))
        before = os.fstat(self._file.fileno()).st_size
        try:
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, before)
            raise self._error(error) from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        self._file.close()

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
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
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
        *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
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
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
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

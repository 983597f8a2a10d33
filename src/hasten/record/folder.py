"""The folder of a run: where each of its files is."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import RunError, printable
from hasten.record.lock import take


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def metrics_path(self) -> Path:
        """One JSON line per step."""
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        """One JSON line for everything else that happened."""
        return self.path / "events.jsonl"

    @property
    def result_path(self) -> Path:
        """How the run ended, in numbers."""
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, in Hugging Face format, so that a checkpoint can be exported without its corpus."""
        return self.path / "tokenizer"

    @property
    def final(self) -> Path:
        """The trained model in Hugging Face format."""
        return self.path / "final"

    @property
    def report_path(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def check_place(self) -> None:
        """Refuse a place that is no folder and cannot become one that this process writes to; nothing is made.

        Raises:
            RunError: says why.
        """
        try:
            place = self.path
            place.exists()  # which says what a name that is too long is, and `lexists` does not
            while not os.path.lexists(place):
                place = place.parent
            if not place.exists():
                raise FileNotFoundError(errno.ENOENT, "a link that leads nowhere")
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
            if os.name != "nt" and os.statvfs(place).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, "Read-only file system")
            if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
                raise PermissionError(errno.EACCES, "Permission denied")
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> RunError:
        return RunError(
            f"The run folder {printable(str(self.path))} cannot be written ({error.strerror}); give another out=."
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one trainer; it is created if needed, and removed again if nothing was put into it.

        Folders above it that had to be made go with it.

        The lock goes with the process that holds it: one that was killed leaves none behind.

        Raises:
            RunError: another trainer holds it (its process id is named), the folder cannot be written, or something in
                it is a link, a pipe or a device: what is written there would land outside the folder, or nowhere.
        """
        new = [folder for folder in (self.path, *self.path.parents) if not os.path.lexists(folder)]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = take(self.path / ".lock")
        except OSError as error:
            raise self._refusal(error) from error
        try:
            self._refuse_ways_out()
            yield
        finally:
            held.release()
            with contextlib.suppress(OSError):  # it holds the run by now, as it should
                for folder in new:
                    folder.rmdir()

    def _refuse_ways_out(self) -> None:
        """Refuse a folder whose entries lead out of it: it may come from anyone, and its files are written to."""
        for path in sorted(self.path.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # a report that is just being written
                kind = path.lstat().st_mode
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    what = "a link" if stat.S_ISLNK(kind) else "no file"
                    raise RunError(
                        f"{printable(str(path))} is {what}, and a run writes into its own folder only: delete it, or "
                        "give another out=."
                    )

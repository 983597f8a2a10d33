"""The folder of a run: where each of its files is."""

from __future__ import annotations

import contextlib
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

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one trainer; it is created if needed, and removed again if nothing was put into it.

        The lock goes with the process that holds it: one that was killed leaves none behind.

        Raises:
            RunError: another trainer holds it (its process id is named), or the folder cannot be written.
        """
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = take(self.path / ".lock")
        except OSError as error:
            raise RunError(
                f"The run folder {printable(str(self.path))} cannot be written ({error.strerror}); give another out=."
            ) from error
        try:
            yield
        finally:
            held.release()
            if is_new:
                with contextlib.suppress(OSError):  # it holds the run by now, as it should
                    self.path.rmdir()

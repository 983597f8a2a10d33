"""How far a preparation is, told now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hasten.data.corpus import Batch, Corpus
from hasten.errors import printable


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is.

    Attributes:
        stage: "reading", "learning the tokenizer", "encoding", and at the end "done" or "reused".
        done_bytes: bytes of the source files (as on disk) that the stage has read.
        total_bytes: what it will read.
        megabytes_per_second: text per second in this stage; None at its beginning.
        seconds_left: of this stage; None at its beginning.
        notes: at the end, sentences for the user: what was reused, which encoder ran, what was replaced in the text.
    """

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0
    megabytes_per_second: float | None = None
    seconds_left: float | None = None
    notes: tuple[str, ...] = ()


OnProgress = Callable[[PrepareProgress], None]


class Reporter:
    """Turns what is read into a PrepareProgress now and then, not more often than every `seconds`."""

    def __init__(self, on_progress: OnProgress | None, seconds: float) -> None:
        self._on_progress, self._seconds = on_progress, seconds
        self._notes: list[str] = []

    def note(self, sentence: str) -> None:
        """Keep a sentence for the user, for the end."""
        self._notes.append(sentence)

    def stage(self, name: str, corpus: Corpus | None) -> None:
        """Begin a stage that reads `corpus`."""
        self._stage, self._corpus = name, corpus
        self._total = sum(file.bytes for file in corpus.files) if corpus else 0
        self._text_bytes, self._start, self._last = 0, time.monotonic(), float("-inf")
        self._send()

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and tell of each."""
        for batch in batches:
            yield batch
            self.read(batch)

    def read(self, batch: Batch) -> None:
        """Tell, if it is time, that a batch was worked on."""
        self._text_bytes += int(batch.sizes.sum())
        if self._on_progress and time.monotonic() - self._last >= self._seconds:
            self._send()

    def finish(self, stage: str, sentences: list[str]) -> None:
        """Tell that it is over, with what is to be said about it."""
        self._notes.extend(sentences)
        if self._on_progress:
            total = self._total
            self._on_progress(PrepareProgress(stage, total, total, notes=tuple(map(printable, self._notes))))

    def _send(self) -> None:
        if self._on_progress is None:
            return
        now = time.monotonic()
        self._last, seconds = now, now - self._start
        done = min(self._corpus.bytes_read, self._total) if self._corpus and self._text_bytes else 0
        speed = self._text_bytes / 1e6 / seconds if done and seconds > 0 else None
        left = seconds * (self._total - done) / done if done else None
        self._on_progress(PrepareProgress(self._stage, done, self._total, speed, left))

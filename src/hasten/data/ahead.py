"""Reading ahead: what the coming steps read of tokens that lie elsewhere, in the order in which they read it.

The order of the rows is a pure function of the position, so what a step reads is known before its turn. Which blocks
that is, and nothing else, is asked for: as far ahead as the place for them goes.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from hasten.data.batches import Draw
    from hasten.data.documents import Documents

# Steps that are looked at while one is taken: the view grows while there is place, in pieces that cost less than a
# millisecond each.
_MOST_NEW = 8
_MOST_STEPS = 4096


class Far(Protocol):
    """A stream of tokens that lies elsewhere and is brought here in blocks.

    Attributes:
        room: blocks that may be asked for before they are read; 0 for a stream that lies here.
    """

    room: int

    def blocks(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Return the numbers of the blocks that hold the spans of `lengths_P` tokens, at least 1, at `starts_P`."""
        ...

    def fetch(self, blocks: np.ndarray, *, urgent: bool = False) -> None:
        """Begin to bring blocks here, those that are `urgent` before the others, and return at once."""
        ...

    def forget(self) -> None:
        """Leave out what was asked for and was not begun."""
        ...


class _Near:
    """A stream that lies here."""

    room = 0

    def blocks(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        return np.empty(0, np.int64)

    def fetch(self, blocks: np.ndarray, *, urgent: bool = False) -> None: ...

    def forget(self) -> None: ...


NEAR: Far = _Near()


def far_of(documents: Documents) -> Far:
    """Return how the tokens of documents are brought here: `NEAR`, unless they are shards that lie elsewhere."""
    from hasten.data.shards import TokenShards

    return documents.far if isinstance(documents, TokenShards) else NEAR


class _Step(NamedTuple):
    """A step that was looked at: where it begins, how many rows it reads as what length, which blocks it needs."""

    asked: tuple[tuple[int, ...], int, int]
    blocks: tuple[tuple[Far, np.ndarray], ...]
    position: tuple[int, ...]


class ReadAhead:
    """Asks for the blocks of the step that is read now, then for those of the steps after it."""

    def __init__(self) -> None:
        self._begin()

    def step(
        self,
        position: tuple[int, ...],
        draw: Draw,
        *,
        rows: int,
        first: int,
        stop: int,
        later: Callable[..., Draw],
    ) -> None:
        """Ask for what the step at `position` reads and, in what place there is, for what those after it will.

        They are taken to have as many rows of the same length; where that turns out wrong, it is begun anew.

        Args:
            position: of the step.
            draw: what it reads.
            rows: of it.
            first, stop: which of its places, counted in tokens, are read here; others belong to other ranks.
            later: what another step reads, as `Batches.draw`.
        """
        room = min(part.far.room for part, _ in draw.parts)
        if not room:
            return
        if os.getpid() != self._pid:  # what was asked for in another process was not asked for in this one
            self._begin()
        asked = (position, rows, draw.length)
        if self._steps and self._steps[0].asked == asked:
            return  # another part of the same step
        while self._steps and self._steps[0].asked != asked:
            self._leave()
        if not self._steps:
            for part, _ in draw.parts:
                part.far.forget()
            self._enter(asked, draw, first, stop)
        for far, blocks in self._steps[0].blocks:
            far.fetch(blocks, urgent=True)
        for _ in range(_MOST_NEW):
            if len(self._steps) >= _MOST_STEPS or len(self._needed) >= room:
                break
            position = self._steps[-1].position
            following = later(position, rows=rows, length=draw.length)
            self._enter((position, rows, draw.length), following, first, stop)
            for far, blocks in self._steps[-1].blocks:
                far.fetch(blocks)

    def _begin(self) -> None:
        self._steps: deque[_Step] = deque()
        self._needed: Counter[int] = Counter()
        self._pid = os.getpid()

    def _enter(self, asked: tuple[tuple[int, ...], int, int], draw: Draw, first: int, stop: int) -> None:
        found, place = [], 0
        for part, numbers in draw.parts:
            begin, end = first // part.seq_len - place, stop // part.seq_len - place
            here = numbers[max(0, begin) : max(0, end)]
            place += len(numbers)
            if len(here):
                found.append((part.far, part.blocks(here)))
        self._steps.append(_Step(asked, tuple(found), draw.position))
        for _, blocks in found:
            self._needed.update(blocks.tolist())

    def _leave(self) -> None:
        for _, blocks in self._steps.popleft().blocks:
            for block in blocks.tolist():
                if self._needed[block] > 1:
                    self._needed[block] -= 1
                else:
                    del self._needed[block]

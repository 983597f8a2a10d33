"""Batches: which rows an optimizer step reads, as a pure function of the seed and the position it begins at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hasten.data.ahead import ReadAhead
from hasten.data.documents import DocumentPart
from hasten.data.rows import NO_TARGET, Rows
from hasten.errors import DataError, RecipeError


@dataclass(frozen=True)
class Batch:
    """A micro-batch. B rows of T tokens.

    `tokens_BT` int64 inputs; `labels_BT` int64 targets, -100 for none; `document_ids_BT` int32, a number per position
    that rises with every document of the row, or None where documents may see each other; `num_targets` labels that
    are real.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    document_ids_BT: Tensor | None
    num_targets: int

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; a copy to a GPU does not wait.

        Document numbers stay where they are: the mask is worked out from them here, without waiting for a GPU.
        """
        if torch.device(device).type == "cpu":
            return self
        tokens_BT = self.tokens_BT.to(device, non_blocking=True)
        return replace(self, tokens_BT=tokens_BT, labels_BT=self.labels_BT.to(device, non_blocking=True))

    @property
    def positions_BT(self) -> Tensor:
        """Each token's place in its document, int64: it begins again with every document and with every row."""
        ids = self.document_ids_BT
        device = self.tokens_BT.device if ids is None else ids.device
        places_T = torch.arange(self.tokens_BT.shape[1], device=device)
        if ids is None:
            return places_T.repeat(len(self.tokens_BT), 1)
        begins_BT = torch.zeros_like(self.tokens_BT, device=device)
        begins_BT[:, 1:] = torch.where(ids[:, 1:] != ids[:, :-1], places_T[1:], 0)
        return places_T - begins_BT.cummax(dim=1).values

    def viewed(self, length: int) -> Batch:
        """Return the same tokens in the same order as rows of `length`, which divides the rows' length: no copy."""
        ids = self.document_ids_BT
        return replace(
            self,
            tokens_BT=self.tokens_BT.view(-1, length),
            labels_BT=self.labels_BT.view(-1, length),
            document_ids_BT=None if ids is None else ids.view(-1, length),
        )


@dataclass(frozen=True)
class Draw:
    """What one optimizer step reads.

    Attributes:
        length: tokens of a row as the model sees it.
        parts: rows and which of them, in order. All have one `seq_len`, a multiple of `length`; longer ones are viewed
            as several rows of `length`. At least one part, with no numbers if need be. Fewer tokens than were asked
            for are made up with padding by `Batches`.
        position: where the next step begins.
    """

    length: int
    parts: tuple[tuple[Rows, np.ndarray], ...]
    position: tuple[int, ...]


class Source(Protocol):
    """Which rows a step reads; it holds no state.

    Attributes:
        begin: the position of the first step. A position is a tuple of whole numbers, all that a checkpoint holds.
        num_rows: rows of full length that hold as many tokens as an epoch.
    """

    begin: tuple[int, ...]
    num_rows: float

    def draw(self, position: tuple[int, ...], *, rows: int, length: int) -> Draw:
        """Return what the step at `position` reads: at most the tokens of `rows` full rows, in rows of `length`.

        A source with rows of several lengths of its own takes `length` for the longest allowed.
        """
        ...

    def epochs(self, position: tuple[int, ...]) -> float:
        """Return how often the data has been read at `position`."""
        ...


class RowSource:
    """Rows of one length in a shuffled order, forever: every row of an epoch once, then the next epoch.

    The position is one number, the rows read so far. Steps run across the ends of epochs; no row is dropped there.
    Shorter lengths view the same rows, so the tokens and their order are the same under every schedule of lengths.

    Args:
        rows: at least one.
        seed: of the order.
    """

    begin: tuple[int, ...] = (0,)

    def __init__(self, rows: Rows, *, seed: int) -> None:
        self.rows = rows
        self.num_rows: float = rows.num_rows
        self._order = rows.order(seed)

    def draw(self, position: tuple[int, ...], *, rows: int, length: int) -> Draw:
        """Return the `rows` rows from `position` on, viewed in rows of `length`, a divisor of the row length."""
        (row,) = self._checked(position)
        return Draw(length, ((self.rows, self._order.at(row, rows)),), (row + rows,))

    def after(self, position: tuple[int, ...], rows: int) -> tuple[int, ...]:
        """Return the position that `rows` rows lead to from `position`."""
        return (position[0] + rows,)

    def epochs(self, position: tuple[int, ...]) -> float:
        """Return how often the rows have been read at `position`."""
        return self._checked(position)[0] / self.rows.num_rows

    def _checked(self, position: tuple[int, ...]) -> tuple[int, ...]:
        if len(position) != 1 or position[0] < 0:
            raise DataError(f"{list(position)} is no position in rows, which is one number of at least 0.")
        return position


class Batches:
    """The micro-batches of any optimizer step, for one rank: a pure function of its position.

    All ranks together read what one alone would: a step's rows are shared out in contiguous slices that differ by a
    row at most. A step has as many tokens whatever the length of its rows; what a source cannot give is padding.

    Args:
        source: which rows a step reads.
        seq_len: tokens of a full row.
        micro_rows: full rows of a micro-batch; the last of a step may have fewer.
        document_mask: number the documents of each row, so that attention can keep them apart.
        rank: of this process, below `world_size`.
        world_size: processes that share a step.

    Raises:
        RecipeError: a rank that is none.

    Example:
        >>> from hasten.data.documents import documents_of
        >>> from hasten.data.rows import ChunkedRows
        >>> rows = ChunkedRows(documents_of([[5, 6, 7], [8]], document_token=0), seq_len=4)
        >>> batches = Batches(RowSource(rows, seed=0), seq_len=4, micro_rows=1)
        >>> step, position = batches.take((0,), rows=2)
        >>> [batch.tokens_BT.shape for batch in step], position
        ([torch.Size([1, 4]), torch.Size([1, 4])], (2,))
    """

    def __init__(
        self,
        source: Source,
        *,
        seq_len: int,
        micro_rows: int,
        document_mask: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise RecipeError(f"rank={rank} is none of world_size={world_size}: ranks count from 0.")
        assert min(seq_len, micro_rows) >= 1, (seq_len, micro_rows)
        self.source, self.seq_len, self.micro_rows = source, seq_len, micro_rows
        self.document_mask, self.rank, self.world_size = document_mask, rank, world_size
        self._ahead = ReadAhead()

    def take(
        self, position: tuple[int, ...], *, rows: int, length: int | None = None, into: Buffers | None = None
    ) -> tuple[list[Batch], tuple[int, ...]]:
        """Return this rank's micro-batches of the step at `position`, and where the next step begins.

        Fresh tensors at every call, unless `into` is given: a caller may keep or change them. Those of one call share
        their memory.

        Args:
            position: the source's `begin`, or what an earlier call returned.
            rows: of the step, over all ranks, in full rows; at least one for each rank.
            length: tokens of a row as the model sees it, a divisor of `seq_len`; None for full rows.
            into: memory to write to.

        Raises:
            RecipeError: no such a length or number of rows.
            DamagedData: a stored block is damaged; `skip` says where the next step begins.
            DataError: the index of a stored file is damaged.
        """
        draw = self.draw(position, rows=rows, length=length)
        self.look_ahead(position, draw, rows=rows)
        return self.fill(draw, *self.share(rows), into=into), draw.position

    def look_ahead(self, position: tuple[int, ...], draw: Draw, *, rows: int) -> None:
        """Have what this rank reads of the step at `position` brought here, and then that of the steps after it.

        For tokens that lie elsewhere; returns at once, and does nothing for those that lie here.
        """
        first, stop = self.share(rows)
        self._ahead.step(
            position, draw, rows=rows, first=first * self.seq_len, stop=stop * self.seq_len, later=self.draw
        )

    def draw(self, position: tuple[int, ...], *, rows: int, length: int | None = None) -> Draw:
        """Return what the step at `position` reads, over all ranks; no token is read yet."""
        length = length or self.seq_len
        if rows < self.world_size:
            raise RecipeError(f"A step of {rows} rows leaves some of {self.world_size} ranks without any: give more.")
        draw = self.source.draw(position, rows=rows, length=length)
        for part, _ in draw.parts:
            if draw.length < 1 or self.seq_len % part.seq_len or part.seq_len % draw.length:
                raise RecipeError(
                    f"Rows of {draw.length} tokens cannot be cut from rows of seq_len={part.seq_len}: give a length "
                    "that divides it."
                )
        return draw

    def share(self, rows: int) -> tuple[int, int]:
        """Return which of a step's full rows this rank reads: from the first up to the second."""
        return rows * self.rank // self.world_size, rows * (self.rank + 1) // self.world_size

    def skip(self, position: tuple[int, ...], *, rows: int, length: int | None = None, steps: int = 1) -> Skipped:
        """Return where a step begins that comes `steps` steps after `position`, and what is left out on the way.

        No token is read, so what is left out may be damaged.
        """
        tokens = 0
        for _ in range(steps):
            draw = self.draw(position, rows=rows, length=length)
            tokens += sum(len(numbers) * part.seq_len for part, numbers in draw.parts)
            position = draw.position
        return Skipped(position, tokens)

    def documents(
        self, position: tuple[int, ...], *, rows: int, length: int | None = None, most: int = 64
    ) -> list[DocumentPart]:
        """Return which documents the step at `position` reads, over all ranks: at most the first `most` parts of them.

        Row after row, in the order in which the rows lie in the step. No token is read, so it can be asked of a step
        whose tokens are damaged. Not while another thread takes from these batches.

        Args:
            position: where the step begins.
            rows: of the step.
            length: tokens of a row as the model sees it; None for full rows.
            most: parts that are returned.

        Raises:
            RecipeError: no such a length or number of rows.
            DataError: where documents start is damaged.

        Example:
            >>> from hasten.data.documents import documents_of
            >>> from hasten.data.rows import ChunkedRows
            >>> rows = ChunkedRows(documents_of([[5, 6, 7], [8]], document_token=0), seq_len=8)
            >>> batches = Batches(RowSource(rows, seed=0), seq_len=8, micro_rows=1)
            >>> [(part.document, part.begin, part.tokens) for part in batches.documents((0,), rows=1)]
            [(0, 0, 4), (1, 0, 1)]
        """
        found: list[DocumentPart] = []
        for part, numbers in self.draw(position, rows=rows, length=length).parts:
            for number in numbers.tolist():
                if len(found) >= most:
                    break
                found += part.parts(number)
        return found[:most]

    def fill(self, draw: Draw, first: int, stop: int, *, into: Buffers | None = None) -> list[Batch]:
        """Return the micro-batches of the full rows `first` up to `stop` of what a step reads."""
        seq_len = draw.parts[0][0].seq_len
        assert all(part.seq_len == seq_len for part, _ in draw.parts), "parts of one step have rows of one length"
        per_row = self.seq_len // seq_len
        begin, end = first * per_row, stop * per_row
        tokens_RT, labels_RT, ids_RT = (into or Buffers(self.document_mask)).arrays(end - begin, seq_len)
        targets_R = np.zeros(end - begin, np.int64)
        place = 0
        for part, numbers in draw.parts:
            low, high = max(place, begin), min(place + len(numbers), end)
            if low < high:
                cut = slice(low - begin, high - begin)
                ids = None if ids_RT is None else ids_RT[cut]
                targets_R[cut] = part.fill(numbers[low - place : high - place], tokens_RT[cut], labels_RT[cut], ids)
            place += len(numbers)
        empty = slice(max(0, place - begin), None)
        tokens_RT[empty], labels_RT[empty] = draw.parts[0][0].filler, NO_TARGET
        if ids_RT is not None:
            ids_RT[empty] = 0
        size = self.micro_rows * per_row
        cuts = [slice(row, row + size) for row in range(0, end - begin, size)]
        return [
            Batch(
                torch.from_numpy(tokens_RT[cut]),
                torch.from_numpy(labels_RT[cut]),
                None if ids_RT is None else torch.from_numpy(ids_RT[cut]),
                int(targets_R[cut].sum()),
            ).viewed(draw.length)
            for cut in cuts
        ]


def blank(batch: Batch) -> Batch:
    """Return a row like the first of `batch` that nothing is learned from."""
    ids = None if batch.document_ids_BT is None else batch.document_ids_BT[:1]
    labels_BT = torch.full_like(batch.labels_BT[:1], NO_TARGET)
    return Batch(batch.tokens_BT[:1], labels_BT, ids, 0)


@dataclass(frozen=True)
class Skipped:
    """Where to go on after steps were left out, and how many places of their rows nobody reads."""

    position: tuple[int, ...]
    tokens: int


class Buffers:
    """Memory of one step, written again by the next step that is given it.

    Args:
        document_mask: whether documents are numbered.
    """

    def __init__(self, document_mask: bool) -> None:
        self._dtypes = (np.int64, np.int64, np.int32) if document_mask else (np.int64, np.int64)
        self._arrays = [np.empty(0, dtype) for dtype in self._dtypes]

    def arrays(self, num_rows: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return arrays of that shape for tokens, labels and, if they are asked for, document numbers."""
        size = num_rows * seq_len
        if len(self._arrays[0]) < size:
            self._arrays = [np.empty(size, dtype) for dtype in self._dtypes]
        tokens_RT, labels_RT, *ids = (array[:size].reshape(num_rows, seq_len) for array in self._arrays)
        return tokens_RT, labels_RT, ids[0] if ids else None

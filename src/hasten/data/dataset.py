"""Packed batches as a `torch` dataset: for any `DataLoader`, so for a plain loop, the `Trainer` and Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hasten.data.batches import Batches, RowSource, Source
from hasten.data.buckets import BucketSource
from hasten.data.documents import COLUMN, Documents, documents_of
from hasten.data.items import Item, item_of
from hasten.data.lengths import LengthSchedule, halvings
from hasten.data.row_counts import RowCounts
from hasten.data.windows import Pack, Report, Windows
from hasten.data.workers import CountingLoader, told
from hasten.errors import DataError, RecipeError

if TYPE_CHECKING:
    from datasets import Dataset

STATE_VERSION = 1
# Shorter buckets would save little: attention is a small part of such rows.
_SHORTEST_BUCKET = 64
_MOST_BUCKETS = 8
_PROGRESS_POINTS = 1024


class PackedBatches(IterableDataset[Item]):
    """Documents packed into rows, one optimizer step after the other, each a dict of tensors.

    ``input_ids`` (B, T) int64; ``labels`` (B, T) int64: the *next* token at each position, -100 for none (already
    shifted: Hugging Face models take them as ``shift_labels``, see `hasten.data.items.for_transformers`);
    ``position_ids`` (B, T) int64, which begin again with each document; ``document_ids`` (B, T) int32, the same for
    tokens that may see each other; ``cu_seqlens`` int32 and ``max_seqlen`` for variable-length attention over the rows
    laid end to end: where each document begins and the last ends, padded with the end to a size that depends on the
    shape alone.

    The order is a pure function of the seed. All ranks together read the same step whatever their number, and workers
    change nothing: worker i of n makes items i, i + n, ... Every token of an epoch comes once or is counted in
    `report`.

    **Where the state is.** `state_dict` says what the consumer has been given. That is known here without workers, and
    with the loader that `loader` makes. Another `DataLoader` with workers hands out copies of this dataset ahead of
    time; give `state_dict` the number of steps that were trained, which every training loop knows.

    Args:
        documents: token shards (``PreparedData.open(folder).train``), a `datasets.Dataset` with a column of token ids,
            or a list of documents, each a list or an array of token ids. See `hasten.data.documents.documents_of`.
        seq_len: tokens of a full row.
        batch_tokens: tokens of an optimizer step over all ranks; a multiple of `seq_len`.
        packing: ``best_fit``, ``chunk`` or ``pad``; ``bucket`` mode packs by best fit always.
        overflow: what becomes of documents longer than a row: ``split``, ``truncate`` or ``drop``.
        lengths: tokens of a row as a function of progress in [0, 1], such as a `LengthSchedule`; None for full rows.
        total_steps: progress is the steps done over this number, and iteration ends after them; None: without end.
        mode: ``view`` cuts full rows into shorter ones, so that the order of tokens is the same under every schedule;
            ``bucket`` packs documents of similar length into rows of their own length, and the schedule says how long
            rows may be.
        buckets: row lengths of ``bucket`` mode, ascending divisors of `seq_len` and then `seq_len` itself.
        seed: of the order.
        rank: of this process.
        world_size: processes that share a step.
        document_mask: False leaves out ``document_ids`` and ``cu_seqlens`` and lets positions run through a row.
        micro_rows: full rows of an item, for gradient accumulation: a step is then several items of equal size. None:
            a step is one item.
        document_token: put in front of documents that do not begin with it; see `documents_of`.
        column: of a `datasets.Dataset`.
        counts: rows of each window, where they are known already.

    Raises:
        RecipeError: settings out of range or at odds with each other.
        DataError: no documents, or none that can be used.

    Example:
        >>> data = PackedBatches([[1, 2, 3], [4, 5], [6, 7, 8, 9]], document_token=0, seq_len=4, batch_tokens=8)
        >>> item = next(iter(data))
        >>> item["input_ids"].shape, item["labels"].shape, data.state_dict()["step"]
        (torch.Size([2, 4]), torch.Size([2, 4]), 1)
    """

    def __init__(
        self,
        documents: Documents | Dataset | Sequence[Any],
        *,
        seq_len: int,
        batch_tokens: int,
        packing: str = "best_fit",
        overflow: str = "split",
        lengths: Callable[[float], int] | None = None,
        total_steps: int | None = None,
        mode: str = "view",
        buckets: Sequence[int] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        document_mask: bool = True,
        micro_rows: int | None = None,
        document_token: int | None = None,
        column: str = COLUMN,
        counts: RowCounts | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(seq_len, batch_tokens, world_size, micro_rows, total_steps)
        pack = _pack(mode, packing, overflow, seq_len, buckets, lengths)
        _check_lengths(lengths, seq_len, mode, total_steps)
        self.rows_per_step, self.total_steps = batch_tokens // seq_len, total_steps
        self._lengths, self._seed = lengths, seed
        documents = documents_of(documents, document_token=document_token, column=column)
        self.windows = Windows(documents, pack, counts=counts)
        classes = [self.windows.rows(number) for number in range(len(pack.capacities))]
        self._most_pieces = {rows.seq_len: rows.most_pieces for rows in classes}
        source: Source = RowSource(classes[0], seed=seed) if mode == "view" else BucketSource(classes, seed=seed)
        self._batches = Batches(
            source,
            seq_len=seq_len,
            micro_rows=self.rows_per_step,
            document_mask=document_mask,
            rank=rank,
            world_size=world_size,
        )
        self._first, self._stop = self._batches.share(self.rows_per_step)
        self._micro_rows = micro_rows or self._stop - self._first
        self.items_per_step = -(-(self._stop - self._first) // self._micro_rows)
        self._origin = self._known = (0, source.begin)  # a step and its position; both are moved by loading
        self._item = 0  # items handed out, counted from the first step
        self._skipped = {"steps": 0, "tokens": 0}
        self._is_counted = False
        # Memory shared with workers, which tell here that they have iterated.
        self._elsewhere = torch.zeros(1, dtype=torch.int8).share_memory_()

    def __iter__(self) -> Iterator[Item]:
        """Yield items from where the state is: in a worker its share of them, else all."""
        worker = get_worker_info()
        if worker is not None:
            items = self._items(self._item + worker.id, worker.num_workers)
            if not self._is_counted:
                self._elsewhere.fill_(1)
            yield from told(items) if self._is_counted else items
            return
        for number, item in enumerate(self._items(begin := self._item, 1)):
            self._item = begin + number + 1
            yield item

    def loader(self, *, num_workers: int = 0, **settings: Any) -> DataLoader[Item]:
        """Return a `DataLoader` of this dataset that keeps count of what it has handed out, for `state_dict`.

        While an item is waited for, a worker that was killed or stopped raises RunError, which names it, within 10 s.
        Nothing is lost by it: this dataset knows what was handed out, and a new loader goes on from there.

        Args:
            num_workers: processes that prepare items ahead.
            settings: of `torch.utils.data.DataLoader`, such as ``pin_memory`` or ``prefetch_factor``.
        """
        if settings.get("persistent_workers"):
            raise RecipeError("persistent_workers=True would keep workers at an old place in the data: leave it out.")
        return CountingLoader(self, batch_size=None, num_workers=num_workers, **settings)

    @property
    def epochs(self) -> float:
        """How often the data has been read where the state is."""
        return self._batches.source.epochs(self._position(self._item // self.items_per_step))

    def report(self) -> Report:
        """Return what becomes of the tokens in an epoch, by cause."""
        return self.windows.report

    @property
    def skipped(self) -> dict[str, int]:
        """Steps that `skip` left out and the positions in them, over all ranks."""
        return dict(self._skipped)

    def skip(self, steps: int = 1) -> None:
        """Leave out the next steps, as a guard does after a loss that does not recover; they are counted in `skipped`.

        The steps that follow keep their numbers: what is skipped are the rows.
        """
        step, position = self._between_steps()
        skipped = self._batches.skip(position, rows=self.rows_per_step, length=self._length(step), steps=steps)
        self._origin = self._known = (step, skipped.position)
        self._skipped["steps"] += steps
        self._skipped["tokens"] += skipped.tokens

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return where the data goes on, as plain data of less than 1 KiB.

        Args:
            step: optimizer steps trained in all, where this dataset cannot know what the consumer was given: with a
                `DataLoader` that has workers and was not made by `loader`. O(1) in ``view`` mode; in ``bucket`` mode
                steps are drawn again, some ten thousand a second.

        Raises:
            DataError: no `step`, and workers have iterated; or a step before the one that was loaded.
        """
        micro = 0
        if step is None:
            if self._elsewhere.item():
                raise DataError(
                    "Workers of a DataLoader have read ahead, so what was trained on is not known here: use the "
                    "loader() of this dataset, or give the steps that were trained as state_dict(step=...)."
                )
            step, micro = divmod(self._item, self.items_per_step)
        return {
            "version": STATE_VERSION,
            "data": self.fingerprint,
            "step": step,
            "micro": micro,
            "position": list(self._position(step)),
            "skipped": dict(self._skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, with any number of ranks and workers.

        Raises:
            DataError: it is no such state, or one of other data or other settings; names the first that differs.
        """
        step, micro, position = (state.get(name) for name in ("step", "micro", "position"))
        numbers = [step, micro, *(position if isinstance(position, list) else [None])]
        if state.get("version") != STATE_VERSION or any(type(n) is not int or n < 0 for n in numbers):
            raise DataError(f"This is no state of packed batches of version {STATE_VERSION}: {str(state)[:200]}.")
        for name, here in self.fingerprint.items():
            if (there := state["data"].get(name)) != here:
                raise DataError(
                    f"The state was saved with {name}={there!r}, but this data has {name}={here!r}, so it would go on "
                    "somewhere else: make the data as it was, or start without the state."
                )
        if micro >= self.items_per_step:
            raise DataError(
                f"The state was saved after {micro} items of a step, which has {self.items_per_step} here: give the "
                "micro_rows that it was saved with, or save between steps."
            )
        self._batches.source.epochs(tuple(position))  # refuses what is no position in this data
        self._origin = self._known = (step, tuple(position))
        self._item = step * self.items_per_step + micro
        self._skipped = dict(state["skipped"])
        self._elsewhere.fill_(0)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the order of the data depends on."""
        pack = self.windows.pack
        return {
            "corpus": self.windows.documents.fingerprint,
            "packing": pack.packing,
            "overflow": pack.overflow,
            "seq_len": self._batches.seq_len,
            "buckets": list(pack.capacities),
            "window_documents": self.windows.window_documents,
            "seed": self._seed,
        }

    def _items(self, first: int, stride: int) -> Iterator[Item]:
        item = first
        while True:
            step, micro = divmod(item, self.items_per_step)
            if self.total_steps is not None and step >= self.total_steps:
                return
            position = self._position(step)
            draw = self._batches.draw(position, rows=self.rows_per_step, length=self._length(step))
            self._batches.look_ahead(position, draw, rows=self.rows_per_step)
            begin = self._first + micro * self._micro_rows
            (batch,) = self._batches.fill(draw, begin, min(begin + self._micro_rows, self._stop))
            stored_rows = batch.tokens_BT.numel() // draw.parts[0][0].seq_len
            most = self._most_pieces[draw.parts[0][0].seq_len] + 1  # padding counts as a document
            # What cuts stored rows into shorter ones may cut a document each time.
            yield item_of(batch, stored_rows * most + len(batch.tokens_BT) - stored_rows)
            item += stride

    def _length(self, step: int) -> int | None:
        if self._lengths is None:
            return None
        progress = 1.0 if self.total_steps is None else min(1.0, step / self.total_steps)
        if isinstance(self._lengths, LengthSchedule):
            return self._lengths(progress, step)
        return index(self._lengths(progress))

    def _position(self, step: int) -> tuple[int, ...]:
        """Return where a step begins: from the last one known, or from where the state was loaded."""
        begun, position = self._known if step >= self._known[0] else self._origin
        if step < begun:
            raise DataError(f"Step {step} lies before step {begun}, from which the data goes on: give a later one.")
        source = self._batches.source
        if isinstance(source, RowSource):
            position = source.after(position, (step - begun) * self.rows_per_step)
        else:
            for number in range(begun, step):
                position = self._batches.draw(position, rows=self.rows_per_step, length=self._length(number)).position
        self._known = (step, position)
        return position

    def _between_steps(self) -> tuple[int, tuple[int, ...]]:
        step, micro = divmod(self._item, self.items_per_step)
        if micro:
            raise DataError(f"{micro} of {self.items_per_step} items of step {step} are read: skip between steps.")
        return step, self._position(step)

    def _moved(self, item: int) -> None:
        self._item = item


def _pack(
    mode: str,
    packing: str,
    overflow: str,
    seq_len: int,
    buckets: Sequence[int] | None,
    lengths: Callable[[float], int] | None,
) -> Pack:
    if mode not in ("view", "bucket"):
        raise RecipeError(f"mode={mode!r} is unknown: give view or bucket.")
    if mode == "view":
        if buckets is not None:
            raise RecipeError(f"buckets={list(buckets)} has no effect with mode='view': leave it out.")
        return Pack(packing, (seq_len,), overflow)
    if packing != "best_fit":
        raise RecipeError(
            f"packing={packing!r} has no effect with mode='bucket', which packs by best fit: leave it out."
        )
    if buckets is None:
        known = lengths.sizes if isinstance(lengths, LengthSchedule) else ()
        buckets = known if len(known) > 1 else halvings(seq_len, _SHORTEST_BUCKET)[-_MOST_BUCKETS:]
    if (
        list(buckets)[-1:] != [seq_len]
        or any(seq_len % width for width in buckets)
        or sorted(set(buckets)) != list(buckets)
    ):
        raise RecipeError(
            f"buckets={list(buckets)} must rise, divide seq_len={seq_len} and end with it, as "
            f"{list(halvings(seq_len, _SHORTEST_BUCKET))}."
        )
    return Pack("bucketed", tuple(buckets), overflow)


def _check_lengths(lengths: Callable[[float], int] | None, seq_len: int, mode: str, total_steps: int | None) -> None:
    if lengths is None:
        return
    if isinstance(lengths, LengthSchedule):
        if lengths.seq_len != seq_len:
            raise RecipeError(
                f"lengths grows to {lengths.seq_len} tokens, but seq_len={seq_len}: give the same to both."
            )
        if lengths.is_constant:
            return
    if total_steps is None:
        raise RecipeError("lengths change with progress, which is unknown without total_steps: give total_steps.")
    if isinstance(lengths, LengthSchedule):
        return  # which has checked its sizes
    for point in range(_PROGRESS_POINTS + 1):
        length = index(lengths(point / _PROGRESS_POINTS))
        if not 1 <= length <= seq_len or (mode == "view" and seq_len % length):
            raise RecipeError(
                f"lengths gives rows of {length} tokens at progress {point / _PROGRESS_POINTS:g}, which do not divide "
                f"seq_len={seq_len}: give divisors of it, as {list(halvings(seq_len, _SHORTEST_BUCKET))}."
            )


def _check_sizes(
    seq_len: int, batch_tokens: int, world_size: int, micro_rows: int | None, total_steps: int | None
) -> None:
    for name, value in (("seq_len", seq_len), ("batch_tokens", batch_tokens), ("world_size", world_size)):
        if value < 1:
            raise RecipeError(f"{name}={value} is out of range: give at least 1.")
    rows, rest = divmod(batch_tokens, seq_len)
    if rest:
        near = [size for size in (rows * seq_len, (rows + 1) * seq_len) if size]
        raise RecipeError(
            f"batch_tokens={batch_tokens} is no multiple of seq_len={seq_len}: give {' or '.join(map(str, near))}."
        )
    if rows < world_size:
        raise RecipeError(
            f"batch_tokens={batch_tokens} is {rows} rows, fewer than world_size={world_size} ranks: give at least "
            f"{world_size * seq_len}."
        )
    if micro_rows is not None and (micro_rows < 1 or rows % (micro_rows * world_size)):
        raise RecipeError(
            f"micro_rows={micro_rows} does not divide the {rows} rows of a step evenly among world_size={world_size} "
            "ranks: give one that does, so that every rank has as many items."
        )
    if total_steps is not None and total_steps < 1:
        raise RecipeError(f"total_steps={total_steps} is out of range: give at least 1, or leave it out.")

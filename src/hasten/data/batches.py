"""Batches: which rows an optimizer step reads, as a pure function of the seed and the row it begins at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hasten.data.order import EndlessOrder
from hasten.data.packing import ChunkedRows, Rows
from hasten.data.shards import TokenShards
from hasten.errors import DataError


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
        """Return the batch on `device`; a copy to a GPU does not wait."""
        if torch.device(device).type == "cpu":
            return self
        ids = self.document_ids_BT
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            document_ids_BT=None if ids is None else ids.to(device, non_blocking=True),
        )


class PackedBatches:
    """Packed rows in a shuffled order, forever: every row of an epoch once, then the next epoch in another order.

    The order is a pure function of the seed. A position is one number, the rows read so far, so going on from
    anywhere costs nothing. Steps run across the ends of epochs; no row is dropped there.

    Args:
        shards: the tokens of a split.
        seq_len: tokens of a row.
        rows_per_step: rows of an optimizer step.
        micro_rows: rows of a micro-batch; the last of a step may have fewer.
        seed: of the order.
        document_mask: number the documents of each row, so that attention can keep them apart.

    Raises:
        DataError: the text is too short, or a stored block is damaged.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        rows_per_step: int,
        micro_rows: int,
        seed: int,
        document_mask: bool = True,
    ) -> None:
        assert rows_per_step >= 1, rows_per_step
        assert micro_rows >= 1, micro_rows
        self.rows: Rows = ChunkedRows(shards, seq_len)
        self.order = EndlessOrder(self.rows.num_rows, seed=seed, purpose="rows")
        self.seq_len = seq_len
        self.rows_per_step = rows_per_step
        self.micro_rows = micro_rows
        self.seed = seed
        self._document_token = shards.document_token
        self._document_mask = document_mask
        self._row = 0

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.rows.num_rows

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of an epoch; seldom a whole number."""
        return self.num_rows / self.rows_per_step

    def take(self, row: int) -> list[Batch]:
        """Return the micro-batches of the optimizer step that begins at row `row` of the endless order.

        Fresh tensors at every call: a caller may keep or change them. Those of one call share their memory.
        """
        numbers = self.order.at(row, self.rows_per_step)
        tokens_RT = np.empty((self.rows_per_step, self.seq_len), np.int64)
        labels_RT = np.empty_like(tokens_RT)
        targets_R = self.rows.fill(numbers, tokens_RT, labels_RT)
        ids_RT = None
        if self._document_mask:
            ids_RT = np.cumsum(tokens_RT == self._document_token, axis=1, dtype=np.int32)
        cuts = [slice(begin, begin + self.micro_rows) for begin in range(0, self.rows_per_step, self.micro_rows)]
        return [
            Batch(
                torch.from_numpy(tokens_RT[cut]),
                torch.from_numpy(labels_RT[cut]),
                None if ids_RT is None else torch.from_numpy(ids_RT[cut]),
                int(targets_R[cut].sum()),
            )
            for cut in cuts
        ]

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of one optimizer step after the other, from where the state says, without end."""
        while True:
            batches = self.take(self._row)
            self._row += self.rows_per_step
            yield batches

    def state_dict(self) -> dict[str, int]:
        """Return the position: rows handed out so far."""
        return {"row": self._row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a position that `state_dict` returned.

        Raises:
            DataError: it is no position.
        """
        row = state.get("row")
        if type(row) is not int or row < 0:
            raise DataError(f"A position in the data is a row number of at least 0; got {row!r}.")
        self._row = row

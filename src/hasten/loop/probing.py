"""What a step costs at every row length, from passes that change nothing; they also compile and allocate everything."""

from __future__ import annotations

import time

import torch

from hasten.data.batches import Batch
from hasten.loop.leaving import readable
from hasten.loop.state import State
from hasten.model import loss_sum


def probe(state: State, *, passes: int = 2) -> float:
    """Return about the seconds that an optimizer step of full size takes, and note the cost of every row length.

    One micro-batch goes forward and backward at every length, the longest first, so that a lack of memory shows before
    the first step, and every shape is compiled. The first pass also pays for allocations; the fastest counts.
    """
    began = time.perf_counter()
    rows = state.batch_sizes.rows
    batches = readable(state, rows)
    seq_len = state.recipe.lengths.seq_len
    window = torch.tensor(seq_len, device=state.device) if state.recipe.lengths.name == "window" else None
    seconds = {}
    for length in reversed(state.recipe.lengths.row_lengths):
        batch = _of_length(batches[0], length).to(state.device)
        seconds[length] = min(_pass(state, batch, window) for _ in range(passes)) * len(batches)
    state.optimizer.zero_grad(set_to_none=True)
    seconds = state.company.ranks.from_main(seconds)
    state.notes["costs"] = {str(length): cost for length, cost in seconds.items()}
    state.spend("probe", time.perf_counter() - began)
    return seconds[seq_len]


def _of_length(batch: Batch, length: int) -> Batch:
    return Batch(
        batch.tokens_BT.reshape(-1, length),
        batch.labels_BT.reshape(-1, length),
        None if batch.document_ids_BT is None else batch.document_ids_BT.reshape(-1, length),
        batch.num_targets,
    )


def _pass(state: State, batch: Batch, window: torch.Tensor | None) -> float:
    began = time.perf_counter()
    loss = loss_sum(state.forward, batch.tokens_BT, batch.labels_BT, batch.document_ids_BT, window)
    state.precision.backward(loss / max(batch.num_targets, 1))
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    return time.perf_counter() - began

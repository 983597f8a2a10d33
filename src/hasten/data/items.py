"""Items: a batch as the dict of tensors that models of other packages take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.data.batches import Batch
from hasten.errors import RecipeError

# `cumulative_lengths` are padded to a multiple of it.
_SEQUENCES = 64

Item = dict[str, "Tensor | int"]


def item_of(batch: Batch, most_documents: int) -> Item:
    """Return the batch under the names that models know; see `hasten.data.dataset.PackedBatches`.

    Args:
        batch: rows with or without document numbers.
        most_documents: that any batch of this shape can hold, so that all have as many cumulative lengths.
    """
    item: Item = {"input_ids": batch.tokens_BT, "labels": batch.labels_BT, "position_ids": batch.positions_BT}
    if batch.document_ids_BT is not None:
        size = -(-(min(most_documents, batch.tokens_BT.numel()) + 1) // _SEQUENCES) * _SEQUENCES
        item["document_ids"] = batch.document_ids_BT
        item["cu_seqlens"] = cumulative_lengths(batch.document_ids_BT, size)
        item["max_seqlen"] = batch.tokens_BT.shape[1]
    return item


def for_transformers(items: Sequence[Item]) -> dict[str, Tensor | bool]:
    """Return what a Hugging Face causal language model takes, from a list of one item: a collator for its `Trainer`.

    The model itself moves ``labels`` by one, which is wrong for rows that do not hold the token after them, so labels
    are given as ``shift_labels`` too, which it takes as they are. Documents are told apart by ``position_ids`` that
    begin again, but only with ``use_cache=False``: with a cache, which is the default even while training, transformers
    does not look for them, and tokens see the documents before theirs.

    Args:
        items: one item of `PackedBatches`; ``per_device_train_batch_size=1``, ``remove_unused_columns=False``.
    """
    if len(items) != 1:
        raise RecipeError(
            f"An item of PackedBatches is a whole batch, and {len(items)} were put together: give "
            "per_device_train_batch_size=1, and the rows of a batch as batch_tokens or micro_rows."
        )
    (item,) = items
    return {
        "input_ids": item["input_ids"],
        "position_ids": item["position_ids"],
        "labels": item["labels"],
        "shift_labels": item["labels"],
        "use_cache": False,
    }


def cumulative_lengths(document_ids_BT: Tensor, size: int) -> Tensor:
    """Return where each document begins in the rows laid end to end, int32, padded to `size` with where they end.

    Padding stands for documents without tokens, so that the shape stays the same from batch to batch.

    Example:
        >>> cumulative_lengths(torch.tensor([[0, 0, 1], [0, 0, 0]]), 5).tolist()
        [0, 2, 3, 6, 6]
    """
    ids_BT = document_ids_BT
    begins_BT = torch.ones(ids_BT.shape, dtype=torch.bool)
    begins_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    starts = begins_BT.flatten().nonzero().flatten()
    assert len(starts) < size, (len(starts), size)
    padded = torch.full((size,), ids_BT.numel(), dtype=torch.int32)
    padded[: len(starts)] = starts
    return padded

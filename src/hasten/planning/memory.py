"""How much memory training takes, part by part: counted where it can be, estimated where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hasten.checks.capacity import held_bytes
from hasten.loop.snapshots import snapshot_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.loop import State

# Bytes of every logit that are alive at once. On a CPU a chunk's probabilities and what one product makes of them; on a
# GPU all logits of a micro-batch, in the model's type, and float32 log-probabilities with two gradients of that size.
CPU_LOGITS_ALIVE, GPU_LOGITS_ALIVE = 2, 3


@dataclass(frozen=True)
class Memory:
    """Bytes that are held when training holds most.

    Attributes:
        weights: of the model; in bf16 and fp16 their float32 masters too.
        gradients: float32, one for each weight.
        optimizer_state: what the optimizer keeps.
        activations: what the forward pass of a micro-batch keeps for the backward pass, at the longest row.
        logits: of the part of a micro-batch whose loss is worked out at once.
        other: the rest: on a CPU Python, PyTorch and the data (about 0.35 GB), and what the allocator keeps beside.
        total: the peak: of the whole process on a CPU, of PyTorch's allocator on CUDA.
        is_measured: whether `total` is the peak of real steps in a process of their own; if not, it is the sum of
            what was counted and of what this process held before.
        machine: bytes that there are; 0 where nobody says.
        snapshot: on a CPU, the copy of weights and optimizer state that checkpoints are written from and the guard
            goes back to.
    """

    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    other: int
    total: int
    is_measured: bool
    machine: int = 0
    snapshot: int = 0


def estimated(state: State, *, optimizer_state: int, machine: int) -> Memory:
    """Return the memory of a run as far as it can be counted before a step was measured.

    Activations are counted in one forward pass of a single row. What a backward pass needs beside them, and what the
    allocator leaves unused, is not in it.

    Args:
        state: of the run, before its first step.
        optimizer_state: bytes of it.
        machine: bytes that there are.
    """
    masters = state.precision.named_masters().values()
    weights = {tensor.data_ptr(): _bytes(tensor) for tensor in (*state.model.parameters(), *masters)}
    held = held_bytes() - sum(weights.values())
    parts = Memory(
        weights=sum(weights.values()),
        gradients=sum(4 * master.numel() for master in masters),
        optimizer_state=optimizer_state,
        activations=saved_bytes(state) * state.batch_sizes.micro_rows,
        logits=_logits(state),
        other=max(held, 0) if state.device.type == "cpu" else 0,
        total=0,
        is_measured=False,
        machine=machine,
        snapshot=snapshot_bytes(state, optimizer_state),
    )
    return replace(parts, total=_sum(parts))


def measured(counted: Memory, peak: int) -> Memory:
    """Return `counted` with a measured peak, what nobody counted as ``other``.

    Example:
        >>> measured(Memory(4, 4, 8, 10, 2, 5, 33, False), 40).other
        12
    """
    other = peak - (_sum(counted) - counted.other)
    # The peaks of two parts need not come together: what then is too much was never all alive.
    activations = counted.activations + min(other, 0)
    return replace(counted, activations=max(activations, 0), other=max(other, 0), total=peak, is_measured=True)


def saved_bytes(state: State) -> int:
    """Return the bytes that the forward pass of one full row keeps for the backward pass, beside the weights."""
    import torch

    from hasten.model import loss_sum

    batches, _ = state.batches.take(state.position, rows=1)
    batch = batches[0].to(state.device)
    window = torch.tensor(state.config.seq_len) if state.recipe.lengths.name == "window" else None
    own = {parameter.untyped_storage().data_ptr() for parameter in state.model.parameters()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in state.model.buffers()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        loss = loss_sum(state.model, batch.tokens_BT, batch.labels_BT, batch.document_ids_BT, window)
    del loss
    return sum(kept.values())


def _logits(state: State) -> int:
    from hasten.model.loss import LOGITS_PER_CHUNK

    vocabulary, tokens = state.config.vocab_size, state.batch_sizes.micro_rows * state.config.seq_len
    if state.device.type == "cpu":
        rows = min(tokens, max(1, LOGITS_PER_CHUNK // vocabulary))
        return CPU_LOGITS_ALIVE * 4 * rows * vocabulary + 4 * vocabulary * state.config.width
    narrow = 0 if state.precision.name == "float32" else 2
    return tokens * vocabulary * (4 * GPU_LOGITS_ALIVE + narrow)


def _sum(memory: Memory) -> int:
    parts = (memory.weights, memory.gradients, memory.optimizer_state, memory.activations, memory.logits, memory.other)
    return sum(parts) + memory.snapshot


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

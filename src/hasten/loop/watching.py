"""What an optimizer step really does, seen from outside in the few steps that are looked at closely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten.clip import ClipReport
from hasten.data.batches import Batch
from hasten.loop.state import Shape, State
from hasten.optim.elementwise import decay_rate
from hasten.sharding import pick

# Besides the first steps and the powers of two, every so many steps are looked at: what that costs (one more norm of
# the gradient, above all) is then less than a thousandth of training.
LOOK_EVERY = 64
# Elements of a group of parameters that stand for all of it.
SAMPLED = 256

Looks = dict[str, dict[str, Any]]


@dataclass
class Watch:
    """A step that is looked at: the clip that it is to use, and how often each thing was seen, by kind and name."""

    clip: Callable[[Sequence[Tensor]], ClipReport]
    looks: Looks = field(default_factory=dict)


def is_looked_at(step: int) -> bool:
    """Say whether the step after `step` steps is looked at; it depends on that alone, so a resumed run does the same.

    Example:
        >>> [step for step in range(140) if is_looked_at(step)]
        [0, 1, 2, 4, 8, 16, 32, 64, 128]
    """
    return step & (step - 1) == 0 or step % LOOK_EVERY == 0


@contextmanager
def watched(state: State, batches: list[Batch], shape: Shape) -> Iterator[Watch]:
    """Yield a watch over the forward and backward passes and the update of a step; one that sees nothing, mostly.

    Nothing of the step changes, and nothing waits for a device: what is seen there stays there until it is counted.
    """
    if not is_looked_at(state.step):
        yield Watch(state.clip)
        return
    watch = Watch(state.clip)
    groups = [g for g in state.optimizer.param_groups if g["cautious"] and not g["hyperball"]]
    before: list[tuple[Tensor, Tensor]] = []

    def clip(parameters: Sequence[Tensor]) -> ClipReport:
        report = state.clip(parameters)
        passed = report.clipped & report.norm.isfinite() & ~state.clip.holds(parameters)
        watch.looks["clip"] = {"passed": passed, "held": report.clipped & ~passed}
        before.extend((sample(group), sample(group, _gradient)) for group in groups)
        return report

    watch.clip = clip
    masks: list[str] = []
    with ExitStack() as seen:
        seen.enter_context(_masks_seen(state.forward, masks))
        # Compiled code cannot be looked into; its products are seen in an evaluation.
        if state.step == 0 and state.forward is state.model:
            watch.looks["matmuls"] = seen.enter_context(matmuls_seen(state.model))
        yield watch
    watch.looks["micro_batches"] = {"seen": len(batches)}
    watch.looks["masks"] = _needed(masks, batches, shape, state.recipe.data.document_mask)
    if before:
        watch.looks["cautious"] = _left_alone(groups, before)


@contextmanager
def matmuls_seen(model: nn.Module) -> Iterator[dict[str, int]]:
    """Yield what the matrix products of the model give inside the block: how many in each number format."""
    seen: dict[str, int] = {}

    def see(module: nn.Module, given: Any, out: Tensor) -> None:
        name = str(out.dtype).removeprefix("torch.")
        seen[name] = seen.get(name, 0) + 1

    handles = [m.register_forward_hook(see) for m in model.modules() if type(m) is nn.Linear]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def sample(group: dict[str, Any], of: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
    """Return `SAMPLED` elements of a group's parameters, the same ones every time, in float32: 1-d, on their device.

    Args:
        group: of an optimizer; every parameter of it is sampled at least once.
        of: what is sampled of a parameter: a tensor of its shape.
    """
    each = max(1, SAMPLED // len(group["params"]))
    return torch.cat([pick(of(p), _places(p, each)).float() for p in group["params"]])


def sample_weights(group: dict[str, Any]) -> Tensor:
    """Return how many elements of the group each element of its `sample` stands for."""
    each = max(1, SAMPLED // len(group["params"]))
    return torch.cat(
        [torch.full_like(_places(p, each), p.numel() / each, dtype=torch.float32) for p in group["params"]]
    )


def _places(parameter: Tensor, each: int) -> Tensor:
    # The golden ratio spreads them over rows and columns, whatever the shape.
    spread = torch.arange(1, each + 1, dtype=torch.float64).mul_(0.6180339887498949).frac_()
    return (spread * parameter.numel()).long().clamp_(max=parameter.numel() - 1).to(parameter.device)


@contextmanager
def _masks_seen(forward: nn.Module, names: list[str]) -> Iterator[None]:
    """Note the kind of every mask that the model is given inside the block, compiled or not."""

    def see(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        names.append(type(named.get("mask")).__name__)

    handle = forward.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _needed(masks: list[str], batches: list[Batch], shape: Shape, document_mask: bool) -> dict[str, int]:
    """Return how often each kind of mask was used where one was needed: two documents in a row, or a window."""
    counts: dict[str, int] = {}
    for name, batch in zip(masks, batches, strict=False):
        ids_BT = batch.document_ids_BT
        if ids_BT is None:
            kind = "none" if document_mask else name if shape.window is not None else ""
        else:
            is_needed = shape.window is not None or bool((ids_BT[:, 0] != ids_BT[:, -1]).any())
            kind = name if is_needed else ""
        if kind:
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _left_alone(groups: list[dict[str, Any]], before: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return how many sampled elements with a gradient a step left as they were, its decay apart, or moved."""
    still, pulled = [], []
    for group, (old, gradient) in zip(groups, before, strict=True):
        now = sample(group)
        is_still = (now == old) | (now == old * (1.0 - decay_rate(group)))
        pulled.append((gradient != 0).sum())
        still.append((is_still & (gradient != 0)).sum())
    left = torch.stack(still).sum()
    return {"still": left, "moved": torch.stack(pulled).sum() - left}

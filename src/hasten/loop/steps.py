"""The only training loop: one optimizer step, and as many of them as are asked for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.data.batches import Batch
from hasten.loop.proving import Told, count_step, settings_now
from hasten.loop.state import Shape, State
from hasten.loop.watching import watched
from hasten.model import loss_sum
from hasten.model.loss import NO_TARGET
from hasten.schedules import apply


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: its kind, the step it happened at, and what there is to know of it."""

    kind: str
    step: int
    values: Mapping[str, Any]


# A hook looks at events. It may never change training, so the order of hooks never matters.
Hook = Callable[[Event], None]


class Teller:
    """Tells every hook what happened: ``tell("evaluation", val_loss=...)``."""

    def __init__(self, hooks: Iterable[Hook], state: State | None = None) -> None:
        self._hooks = tuple(hooks)
        self._state = state

    def __call__(self, kind: str, **values: Any) -> None:
        event = Event(kind, self._state.step if self._state else 0, values)
        for hook in self._hooks:
            hook(event)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; tensors are still on the device and are read a step later."""

    loss: Tensor
    norm: Tensor
    clipped: Tensor
    skipped: bool
    loss_scale: float
    lr: float
    progress: float
    seq_len: int
    num_targets: int
    tokens: int
    seconds: float
    step_seconds: float
    told: Told


def advance(
    state: State, stop: int, *, hooks: Iterable[Hook] = (), pause: Callable[[State], bool] | None = None
) -> State:
    """Train until `stop` steps are done, the run diverges, or `pause` says so; return the same state.

    Stopping never touches a schedule: schedules see `state.progress`, which `start` fixed. Training on from the
    returned state, or from a checkpoint of it, gives the same bits as never having stopped.

    Args:
        stop: optimizer steps done in all, at most the horizon.
        hooks: called with a ``step`` event for every step.
        pause: asked after every step; True returns early.
    """
    hooks = tuple(hooks)
    waiting: StepReport | None = None
    while state.step < stop and state.status == "running":
        report = train_step(state)
        # The device is already busy with this step while the one before is read: no stall on a GPU.
        if waiting is not None:
            _tell(state, state.step - 1, waiting, hooks)
        waiting = report
        if pause is not None and pause(state):
            break
    if waiting is not None:
        _tell(state, state.step, waiting, hooks)
    return state


def train_step(state: State) -> StepReport:
    """Do one optimizer step: forward and backward over its micro-batches, clip, update.

    The loss is the mean over the real target tokens of the whole step, so neither the number of micro-batches nor
    padding changes it. Reference for the order of things: Goyal et al., arXiv:1706.02677, section 3 (normalise over
    the global mini-batch).
    """
    began = time.perf_counter()
    shape = state.shape()
    batches, position = state.take(shape)
    num_targets = sum(batch.num_targets for batch in batches)
    gathered = time.perf_counter()

    apply(state.optimizer, state.schedules, shape.progress)
    for group in state.optimizer.param_groups:
        group["lr"] *= shape.lr_factor
    settings = settings_now(state, shape)
    loss = 0.0
    with watched(state, batches, shape) as watch:
        for batch in batches:
            share = batch_loss(state, batch, shape) / num_targets
            state.precision.backward(share)
            loss = loss + share.detach()
        update = state.precision.step(state.optimizer, watch.clip)

    state.work += state.work_at(shape.progress, state.step)
    state.step += 1
    if _estimate_is_due(state):
        _estimate(state, batches, shape, num_targets)
        watch.looks["estimates"] = {"done": 1}
    state.position = position
    state.tokens += num_targets
    done = time.perf_counter()
    state.spend("data", gathered - began)
    state.spend("train", done - gathered)
    return StepReport(
        loss=loss,
        norm=update.norm,
        clipped=update.clipped,
        skipped=update.skipped,
        loss_scale=update.loss_scale,
        lr=state.recipe.optimizer.lr * state.schedule(shape.progress) * shape.lr_factor,
        progress=shape.progress,
        seq_len=batches[0].tokens_BT.shape[1],
        num_targets=num_targets,
        tokens=state.tokens,
        seconds=state.clock.seconds,
        step_seconds=done - began,
        told=Told(
            targets=num_targets,
            positions=sum(batch.tokens_BT.numel() for batch in batches),
            seq_len=batches[0].tokens_BT.shape[1],
            micro_batches=len(batches),
            window=shape.window,
            groups=settings,
            looks=watch.looks,
        ),
    )


def batch_loss(state: State, batch: Batch, shape: Shape) -> Tensor:
    """Return the summed loss of a micro-batch under the run's forward pass."""
    return loss_sum(state.forward, batch.tokens_BT, batch.labels_BT, batch.document_ids_BT, shape.window)


def _estimate_is_due(state: State) -> bool:
    every = state.optimizer.estimate_every
    return every > 0 and state.step % every == 0


def _estimate(state: State, batches: list[Batch], shape: Shape, num_targets: int) -> None:
    """Give the optimizer gradients of a loss over labels that the model draws itself, in place of the text's.

    What is drawn depends on the seed and the step alone, so a resumed run draws the same.
    """
    generator = torch.Generator(device=state.device).manual_seed(state.seed * 1_000_003 + state.step)
    for batch in batches:
        with torch.no_grad():
            logits_BTV = state.model(batch.tokens_BT, batch.document_ids_BT, window=shape.window)
            chances_NV = torch.softmax(logits_BTV.float(), -1).flatten(0, 1)
            drawn_BT = torch.multinomial(chances_NV, 1, generator=generator).view_as(batch.labels_BT)
        labels_BT = torch.where(batch.labels_BT == NO_TARGET, batch.labels_BT, drawn_BT.to(batch.labels_BT.dtype))
        drawn = dataclasses.replace(batch, labels_BT=labels_BT)
        state.precision.backward(batch_loss(state, drawn, shape) / num_targets)
    state.precision.estimate(state.optimizer)


def _tell(state: State, step: int, report: StepReport, hooks: tuple[Hook, ...]) -> None:
    loss, norm = float(report.loss), float(report.norm)
    clipped = bool(report.clipped)
    count_step(state, report.told, norm=norm, clipped=clipped, skipped=report.skipped, loss_scale=report.loss_scale)
    verdict = state.guard.judge(loss, norm, skipped=report.skipped)
    if verdict.diverged:
        state.status, state.reason = "diverged", verdict.reason
    values = {
        "loss": loss,
        "lr": report.lr,
        "grad_norm": norm,
        "clipped": clipped,
        "skipped": report.skipped,
        "loss_scale": report.loss_scale,
        "seq_len": report.seq_len,
        "progress": report.progress,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "tokens_per_second": report.num_targets / max(report.step_seconds, 1e-9),
    }
    for hook in hooks:
        hook(Event("step", step, values))

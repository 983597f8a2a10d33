"""The only training loop: one optimizer step, and as many of them as are asked for."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.clip import ClipReport
from hasten.data.batches import Batch
from hasten.errors import DamagedData, RunError, printable
from hasten.guard import Verdict
from hasten.loop.leaving import GUARDED, count_left_out, documents_at, jump, leave_out_damaged
from hasten.loop.proving import Told, count_step, settings_now
from hasten.loop.recovery import go_back, keep_place
from hasten.loop.state import Shape, State
from hasten.loop.telling import Event, Hook, Teller
from hasten.loop.watching import watched
from hasten.model import loss_sum
from hasten.model.loss import NO_TARGET
from hasten.schedules import apply


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; tensors are still on the device and are read a step later.

    `verdict` is the guard's, None where it has not been asked yet; `skipped` says whether the update was left out.
    """

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
    verdict: Verdict | None


class NoMemory(Exception):
    """A forward or backward pass found no memory; nothing of the state has changed."""


def advance(
    state: State, stop: int, *, hooks: Iterable[Hook] = (), pause: Callable[[State], bool] | None = None
) -> State:
    """Train until `stop` steps are done, the run diverges, or `pause` says so; return the same state.

    Stopping never touches a schedule: schedules see `state.progress`, which `start` fixed. Training on from the
    returned state, or from a checkpoint of it, gives the same bits as never having stopped. What the guard says is
    done here: a step's update is left out, or the run goes back to an earlier state and `state.step` with it.

    Args:
        stop: optimizer steps done in all, at most the horizon.
        hooks: called with a ``step`` event for every step.
        pause: asked after every step; True returns early.
    """
    hooks = tuple(hooks)
    tell = Teller(hooks, state)
    waiting: StepReport | None = None
    while state.step < stop and state.status == "running":
        keep_place(state)
        report = train_step(state, tell)
        # The device is already busy with this step while the one before is read: no stall on a GPU.
        if waiting is not None:
            _tell(state, state.step - 1, waiting, hooks)
        waiting = report
        if report.verdict is not None and report.verdict.action in ("rollback", "diverged"):
            _tell(state, state.step, waiting, hooks)
            waiting = None
            if report.verdict.action == "rollback":
                go_back(state, tell, report.verdict.reason)
        if pause is not None and pause(state):
            break
    if waiting is not None:
        _tell(state, state.step, waiting, hooks)
    return state


def train_step(state: State, tell: Teller | None = None) -> StepReport:
    """Do one optimizer step: forward and backward over its micro-batches, clip, ask the guard, update.

    Where the passes find no memory, the step is done again in micro-batches half as large, with the same tokens.

    The loss is the mean over the real target tokens of the whole step, so neither the number of micro-batches nor
    padding changes it. Reference for the order of things: Goyal et al., arXiv:1706.02677, section 3 (normalise over
    the global mini-batch).

    Raises:
        RunError: there is no memory for a micro-batch of one row either.
    """
    tell = tell or Teller((), state)
    while True:
        try:
            return _step(state, tell)
        except NoMemory as error:
            shortage = str(error)
        _halve(state, tell, shortage)


def _step(state: State, tell: Teller) -> StepReport:
    began = time.perf_counter()
    shape = state.shape()
    begin, batches, position, num_targets = _take(state, shape, tell)
    gathered = time.perf_counter()

    apply(state.optimizer, state.schedules, shape.progress)
    for group in state.optimizer.param_groups:
        group["lr"] *= shape.lr_factor
    settings = settings_now(state, shape)
    verdict: Verdict | None = None
    row_length = batches[0].tokens_BT.shape[1]

    def accept(seen: ClipReport, overflowed: bool) -> bool:
        nonlocal verdict
        if state.guard.is_active:  # else nothing waits for the device here, and the loss is judged a step later
            verdict = state.guard.judge(float(loss), float(seen.norm), overflowed=overflowed, length=row_length)
        return verdict is None or verdict.action == "go"

    with watched(state, batches, shape) as watch:
        loss = _backward(state, batches, shape, num_targets)
        update = state.precision.step(state.optimizer, watch.clip, accept)

    is_good = verdict is None or verdict.action == "go"
    state.work += state.work_at(shape.progress, state.step)
    state.step += 1
    if is_good and _estimate_is_due(state):
        _estimate(state, batches, shape, num_targets)
        watch.looks["estimates"] = {"done": 1}
    state.position = position
    state.tokens += num_targets if is_good else 0
    if not is_good:
        count_left_out(state, GUARDED, num_targets)
    if verdict is not None and verdict.cause:
        _tell_verdict(state, tell, verdict, shape, begin, float(loss), float(update.norm))
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
        seq_len=row_length,
        num_targets=num_targets,
        tokens=state.tokens,
        seconds=state.clock.seconds,
        step_seconds=done - began,
        told=Told(
            targets=num_targets,
            positions=sum(batch.tokens_BT.numel() for batch in batches),
            seq_len=row_length,
            micro_batches=len(batches),
            window=shape.window,
            groups=settings,
            looks=watch.looks,
        ),
        verdict=verdict,
    )


def _take(state: State, shape: Shape, tell: Teller) -> tuple[tuple[int, ...], list[Batch], tuple[int, ...], int]:
    """Return where the next step begins that is not left out, its micro-batches, where it ends, and its targets.

    The micro-batches are those of this process, the targets those of all.

    Raises:
        DamagedData: the recipe says to stop, or a whole epoch is damaged.
    """
    for _ in range(math.ceil(state.steps_per_epoch)):
        jump(state)
        try:
            return _taken(state, shape)
        except DamagedData as damage:
            if state.recipe.data.on_damage == "stop":
                raise
            leave_out_damaged(state, shape, tell, damage)
    return _taken(state, shape)


def _taken(state: State, shape: Shape) -> tuple[tuple[int, ...], list[Batch], tuple[int, ...], int]:
    """Return what `_take` returns of the step at the present place, once all processes have come to it."""
    batches: list[Batch] = []
    position, damage = state.position, None
    try:
        batches, position = state.take(shape)
    except DamagedData as found:
        damage = found
    own = sum(batch.num_targets for batch in batches)
    targets = state.company.agree(state.clock, own, damage, state.step)
    return state.position, batches, position, targets


def _backward(state: State, batches: list[Batch], shape: Shape, num_targets: int) -> Tensor:
    """Do the forward and backward passes of a step and return its mean loss over all processes, still on the device.

    Raises:
        NoMemory: there is too little.
    """
    loss = torch.zeros((), device=state.device)
    try:
        for batch, is_last in _passing(state, batches):
            share = batch_loss(state, batch, shape) / num_targets
            _add_gradients(state, share, is_last)
            loss = loss + share.detach()
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        raise NoMemory(str(error).splitlines()[0]) from None
    return state.company.parallel.total(loss)


def _passing(state: State, batches: list[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Yield the micro-batches of a step and whether it is the last, each inside what its passes go on in."""
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        with state.company.parallel.passing(state.forward, is_last):
            yield batch, is_last


def _add_gradients(state: State, share: Tensor, is_last: bool) -> None:
    parallel = state.company.parallel
    state.precision.backward(share * parallel.loss_factor, is_collected=parallel.has_collected(is_last))


def _is_shortage(error: BaseException) -> bool:
    """Say whether there was no memory; on a CPU that is a plain RuntimeError, known by its words alone."""
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def _halve(state: State, tell: Teller, shortage: str) -> None:
    """Let every step from here on have micro-batches of half as many rows."""
    state.model.zero_grad(set_to_none=True)
    state.optimizer.zero_grad(set_to_none=True)
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    rows = state.batches.micro_rows
    if rows == 1 or state.company.ranks.size > 1:  # the others have not met it, and go on
        size = "though its micro-batches have one row" if rows == 1 else f"whose micro-batches have {rows} rows"
        smaller = "" if rows == 1 else f"batch.micro_rows={rows // 2}, "
        raise RunError(
            f"There is no memory for step {state.step + 1}, {size} of "
            f"{state.recipe.lengths.seq_len} tokens ({printable(shortage)[:200]}): give {smaller}shorter rows, a "
            "smaller model or optimizer.state_format=8bit; the newest checkpoint is whole."
        )
    state.batches.micro_rows = state.notes["micro_rows"] = rows // 2
    tell(
        "warning",
        message=f"There was no memory for micro-batches of {rows} rows at step {state.step + 1}: from here on they "
        f"have {rows // 2}, and a step has as many tokens as before.",
    )


def _tell_verdict(
    state: State, tell: Teller, verdict: Verdict, shape: Shape, begin: tuple[int, ...], loss: float, norm: float
) -> None:
    """Tell that a step was found bad, and which documents it read."""
    tell(
        "bad_step",
        action=verdict.action,
        cause=verdict.cause,
        spike=verdict.kind,
        reason=verdict.reason,
        loss=loss,
        grad_norm=norm,
        position=list(begin),
        documents=documents_at(state, begin, shape),
    )


def batch_loss(state: State, batch: Batch, shape: Shape) -> Tensor:
    """Return the summed loss of a micro-batch under the run's forward pass."""
    return loss_sum(state.forward, batch.tokens_BT, batch.labels_BT, batch.document_ids_BT, shape.window)


def _estimate_is_due(state: State) -> bool:
    every = state.optimizer.estimate_every
    return every > 0 and state.step % every == 0


def _estimate(state: State, batches: list[Batch], shape: Shape, num_targets: int) -> None:
    """Give the optimizer gradients of a loss over labels that the model draws itself, in place of the text's.

    What is drawn for a row depends on the seed, the step and the row's place in the step alone: a resumed run draws the
    same, and so do several processes.
    """
    generator = torch.Generator(device=state.device)
    seq_len = state.recipe.lengths.seq_len
    row = state.batches.share(shape.rows)[0] * (seq_len // batches[0].tokens_BT.shape[1])
    for batch, is_last in _passing(state, batches):
        with torch.no_grad():
            logits_BTV = state.model(batch.tokens_BT, batch.document_ids_BT, window=shape.window)
            drawn_BT = torch.empty_like(batch.labels_BT)
            for logits_TV, drawn_T in zip(logits_BTV, drawn_BT, strict=True):
                generator.manual_seed((state.seed * 1_000_003 + state.step) * 1_000_003 + row)
                chances_TV = torch.softmax(logits_TV.float(), -1)
                drawn_T.copy_(torch.multinomial(chances_TV, 1, generator=generator)[:, 0])
                row += 1
        labels_BT = torch.where(batch.labels_BT == NO_TARGET, batch.labels_BT, drawn_BT)
        drawn = dataclasses.replace(batch, labels_BT=labels_BT)
        _add_gradients(state, batch_loss(state, drawn, shape) / num_targets, is_last)
    state.precision.estimate(state.optimizer)


def _tell(state: State, step: int, report: StepReport, hooks: tuple[Hook, ...]) -> None:
    loss, norm = float(report.loss), float(report.norm)
    clipped = bool(report.clipped)
    count_step(state, report.told, norm=norm, clipped=clipped, skipped=report.skipped, loss_scale=report.loss_scale)
    verdict = report.verdict or state.guard.judge(loss, norm, overflowed=report.skipped)
    if verdict.action == "diverged":
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

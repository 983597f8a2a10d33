"""What happens between two optimizer steps: an evaluation, a checkpoint."""

from __future__ import annotations

import time

import torch

from hasten import checkpoint
from hasten.evaluation import Evaluation, evaluate_shards
from hasten.loop.snapshots import capture
from hasten.loop.state import State, weights_to_evaluate
from hasten.loop.steps import Teller
from hasten.loop.timetable import Timetable
from hasten.record import RunFolder


def between_steps(state: State, folder: RunFolder, timetable: Timetable, tell: Teller) -> None:
    """Do what is due after a step; what is due at the very end belongs to the finish of the run."""
    if state.step >= state.total_steps:
        return
    timetable.plan_again(state)
    if timetable.evaluation_due(state):
        before = state.phases.get("evaluation", 0.0)
        evaluate_in_run(state, tell)
        timetable.evaluation_took(state.phases["evaluation"] - before)
    if state.status == "running" and timetable.checkpoint_due(state):
        timetable.checkpoint_took(save(state, folder, tell))


def validate(state: State, *, max_tokens: int | None) -> Evaluation:
    """Evaluate the run's model on its held-out text: about `max_tokens` of it, spread evenly, or the whole."""
    with weights_to_evaluate(state):
        return evaluate_shards(
            state.model,
            state.data.val,
            seq_len=state.recipe.lengths.seq_len,
            document_token=state.data.document_token,
            max_tokens=max_tokens,
        )


def save(state: State, folder: RunFolder, tell: Teller) -> float:
    """Write a checkpoint and return the seconds it took; never one with a non-finite weight: that is divergence."""
    began = time.perf_counter()
    if not all(bool(torch.isfinite(master).all()) for master in state.precision.named_masters().values()):
        state.status, state.reason = "diverged", f"a weight is not finite after step {state.step}"
        return 0.0
    tensors, plain = capture(state)
    path = checkpoint.save(folder.checkpoints, state.step, tensors, plain, keep=state.recipe.checkpoint.keep)
    spent = time.perf_counter() - began
    state.spend("checkpoint", spent)
    tell("checkpoint", path=path.name, seconds=spent)
    return spent


def evaluate_in_run(state: State, tell: Teller) -> Evaluation:
    """Evaluate on the tokens that evaluations within the run take, book its time, and tell it."""
    began = time.perf_counter()
    evaluation = validate(state, max_tokens=state.recipe.evaluate.tokens)
    spent = time.perf_counter() - began
    state.spend("evaluation", spent)
    tell(
        "evaluation",
        val_loss=evaluation.loss,
        val_bpb=evaluation.bits_per_byte,
        tokens=evaluation.tokens,
        whole=False,
        seconds=spent,
        trained_tokens=state.tokens,
        train_seconds=state.phases.get("train", 0.0) + state.phases.get("data", 0.0),
    )
    target = state.recipe.target_loss
    if target is not None and evaluation.loss <= target:
        state.status = "finished"
        state.reason = f"validation loss {evaluation.loss:.4f} reached target_loss={target:g}"
    return evaluation

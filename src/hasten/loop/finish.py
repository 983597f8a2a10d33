"""What a run leaves when it ends: last checkpoint, whole evaluation, exported model, sample, result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.checkpoint import Writer
from hasten.evaluation import baselines
from hasten.exports import export
from hasten.generation import generate
from hasten.loop.between import evaluate_in_run, save_last, tell_written, validate
from hasten.loop.memory import peak_bytes
from hasten.loop.proving import prove, watched_evaluation
from hasten.loop.state import State, weights_to_evaluate
from hasten.loop.telling import Teller
from hasten.model import count_parameters, read_model
from hasten.record import RunFolder, write_result

SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class Result:
    """How a run ended.

    `status` is ``finished``, ``diverged``, ``stopped`` (`reason` then names the signal; the same command goes on) or
    ``paused`` (where ``until`` asked for it).
    `values` is what ``result.json`` holds. `already_finished`: this call found nothing left to do.
    """

    status: str
    reason: str
    folder: Path
    values: Mapping[str, Any]
    already_finished: bool = False


def finish(state: State, folder: RunFolder, writer: Writer, tell: Teller) -> Result:
    """Save, evaluate on the whole held-out text, export and describe a run that has ended; return its result.

    A diverged run is described, but neither saved nor exported: its last good checkpoint stays the newest.
    """
    state.company.tick(state.clock)
    seconds, memory = state.clock.seconds, peak_bytes(state.device)
    if state.status == "running":
        state.status = "finished"
    if state.status == "finished":
        save_last(state, writer, tell)
    if state.status == "diverged":
        tell_written(writer.wait(), tell)
        tell("warning", message=f"The run diverged: {state.reason}.")
        return _write(state, folder, tell, {}, seconds, memory)

    with watched_evaluation(state):
        evaluation = validate(state, max_tokens=None)
    tell(
        "evaluation",
        val_loss=evaluation.loss,
        val_bpb=evaluation.bits_per_byte,
        tokens=evaluation.tokens,
        whole=True,
    )
    with weights_to_evaluate(state):
        weights = state.company.parallel.whole(state.precision.named_masters())
        text = _export(state, weights, folder) if state.company.ranks.is_main else ""
    tell("sample", prompt="", text=text)
    values = {
        "val_loss": evaluation.loss,
        "val_bpb": evaluation.bits_per_byte,
        "val_tokens": evaluation.tokens,
        "val_bytes": evaluation.bytes,
        **(baselines(state.data.val, state.data.tokenizer) if state.company.ranks.is_main else {}),
    }
    return _write(state, folder, tell, values, seconds, memory)


def _export(state: State, weights: Mapping[str, Tensor], folder: RunFolder) -> str:
    """Write the model in Hugging Face format, and return what it writes."""
    tokenizer = state.data.tokenizer
    final = export(weights, state.config, tokenizer, folder.final, document_token=state.data.document_token)
    model = read_model(final) if state.company.parallel.is_sharded else state.model
    return "".join(generate(model, tokenizer, max_tokens=SAMPLE_TOKENS, seed=state.seed))


def stopped(state: State, folder: RunFolder, writer: Writer, tell: Teller, signal_name: str) -> Result:
    """Save a run that a signal stopped, so that the same command goes on from here; return its result so far."""
    state.company.tick(state.clock)
    seconds, memory = state.clock.seconds, peak_bytes(state.device)
    save_last(state, writer, tell)
    if state.status == "diverged":
        return finish(state, folder, writer, tell)
    tell("stop", reason=signal_name)
    state.status, state.reason = "stopped", signal_name
    return _write(state, folder, tell, {}, seconds, memory)


def paused(state: State, folder: RunFolder, writer: Writer, tell: Teller, reason: str) -> Result:
    """Save and evaluate a run that was asked to go no further for now; return its result so far.

    The evaluation is that of `evaluate.tokens`, so that pausing costs what an evaluation within the run costs.
    """
    state.company.tick(state.clock)
    seconds, memory = state.clock.seconds, peak_bytes(state.device)
    save_last(state, writer, tell)
    if state.status == "diverged":
        return finish(state, folder, writer, tell)
    with watched_evaluation(state):
        evaluation = evaluate_in_run(state, tell)
    tell("stop", reason=reason)
    state.status, state.reason = "paused", reason
    values = {"val_loss": evaluation.loss, "val_bpb": evaluation.bits_per_byte, "val_tokens": evaluation.tokens}
    return _write(state, folder, tell, values, seconds, memory)


def _write(
    state: State, folder: RunFolder, tell: Teller, values: Mapping[str, Any], seconds: float, memory: int | None
) -> Result:
    trained = state.phases.get("train", 0.0) + state.phases.get("data", 0.0)
    before = state.notes.get("branch", {}).get("run_tokens", 0)  # those of the run that this one branched from
    tell("phases", **state.phases)
    proof = prove(state)
    tell("proof", facts=proof.facts, warnings=proof.warnings, data=proof.data)
    for message in proof.warnings:
        tell("warning", message=message)
    untrained = state.notes.get("untrained", {})
    result = {
        "status": state.status,
        "reason": state.reason,
        "val_loss": None,
        "val_bpb": None,
        **values,
        "untrained_val_loss": untrained.get("loss"),
        "untrained_val_bpb": untrained.get("bits_per_byte"),
        "tokens": state.tokens,
        "steps": state.step,
        "source_epochs": state.source_epochs(state.step),
        "left_out": dict(state.notes.get("left_out", {})),
        "rollbacks": state.guard.rollbacks,
        "total_steps": state.total_steps,
        "seconds": seconds,
        "phases": dict(state.phases),
        "tokens_per_second": (state.tokens - before) / trained if trained else None,
        "memory_bytes": memory,
        "params": count_parameters(state.config),
        "seed": state.seed,
        "corpus": state.data.manifest["corpus"],
        "corpus_sha256": state.data.corpus_sha256,
        "tokenizer_sha256": state.data.tokenizer_sha256,
    }
    if state.company.ranks.is_main:
        write_result(folder, {**result, "proof": proof.data})
    tell("finish", **result)
    return Result(state.status, state.reason, folder.path, {**result, "proof": proof.data})

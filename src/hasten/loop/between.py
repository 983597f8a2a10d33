"""What happens between two optimizer steps: an evaluation, a checkpoint."""

from __future__ import annotations

import time

from hasten.checkpoint import Writer, Written, newest
from hasten.distributed import Ranks
from hasten.errors import RunError
from hasten.evaluation import Evaluation, evaluate_shards
from hasten.loop.recovery import go_back
from hasten.loop.snapshots import Snapshot, hold, snapshot
from hasten.loop.state import State, weights_to_evaluate
from hasten.loop.telling import Teller
from hasten.loop.timetable import Timetable


def between_steps(state: State, writer: Writer, timetable: Timetable, tell: Teller) -> None:
    """Do what is due after a step; what is due at the very end belongs to the finish of the run."""
    tell_written(writer.done(), tell)
    if state.step >= state.total_steps:
        return
    timetable.plan_again(state)
    if timetable.evaluation_due(state):
        before = state.phases.get("evaluation", 0.0)
        evaluate_in_run(state, tell)
        timetable.evaluation_took(state.phases["evaluation"] - before)
    if state.status == "running" and timetable.checkpoint_due(state):
        timetable.checkpoint_took(save(state, writer, tell))


def validate(state: State, *, max_tokens: int | None) -> Evaluation:
    """Evaluate the run's model on its held-out text: about `max_tokens` of it, spread evenly, or the whole."""
    with weights_to_evaluate(state):
        return evaluate_shards(
            state.model,
            state.data.val,
            seq_len=state.recipe.lengths.seq_len,
            document_token=state.data.document_token,
            max_tokens=max_tokens,
            ranks=state.company.ranks,
        )


def save(state: State, writer: Writer, tell: Teller) -> float:
    """Begin to write a checkpoint, and return the seconds that training waited for it.

    A broken state is never saved: the run goes back to the one that was good last.
    """
    began = time.perf_counter()
    taken = snapshot(state)
    if taken is None:
        go_back(state, tell, f"a number of the state is not finite after step {state.step}")
        return 0.0
    hold(state, taken)
    _write(state, taken, writer, tell)
    spent = time.perf_counter() - began
    state.spend("checkpoint", spent)
    return spent


def save_last(state: State, writer: Writer, tell: Teller) -> None:
    """Write the checkpoint of a run that ends here, and wait until it is on the disk; a broken state is divergence.

    Raises:
        RunError: it cannot be written.
    """
    began = time.perf_counter()
    taken = snapshot(state)
    if taken is None:
        state.status, state.reason = "diverged", f"a number of the state is not finite after step {state.step}"
        return
    _write(state, taken, writer, tell)
    written = writer.wait()
    state.spend("checkpoint", time.perf_counter() - began)
    tell_written([one for one in written if one.step != taken.step], tell)
    (last,) = (one for one in written if one.step == taken.step)
    if last.error is not None:
        raise RunError(f"{last.error} The same command then goes on from the newest checkpoint.")
    tell_written([last], tell)


def _write(state: State, taken: Snapshot, writer: Writer, tell: Teller) -> None:
    tell("saving")  # the record is forced to the disk first: no saved step without its lines
    tell_written(writer.wait(), tell)
    owned = state.company.parallel.owned
    writer.write(taken.step, lambda: {group: owned(held) for group, held in taken.tensors.items()}, taken.plain)


def newest_saved(writer: Writer, ranks: Ranks, tell: Teller) -> Snapshot | None:
    """Return the newest good checkpoint as a state to go back to, once all are written; None where there is none."""
    tell_written(writer.wait(), tell)
    loaded, notes = newest(writer.root, ranks)
    for note in notes:
        tell("warning", message=note)
    return None if loaded is None else Snapshot(loaded.step, loaded.tensors, loaded.state)


def tell_written(written: list[Written], tell: Teller) -> None:
    """Tell what became of checkpoints; one that could not be written is a warning, and training goes on."""
    for one in written:
        if one.error is None:
            tell("checkpoint", path=one.path.name, seconds=one.seconds)
        else:
            tell("warning", message=f"{one.error} Training goes on; the next checkpoint is tried when it is due.")


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

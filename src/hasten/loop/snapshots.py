"""The whole of a run's state as named tensors and plain data, and back: what a checkpoint holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten import checkpoint
from hasten.errors import CheckpointError, RecipeError, printable
from hasten.loop.identity import identity
from hasten.loop.state import Clock, Jump, State, build_schedule, nothing_kept, weights_to_evaluate
from hasten.schedules import Progress
from hasten.sharding import local

STATE_FORMAT = 3


@dataclass(frozen=True)
class Snapshot:
    """A state at a step, in memory of its own: what a checkpoint of it would hold.

    `tensors` are what this process holds of them, as `Parallel.hold` gives it.
    """

    step: int
    tensors: dict[str, dict[str, Any]]
    plain: dict[str, Any]


def snapshot(state: State) -> Snapshot | None:
    """Return a copy of `state` on the CPU, which training goes on without changing; None if it is not all finite."""
    tensors, plain = capture(state)
    if state.company.ranks.sums([0.0 if _is_finite(tensors) else 1.0])[0]:
        return None
    if keeps_in_memory(state):
        state.kept = nothing_kept  # its memory is free before the new one is copied
    held = {group: state.company.parallel.hold(named) for group, named in tensors.items()}
    return Snapshot(state.step, held, copy.deepcopy(plain))


def keeps_in_memory(state: State) -> bool:
    """Say whether the state to go back to is kept in memory."""
    return state.guard.allows_rollback and state.recipe.guard.snapshot == "memory"


def hold(state: State, kept: Snapshot | None) -> None:
    """Let `kept` be what `state` goes back to, unless it is None, which the snapshot of a broken state is."""
    if kept is not None and keeps_in_memory(state):
        state.kept = lambda: kept


def snapshot_bytes(state: State, state_bytes: int) -> int:
    """Return the bytes of the copy that checkpoints are written from, where it shares the memory of training: on a CPU.

    It is there while one is written, and all the time where the guard goes back to it.

    Args:
        state: of the run.
        state_bytes: of its optimizer.
    """
    if state.device.type != "cpu":
        return 0
    return state_bytes + sum(4 * master.numel() for master in state.precision.named_masters().values())


def _is_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Say whether every number of the state is finite; a sum tells of most without a mask of the tensor's size."""
    held = [local(t) for named in tensors.values() for t in named.values()]
    floating = [t for t in held if t.is_floating_point() and t.numel()]
    return all(bool(t.sum().isfinite()) or bool(t.isfinite().all()) for t in floating)


def capture(state: State) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return what a checkpoint holds of `state`: named groups of tensors, and plain data."""
    optimizer_tensors, optimizer_layout = checkpoint.pack(state.optimizer.state_dict())
    tensors = {
        "model": {name: master.detach() for name, master in state.precision.named_masters().items()},
        "optimizer": optimizer_tensors,
        "random": {"torch": torch.get_rng_state()},
    }
    if state.optimizer.averages:
        with weights_to_evaluate(state):
            tensors["averaged"] = {name: p.detach().clone() for name, p in state.precision.named_masters().items()}
    plain = {
        "format": STATE_FORMAT,
        "identity": identity(state),
        "step": state.step,
        "position": list(state.position),
        "tokens": state.tokens,
        "seconds": state.clock.seconds,
        "phases": dict(state.phases),
        "status": state.status,
        "reason": state.reason,
        "seed": state.seed,
        "progress": state.progress.to_json() if state.progress else None,
        "schedule_steps": state.schedule_steps,
        "precision": state.precision.state_dict(),
        "guard": state.guard.state_dict(),
        "clip": state.clip.state_dict(),
        "jumps": [dataclasses.asdict(jump) for jump in state.jumps],
        "optimizer": optimizer_layout,
        "notes": copy.deepcopy(state.notes),
        "model": dataclasses.asdict(state.config),
        "corpus_sha256": state.data.corpus_sha256,
        "tokenizer_sha256": state.data.tokenizer_sha256,
    }
    return tensors, plain


def restore(state: State, tensors: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Any]) -> None:
    """Put a freshly started `state` where the checkpoint was, bit for bit.

    Args:
        state: as `start` built it.
        tensors: of a checkpoint that was read or of a `Snapshot`: what `Parallel.place` takes.
        plain: its plain data.
    """
    place = state.company.parallel.place
    plain = _current(state, plain)
    _refuse_other_data(state, plain)
    masters = state.precision.named_masters()
    saved = tensors["model"]
    if set(masters) != set(saved):
        raise RecipeError(
            "The checkpoint holds another model than the recipe describes; "
            f"differing weights: {', '.join(sorted(set(masters) ^ set(saved))[:3])}."
        )
    with torch.no_grad():
        for name, master in masters.items():
            local(master).copy_(local(place(saved[name], master)))
    state.precision.sync()
    placed = _placed(state, tensors["optimizer"])
    state.optimizer.load_state_dict(checkpoint.unpack(placed, plain["optimizer"]))
    state.precision.load_state_dict(plain["precision"])
    state.guard.load_state_dict(plain["guard"])
    state.clip.load_state_dict(plain["clip"])
    state.jumps = [_jump(jump) for jump in plain["jumps"]]
    if "micro_rows" in plain["notes"]:
        state.batches.micro_rows = plain["notes"]["micro_rows"]
    torch.set_rng_state(place(tensors["random"]["torch"], torch.get_rng_state()))
    for name in ("step", "tokens", "status", "reason"):
        setattr(state, name, plain[name])
    state.position = tuple(plain["position"])
    state.clock = Clock(before=plain["seconds"])
    state.phases = dict(plain["phases"])
    state.notes = copy.deepcopy(plain["notes"])
    if plain["progress"] is not None:
        state.progress = Progress.from_json(plain["progress"])
        build_schedule(state, plain["schedule_steps"])
    # The run that was never interrupted holds what it saved last too, so both go back to the same state.
    is_alone = state.company.ranks.size == 1
    hold(state, Snapshot(plain["step"], dict(tensors), dict(plain)) if is_alone else snapshot(state))


def _placed(state: State, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what this process is to hold of the optimizer's tensors; `checkpoint.pack` named them by their place."""
    place = state.company.parallel.place
    if not state.company.parallel.is_sharded:
        return {name: place(tensor, tensor) for name, tensor in saved.items()}
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    alone = torch.empty(())
    like: dict[str, dict[str, Tensor]] = {}
    placed: dict[str, Tensor] = {}
    for name, tensor in sorted(saved.items()):
        kind, _, rest = name.partition(".")
        number, _, entry = rest.partition(".")
        if kind != "state" or not number.isdigit() or int(number) >= len(parameters):
            placed[name] = place(tensor, alone)
            continue
        if number not in like:  # those of one parameter follow one another
            like = {number: state.optimizer.state_like(parameters[int(number)])}
        placed[name] = place(tensor, like[number].get(entry, alone))
    return placed


def _current(state: State, plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the plain data of a checkpoint in the present format; what an older one had not is as at a fresh start.

    Raises:
        CheckpointError: a newer hasten wrote it.
    """
    if plain["format"] == STATE_FORMAT:
        return plain
    if plain["format"] != 2:
        raise CheckpointError(
            f"The checkpoint's state has format {printable(str(plain['format']))[:20]}, and this hasten reads 2 and "
            f"{STATE_FORMAT}; use the hasten that wrote it."
        )
    return {**plain, "guard": state.guard.state_dict(), "clip": state.clip.state_dict(), "jumps": [], "bad": None}


def _refuse_other_data(state: State, plain: Mapping[str, Any]) -> None:
    for what, given in (
        ("corpus", state.data.corpus_sha256),
        ("tokenizer", state.data.tokenizer_sha256),
    ):
        saved = plain[f"{what}_sha256"]
        if saved != given:
            raise RecipeError(
                f"The {what} changed since this run was saved (was {saved[:12]}, is {given[:12]}); "
                "restore it, or start a new run with another out=."
            )


def _jump(plain: Mapping[str, Any]) -> Jump:
    return Jump(tuple(plain["begin"]), tuple(plain["end"]), plain["tokens"])

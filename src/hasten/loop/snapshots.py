"""The whole of a run's state as named tensors and plain data, and back: what a checkpoint holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten import checkpoint
from hasten.errors import RecipeError
from hasten.loop.state import Clock, State, build_schedule, weights_to_evaluate
from hasten.schedules import Progress

STATE_FORMAT = 2


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
        "step": state.step,
        "position": list(state.position),
        "tokens": state.tokens,
        "seconds": state.clock.seconds,
        "phases": state.phases,
        "status": state.status,
        "reason": state.reason,
        "seed": state.seed,
        "progress": state.progress.to_json() if state.progress else None,
        "schedule_steps": state.schedule_steps,
        "precision": state.precision.state_dict(),
        "guard": state.guard.state_dict(),
        "optimizer": optimizer_layout,
        "notes": copy.deepcopy(state.notes),
        "model": dataclasses.asdict(state.config),
        "corpus_sha256": state.data.corpus_sha256,
        "tokenizer_sha256": state.data.tokenizer_sha256,
    }
    return tensors, plain


def restore(state: State, tensors: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Any]) -> None:
    """Put a freshly started `state` where the checkpoint was, bit for bit."""
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
            master.copy_(saved[name])
    state.precision.sync()
    state.optimizer.load_state_dict(checkpoint.unpack(tensors["optimizer"], plain["optimizer"]))
    state.precision.load_state_dict(plain["precision"])
    state.guard.load_state_dict(plain["guard"])
    torch.set_rng_state(tensors["random"]["torch"])
    for name in ("step", "tokens", "status", "reason"):
        setattr(state, name, plain[name])
    state.position = tuple(plain["position"])
    state.clock = Clock(before=plain["seconds"])
    state.phases = dict(plain["phases"])
    state.notes = copy.deepcopy(plain["notes"])
    if plain["progress"] is not None:
        state.progress = Progress.from_json(plain["progress"])
        build_schedule(state, plain["schedule_steps"])


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

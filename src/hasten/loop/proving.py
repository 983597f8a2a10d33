"""The proof of a run: what every technique did, counted while it trains and summed up when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.loop.state import Shape, State
from hasten.loop.watching import Looks, matmuls_seen, sample, sample_weights
from hasten.optim import RULES
from hasten.optim.elementwise import decay_rate
from hasten.proof import Seen, count, empty, facts_of, quantile, warnings_of
from hasten.recipe.schedules import BESIDE

_BETAS = {"beta1": 0, "beta2": 1}
# Moments at which a schedule is looked up to say whether it changes anything.
POINTS = 1000


@dataclass(frozen=True)
class Told:
    """What a step leaves to be counted once the device has finished it."""

    targets: int
    positions: int
    seq_len: int
    micro_batches: int
    window: Tensor | None
    groups: Mapping[str, Mapping[str, float]]
    looks: Looks


@dataclass(frozen=True)
class Proof:
    """What a run did: lines for people, warnings, and the numbers behind both."""

    facts: list[list[str]]
    warnings: list[str]
    data: dict[str, Any]


def settings_now(state: State, shape: Shape) -> dict[str, dict[str, float]]:
    """Return what every parameter group has for this step, read from the groups that the optimizer steps.

    `factor` is the learning rate relative to its peak, what the size of the step multiplies it by apart; `decay` the
    share of a weight that decays.
    """
    scheduled = [name for name in BESIDE if getattr(state.recipe.schedule, name) is not None]
    found: dict[str, dict[str, float]] = {}
    for name, group in named_groups(state):
        lr = float(group["lr"])
        found[name] = settings = {
            "lr": lr,
            "factor": lr / (group["initial_lr"] * shape.lr_factor),
            "decay": 0.0 if group["hyperball"] else float(decay_rate(group)),
        }
        for setting in scheduled:
            if setting in group:
                settings[setting] = float(group[setting])
            elif setting in _BETAS and len(group.get("betas", ())) > _BETAS[setting]:
                settings[setting] = float(group["betas"][_BETAS[setting]])
    return found


def named_groups(state: State) -> list[tuple[str, dict[str, Any]]]:
    """Return the optimizer's groups by a name that no two share."""
    named: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(state.optimizer.param_groups):
        name = str(group.get("name", f"group {number}"))
        named[name if name not in named else f"{name} {number}"] = group
    return list(named.items())


def count_step(state: State, told: Told, *, norm: float, clipped: bool, skipped: bool, loss_scale: float) -> None:
    """Add a step to the run's tally, which its checkpoints hold."""
    seen = Seen(
        targets=told.targets,
        positions=told.positions,
        seq_len=told.seq_len,
        micro_batches=told.micro_batches,
        window=None if told.window is None else int(told.window),
        norm=norm,
        limit=state.clip.limit,
        clipped=clipped,
        skipped=skipped,
        loss_scale=loss_scale,
        groups=told.groups,
        # A step that was skipped moved nothing, whatever the optimizer would have done.
        looks={kind: _counted(n) for kind, n in told.looks.items() if n and not (skipped and kind == "cautious")},
    )
    count(tally(state), seen)


def tally(state: State) -> dict[str, Any]:
    """Return what was counted so far; a run begins with nothing."""
    return state.notes.setdefault("proof", empty())


def note_first_weights(state: State) -> None:
    """Keep a sample of the weights that a run begins with, to say at its end whether and how far they moved."""
    if state.step == 0:
        state.notes["first_weights"] = {name: sample(group).tolist() for name, group in named_groups(state)}


@contextmanager
def watched_evaluation(state: State) -> Iterator[None]:
    """Look at the matrix products of an evaluation inside the block, where those of training cannot be seen."""
    if state.forward is state.model:
        yield
        return
    with matmuls_seen(state.model) as seen:
        yield
    tally(state)["looks"]["matmuls"] = seen


def prove(state: State) -> Proof:
    """Return what the run did so far, and what of its recipe had no effect."""
    data = _data(state)
    return Proof(facts_of(data), warnings_of(state.recipe, data), data)


def _counted(counts: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(number) for name, number in counts.items()}


def _data(state: State) -> dict[str, Any]:
    counted = tally(state)
    norms = {name: quantile(counted, share) for name, share in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95))}
    return {
        **counted,
        "norm": {**norms, "max": counted["norm"]["max"], "broken": counted["norm"]["broken"]},
        "clip": {"name": state.recipe.clip.name, **counted["clip"]},
        "total_steps": state.total_steps,
        "is_whole": state.status == "finished" and state.step >= state.total_steps and counted["steps"] == state.step,
        "planned": _planned(state) if state.step else {},
        "packing": _packing(state),
        "document_mask": state.recipe.data.document_mask,
        "matmul_note": _matmul_note(state),
        "compile": graphs_since(state),
        "optimizer": _optimizer(state),
        "precision": state.recipe.precision.name,
        "left_out": dict(state.notes.get("left_out", {})),
        "rollbacks": state.guard.rollbacks,
        "seed": state.seed,
        "recipe_sha256": state.recipe.sha256,
        "corpus_sha256": state.data.corpus_sha256,
        "tokenizer_sha256": state.data.tokenizer_sha256,
    }


def _planned(state: State) -> dict[str, Any]:
    """Return what the recipe says should have happened, built from it anew: what trained may have been changed."""
    recipe, total = state.recipe, state.total_steps
    run = {
        "total_steps": state.schedule_steps,
        "tokens_per_step": state.tokens_per_step,
        "steps_per_epoch": state.steps_per_epoch,
        "seconds": recipe.budget.value if recipe.budget.unit == "seconds" else None,
    }
    curve = recipe.schedule.build_all(**run)["lr"]
    places = [point / POINTS for point in range(POINTS)]
    sizes = recipe.batch.build(rows=recipe.rows_per_step, micro_rows=state.batch_sizes.micro_rows)
    grows = recipe.lengths.build_window if recipe.lengths.name == "window" else recipe.lengths.build
    return {
        "last_factor": curve(state.progress(state.step - 1)),
        "is_flat": len({curve(place) for place in places}) == 1,
        "warmup_steps": recipe.schedule.warmup_share(**run) * state.schedule_steps,
        "growing_steps": 0.0 if recipe.lengths.name == "constant" else grows(**run).share * total,
        "sizes": len({sizes(place) for place in places}),
        "estimate_every": state.optimizer.estimate_every,
    }


def _packing(state: State) -> dict[str, Any] | None:
    reports = state.notes.get("packing")
    if not reports:
        return None
    lost: dict[str, int] = {}
    for report in reports:
        for cause, tokens in report["lost"].items():
            lost[cause] = lost.get(cause, 0) + tokens
    counts = {key: sum(report[key] for report in reports) for key in ("documents", "rows", "cuts")}
    name = "buckets" if state.recipe.lengths.reading == "bucket" else state.recipe.data.packing
    return {"name": name, **counts, "lost": lost}


def _matmul_note(state: State) -> str:
    seen = " of an evaluation, as compiled code cannot be looked into" if state.forward is not state.model else ""
    has_tf32 = state.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return f"{seen}{' (TF32 allowed)' if has_tf32 and state.recipe.precision.name == 'float32' else ''}"


def _optimizer(state: State) -> dict[str, Any]:
    optimizer, recipe = state.optimizer, state.recipe
    state_bytes: dict[str, int] = {}
    for kept in optimizer.state.values():
        for name, tensor in kept.items():
            if name != "step":
                dtype = str(tensor.dtype).removeprefix("torch.")
                state_bytes[dtype] = state_bytes.get(dtype, 0) + tensor.numel() * tensor.element_size()
    radii = sum("radius" in kept for kept in optimizer.state.values())
    return {
        "name": recipe.optimizer.name,
        "is_coupled": RULES[recipe.optimizer.name].is_coupled,
        "state_bytes": state_bytes,
        "moved": _moved(state),
        "on_sphere": radii if recipe.optimizer.model_dump().get("hyperball") else None,
        **_average(state),
    }


def _moved(state: State) -> dict[str, float]:
    """Return how far the weights are from where they began, relative to their norm there: all of them, and by group."""
    first = state.notes.get("first_weights")
    if first is None:
        return {}
    moved, changes, sizes = {}, 0.0, 0.0
    for name, group in named_groups(state):
        now, weight = sample(group).double().cpu(), sample_weights(group).double().cpu()
        began = torch.tensor(first[name], dtype=torch.float64)
        change = float((weight * (now - began).square()).sum())
        size = float((weight * began.square()).sum()) or float((weight * now.square()).sum()) or 1.0
        moved[name] = math.sqrt(change / size)
        changes, sizes = changes + change, sizes + size
    moved = {"all": math.sqrt(changes / sizes), **moved}
    return {name: share for name, share in moved.items() if math.isfinite(share)}


def _average(state: State) -> dict[str, Any]:
    """Return how far an average of the weights is from them, and whether it ever left the first ones."""
    kept = state.optimizer.state
    averaged = [
        (name, group)
        for name, group in named_groups(state)
        if group["ema"] > 0 and all("ema" in kept[p] for p in group["params"])
    ]
    if not averaged:
        return {"ema_distance": None, "ema_is_first": False}
    first = state.notes.get("first_weights", {})
    averages = [sample(group, lambda p: kept[p]["ema"]) for _, group in averaged]
    weights = torch.cat([sample(group) for _, group in averaged])
    is_first = all(average.tolist() == first.get(name) for average, (name, _) in zip(averages, averaged, strict=True))
    distance = float((torch.cat(averages) - weights).norm() / weights.norm().clamp(min=1e-30))
    return {"ema_distance": distance if math.isfinite(distance) else None, "ema_is_first": is_first}


# --- compilation ----------------------------------------------------------------------------------------------------


def note_graphs(state: State, mark: str) -> None:
    """Note how many graphs this process has compiled: once ``before`` the model is compiled, once it is ``warm``."""
    state.notes.setdefault("graphs", {})[mark] = _graphs()


def graphs_since(state: State) -> dict[str, int] | None:
    """Return the graphs of this attempt, those compiled while training among them; None where nothing is compiled."""
    marks = state.notes.get("graphs")
    if not state.notes.get("compile") or marks is None:
        return None
    now, before, warm = _graphs(), marks["before"], marks["warm"]
    graphs, breaks = (max(0, now[key] - before[key]) for key in ("graphs", "breaks"))
    return {"graphs": graphs, "recompiles": max(0, now["graphs"] - warm["graphs"]), "graph_breaks": breaks}


def _graphs() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}

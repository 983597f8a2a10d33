"""The same training in one process and, with FSDP2 over gloo, in two and in three.

Run as a script with a folder, it writes ``<number of ranks>.json`` there: what each case measured. Torch is imported once; the
ranks are forks.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from optimizer_problems import distance
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hasten.optim import OPTIMIZERS, RULES, RuledOptimizer, optimizer

WORLDS = (2, 3)
STEPS, SAVED_AT = 20, 9
LIMIT = timedelta(seconds=60)

# A rate at which weights move visibly, and decay that counts.
COMMON = {"lr": 0.01, "weight_decay": 0.1, "total_steps": STEPS}
OWN: dict[str, dict[str, Any]] = {
    "prodigy": {"lr": 1.0, "d0": 1e-3},
    "sophia": {"estimate_every": 5},
    "schedule_free_adamw": {"warmup_steps": 4},
}
MODIFIERS: dict[str, dict[str, Any]] = {
    "cautious": {"cautious": True},
    "cautious_decay": {"cautious_decay": True},
    "hyperball": {"hyperball": True},
    "ema": {"ema": 0.8, "ema_share": 0.7},
}


# --- models ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Sizes that neither two nor three divide; fused projections, experts, and what is smaller than the world."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(7)
        self.qkv, self.out = nn.Linear(7, 21), nn.Linear(7, 7, bias=False)
        self.up, self.down = nn.Linear(7, 10), nn.Linear(10, 7, bias=False)
        self.narrow, self.wide = nn.Linear(7, 2, bias=False), nn.Linear(2, 7, bias=False)
        self.experts = nn.Parameter(torch.empty(2, 7, 5))
        self.scale = nn.Parameter(torch.empty(1))
        self.num_heads = 1

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BTD)).split(7, dim=-1)
        x_BTD = x_BTD + self.out(torch.softmax(q @ k.mT, dim=-1) @ v)
        x_BTD = x_BTD + self.down(torch.tanh(self.up(x_BTD))) + self.scale * self.wide(self.narrow(x_BTD))
        first, second = self.experts
        return x_BTD + torch.tanh(x_BTD @ first) @ second.mT


class Small(nn.Module):
    """A language model of eleven tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(11, 7), Block(), nn.Linear(7, 11)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens_BT)).flatten(0, 1))


class Large(nn.Module):
    """A matrix and a convolution, each large enough for state in 8 bits; rows of the first longer than one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.convolution = nn.Linear(300, 17), nn.Conv2d(47, 10, 3)


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        name: in the results.
        rule: a key of `OPTIMIZERS`.
        settings: besides `COMMON` and `OWN`.
        model: its class.
        dtype: of the weights.
        is_real: whether gradients come from a loss over tokens, a part on each rank; else they are made up.
    """

    name: str
    rule: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = Small
    dtype: torch.dtype = torch.float32
    is_real: bool = False

    def build(self, mesh: DeviceMesh | None, seed: int = 0) -> tuple[nn.Module, RuledOptimizer]:
        """Return the model, sharded over `mesh`, and its optimizer."""
        model = self.model().to(self.dtype)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        if mesh is not None:
            for block in (module for module in model.modules() if isinstance(module, Block)):
                _shard(block, mesh)
            _shard(model, mesh)
        settings = {**COMMON, **OWN.get(self.rule, {}), **self.settings}
        if "compute_dtype" in RULES[self.rule].settings:
            settings["compute_dtype"] = "float32"
        return model, optimizer(model, self.rule, **settings)


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    # Gradients are summed over ranks and halved; see `_losses`. Both are exact, whatever the number of ranks.
    fully_shard(module, mesh=mesh).set_gradient_divide_factor(2.0)


RULE_CASES = [Case(f"rule {name}", name) for name in OPTIMIZERS]
MODIFIER_CASES = [
    Case(f"{modifier} {name}", name, settings) for modifier, settings in MODIFIERS.items() for name in ("adamw", "muon")
]
PACKED_CASES = [
    Case(f"8bit {name}", name, {"state_format": "8bit"}, Large) for name, _ in OPTIMIZERS.items() if RULES[name].has_8bit
]
BF16_CASES = [
    Case(f"{rounding} {name}", name, {"rounding": rounding}, dtype=torch.bfloat16)
    for rounding in ("nearest", "stochastic", "kahan")
    for name in ("adamw", "muon")
]
REAL_CASES = [Case(f"real {name}", name, is_real=True) for name in ("adamw", "adafactor", "mars", "prodigy", "muon")]
CASES = [*RULE_CASES, *MODIFIER_CASES, *PACKED_CASES, *BF16_CASES, *REAL_CASES]
# Saved by two ranks, continued by two and by three.
SAVED_CASES = [*RULE_CASES, *MODIFIER_CASES, *PACKED_CASES]
COUNTED_CASES = [case for case in RULE_CASES if case.rule in ("muon", "normuon")]


# --- one run --------------------------------------------------------------------------------------------------------


@functools.cache
def gradients(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, step: int) -> list[Tensor]:
    """Return whole gradients of that step: a drift and noise, with sizes that differ by up to 100."""
    found = []
    for number, shape in enumerate(shapes):
        fixed = torch.Generator().manual_seed(1000 * number)
        size = 10 ** (2 * torch.rand(shape, generator=fixed) - 2)
        drift = torch.randn(shape, generator=fixed)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * number + step))
        found.append((size * (drift + noise)).to(dtype))
    return found


@functools.cache
def sharded_gradients(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, step: int, mesh: DeviceMesh
) -> list[Tensor]:
    """Return the same, each rank with its rows."""
    whole = gradients(shapes, dtype, step)
    return [distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None) for grad in whole]


def set_gradients(case: Case, model: nn.Module, step: int, mesh: DeviceMesh | None) -> None:
    """Give every parameter its part of the gradients of that step."""
    shapes = tuple(tuple(p.shape) for p in model.parameters())
    whole = gradients(shapes, case.dtype, step)
    grads = whole if mesh is None else sharded_gradients(shapes, case.dtype, step, mesh)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad


def _losses(step: int, model: nn.Module, mesh: DeviceMesh | None) -> Iterator[Tensor]:
    """Yield what this process calls ``backward`` on: half the sum of the losses of rank 0 and 1; a third rank adds zero.

    A sum of two numbers and zeros is the same in any order, so gradients are equal to the last bit.
    """
    for rank in (0, 1) if mesh is None else (mesh.get_local_rank(),):
        tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(10 * step + rank))
        loss = F.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())
        yield loss * (0.5 if mesh is None else float(rank < 2))


def take_step(case: Case, model: nn.Module, opt: RuledOptimizer, step: int, mesh: DeviceMesh | None) -> None:
    """Make one step of a run whose learning rate changes."""
    for group in opt.param_groups:
        group["lr"] = group["initial_lr"] * (0.5 + 0.5 * math.cos(step / STEPS))
    if case.is_real:
        opt.zero_grad()
        for loss in _losses(step, model, mesh):
            loss.backward()
    else:
        set_gradients(case, model, step, mesh)
    opt.step()
    if opt.estimate_every and step % opt.estimate_every == 0:
        set_gradients(case, model, STEPS + step, mesh)
        opt.estimate()


def snapshot(model: nn.Module) -> list[Tensor]:
    """Return copies of all whole weights."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


@dataclass
class Outcome:
    """Weights before, after, as `eval` shows them, and after `train` brought them back."""

    start: list[Tensor]
    trained: list[Tensor]
    evaluated: list[Tensor]
    restored: list[Tensor]


def run(
    case: Case, mesh: DeviceMesh | None = None, after: Callable[[int, nn.Module, RuledOptimizer], None] | None = None
) -> Outcome:
    """Train from the start; `after` is called after every step."""
    model, opt = case.build(mesh)
    start = snapshot(model)
    for step in range(1, STEPS + 1):
        take_step(case, model, opt, step, mesh)
        if after is not None:
            after(step, model, opt)
    trained = snapshot(model)
    opt.eval()
    evaluated = snapshot(model)
    opt.train()
    return Outcome(start, trained, evaluated, snapshot(model))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Say whether two sets of weights are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def compare(ours: Outcome, single: Outcome) -> dict[str, Any]:
    """Return what the tests ask about two runs, distances relative to what the second one moved."""
    pairs = zip(ours.trained, single.start, strict=True)
    return {
        "distance": distance(ours.trained, single.trained, single.start),
        "eval_distance": distance(ours.evaluated, single.evaluated, single.start),
        "is_same": same(ours.trained, single.trained),
        "is_evaluated_apart": not same(ours.evaluated, ours.trained),
        "is_restored": same(ours.restored, ours.trained),
        "is_finite": all(bool(p.isfinite().all()) for p in ours.trained),
        "still": sum(torch.equal(a, b) for a, b in pairs),
    }


# --- on every rank --------------------------------------------------------------------------------------------------


def save_at_half(folder: Path) -> Callable[[int, nn.Module, RuledOptimizer], None]:
    """Return what saves weights and optimizer after step `SAVED_AT`."""

    def after(step: int, model: nn.Module, opt: RuledOptimizer) -> None:
        if step == SAVED_AT:
            state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt)}
            dcp.save(state, checkpoint_id=str(folder))

    return after


def resume(case: Case, folder: Path, mesh: DeviceMesh) -> list[Tensor]:
    """Return the weights at the end of a run that goes on from `folder` with other weights and an unused optimizer."""
    model, opt = case.build(mesh, seed=1)
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=str(folder))
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, opt, state["optim"])
    for step in range(SAVED_AT + 1, STEPS + 1):
        take_step(case, model, opt, step, mesh)
    return snapshot(model)


class Collectives(TorchDispatchMode):
    """Counts what is sent between processes, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count(case: Case, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return what one step sends and multiplies in this process, and the number of matrices."""
    model, opt = case.build(mesh)
    take_step(case, model, opt, 1, mesh)
    set_gradients(case, model, 2, mesh)
    matrices = [p for g in opt.param_groups if g["rule"] == case.rule for p in g["params"] if p.ndim == 2]
    with Collectives() as sent, FlopCounterMode(display=False) as work:
        opt.step()
    return {"sent": dict(sent.counts), "work": work.get_total_flops(), "matrices": len(matrices)}


def measured(singles: Mapping[str, Outcome], mesh: DeviceMesh, folder: Path) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yield every measurement of a rank by name, in the same order on all."""
    world = mesh.size()
    for case in CASES:
        is_saved = world == WORLDS[0] and case in SAVED_CASES
        after = save_at_half(folder / case.name) if is_saved else None
        ours = {}

        def train(case=case, after=after, ours=ours):
            ours[case.name] = run(case, mesh, after)
            return compare(ours[case.name], singles[case.name])

        def proceed(case=case, ours=ours):
            return {"is_same": same(resume(case, folder / case.name, mesh), ours[case.name].trained)}

        yield case.name, train
        if is_saved:
            yield f"resumed {case.name}", proceed
    for case in COUNTED_CASES:
        yield f"counted {case.name}", lambda case=case: gathered(count(case, mesh), world)
    if world != WORLDS[0]:
        for case in SAVED_CASES:
            yield f"resumed {case.name}", lambda case=case: moved_over(case, singles[case.name], folder, mesh)


def gathered(found: dict[str, Any], world: int) -> dict[str, Any]:
    """Return what all ranks found."""
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found)
    return {"ranks": everyone}


def moved_over(case: Case, single: Outcome, folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """Go on from what the other number of ranks saved, as soon as it has."""
    deadline = time.monotonic() + LIMIT.total_seconds()
    while not (folder / f"{WORLDS[0]}.done").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return {"distance": distance(resume(case, folder / case.name, mesh), single.trained, single.start)}


def rank_main(rank: int, world: int, folder: Path, singles: Mapping[str, Outcome]) -> None:
    """Make all measurements on one rank; rank 0 writes them down, one line each."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}.store", rank=rank, world_size=world, timeout=LIMIT
    )
    mesh = init_device_mesh("cpu", (world,))
    with open(folder / f"{world}.rank{rank}.jsonl", "w", encoding="utf-8") as file:
        for name, measure in measured(singles, mesh, folder):
            began = time.perf_counter()
            try:
                found = measure()
            except Exception:  # Whatever it is, it is the result of this case.
                found = {"error": traceback.format_exc()}
            print(json.dumps({"case": name, "seconds": time.perf_counter() - began, **found}), file=file, flush=True)
    dist.barrier()
    (folder / f"{world}.done").touch()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Train in one process, then in forks."""
    torch.set_num_threads(1)
    singles = {case.name: run(case) for case in CASES}
    work = {case.name: count(case, None) for case in COUNTED_CASES}
    (folder / "1.json").write_text(json.dumps(work), encoding="utf-8")
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=rank_main, args=(rank, world, folder, singles), daemon=True)
        for world in WORLDS
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Trainings of a small model that are the same in one process and sharded over several by FSDP2."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hasten.optim import OPTIMIZERS, RULES, RuledOptimizer, optimizer

WORLDS = (2, 3)
STEPS, SAVED_AT = 20, 9

# A rate at which weights move visibly, and decay that counts.
COMMON = {"lr": 0.01, "weight_decay": 0.1, "total_steps": STEPS}
OWN: dict[str, dict[str, Any]] = {
    "prodigy": {"lr": 1.0, "d0": 1e-3},
    "sophia": {"estimate_every": 5},
    "schedule_free_adamw": {"warmup_steps": 4},
    "soap": {"precondition_frequency": 4},
    "soap_muon": {"precondition_frequency": 4},
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
        self.qkv, self.out = nn.Linear(7, 21, bias=False), nn.Linear(7, 7, bias=False)
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
        self.embedding, self.block, self.head = nn.Embedding(11, 7), Block(), nn.Linear(7, 11, bias=False)

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
        parts: ranks whose tokens the loss is the mean over; 0 where gradients are made up.
    """

    name: str
    rule: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = Small
    dtype: torch.dtype = torch.float32
    parts: int = 0

    def build(self, mesh: DeviceMesh | None, seed: int = 0) -> tuple[nn.Module, RuledOptimizer]:
        """Return the model, sharded over `mesh`, and its optimizer."""
        model = self.model().to(self.dtype)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        if mesh is not None:
            for block in (module for module in model.modules() if isinstance(module, Block)):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        settings = {**COMMON, **OWN.get(self.rule, {}), **self.settings}
        if "compute_dtype" in RULES[self.rule].settings:
            settings["compute_dtype"] = "float32"  # "auto" is measured by each process.
        return model, optimizer(model, self.rule, **settings)


RULE_CASES = [Case(f"rule {name}", name) for name in OPTIMIZERS]
MODIFIER_CASES = [
    Case(f"{modifier} {name}", name, settings) for modifier, settings in MODIFIERS.items() for name in ("adamw", "muon")
]
PACKED_CASES = [
    Case(f"8bit {name}", name, {"state_format": "8bit"}, Large)
    for name, _ in OPTIMIZERS.items()
    if RULES[name].has_8bit
]
BF16_CASES = [
    Case(f"{rounding} {name}", name, {"rounding": rounding}, dtype=torch.bfloat16)
    for rounding in ("nearest", "stochastic", "kahan")
    for name in ("adamw", "muon")
]
# A mean over three ranks is rounded in another order than in one process: in float64 nothing comes of it.
REAL_CASES = [
    Case(f"real {name} {world}", name, dtype=torch.float64, parts=world)
    for name in ("adamw", "mars", "prodigy", "muon")
    for world in WORLDS
]
CASES = [*RULE_CASES, *MODIFIER_CASES, *PACKED_CASES, *BF16_CASES, *REAL_CASES]
# Saved by two ranks and continued by them.
SAVED_CASES = [
    *RULE_CASES,
    *(case for case in MODIFIER_CASES if case.name in ("hyperball muon", "ema adamw")),
    *(case for case in PACKED_CASES if case.rule == "adamw"),
]
# Continued by three as well.
MOVED_CASES = [case for case in SAVED_CASES if case not in RULE_CASES or not RULES[case.rule].is_elementwise]
MOVED_CASES += [case for case in RULE_CASES if case.rule == "adamw"]
# By rule, for weights whose columns are sharded.
COLUMN_SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"state_format": "8bit"},
    "adafactor": {},
    "muon": {},
}
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


def backward(case: Case, model: nn.Module, step: int, mesh: DeviceMesh | None) -> None:
    """Put gradients of the mean loss over all ranks' tokens into the parameters."""
    for rank in range(case.parts) if mesh is None else (mesh.get_local_rank(),):
        tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(10 * step + rank))
        loss = F.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())
        (loss / case.parts if mesh is None else loss).backward()


def take_step(case: Case, model: nn.Module, opt: RuledOptimizer, step: int, mesh: DeviceMesh | None) -> None:
    """Make one step of a run whose learning rate changes."""
    for group in opt.param_groups:
        group["lr"] = group["initial_lr"] * (0.5 + 0.5 * math.cos(step / STEPS))
    if case.parts:
        opt.zero_grad()
        backward(case, model, step, mesh)
    else:
        set_gradients(case, model, step, mesh)
    opt.step()
    if opt.estimate_every and step % opt.estimate_every == 0:
        set_gradients(case, model, STEPS + step, mesh)
        opt.estimate()


def snapshot(model: nn.Module) -> list[Tensor]:
    """Return copies of the weights that this process holds."""
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in held]


@dataclass
class Outcome:
    """Weights before, after, as `eval` shows them, and after `train` brought them back."""

    start: list[Tensor]
    trained: list[Tensor]
    evaluated: list[Tensor]
    restored: list[Tensor]

    def part(self, mesh: DeviceMesh) -> Outcome:
        """Return the rows that a rank of `mesh` holds."""
        cut = functools.partial(_rows, rank=mesh.get_local_rank(), world=mesh.size())
        return Outcome(*([cut(p) for p in weights] for weights in vars(self).values()))


def _rows(whole: Tensor, *, rank: int, world: int) -> Tensor:
    chunks = whole.chunk(world)
    return chunks[rank] if rank < len(chunks) else whole[:0]


After = Callable[[int, nn.Module, RuledOptimizer], None]


def run(case: Case, mesh: DeviceMesh | None = None, after: After | None = None) -> Outcome:
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


def distance(ours: list[Tensor], theirs: list[Tensor], start: list[Tensor]) -> float:
    """Return the norm over all ranks of what two runs differ by, relative to what the second one moved from `start`."""
    pairs = [(ours, theirs), (theirs, start)]
    squares = [sum((a.double() - b.double()).square().sum() for a, b in zip(*pair, strict=True)) for pair in pairs]
    total = torch.stack(squares)
    dist.all_reduce(total)
    difference, moved = total.sqrt().tolist()
    return difference / moved


def compare(ours: Outcome, single: Outcome) -> dict[str, Any]:
    """Return what the tests ask about two runs."""
    return {
        "distance": distance(ours.trained, single.trained, single.start),
        "eval_distance": distance(ours.evaluated, single.evaluated, single.start),
        "is_same": same(ours.trained, single.trained),
        "is_evaluated_apart": not same(ours.evaluated, ours.trained),
        "is_restored": same(ours.restored, ours.trained),
        "is_finite": all(bool(p.isfinite().all()) for p in ours.trained),
    }

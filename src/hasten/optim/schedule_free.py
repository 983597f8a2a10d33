"""Schedule-Free AdamW: no decay of the learning rate, an average of the weights instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import LOW, apply_each, decay_rate, wide_zeros, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer
from hasten.sharding import local


def schedule_free_step(
    p: Tensor,
    g: Tensor,
    z: Tensor,
    exp_avg_sq: Tensor,
    *,
    beta2: float,
    rest2: float,
    root: float,
    eps: float,
    decay: float,
    share: float,
    kept: float,
    ahead: float,
    lr: float,
) -> Mapping[str, Tensor]:
    """Return the new y (the weight), z and squared gradient."""
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (g * g)
    update = g / (torch.sqrt(exp_avg_sq) / root + eps) + decay * p
    return {"p": kept * p + share * z + ahead * update, "z": z - lr * update, "exp_avg_sq": exp_avg_sq}


KERNEL = Kernel(
    schedule_free_step,
    ("p", "g", "z", "exp_avg_sq"),
    ("beta2", "rest2", "root", "eps", "decay", "share", "kept", "ahead", "lr"),
)


def _choose(work: Work) -> tuple[Kernel, dict[str, float]]:
    group, (beta1, beta2) = work.group, work.group["betas"]
    lr, weight = _warmed(group, group["k"]), _weight(group)
    share = weight / group["weight_sum"] if group["weight_sum"] > 0 else 0.0
    numbers = {
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "root": math.sqrt(1.0 - beta2**work.step),
        "eps": group["eps"],
        "decay": decay_rate(group) / float(group["lr"]) if float(group["lr"]) > 0 else 0.0,
        "share": share,
        "kept": 1.0 - share,
        "ahead": lr * (beta1 * (1.0 - share) - 1.0),
        "lr": lr,
    }
    return KERNEL, numbers


def _advance(groups: list[Group]) -> None:
    """Count the step in every group, one without a gradient too, as the authors do."""
    for group in groups:
        group["k"] += 1
        group["lr_max"] = max(_warmed(group, group["k"]), group["lr_max"])
        group["weight_sum"] += _weight(group)


def _warmed(group: Group, step: int) -> float:
    """Return the learning rate of step `step`, counted from 1."""
    warmup = group["warmup_steps"]
    return float(group["lr"]) * (step / warmup if step <= warmup else 1.0)


def _weight(group: Group) -> float:
    """Return what the present step weighs in the average."""
    return group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"]


def _averaged(work: Work) -> None:
    """Write the average x over the training point y: ``x = y + (1 - 1 / beta1) * (z - y)``."""
    weight = 1.0 - 1.0 / work.group["betas"][0]
    for parameter, state in zip(work.params, work.states, strict=True):
        y, z = local(parameter), local(state["z"])
        wide = y.to(z.dtype) + local(state[LOW]).to(z.dtype) if LOW in state else y.to(z.dtype)
        y.copy_(torch.lerp(wide, z, weight))


def _init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    z = wide_zeros(parameter).copy_(parameter.detach())
    return {"z": z, **zeros(parameter, group, "exp_avg_sq")}


def _check(group: Group) -> None:
    check_betas(group)
    if group["betas"][0] == 0:
        raise RecipeError("optimizer.betas[0]=0 leaves no average to train at; give a number above 0, such as 0.9.")
    for name in ("eps", "r", "weight_lr_power"):
        check_number(group, name)
    if not isinstance(group["warmup_steps"], int) or group["warmup_steps"] < 0:
        raise RecipeError(
            f"optimizer.warmup_steps={group['warmup_steps']} is out of range; give a whole number of at least 0."
        )


SCHEDULE_FREE = Rule(
    name="schedule_free_adamw",
    settings={
        "lr": 2.5e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "warmup_steps": 0,
        "r": 0.0,
        "weight_lr_power": 2.0,
        "weight_decay": 0.0,
        "k": 0,
        "weight_sum": 0.0,
        "lr_max": 0.0,
    },
    init=_init,
    update=lambda works: apply_each(works, _choose),
    check=_check,
    before=_advance,
    averaged=_averaged,
)


class ScheduleFreeAdamW(RuledOptimizer):
    """Schedule-Free AdamW: gradients at y, steps of z, evaluation at x, the average of z.

    ``eval()`` puts x into the parameters and ``train()`` puts y back, bit for bit; save and evaluate weights between
    the two. Bias correction counts each parameter's own steps (the authors count the group's, which differs for
    parameters whose gradients begin late). Use it with a constant learning rate and with gradient clipping (needed in
    arXiv:2509.01440, contrary to its authors). Source: Defazio et al., arXiv:2405.15682.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: momentum (as interpolation of y; above 0) and decay rate of the squared gradient, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at y, decoupled, times the learning rate, at least 0.
        warmup_steps: of the optimizer's own linear warm-up, at least 0.
        r: weight of later steps in the average: ``(k + 1)**r``, at least 0.
        weight_lr_power: power of the largest learning rate so far in that weight, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **more: Any,
    ) -> None:
        average = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        super().__init__(
            params, SCHEDULE_FREE, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **average, **more
        )

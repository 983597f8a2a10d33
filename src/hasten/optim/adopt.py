"""ADOPT: Adam that divides by the squared gradients before the present one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.optim.elementwise import apply_each, decay_rate, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer


def first_step(g: Tensor, exp_avg_sq: Tensor) -> Mapping[str, Tensor]:
    """Return the squared gradient; the first one moves nothing."""
    return {"exp_avg_sq": g * g}


def adopt_step(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    keep: float,
    lr: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    eps: float,
    limit: float,
) -> Mapping[str, Tensor]:
    """Return the new weight and moments."""
    scaled = g / torch.clamp_min(torch.sqrt(exp_avg_sq), eps)
    scaled = torch.clamp_max(torch.clamp_min(scaled, -limit), limit)
    exp_avg = beta1 * exp_avg + rest1 * scaled
    return {"p": keep * p - lr * exp_avg, "exp_avg": exp_avg, "exp_avg_sq": beta2 * exp_avg_sq + rest2 * (g * g)}


FIRST = Kernel(first_step, ("g", "exp_avg_sq"), ())
KERNEL = Kernel(
    adopt_step,
    ("p", "g", "exp_avg", "exp_avg_sq"),
    ("keep", "lr", "beta1", "rest1", "beta2", "rest2", "eps", "limit"),
)


def _choose(work: Work) -> tuple[Kernel, dict[str, float]]:
    if work.step == 1:
        return FIRST, {}
    group, (beta1, beta2) = work.group, work.group["betas"]
    numbers = {
        "keep": 1.0 - decay_rate(group),
        "lr": float(group["lr"]),
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "eps": group["eps"],
        "limit": float(work.step - 1) ** group["clip_exponent"],
    }
    return KERNEL, numbers


def _check(group: Group) -> None:
    check_betas(group)
    check_number(group, "eps", is_open=True)
    check_number(group, "clip_exponent")


ADOPT_RULE = Rule(
    name="adopt",
    settings={"lr": 1e-3, "betas": (0.9, 0.9999), "eps": 1e-6, "clip_exponent": 0.25, "weight_decay": 0.0},
    init=lambda parameter, group: zeros(parameter, group, "exp_avg", "exp_avg_sq"),
    update=lambda works: apply_each(works, _choose),
    check=_check,
)


class ADOPT(RuledOptimizer):
    """ADOPT: Adam whose gradient is divided before it enters the momentum, by what was known before it.

    ``n = clip(g / max(sqrt(v), eps), k**0.25)``, ``m = beta1 * m + (1 - beta1) * n``, ``p -= lr * m``, and v only then.
    The first gradient only fills v; k counts the updates after it. No bias correction. Source: Taniguchi et al.,
    arXiv:2411.02853, in the authors' form since 2024-11-22 (clipped).

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of momentum and squared gradient, each in [0, 1).
        eps: least value of the denominator, above 0; at most 1e-6 works (arXiv:2509.01440).
        clip_exponent: of the growing limit, at least 0.
        weight_decay: decoupled, times the learning rate, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_exponent: float = 0.25,
        weight_decay: float = 0.0,
        **more: Any,
    ) -> None:
        given = {"betas": betas, "eps": eps, "clip_exponent": clip_exponent, "weight_decay": weight_decay}
        super().__init__(params, ADOPT_RULE, lr=lr, **given, **more)

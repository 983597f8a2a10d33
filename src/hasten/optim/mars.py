"""MARS: Adam on gradients corrected by how they changed since the last step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.optim.elementwise import apply, decay_rate, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer
from hasten.sharding import add_up


def corrected_squares(g: Tensor, last_grad: Tensor, *, change: float) -> Mapping[str, Tensor]:
    """Return the squares of the corrected gradient, to be summed."""
    c = g + change * (g - last_grad)
    return {"squares": c * c}


def mars_step(
    p: Tensor,
    g: Tensor,
    last_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    keep: float,
    change: float,
    shrink: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    root: float,
    eps: float,
    step_size: float,
) -> Mapping[str, Tensor]:
    """Return the new weight and state; `shrink` brings the corrected gradient of the tensor to at most norm 1."""
    c = shrink * (g + change * (g - last_grad))
    exp_avg = beta1 * exp_avg + rest1 * c
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (c * c)
    update = exp_avg / (torch.sqrt(exp_avg_sq) / root + eps)
    return {"p": keep * p - step_size * update, "last_grad": g + 0.0, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


SQUARES = Kernel(corrected_squares, ("g", "last_grad"), ("change",))
KERNEL = Kernel(
    mars_step,
    ("p", "g", "last_grad", "exp_avg", "exp_avg_sq"),
    ("keep", "change", "shrink", "beta1", "rest1", "beta2", "rest2", "root", "eps", "step_size"),
)


def _update(works: list[Work]) -> None:
    for work in works:
        group, (beta1, beta2) = work.group, work.group["betas"]
        change = group["gamma"] * beta1 / (1.0 - beta1)
        squares = apply(SQUARES, work, {"change": change})["squares"]
        norms = add_up(squares, work.params).sqrt()
        numbers: dict[str, float | Tensor] = {
            "keep": 1.0 - decay_rate(group),
            "change": change,
            "shrink": 1.0 / norms.clamp(min=1.0),
            "beta1": beta1,
            "rest1": 1.0 - beta1,
            "beta2": beta2,
            "rest2": 1.0 - beta2,
            "root": math.sqrt(1.0 - beta2**work.step),
            "eps": group["eps"],
            "step_size": float(group["lr"]) / (1.0 - beta1**work.step),
        }
        apply(KERNEL, work, numbers)


def _check(group: Group) -> None:
    check_betas(group)
    check_number(group, "gamma")
    check_number(group, "eps")


MARS_RULE = Rule(
    name="mars",
    settings={"lr": 3e-3, "betas": (0.95, 0.99), "gamma": 0.025, "eps": 1e-8, "weight_decay": 0.0},
    init=lambda parameter, group: zeros(parameter, group, "last_grad", "exp_avg", "exp_avg_sq"),
    update=_update,
    check=_check,
    only_matrices=True,
    rest_settings={"betas": (0.9, 0.95)},
)


class MARS(RuledOptimizer):
    """MARS-AdamW: AdamW on ``c = g + gamma * beta1 / (1 - beta1) * (g - last g)``, c at most of norm 1 per tensor.

    Vectors go to AdamW with betas (0.9, 0.95), as in the authors' code (there with a learning rate of their own: give
    groups for that). The gradient before the first is zero. Source: Yuan et al., arXiv:2411.10438, the approximate
    form.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, each in [0, 1).
        gamma: strength of the correction, at least 0.
        eps: added to the denominator, at least 0.
        weight_decay: decoupled, times the learning rate, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float = 0.025,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **more: Any,
    ) -> None:
        given = {"betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, MARS_RULE, lr=lr, **given, **more)

"""Sophia-G: momentum divided by an estimate of the curvature, clipped element by element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import apply, apply_each, decay_rate, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer


def sophia_step(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    *,
    keep: float,
    lr: float,
    beta1: float,
    rest1: float,
    scale: float,
    least: float,
) -> Mapping[str, Tensor]:
    """Return the new weight and momentum; an element moves at most `lr`."""
    exp_avg = beta1 * exp_avg + rest1 * g
    ratio = torch.clamp_max(torch.abs(exp_avg) / (scale * hessian + least), 1.0)
    return {"p": keep * p - lr * (torch.sign(exp_avg) * ratio), "exp_avg": exp_avg}


def estimate_step(g: Tensor, hessian: Tensor, *, beta2: float, rest2: float) -> Mapping[str, Tensor]:
    """Return the new curvature from gradients of a sampled-label loss."""
    return {"hessian": beta2 * hessian + rest2 * (g * g)}


KERNEL = Kernel(sophia_step, ("p", "g", "exp_avg", "hessian"), ("keep", "lr", "beta1", "rest1", "scale", "least"))
ESTIMATE = Kernel(estimate_step, ("g", "hessian"), ("beta2", "rest2"))


def _choose(work: Work) -> tuple[Kernel, dict[str, float]]:
    group, beta1 = work.group, work.group["betas"][0]
    numbers = {
        "keep": 1.0 - decay_rate(group),
        "lr": float(group["lr"]),
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "scale": group["rho"] * group["batch_tokens"],
        "least": 1e-15,
    }
    return KERNEL, numbers


def _estimate(works: list[Work]) -> None:
    for work in works:
        beta2 = work.group["betas"][1]
        apply(ESTIMATE, work, {"beta2": beta2, "rest2": 1.0 - beta2})


def _check(group: Group) -> None:
    check_betas(group)
    check_number(group, "rho", is_open=True)
    for name in ("batch_tokens", "estimate_every"):
        if not isinstance(group[name], int) or group[name] < 1:
            raise RecipeError(f"optimizer.{name}={group[name]} is out of range; give a whole number of at least 1.")


SOPHIA = Rule(
    name="sophia",
    settings={
        "lr": 1e-4,
        "betas": (0.965, 0.99),
        "rho": 0.04,
        "batch_tokens": 5120,
        "estimate_every": 10,
        "weight_decay": 0.1,
    },
    init=lambda parameter, group: zeros(parameter, group, "exp_avg", "hessian"),
    update=lambda works: apply_each(works, _choose),
    check=_check,
    estimate=_estimate,
)


class Sophia(RuledOptimizer):
    """Sophia-G: ``p -= lr * sign(m) * min(|m| / (rho * batch_tokens * h + 1e-15), 1)``, h from an extra pass.

    Every `estimate_every` steps, after ``step()``: sample labels from the model's own output, take the gradient of the
    mean loss over them, call ``estimate()``, drop the gradients. hasten's trainer does it by itself (`estimate_every`
    tells it). Handle with care: it diverged on long runs of 124M parameters in arXiv:2509.01440. Source: Liu et al.,
    arXiv:2305.14342.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of momentum and curvature, each in [0, 1).
        rho: how soon elements are clipped, above 0.
        weight_decay: decoupled, times the learning rate, at least 0.
        batch_tokens: tokens that the mean loss of the extra pass is over; the curvature is that many times ``g**2``.
        estimate_every: steps between two extra passes, at least 1.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        batch_tokens: int = 5120,
        estimate_every: int = 10,
        **more: Any,
    ) -> None:
        given = {"betas": betas, "rho": rho, "weight_decay": weight_decay}
        super().__init__(
            params, SOPHIA, lr=lr, **given, batch_tokens=batch_tokens, estimate_every=estimate_every, **more
        )

"""AdEMAMix: Adam with a second, very slow momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import apply_each, decay_rate, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer


def ademamix_step(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    *,
    keep: float,
    lr: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    beta3: float,
    rest3: float,
    correction1: float,
    root: float,
    eps: float,
    alpha: float,
) -> Mapping[str, Tensor]:
    """Return the new weight and moments; the slow momentum has no bias correction."""
    exp_avg = beta1 * exp_avg + rest1 * g
    exp_avg_slow = beta3 * exp_avg_slow + rest3 * g
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (g * g)
    update = (exp_avg / correction1 + alpha * exp_avg_slow) / (torch.sqrt(exp_avg_sq) / root + eps)
    new = {"exp_avg": exp_avg, "exp_avg_slow": exp_avg_slow, "exp_avg_sq": exp_avg_sq}
    return {"p": keep * p - lr * update, **new}


KERNEL = Kernel(
    ademamix_step,
    ("p", "g", "exp_avg", "exp_avg_slow", "exp_avg_sq"),
    ("keep", "lr", "beta1", "rest1", "beta2", "rest2", "beta3", "rest3", "correction1", "root", "eps", "alpha"),
)


def warmed_alpha(step: int, alpha: float, warmup: int | None) -> float:
    """Return the weight of the slow momentum: linear from 0 over `warmup` steps, then `alpha`.

    Example:
        >>> [warmed_alpha(step, 8.0, 4) for step in (1, 2, 4, 9)]
        [2.0, 4.0, 8.0, 8.0]
    """
    return alpha if not warmup else alpha * min(step / warmup, 1.0)


def warmed_beta3(step: int, beta3: float, warmup: int | None, beta1: float) -> float:
    """Return the slow decay rate: from beta1 over `warmup` steps, its half-life growing linearly, then `beta3`.

    ``exp(ln b1 * ln b3 / ((1 - t/T) ln b3 + t/T ln b1))``, the paper's form. The authors' code adds 1e-8 to both rates
    first, which moves the weights by about 5e-5 of their way in 100 steps.

    Example:
        >>> [round(warmed_beta3(step, 0.9999, 100, 0.9), 4) for step in (1, 50, 100, 200)]
        [0.9909, 0.9998, 0.9999, 0.9999]
    """
    if not warmup or step >= warmup:
        return beta3
    # A fast decay rate of 0 has no logarithm; the authors' code adds the same 1e-8.
    share, slow, fast = step / warmup, math.log(beta3), math.log(max(beta1, 1e-8))
    return min(math.exp(fast * slow / ((1.0 - share) * slow + share * fast)), beta3)


def warmup_steps(group: Group, name: str) -> int | None:
    """Return a warm-up in steps: as given, or as a share of the group's ``total_steps``.

    Raises:
        RecipeError: it is a share, and the whole is not known.
    """
    value = group[name]
    if value is None or not isinstance(value, float):
        return value
    if not group["total_steps"]:
        raise RecipeError(
            f"optimizer.{name}={value} is a share of the run, whose length is not known; give total_steps, or the "
            "warm-up in steps."
        )
    return round(value * group["total_steps"])


def _choose(work: Work) -> tuple[Kernel, dict[str, float]]:
    group, step = work.group, work.step
    beta1, beta2, final_beta3 = group["betas"]
    beta3 = warmed_beta3(step, final_beta3, warmup_steps(group, "beta3_warmup"), beta1)
    numbers = {
        "keep": 1.0 - decay_rate(group),
        "lr": float(group["lr"]),
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "beta3": beta3,
        "rest3": 1.0 - beta3,
        "correction1": 1.0 - beta1**step,
        "root": math.sqrt(1.0 - beta2**step),
        "eps": group["eps"],
        "alpha": warmed_alpha(step, group["alpha"], warmup_steps(group, "alpha_warmup")),
    }
    return KERNEL, numbers


def _check(group: Group) -> None:
    check_betas(group, count=3)
    check_number(group, "alpha")
    check_number(group, "eps")
    for name in ("alpha_warmup", "beta3_warmup"):
        value = group[name]
        if value is None:
            continue
        is_share = isinstance(value, float) and 0.0 < value <= 1.0
        if not is_share and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RecipeError(
                f"optimizer.{name}={value} is no warm-up; give steps (a whole number of at least 1), a share of the "
                "run (above 0.0, at most 1.0), or None for none."
            )
        warmup_steps(group, name)
    if group["total_steps"] is not None and (not isinstance(group["total_steps"], int) or group["total_steps"] < 1):
        raise RecipeError(f"optimizer.total_steps={group['total_steps']} is no run; give at least 1.")


ADEMAMIX = Rule(
    name="ademamix",
    settings={
        "lr": 1e-3,
        "betas": (0.9, 0.999, 0.9999),
        "alpha": 8.0,
        "alpha_warmup": None,
        "beta3_warmup": None,
        "total_steps": None,
        "eps": 1e-8,
        "weight_decay": 0.0,
    },
    init=lambda p, group: zeros(p, group, "exp_avg", "exp_avg_slow", "exp_avg_sq", unsigned=("exp_avg_sq",)),
    update=lambda works: apply_each(works, _choose),
    check=_check,
    has_8bit=True,
)


class AdEMAMix(RuledOptimizer):
    """AdEMAMix: ``p -= lr * ((m1_hat + alpha * m2) / (sqrt(v_hat) + eps) + weight_decay * p)``, m2 very slow.

    Where small batches or long runs make gradients noisy it is the safest gain over AdamW: first or second at every
    size in arXiv:2509.01440. Source: Pagliardini et al., arXiv:2409.03137.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of the fast momentum, the squared gradient and the slow momentum, each in [0, 1). The slow
            one should remember a tenth to a third of the run: 0.9999 above some 32,000 steps, 0.999 above 3,200.
        alpha: weight of the slow momentum, at least 0.
        alpha_warmup: over how much of the run alpha grows from 0: steps, a share such as 1.0, or None for no warm-up.
        beta3_warmup: over how much of the run the slow decay rate grows from the fast one; as `alpha_warmup`.
        eps: added to the denominator, at least 0.
        weight_decay: decoupled, times the learning rate, at least 0.
        total_steps: of the run; needed where a warm-up is a share.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range, or a share is given without `total_steps`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 8.0,
        alpha_warmup: float | None = None,
        beta3_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
        **more: Any,
    ) -> None:
        warmups = {"alpha_warmup": alpha_warmup, "beta3_warmup": beta3_warmup, "total_steps": total_steps}
        given = {"betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, ADEMAMIX, lr=lr, **given, **warmups, **more)

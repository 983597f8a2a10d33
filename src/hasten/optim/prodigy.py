"""Prodigy: AdamW that finds its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import apply, wide_zeros, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer
from hasten.sharding import add_up


def measure_step(
    p: Tensor,
    g: Tensor,
    p0: Tensor,
    s: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    beta3: float,
    rest3: float,
) -> Mapping[str, Tensor]:
    """Return the new moments, and the two sums that the distance is estimated from."""
    s = beta3 * s + rest3 * g
    return {
        "exp_avg": beta1 * exp_avg + rest1 * g,
        "exp_avg_sq": beta2 * exp_avg_sq + rest2 * (g * g),
        "s": s,
        "along": g * (p0 - p),
        "size": torch.abs(s),
    }


def move_step(
    p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, keep: float, eps: float, step_size: float
) -> Mapping[str, Tensor]:
    """Return the new weight."""
    return {"p": keep * p - step_size * (exp_avg / (torch.sqrt(exp_avg_sq) + eps))}


MEASURE = Kernel(
    measure_step,
    ("p", "g", "p0", "s", "exp_avg", "exp_avg_sq"),
    ("beta1", "rest1", "beta2", "rest2", "beta3", "rest3"),
)
MOVE = Kernel(move_step, ("p", "exp_avg", "exp_avg_sq"), ("keep", "eps", "step_size"))


def _update(works: list[Work]) -> None:
    """Take the gradients in, estimate the distance over all groups together, move."""
    lr = max(float(work.group["lr"]) for work in works)
    first = works[0].group
    d, d0, beta3 = first["d"], first["d0"], _beta3(first)
    rate = d * lr * _correction(first)
    numerator, denominator = first["d_numerator"] * beta3, 0.0
    for work in works:
        group = work.group
        if float(group["lr"]) == 0.0:
            continue
        beta1, beta2 = group["betas"]
        numbers = {
            "beta1": beta1,
            "rest1": d * (1.0 - beta1),
            "beta2": beta2,
            "rest2": d * d * (1.0 - beta2),
            "beta3": _beta3(group),
            "rest3": d / d0 * (d if group["safeguard_warmup"] else rate),
        }
        sums = apply(MEASURE, work, numbers)
        numerator += d / d0 * rate * float(add_up(sums["along"], work.params).sum())
        denominator += float(add_up(sums["size"], work.params).sum())
    if denominator == 0.0:
        return
    new_d = _new_distance(first, numerator / denominator) if lr > 0 else d
    # The other groups follow before the next step.
    first.update(d=new_d, d_numerator=numerator, k=first["k"] + 1)
    for work in works:
        group = work.group
        if float(group["lr"]) == 0.0:
            continue
        keep = 1.0 - group["weight_decay"] * rate
        apply(MOVE, work, {"keep": keep, "eps": new_d * group["eps"], "step_size": rate})


def _share(groups: list[Group]) -> None:
    """Give every group the numbers of the one that moved last: the estimate is one for all."""
    newest = max(groups, key=lambda group: group["k"])
    for group in groups:
        group.update({name: newest[name] for name in ("d", "d_max", "d_numerator", "k")})


def _beta3(group: Group) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]


def _correction(group: Group) -> float:
    if not group["use_bias_correction"]:
        return 1.0
    (beta1, beta2), step = group["betas"], group["k"] + 1
    return math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)


def _new_distance(group: Group, ratio: float) -> float:
    estimate = group["d_coef"] * ratio
    d = max(group["d"], estimate) if group["d"] == group["d0"] else group["d"]
    group["d_max"] = max(group["d_max"], estimate)
    return min(group["d_max"], d * group["growth_rate"])


def _init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    start = wide_zeros(parameter).copy_(parameter.detach())
    return {"p0": start, **zeros(parameter, group, "s", "exp_avg", "exp_avg_sq")}


def _check(group: Group) -> None:
    check_betas(group)
    if group["beta3"] is not None:
        check_number(group, "beta3", high=1.0)
    check_number(group, "eps")
    check_number(group, "d0", is_open=True)
    check_number(group, "d_coef", is_open=True)
    for name in ("d", "d_max"):
        group[name] = group["d0"] if group[name] is None else group[name]
    if not group["growth_rate"] > 1.0:
        raise RecipeError(
            f"optimizer.growth_rate={group['growth_rate']} lets nothing grow; give a number above 1, or infinity."
        )
    if not group["decay_follows_lr"]:
        raise RecipeError(
            "optimizer.decay_follows_lr=False does not go with prodigy, whose rate it finds; leave it out."
        )


PRODIGY = Rule(
    name="prodigy",
    settings={
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "beta3": None,
        "eps": 1e-8,
        "d0": 1e-6,
        "d_coef": 1.0,
        "growth_rate": float("inf"),
        "use_bias_correction": False,
        "safeguard_warmup": False,
        "weight_decay": 0.0,
        "d": None,
        "d_max": None,
        "d_numerator": 0.0,
        "k": 0,
    },
    init=_init,
    update=_update,
    before=_share,
    check=_check,
)


class Prodigy(RuledOptimizer):
    """Prodigy: AdamW at the rate ``d * lr``, where d, the distance to the solution, is estimated as it goes.

    Leave lr at 1 and put the schedule on it. ``optimizer.param_groups[0]["d"]`` at the end is a good learning rate for
    AdamW (effective rate 1.08x of the best one in arXiv:2509.01440). The estimate is over all groups and all ranks.
    Source: Mishchenko & Defazio, arXiv:2306.06101.

    Args:
        params: parameters, or groups of them.
        lr: factor of the estimated rate, at least 0; the largest of the groups counts.
        betas: decay rates of the two moments, each in [0, 1).
        beta3: decay rate of the estimate; None for ``sqrt(beta2)``.
        eps: added to the denominator (times d), at least 0.
        weight_decay: decoupled, times the rate, at least 0.
        use_bias_correction: Adam's; needed for small batches (arXiv:2509.01440).
        safeguard_warmup: keeps the warm-up out of the estimate's denominator.
        d0: first estimate, above 0.
        d_coef: factor of the estimate, above 0.
        growth_rate: most that the estimate grows in a step, above 1.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        **more: Any,
    ) -> None:
        given = {"betas": betas, "beta3": beta3, "eps": eps, "weight_decay": weight_decay}
        estimate = {"d0": d0, "d_coef": d_coef, "growth_rate": growth_rate}
        flags = {"use_bias_correction": use_bias_correction, "safeguard_warmup": safeguard_warmup}
        super().__init__(params, PRODIGY, lr=lr, **given, **estimate, **flags, **more)

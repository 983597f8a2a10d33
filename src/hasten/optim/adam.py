"""AdamW, and Adam with its coupled decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.optim import native
from hasten.optim.elementwise import apply_each, decay_rate, stored, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer
from hasten.sharding import local


def adam_step(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    keep: float,
    coupled: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    root: float,
    eps: float,
    step_size: float,
) -> Mapping[str, Tensor]:
    """Return the new weight and moments; decoupled decay is in `keep`, L2 in `coupled`."""
    g = g + coupled * p
    exp_avg = beta1 * exp_avg + rest1 * g
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (g * g)
    update = exp_avg / (torch.sqrt(exp_avg_sq) / root + eps)
    return {"p": keep * p - step_size * update, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


KERNEL = Kernel(
    adam_step,
    ("p", "g", "exp_avg", "exp_avg_sq"),
    ("keep", "coupled", "beta1", "rest1", "beta2", "rest2", "root", "eps", "step_size"),
)


def _update(works: list[Work], *, is_decoupled: bool) -> None:
    rest = []
    for work in works:
        if _takes_fused(work):
            _fused(work, is_decoupled=is_decoupled)
        else:
            rest.append(work)
    apply_each(rest, lambda work: (KERNEL, _numbers(work, is_decoupled=is_decoupled)))


def _numbers(work: Work, *, is_decoupled: bool) -> dict[str, float]:
    group, (beta1, beta2) = work.group, work.group["betas"]
    return {
        "keep": 1.0 - decay_rate(group) if is_decoupled else 1.0,
        "coupled": 0.0 if is_decoupled else group["weight_decay"],
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "root": math.sqrt(1.0 - beta2**work.step),
        "eps": group["eps"],
        "step_size": float(group["lr"]) / (1.0 - beta1**work.step),
    }


def _takes_fused(work: Work) -> bool:
    """Say whether torch's own fused kernel is taken: on CUDA, and on a CPU without a compiler."""
    device = work.params[0].device.type
    if device != "cuda" and (device != "cpu" or native.compiler() is not None):
        return False
    is_plain = all(p.dtype == g.dtype and p.dtype.itemsize >= 4 for p, g in zip(work.params, work.grads, strict=True))
    return is_plain and work.group["state_format"] == "float32" and bool(work.group["decay_follows_lr"])


def _fused(work: Work, *, is_decoupled: bool) -> None:
    group, (beta1, beta2) = work.group, work.group["betas"]
    params = [local(p) for p in work.params]
    step = torch.full((), float(work.step), device=params[0].device)
    (torch._fused_adamw_ if is_decoupled else torch._fused_adam_)(
        params,
        [local(g) for g in work.grads],
        stored(work, "exp_avg"),
        stored(work, "exp_avg_sq"),
        [],
        [step] * len(params),
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )


def _init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    return zeros(parameter, group, "exp_avg", "exp_avg_sq", unsigned=("exp_avg_sq",))


def _check(group: Group) -> None:
    check_betas(group)
    check_number(group, "eps")


ADAMW = Rule(
    name="adamw",
    settings={"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    init=_init,
    update=lambda works: _update(works, is_decoupled=True),
    check=_check,
    has_8bit=True,
)
ADAM = Rule(
    name="adam",
    settings={"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    init=_init,
    update=lambda works: _update(works, is_decoupled=False),
    check=_check,
    is_coupled=True,
    has_8bit=True,
)


class AdamW(RuledOptimizer):
    """AdamW: ``p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)``.

    The numbers are torch.optim.AdamW's. On a CPU one pass of machine code updates everything; on CUDA torch's fused
    kernel. Source: Loshchilov & Hutter, arXiv:1711.05101.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, each in [0, 1). For language models (0.9, 0.95) on short runs, 0.999 on
            long ones (arXiv:2509.01440).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled, times the learning rate, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **more: Any,
    ) -> None:
        super().__init__(params, ADAMW, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **more)


class Adam(RuledOptimizer):
    """Adam: the decay is added to the gradient, ``g + weight_decay * p``.

    The numbers are torch.optim.Adam's. For decay that acts as decay take `AdamW`. Source: Kingma & Ba, arXiv:1412.6980.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: L2 penalty, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(params, ADAM, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **more)

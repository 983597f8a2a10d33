"""Optimizers whose step is a sign: Lion, Signum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.optim.elementwise import apply_each, decay_rate, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer


def lion_step(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    *,
    keep: float,
    lr: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
) -> Mapping[str, Tensor]:
    """Return the new weight and momentum: the step looks ahead with beta1, the momentum remembers with beta2."""
    update = torch.sign(beta1 * exp_avg + rest1 * g)
    return {"p": keep * p - lr * update, "exp_avg": beta2 * exp_avg + rest2 * g}


def signum_step(
    p: Tensor, g: Tensor, momentum_buffer: Tensor, *, keep: float, lr: float, momentum: float, ahead: float
) -> Mapping[str, Tensor]:
    """Return the new weight and buffer."""
    momentum_buffer = momentum * momentum_buffer + g
    return {"p": keep * p - lr * torch.sign(g + ahead * momentum_buffer), "momentum_buffer": momentum_buffer}


def plain_signum_step(
    p: Tensor, g: Tensor, momentum_buffer: Tensor, *, keep: float, lr: float, momentum: float
) -> Mapping[str, Tensor]:
    """Return the new weight and buffer, without looking ahead."""
    momentum_buffer = momentum * momentum_buffer + g
    return {"p": keep * p - lr * torch.sign(momentum_buffer), "momentum_buffer": momentum_buffer}


LION_KERNEL = Kernel(lion_step, ("p", "g", "exp_avg"), ("keep", "lr", "beta1", "rest1", "beta2", "rest2"))
SIGNUM_KERNEL = Kernel(signum_step, ("p", "g", "momentum_buffer"), ("keep", "lr", "momentum", "ahead"))
PLAIN_SIGNUM_KERNEL = Kernel(plain_signum_step, ("p", "g", "momentum_buffer"), ("keep", "lr", "momentum"))


def _lion(work: Work) -> tuple[Kernel, dict[str, float]]:
    group, (beta1, beta2) = work.group, work.group["betas"]
    return LION_KERNEL, {
        "keep": 1.0 - decay_rate(group),
        "lr": float(group["lr"]),
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
    }


def _signum(work: Work) -> tuple[Kernel, dict[str, float]]:
    group, momentum = work.group, work.group["momentum"]
    numbers = {"keep": 1.0 - decay_rate(group), "lr": float(group["lr"]), "momentum": momentum}
    return (SIGNUM_KERNEL, {**numbers, "ahead": momentum}) if group["nesterov"] else (PLAIN_SIGNUM_KERNEL, numbers)


def _check_signum(group: Group) -> None:
    check_number(group, "momentum", high=1.0)


LION = Rule(
    name="lion",
    settings={"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    init=lambda parameter, group: zeros(parameter, group, "exp_avg"),
    update=lambda works: apply_each(works, _lion),
    check=check_betas,
    has_8bit=True,
)
SIGNUM = Rule(
    name="signum",
    settings={"lr": 1e-4, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0},
    init=lambda parameter, group: zeros(parameter, group, "momentum_buffer"),
    update=lambda works: apply_each(works, _signum),
    check=_check_signum,
)


class Lion(RuledOptimizer):
    """Lion: ``p -= lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * p)``, ``m = beta2 * m + (1 - beta2) * g``.

    Half of AdamW's state. The learning rate is 3 to 10 times smaller than AdamW's and the decay as much larger; long
    warm-ups help (6 to 25 % of the run, arXiv:2509.01440). Source: Chen et al., arXiv:2302.06675.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0: what every weight moves in a step.
        betas: interpolation of the step, and decay rate of the momentum, each in [0, 1).
        weight_decay: decoupled, times the learning rate, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = Lion([weight], lr=0.25)
        >>> weight.grad = torch.tensor([3.0, -0.1])
        >>> optimizer.step()
        >>> weight.tolist()
        [0.75, -0.75]
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(params, LION, lr=lr, betas=betas, weight_decay=weight_decay, **more)


class Signum(RuledOptimizer):
    """Signum: ``b = momentum * b + g``, ``p -= lr * (sign(g + momentum * b) + weight_decay * p)``.

    Without Nesterov the step is ``sign(b)``. The buffer begins at zero (the benchmark's code begins it as a copy of the
    weights, which is a mistake). Source: Bernstein et al., arXiv:1802.04434.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0: what every weight moves in a step.
        momentum: in [0, 1).
        nesterov: 0.45 perplexity better than plain at 2.1B tokens (arXiv:2509.01440).
        weight_decay: decoupled, times the learning rate, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(params, SIGNUM, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, **more)

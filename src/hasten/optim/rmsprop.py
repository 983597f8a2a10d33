"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.optim.elementwise import apply_each, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_number
from hasten.optim.shell import Params, RuledOptimizer

Numbers = Mapping[str, Tensor]


def _direction(g: Tensor, square_avg: Tensor, numbers: Mapping[str, float]) -> tuple[Tensor, Numbers]:
    square_avg = numbers["alpha"] * square_avg + numbers["rest"] * (g * g)
    return g / (torch.sqrt(square_avg) + numbers["eps"]), {"square_avg": square_avg}


def _centered(g: Tensor, square_avg: Tensor, grad_avg: Tensor, numbers: Mapping[str, float]) -> tuple[Tensor, Numbers]:
    square_avg = numbers["alpha"] * square_avg + numbers["rest"] * (g * g)
    grad_avg = numbers["alpha"] * grad_avg + numbers["rest"] * g
    spread = torch.sqrt(square_avg - grad_avg * grad_avg) + numbers["eps"]
    return g / spread, {"square_avg": square_avg, "grad_avg": grad_avg}


def plain_step(p: Tensor, g: Tensor, square_avg: Tensor, **numbers: float) -> Numbers:
    """Return the new weight and state."""
    update, state = _direction(g + numbers["coupled"] * p, square_avg, numbers)
    return {"p": p - numbers["lr"] * update, **state}


def momentum_step(p: Tensor, g: Tensor, square_avg: Tensor, momentum_buffer: Tensor, **numbers: float) -> Numbers:
    """Return the new weight and state, with momentum."""
    update, state = _direction(g + numbers["coupled"] * p, square_avg, numbers)
    momentum_buffer = numbers["momentum"] * momentum_buffer + update
    return {"p": p - numbers["lr"] * momentum_buffer, **state, "momentum_buffer": momentum_buffer}


def centered_step(p: Tensor, g: Tensor, square_avg: Tensor, grad_avg: Tensor, **numbers: float) -> Numbers:
    """Return the new weight and state, the square about the mean."""
    update, state = _centered(g + numbers["coupled"] * p, square_avg, grad_avg, numbers)
    return {"p": p - numbers["lr"] * update, **state}


def centered_momentum_step(
    p: Tensor, g: Tensor, square_avg: Tensor, grad_avg: Tensor, momentum_buffer: Tensor, **numbers: float
) -> Numbers:
    """Return the new weight and state, the square about the mean, with momentum."""
    update, state = _centered(g + numbers["coupled"] * p, square_avg, grad_avg, numbers)
    momentum_buffer = numbers["momentum"] * momentum_buffer + update
    return {"p": p - numbers["lr"] * momentum_buffer, **state, "momentum_buffer": momentum_buffer}


_NUMBERS = ("coupled", "lr", "alpha", "rest", "eps")
# (centered, with momentum) -> kernel
KERNELS = {
    (False, False): Kernel(plain_step, ("p", "g", "square_avg"), _NUMBERS),
    (False, True): Kernel(momentum_step, ("p", "g", "square_avg", "momentum_buffer"), (*_NUMBERS, "momentum")),
    (True, False): Kernel(centered_step, ("p", "g", "square_avg", "grad_avg"), _NUMBERS),
    (True, True): Kernel(
        centered_momentum_step, ("p", "g", "square_avg", "grad_avg", "momentum_buffer"), (*_NUMBERS, "momentum")
    ),
}


def _kernel(group: Group) -> Kernel:
    return KERNELS[bool(group["centered"]), group["momentum"] > 0]


def _choose(work: Work) -> tuple[Kernel, dict[str, float]]:
    group = work.group
    numbers = {
        "coupled": group["weight_decay"],
        "lr": float(group["lr"]),
        "alpha": group["alpha"],
        "rest": 1.0 - group["alpha"],
        "eps": group["eps"],
        "momentum": group["momentum"],
    }
    kernel = _kernel(group)
    return kernel, {name: numbers[name] for name in kernel.scalars}


def _init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    return zeros(parameter, group, *_kernel(group).tensors[2:])


def _check(group: Group) -> None:
    check_number(group, "alpha", high=1.0)
    check_number(group, "momentum", high=1.0)
    check_number(group, "eps")


RMSPROP = Rule(
    name="rmsprop",
    settings={"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False, "weight_decay": 0.0},
    init=_init,
    update=lambda works: apply_each(works, _choose),
    check=_check,
    is_coupled=True,
)


class RMSprop(RuledOptimizer):
    """RMSprop: ``v = alpha * v + (1 - alpha) * g**2``, ``p -= lr * g / (sqrt(v) + eps)``.

    The numbers are torch.optim.RMSprop's (eps outside the root). Source: Tieleman & Hinton, lecture 6.5, 2012;
    centered: Graves, arXiv:1308.0850.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        alpha: decay rate of the squared gradient, in [0, 1).
        eps: added to the root, at least 0.
        weight_decay: L2 penalty, at least 0.
        momentum: of the update, in [0, 1).
        centered: whether the square is taken about the running mean of the gradient.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **more: Any,
    ) -> None:
        given = {"alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum, "centered": centered}
        super().__init__(params, RMSPROP, lr=lr, **given, **more)

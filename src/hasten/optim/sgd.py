"""SGD with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import apply_each, remainder, zeros
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_number
from hasten.optim.shell import Params, RuledOptimizer


def plain_step(p: Tensor, g: Tensor, *, coupled: float, lr: float) -> Mapping[str, Tensor]:
    """Return the new weight without momentum."""
    return {"p": p - lr * (g + coupled * p)}


def momentum_step(
    p: Tensor, g: Tensor, momentum_buffer: Tensor, *, coupled: float, lr: float, old: float, new: float
) -> Mapping[str, Tensor]:
    """Return the new weight and buffer."""
    momentum_buffer = old * momentum_buffer + new * (g + coupled * p)
    return {"p": p - lr * momentum_buffer, "momentum_buffer": momentum_buffer}


def nesterov_step(
    p: Tensor, g: Tensor, momentum_buffer: Tensor, *, coupled: float, lr: float, old: float, new: float, ahead: float
) -> Mapping[str, Tensor]:
    """Return the new weight and buffer, one step ahead along the buffer."""
    g = g + coupled * p
    momentum_buffer = old * momentum_buffer + new * g
    return {"p": p - lr * (g + ahead * momentum_buffer), "momentum_buffer": momentum_buffer}


PLAIN = Kernel(plain_step, ("p", "g"), ("coupled", "lr"))
MOMENTUM = Kernel(momentum_step, ("p", "g", "momentum_buffer"), ("coupled", "lr", "old", "new"))
NESTEROV = Kernel(nesterov_step, ("p", "g", "momentum_buffer"), ("coupled", "lr", "old", "new", "ahead"))


def _choose(work: Work) -> tuple[Kernel, dict[str, float]]:
    group, momentum = work.group, work.group["momentum"]
    numbers = {"coupled": group["weight_decay"], "lr": float(group["lr"])}
    if momentum == 0:
        return PLAIN, numbers
    is_first = work.step == 1  # The buffer begins as the gradient, not as a part of it.
    numbers |= {"old": 0.0 if is_first else momentum, "new": 1.0 if is_first else 1.0 - group["dampening"]}
    return (NESTEROV, {**numbers, "ahead": momentum}) if group["nesterov"] else (MOMENTUM, numbers)


def _init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    return zeros(parameter, group, "momentum_buffer") if group["momentum"] > 0 else remainder(parameter, group)


def _check(group: Group) -> None:
    check_number(group, "momentum", high=1.0)
    check_number(group, "dampening", high=1.0)
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise RecipeError(
            "optimizer.nesterov needs momentum above 0 and no dampening; give momentum=0.9, or leave it out."
        )


SGD_RULE = Rule(
    name="sgd",
    settings={"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    init=_init,
    update=lambda works: apply_each(works, _choose),
    check=_check,
    is_coupled=True,
)


class SGD(RuledOptimizer):
    """SGD: ``b = momentum * b + (1 - dampening) * (g + weight_decay * p)``, ``p -= lr * b``.

    The numbers are torch.optim.SGD's. Source: Sutskever et al., ICML 2013.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        momentum: in [0, 1); the buffer begins as the first gradient.
        dampening: in [0, 1).
        nesterov: whether the step is ``g + momentum * b``.
        weight_decay: L2 penalty, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **more: Any,
    ) -> None:
        given = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, SGD_RULE, lr=lr, **given, **more)

"""Adafactor: the squared gradient of a matrix kept as one number per row and one per column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import apply, decay_rate, remainder
from hasten.optim.kernels import Kernel
from hasten.optim.rule import Group, Rule, Work, check_number
from hasten.optim.sharding import add_up, local, local_like, whole
from hasten.optim.shell import Params, RuledOptimizer


def move_step(p: Tensor, update: Tensor, *, keep: float, step_size: float) -> dict[str, Tensor]:
    """Return the new weight."""
    return {"p": keep * p - step_size * update}


MOVE = Kernel(move_step, ("p", "update"), ("keep", "step_size"))


def _update(works: list[Work]) -> None:
    for work in works:
        group, step = work.group, work.step
        lr = float(group["lr"])
        share = float(step) ** group["beta2_decay"]
        rate = min(lr, 1.0 / step**0.5)
        updates, sizes = [], []
        for p, g, state, rms in zip(work.params, work.grads, work.states, _sizes(work), strict=True):
            grad = whole(g)
            eps1 = torch.finfo(p.dtype).eps if group["eps"][0] is None else group["eps"][0]
            wide = torch.promote_types(p.dtype, torch.float32)
            update = _direction(grad.to(wide), state, share, eps1)
            shrink = (update.norm(2) / (update.numel() ** 0.5 * group["d"])).clamp(min=1.0)
            sizes.append(rms.clamp(min=group["eps"][1]) * rate / shrink.double())
            updates.append(local_like(update, p))
        numbers = {"keep": 1.0 - decay_rate(group), "step_size": torch.stack(sizes)}
        apply(MOVE, work, numbers, extra={"update": updates})


def _sizes(work: Work) -> Tensor:
    """Return the root mean square of every weight."""
    norms = [local(p).norm(2, dtype=torch.promote_types(p.dtype, torch.float32)) for p in work.params]
    squares = add_up(torch.stack(norms).double().square(), work.params)
    return (squares / torch.tensor([float(p.numel()) for p in work.params], device=squares.device)).sqrt()


def _direction(grad: Tensor, state: dict[str, Tensor], share: float, eps: float) -> Tensor:
    """Take `grad` into the state and return it divided by the root of its estimated square."""
    if grad.ndim > 1:
        state["row_var"].lerp_(grad.norm(dim=-1, keepdim=True).square_().div_(grad.shape[-1]), share)
        state["col_var"].lerp_(grad.norm(dim=-2, keepdim=True).square_().div_(grad.shape[-2]), share)
        estimate = state["row_var"] @ state["col_var"]
        estimate.div_(state["row_var"].mean(dim=-2, keepdim=True).clamp_(min=eps))
    else:
        state["variance"].lerp_(grad.square(), share)
        estimate = state["variance"].clone()
    return estimate.clamp_(min=eps * eps).rsqrt_().mul_(grad)


def _init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    # Small, and whole on every process: sharded gradients are gathered for the means over rows and columns anyway.
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    shape, device = tuple(parameter.shape), parameter.device
    if len(shape) > 1:
        state = {
            "row_var": torch.zeros((*shape[:-1], 1), dtype=dtype, device=device),
            "col_var": torch.zeros((*shape[:-2], 1, shape[-1]), dtype=dtype, device=device),
        }
    else:
        state = {"variance": torch.zeros(shape, dtype=dtype, device=device)}
    return state | remainder(parameter, group)


def _check(group: Group) -> None:
    eps = group["eps"]
    if not isinstance(eps, (tuple, list)) or len(eps) != 2 or any(e is not None and not e >= 0 for e in eps):
        raise RecipeError(
            f"optimizer.eps={eps} is out of range; give two numbers of at least 0, the first may be None."
        )
    if not group["beta2_decay"] <= 0:
        raise RecipeError(f"optimizer.beta2_decay={group['beta2_decay']} is out of range; give a number of at most 0.")
    check_number(group, "d", is_open=True)


ADAFACTOR = Rule(
    name="adafactor",
    settings={"lr": 1e-2, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, "weight_decay": 0.0},
    init=_init,
    update=_update,
    check=_check,
    is_elementwise=False,
)


class Adafactor(RuledOptimizer):
    """Adafactor: ``v ~ row * col / mean(row)``, steps relative to the size of the weights, almost no state.

    The numbers are torch.optim.Adafactor's; unlike it, this one works on sharded parameters. Source: Shazeer & Stern,
    arXiv:1804.04235, with decoupled decay.

    Args:
        params: parameters, or groups of them.
        lr: largest relative step, at least 0; the step is ``min(lr, 1 / sqrt(t))``.
        beta2_decay: exponent of the growing memory, at most 0.
        eps: least squared root of the estimate (None: the number format's), and least size of a weight.
        d: limit of the update's root mean square, above 0.
        weight_decay: decoupled, times the learning rate, at least 0.
        **more: see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **more: Any,
    ) -> None:
        given = {"beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, ADAFACTOR, lr=lr, **given, **more)

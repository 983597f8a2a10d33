"""Adafactor: the squared gradient of a matrix kept as one number per row and one per column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import apply, decay_rate, remainder
from hasten.optim.kernels import Kernel
from hasten.optim.matrices import sharded_dim
from hasten.optim.rule import Group, Rule, Work, check_number
from hasten.optim.sharding import add_up, add_up_each, local
from hasten.optim.shell import Params, RuledOptimizer


def move_step(p: Tensor, update: Tensor, *, keep: float, step_size: float) -> dict[str, Tensor]:
    """Return the new weight."""
    return {"p": keep * p - step_size * update}


MOVE = Kernel(move_step, ("p", "update"), ("keep", "step_size"))


def _update(works: list[Work]) -> None:
    for work in works:
        group, step = work.group, work.step
        lr = float(group["lr"])
        rate = min(lr, 1.0 / step**0.5)
        updates = _directions(work, share=float(step) ** group["beta2_decay"])
        weights = [local(p).to(u.dtype) for p, u in zip(work.params, updates, strict=True)]
        squares = torch.stack([values.norm(2) for values in [*weights, *updates]]).double().square_()
        elements = torch.tensor([float(p.numel()) for p in work.params], dtype=torch.float64, device=squares.device)
        rms, size = (add_up(squares, [*work.params, *work.params]).view(2, -1) / elements).sqrt_()
        numbers: dict[str, float | Tensor] = {
            "keep": 1.0 - decay_rate(group),
            "step_size": rms.clamp(min=group["eps"][1]) * rate / (size / group["d"]).clamp(min=1.0),
        }
        apply(MOVE, work, numbers, extra={"update": updates})


def _directions(work: Work, *, share: float) -> list[Tensor]:
    """Take the gradients into the state; return them divided by the roots of their estimated squares, local parts."""
    least = work.group["eps"][0]
    states = [{name: local(value) for name, value in state.items()} for state in work.states]
    grads = [
        local(g).to(torch.promote_types(p.dtype, torch.float32)) for p, g in zip(work.params, work.grads, strict=True)
    ]
    factored = [k for k, p in enumerate(work.params) if p.ndim > 1]
    columns = {k: grads[k].norm(dim=-2, keepdim=True).square_() for k in factored}
    for k in factored:
        row_var = states[k]["row_var"]
        row_var.lerp_(grads[k].norm(dim=-1, keepdim=True).square_().div_(grads[k].shape[-1]), share)
    sums = {k: states[k]["row_var"].sum(dim=-2, keepdim=True) for k in factored}
    # Rows are what is sharded; in stacks of matrices they are the matrices, and each is whole.
    if flat := [k for k in factored if work.params[k].ndim == 2]:
        found = add_up_each([torch.cat([columns[k], sums[k]], dim=-1) for k in flat], [work.params[k] for k in flat])
        for k, both in zip(flat, found, strict=True):
            columns[k], sums[k] = both[:, :-1], both[:, -1:]
    updates = []
    for k, (p, grad, state) in enumerate(zip(work.params, grads, states, strict=True)):
        eps = torch.finfo(p.dtype).eps if least is None else least
        if k in columns:
            rows = p.shape[-2]
            state["col_var"].lerp_(columns[k] / rows, share)
            estimate = (state["row_var"] @ state["col_var"]).div_((sums[k] / rows).clamp_(min=eps))
        else:
            state["variance"].lerp_(grad.square(), share)
            estimate = state["variance"].clone()
        updates.append(estimate.clamp_(min=eps * eps).rsqrt_().mul_(grad))
    return updates


def _init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    if local(parameter) is not parameter:
        sharded_dim(parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if parameter.ndim < 2:
        return {"variance": torch.zeros_like(parameter, dtype=dtype)} | remainder(parameter, group)
    # Sharded like the rows of the parameter; the columns of a sharded matrix are small, and whole on every process.
    columns = (
        parameter.narrow(-2, 0, 1)
        if parameter.ndim > 2
        else torch.empty(1, parameter.shape[1], device=parameter.device)
    )
    state = {
        name: torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        for name, like in (("row_var", parameter.narrow(-1, 0, 1)), ("col_var", columns))
    }
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

"""Adafactor: the squared gradient of a matrix kept as one number per row and one per column."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import apply, decay_rate, remainder
from hasten.optim.kernels import Kernel
from hasten.optim.matrices import sharded_dim
from hasten.optim.rule import Group, Rule, Work, check_number
from hasten.optim.shell import Params, RuledOptimizer
from hasten.sharding import add_up, add_up_each, local, local_parts

# Elements that squares are taken of at a time.
PART = 1 << 18


def matrix_squares(p: Tensor, g: Tensor, row: Tensor, column: Tensor, *, least: float) -> dict[str, Tensor]:
    """Return the squares of a matrix and of its update, to be summed."""
    update = g / torch.sqrt(torch.clamp_min(row * column, least))
    return {"weights": p * p, "updates": update * update}


def matrix_step(
    p: Tensor, g: Tensor, row: Tensor, column: Tensor, *, least: float, keep: float, step_size: float
) -> dict[str, Tensor]:
    """Return the new matrix; ``row * column`` estimates the squared gradient."""
    update = g / torch.sqrt(torch.clamp_min(row * column, least))
    return {"p": keep * p - step_size * update}


def vector_squares(
    p: Tensor, g: Tensor, variance: Tensor, *, old: float, new: float, least: float
) -> dict[str, Tensor]:
    """Return the new squared gradient of a vector, and the squares of the vector and of its update, to be summed."""
    variance = old * variance + new * (g * g)
    update = g / torch.sqrt(torch.clamp_min(variance, least))
    return {"variance": variance, "weights": p * p, "updates": update * update}


def vector_step(
    p: Tensor, g: Tensor, variance: Tensor, *, least: float, keep: float, step_size: float
) -> dict[str, Tensor]:
    """Return the new vector."""
    return {"p": keep * p - step_size * (g / torch.sqrt(torch.clamp_min(variance, least)))}


_ACROSS = {"by_row": ("row",), "by_column": ("column",)}
MATRIX_SQUARES = Kernel(matrix_squares, ("p", "g", "row", "column"), ("least",), **_ACROSS)
MATRIX_STEP = Kernel(matrix_step, ("p", "g", "row", "column"), ("least", "keep", "step_size"), **_ACROSS)
VECTOR_SQUARES = Kernel(vector_squares, ("p", "g", "variance"), ("old", "new", "least"))
VECTOR_STEP = Kernel(vector_step, ("p", "g", "variance"), ("least", "keep", "step_size"))


def _update(works: list[Work]) -> None:
    for work in works:
        for is_matrix in (True, False):
            places = [k for k, p in enumerate(work.params) if (p.ndim > 1) == is_matrix]
            if places:
                part = ([values[k] for k in places] for values in (work.params, work.grads, work.states))
                _step(Work(work.group, *part, work.step), is_matrix=is_matrix)


def _step(work: Work, *, is_matrix: bool) -> None:
    """Update matrices, or vectors: statistics, then the size of the update, then the weights."""
    group, step = work.group, work.step
    lr, share = float(group["lr"]), float(step) ** group["beta2_decay"]
    eps = [_eps(p.dtype) if group["eps"][0] is None else group["eps"][0] for p in work.params]
    least = eps[0] ** 2 if len(set(eps)) == 1 else torch.tensor(eps, dtype=torch.float64).square_()
    if is_matrix:
        rows, columns = _factors(work, share, eps)
        extra, move = {"row": rows, "column": columns}, MATRIX_STEP
        sums = apply(MATRIX_SQUARES, work, {"least": least}, extra)
    else:
        extra, move = {}, VECTOR_STEP
        sums = apply(VECTOR_SQUARES, work, {"old": 1.0 - share, "new": share, "least": least})
    both = add_up(torch.cat([sums["weights"], sums["updates"]]), [*work.params, *work.params]).view(2, -1)
    rms, size = both.div_(_sizes(tuple(map(Tensor.numel, work.params)), both.device)).sqrt_()
    rates = rms.clamp_(min=group["eps"][1]).mul_(min(lr, 1.0 / step**0.5)).div_(size.div_(group["d"]).clamp_(min=1.0))
    apply(move, work, {"least": least, "keep": 1.0 - decay_rate(group), "step_size": rates}, extra)


def _factors(work: Work, share: float, eps: list[float]) -> tuple[list[Tensor], list[Tensor]]:
    """Take the gradients into the state; return what each row and each column of the estimated squares is made of."""
    grads = local_parts(work.grads)
    row_vars, column_vars = ([local(state[name]) for state in work.states] for name in ("row_var", "col_var"))
    rows, columns = [], []
    for p, grad in zip(work.params, grads, strict=True):
        row, column = _squares(grad, _wide(p))
        rows.append(row)
        columns.append(column)
    # Lists at once: these are small, and a call for each would be most of the time. So would be `mean` for sum.
    torch._foreach_div_(rows, [float(grad.shape[-1]) for grad in grads])
    torch._foreach_lerp_(row_vars, rows, share)
    sums = [row_var.sum(-2, keepdim=True) for row_var in row_vars]
    # Rows are what is sharded; in stacks of matrices they are the matrices, and each is whole.
    flat = [k for k, p in enumerate(work.params) if p.ndim == 2 and grads[k] is not work.grads[k]]
    if flat:
        found = add_up_each([torch.cat([columns[k], sums[k]], dim=-1) for k in flat], [work.params[k] for k in flat])
        for k, both in zip(flat, found, strict=True):
            columns[k], sums[k] = both[:, :-1].contiguous(), both[:, -1:].contiguous()
    heights = [float(p.shape[-2]) for p in work.params]
    torch._foreach_div_(columns, heights)
    torch._foreach_lerp_(column_vars, columns, share)
    torch._foreach_div_(sums, heights)
    torch._foreach_maximum_(sums, eps)
    return list(torch._foreach_div(row_vars, sums)), column_vars


def _squares(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sums of squares of every row and of every column, a part at a time so that no copy is kept."""
    if grad.numel() <= PART:
        squares = torch.square(grad if grad.dtype == dtype else grad.to(dtype))
        return squares.sum(-1, keepdim=True), squares.sum(-2, keepdim=True)
    height = max(1, PART // max(1, grad.numel() // max(1, grad.shape[-2])))
    rows, columns = [], None
    for part in grad.split(height, dim=-2):
        squares = part.to(dtype).square()
        rows.append(squares.sum(-1, keepdim=True))
        sums = squares.sum(-2, keepdim=True)
        columns = sums if columns is None else columns.add_(sums)
    return torch.cat(rows, dim=-2), columns


@functools.lru_cache(64)
def _sizes(elements: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(elements, dtype=torch.float64, device=device)


@functools.cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _wide(parameter: Tensor) -> torch.dtype:
    return parameter.dtype if parameter.dtype == torch.float64 else torch.float32


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

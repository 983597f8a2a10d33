"""SOAP, Adam in the eigenbasis of Shampoo's statistics, for matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hasten.optim.eigenbasis import add_outer_, complete_, first_basis, next_basis, reordered
from hasten.optim.elementwise import decay_rate, remainder
from hasten.optim.exchange import balanced, held_rows
from hasten.optim.matrices import SETTINGS as MATRIX_SETTINGS
from hasten.optim.matrices import apply, matrix_shape, parts, sharded_dim
from hasten.optim.rule import Group, Rule, Work, check_betas, check_number
from hasten.optim.shell import Params, RuledOptimizer
from hasten.sharding import local

Finish = Callable[[Tensor, Group], None]

SETTINGS: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.95, 0.95),
    "shampoo_beta": None,
    "eps": 1e-8,
    "precondition_frequency": 10,
    "spread_refresh": True,
    "max_precond_dim": 10000,
    "one_sided": False,
    "kl": False,
    "correct_bias": True,
    "weight_decay": 0.01,
    **MATRIX_SETTINGS,
}
# Where the authors of KL-SOAP start the eigenvalues, and the least that they divide by (one over 4000 squared).
KL_FIRST_EIGENVALUE = 0.1
KL_LARGEST_FACTOR = 4000


@dataclass
class Block:
    """One matrix (or stack of matrices) with its two sides.

    Args:
        gradient: [..., rows, columns], in the dtype of the state.
        first: ``exp_avg``, turned into the bases.
        second: ``exp_avg_sq``, of the turned gradient.
        state: of the parameter; statistic, basis (and eigenvalues) of a side are under ``<name>_<side><suffix>``.
        suffix: "" or the number of the block in a split parameter.
        sides: which of "rows" and "columns" have a basis.
    """

    gradient: Tensor
    first: Tensor
    second: Tensor
    state: dict[str, Tensor]
    suffix: str
    sides: tuple[str, ...]

    def of(self, name: str, side: str) -> Tensor:
        """Return a tensor of the state that belongs to a side."""
        return self.state[f"{name}_{side}{self.suffix}"]

    def turn(self, matrix: Tensor, *, back: bool = False) -> Tensor:
        """Return `matrix` in the bases, or from them."""
        for side in self.sides:
            basis = self.of("basis", side)
            basis = basis.mT if back else basis
            matrix = basis.mT @ matrix if side == "rows" else matrix @ basis
        return matrix


def init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    """Return moments and, for each side with a basis, ``statistic``, ``basis`` and with ``kl`` ``eigenvalues``.

    All of it whole at every process where the parameter is sharded. ``early`` (0-d, on the CPU) is how many steps early
    the bases change: with the state, so that it stays when other parameters have no gradient, and over a resume.

    Raises:
        RecipeError: `split_sizes` do not fit the shape.
    """
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    whole = torch.zeros(parameter.shape, dtype=dtype, device=local(parameter).device)
    state = {"exp_avg": whole, "exp_avg_sq": whole.clone(), "early": torch.tensor(float(_slot(parameter, group)))}
    state |= remainder(parameter, group)
    shape = matrix_shape(parameter, group)
    for block in _blocks(shape, group, whole.view(shape), state):
        for side in block.sides:
            size = whole.new_zeros(block.gradient.shape[:-2]).shape
            length = _length(block.gradient, side)
            key = f"{side}{block.suffix}"
            state[f"statistic_{key}"] = whole.new_zeros(*size, length, length)
            state[f"basis_{key}"] = torch.eye(length, dtype=dtype, device=whole.device).repeat(*size, 1, 1)
            if group["kl"]:
                state[f"eigenvalues_{key}"] = whole.new_full((*size, length), KL_FIRST_EIGENVALUE)
    return state


def check(group: Group) -> None:
    """Refuse settings that are out of range.

    Raises:
        RecipeError: names the setting.
    """
    check_betas(group)
    if group["shampoo_beta"] is not None:
        check_number(group, "shampoo_beta", high=1.0)
    check_number(group, "eps")
    check_number(group, "precondition_frequency", low=1)
    check_number(group, "max_precond_dim")


def update(works: list[Work]) -> None:
    """Apply one step of SOAP.

    With bases L and R of the statistics (averages of ``g g^T`` and ``g^T g``): ``g' = L^T g R``; m and v are averages
    of g' and its square; ``p <- p - lr sqrt(c2) / c1 L (m / (sqrt(v) + eps)) R^T``, then ``p <- p (1 - lr wd)``. The
    first gradient only gives the bases. Every ``precondition_frequency`` steps a basis takes one step of orthogonal
    iteration.

    Source: Vyas et al., arXiv:2409.11321, and the authors' code. Same numbers with fewer products: m stays in the bases
    and is turned only when they change (6 products a step instead of 10). Ours differs where `spread_refresh` is on:
    the matrices of a group refresh at different steps, so that no step takes much longer than others. Tensors of four
    and more dimensions are taken as matrices, those of three as stacks; the authors turn every dimension.

    ``one_sided`` keeps only the basis of the shorter side (rows of a square). ``kl`` weighs each statistic with the
    other side's inverse eigenvalues r, ``g R diag(1 / r) R^T g^T / columns``; r is an average of the mean squares of
    ``diag(1 / l)^(1/2) g'`` over rows, and columns are not sorted (KL-SOAP, arXiv:2509.03378, and its authors' code).
    """
    for weight, direction, group, step in directions(works):
        correction = bias_correction(group, step)
        lr = float(group["lr"])
        keep = 1.0 - decay_rate(group)
        apply(weight, direction, keep=keep, step_size=lr * correction * keep)


def bias_correction(group: Group, step: int) -> float:
    """Return ``sqrt(1 - beta2^t) / (1 - beta1^t)``; the first gradient does not count."""
    if not group["correct_bias"]:
        return 1.0
    beta1, beta2 = group["betas"]
    return math.sqrt(1.0 - beta2 ** (step - 1)) / (1.0 - beta1 ** (step - 1))


def directions(works: list[Work], finish: Finish | None = None) -> Iterator[tuple[Tensor, Tensor, Group, int]]:
    """Move the state of every parameter; yield (local weight, its direction, group, step), but nothing at step 1.

    Args:
        works: what to update.
        finish: changes the whole direction (as matrix, under a group) in place, before the local part is taken.
    """
    for work in works:
        for parameter, gradient, state in zip(work.params, work.grads, work.states):
            weight = local(parameter)
            whole = gradient if local(gradient) is gradient else gradient.full_tensor()
            shape = matrix_shape(parameter, work.group)
            matrix = whole.to(state["exp_avg"].dtype).reshape(shape)
            blocks = _blocks(shape, work.group, matrix, state)
            if work.step == 1:
                for block in blocks:
                    _start(block, work.group)
                continue
            clock = work.step - 1 + _early(state, work.group)
            turned_back = [_step(block, work.group, clock) for block in blocks]
            direction = turned_back[0] if len(blocks) == 1 else _join(turned_back, matrix, work.group)
            if finish is not None:
                finish(direction, work.group)
            yield weight, direction if weight is parameter else _local_rows(direction, parameter), work.group, work.step


def refresh_slots(params: Sequence[Tensor], group: Group) -> dict[Tensor, int]:
    """Return for each parameter how many steps early it refreshes: equal work in every step of a period.

    A function of the shapes alone.
    """
    frequency = int(group["precondition_frequency"])
    if not group["spread_refresh"] or frequency == 1:
        return dict.fromkeys(params, 0)
    return dict(zip(params, _balanced(tuple(sum(size**3 for size in p.shape) for p in params), frequency)))


@lru_cache(maxsize=8)
def _balanced(costs: tuple[int, ...], size: int) -> list[int]:
    # Once for all parameters of a group, each of which asks for its own slot.
    return balanced(costs, size)


def _slot(parameter: Tensor, group: Group) -> int:
    # A tensor that stands for a parameter, to find out how large its state is, is none of the group's.
    return refresh_slots(group.get("params", ()), group).get(parameter, 0)


def _early(state: dict[str, Tensor], group: Group) -> int:
    if not group["spread_refresh"]:
        return 0
    if state["early"].device.type != "cpu":  # loaded with the rest: once, or every step would wait for the device
        state["early"] = state["early"].cpu()
    return int(state["early"].item())


def _blocks(shape: tuple[int, ...], group: Group, gradient: Tensor, state: dict[str, Tensor]) -> list[Block]:
    split = parts(shape, group)
    first, second = state["exp_avg"].view(shape), state["exp_avg_sq"].view(shape)
    return [
        Block(
            part.of(gradient),
            part.of(first),
            part.of(second),
            state,
            f"_{number}" if len(split) > 1 else "",
            _sides(part.of(gradient), group),
        )
        for number, part in enumerate(split)
    ]


def _sides(matrix: Tensor, group: Group) -> tuple[str, ...]:
    rows, columns = matrix.shape[-2:]
    sides = ("rows", "columns")
    if group["one_sided"]:
        sides = ("rows",) if rows <= columns else ("columns",)
    # One row or column has nothing to turn.
    return tuple(side for side in sides if 1 < _length(matrix, side) <= group["max_precond_dim"])


def _length(matrix: Tensor, side: str) -> int:
    return matrix.shape[-2 if side == "rows" else -1]


def _start(block: Block, group: Group) -> None:
    beta = _statistic_beta(group)
    for side in block.sides:
        statistic, factor = block.of("statistic", side), block.gradient if side == "rows" else block.gradient.mT
        # As the authors do, to the last bit and at any size: see `add_outer_`.
        statistic.lerp_(factor @ factor.mT, 1.0 - beta)
        if group["kl"]:
            statistic.div_(factor.shape[-1])
        block.of("basis", side).copy_(first_basis(statistic))


def _step(block: Block, group: Group, clock: int) -> Tensor:
    beta1, beta2 = group["betas"]
    turned = block.turn(block.gradient)
    block.first.lerp_(turned, 1.0 - beta1)
    block.second.lerp_(turned * turned, 1.0 - beta2)
    factors = _kl_factors(block, group, turned) if group["kl"] else None
    # Without a basis `turned` is the gradient itself, which is not ours to write.
    scaled = torch.div(block.first, block.second.sqrt().add_(group["eps"]), out=turned if block.sides else None)
    direction = block.turn(scaled, back=True)
    del turned, scaled
    for side in block.sides:
        plain = block.gradient if side == "rows" else block.gradient.mT
        factor = plain if factors is None else factors[side]
        add_outer_(block.of("statistic", side), factor, beta=_statistic_beta(group))
    if clock % int(group["precondition_frequency"]) == 0:
        _refresh(block, is_sorted=not group["kl"])
    return direction


def _statistic_beta(group: Group) -> float:
    return group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]


def _kl_factors(block: Block, group: Group, turned: Tensor) -> dict[str, Tensor]:
    """Return for each side what its statistic is the outer product of; move the eigenvalues after."""
    beta, found, means = _statistic_beta(group), {}, {}
    for side, other, dim in (("rows", "columns", -1), ("columns", "rows", -2)):
        if side not in block.sides:
            continue
        factor, size, sharpened = block.gradient, _length(turned, other), turned
        if other in block.sides:
            inverse = block.of("eigenvalues", other).rsqrt().unsqueeze(-2 if dim == -1 else -1)
            basis = block.of("basis", other)
            factor = (factor @ basis if other == "columns" else basis.mT @ factor) * inverse
            sharpened = turned * inverse
        found[side] = (factor if side == "rows" else factor.mT) / math.sqrt(size)
        means[side] = sharpened.square().mean(dim)
    for side, mean in means.items():
        least = max(10, min(mean.shape[-1], KL_LARGEST_FACTOR)) ** -2
        block.of("eigenvalues", side).lerp_(mean, 1.0 - beta).clamp_min_(least)
    return found


def _refresh(block: Block, *, is_sorted: bool) -> None:
    for side in block.sides:
        dim = -2 if side == "rows" else -1
        basis = block.of("basis", side)
        following, order = next_basis(complete_(block.of("statistic", side)), basis, is_sorted=is_sorted)
        _rotate(block.first, basis, following, dim)
        if order is not None:
            block.second.copy_(reordered(block.second, order, dim))
        basis.copy_(following)


def _rotate(matrix: Tensor, basis: Tensor, following: Tensor, dim: int) -> None:
    """Turn rows (`dim` -2) or columns (-1) of `matrix` from one basis into the following one."""
    along, across = matrix.shape[dim], matrix.shape[-3 - dim]
    if along < across:  # the product of two bases is the smaller one
        change = basis.mT @ following
        turned = change.mT @ matrix if dim == -2 else matrix @ change
    else:
        turned = following.mT @ (basis @ matrix) if dim == -2 else matrix @ basis.mT @ following
    matrix.copy_(turned)


def _join(matrices: list[Tensor], like: Tensor, group: Group) -> Tensor:
    whole = torch.empty_like(like, memory_format=torch.contiguous_format)
    for matrix, part in zip(matrices, parts(tuple(like.shape), group)):
        part.of(whole).copy_(matrix)
    return whole


def _local_rows(direction: Tensor, parameter: Any) -> Tensor:
    mesh_dim = sharded_dim(parameter)
    if mesh_dim is None:
        return direction
    processes = parameter.device_mesh.get_group(mesh_dim)
    start, stop = held_rows(parameter.shape[0], processes.rank(), processes.size())
    return direction[start:stop]


RULE = Rule(
    name="soap",
    settings=SETTINGS,
    init=init,
    update=update,
    check=check,
    only_matrices=True,
    is_elementwise=False,
)


class SOAP(RuledOptimizer):
    """SOAP: Adam in the slowly turning eigenbasis of a matrix's gradients; everything that is no matrix goes to AdamW.

    See `update`. State is 8 bytes for each element, and 8 for each element of the two square statistics: for a matrix
    four times as long as wide 42 bytes per parameter in all, with ``one_sided`` 10. Give embeddings and the head to
    AdamW: `hasten.optimizer` does. Source: Vyas et al., arXiv:2409.11321.

    Args:
        params: parameters, or groups of them; vectors go to AdamW by themselves.
        lr: learning rate, at least 0.
        betas: decay rates of the first and second moments, in [0, 1).
        shampoo_beta: decay rate of the statistics, in [0, 1); None for the second of `betas`.
        eps: added to the root of the second moment, before the bias correction; at least 0.
        precondition_frequency: steps between changes of a basis, at least 1; 1 at large batch (arXiv:2607.20548).
        max_precond_dim: longer sides have no basis.
        one_sided: whether only the shorter side has a basis.
        kl: KL-SOAP, arXiv:2509.03378.
        correct_bias: whether moments are corrected for their start at zero.
        weight_decay: decoupled, times the learning rate, at least 0.
        **more: ``spread_refresh`` (False: all bases change at the same step, as the authors'), and see
            `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        one_sided: bool = False,
        kl: bool = False,
        correct_bias: bool = True,
        weight_decay: float = 0.01,
        **more: Any,
    ) -> None:
        moments = {"betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "correct_bias": correct_bias}
        bases = {"precondition_frequency": precondition_frequency, "max_precond_dim": max_precond_dim}
        form = {"one_sided": one_sided, "kl": kl, "weight_decay": weight_decay}
        super().__init__(params, RULE, lr=lr, **moments, **bases, **form, **more)

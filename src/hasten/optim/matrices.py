"""Parameters as matrices: their blocks, their shards and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.exchange import held_rows
from hasten.optim.rule import Group, Work
from hasten.sharding import local

# What every rule for matrices reads from its group: sizes of fused matrices along a dimension (None: the rows), and
# "flatten" to take three dimensions as one matrix rather than as a stack.
SETTINGS: dict[str, Any] = {"split_sizes": None, "split_dim": None, "as_matrix": None}


@dataclass(frozen=True)
class Part:
    """A block of a parameter that is a matrix of its own, such as the query of a fused QKV weight.

    Args:
        rows: of the whole matrix.
        columns: of the whole matrix.
        band: which of the blocks beside each other.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    band: int

    def of(self, matrix: Tensor, first_row: int = 0) -> Tensor:
        """Return the view of this block on `matrix`, whose row 0 is row `first_row` of the whole.

        It is `matrix` itself where the block is all of it.
        """
        *_, height, width = matrix.shape
        if not first_row and self.rows == (0, height) and self.columns == (0, width):
            return matrix
        start, stop = (min(max(row - first_row, 0), height) for row in self.rows)
        return matrix[..., start:stop, self.columns[0] : self.columns[1]]


@dataclass
class Piece:
    """One parameter in one step: what this process holds, as a matrix or a stack of matrices.

    Args:
        group: its settings.
        weight: local part of the parameter.
        gradient: local part of the gradient.
        state: its state, local.
        shape: of the whole matrix (or of the local stack).
        first_row: number of the first local row.
        processes: that hold its other rows; None where this one has all.
    """

    group: Group
    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    shape: tuple[int, ...]
    first_row: int = 0
    processes: Any = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of what this process holds, as matrix or stack."""
        return self.shape if self.processes is None else (self.weight.shape[0], self.shape[1])

    @property
    def cost(self) -> float:
        """Multiplications of one product of short sides with the long one."""
        *_, rows, columns = self.shape
        return min(rows, columns) ** 2 * (max(rows, columns) + min(rows, columns))


def matrix_shape(parameter: Tensor, group: Group) -> tuple[int, ...]:
    """Return (rows, columns), or (matrices, rows, columns) for a stack, that `parameter` is taken as.

    Three dimensions are a stack of matrices, such as experts; four and more (convolutions), and three with
    ``as_matrix = "flatten"``, have their first dimension as rows.
    """
    shape = tuple(parameter.shape)
    if len(shape) > 3 or (len(shape) == 3 and group["as_matrix"] == "flatten"):
        return shape[0], math.prod(shape[1:])
    return shape


def parts(shape: tuple[int, ...], group: Group) -> list[Part]:
    """Return the blocks of a matrix of `shape` that are matrices of their own: ``split_sizes`` along ``split_dim``.

    Raises:
        RecipeError: `split_sizes` do not add up to that dimension, or that dimension is the stack's.
    """
    *_, rows, columns = shape
    sizes = group["split_sizes"]
    if not sizes:
        return [Part((0, rows), (0, columns), 0)]
    dim = -2 if group["split_dim"] is None else group["split_dim"]
    dim = dim - len(shape) if dim >= 0 else dim
    if dim not in (-1, -2):
        raise RecipeError(
            f"optimizer.split_dim={group['split_dim']} of a weight of shape {shape} is no side of a matrix."
        )
    if min(sizes) < 1 or sum(sizes) != shape[dim]:
        raise RecipeError(
            f"optimizer.split_sizes={list(sizes)} add up to {sum(sizes)}, and dimension {dim} of a weight of shape "
            f"{shape} has {shape[dim]}; give sizes that add up to it."
        )
    bounds = list(pairwise(accumulate(sizes, initial=0)))
    if dim == -2:
        return [Part(bound, (0, columns), 0) for bound in bounds]
    return [Part((0, rows), bound, band) for band, bound in enumerate(bounds)]


def step_scale(part: Part, adjust_lr: str) -> float:
    """Return what an orthogonal update of this block is multiplied by.

    ``match_rms_adamw``: ``0.2 sqrt(max(out, in))``, a root mean square of 0.2 as AdamW's (arXiv:2502.16982);
    ``original``: ``sqrt(max(1, out / in))`` (Keller Jordan); ``rms_to_rms``: ``sqrt(out / in)`` (Bernstein).
    """
    outputs, inputs = part.rows[1] - part.rows[0], part.columns[1] - part.columns[0]
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(outputs, inputs))
    return math.sqrt(max(1.0, outputs / inputs) if adjust_lr == "original" else outputs / inputs)


def apply(weight: Tensor, update: Tensor, *, keep: float, step_size: float) -> None:
    """``weight <- keep * weight - step_size * update``, in float32 or better."""
    if weight.dtype in (torch.float32, torch.float64):
        weight.mul_(keep).add_(update.view(weight.shape), alpha=-step_size)
    else:
        weight.copy_(weight.float().mul_(keep).add_(update.view(weight.shape), alpha=-step_size))


def apply_all(
    weights: Sequence[Tensor], updates: Sequence[Tensor], *, keep: Sequence[float], step_size: Sequence[float]
) -> None:
    """`apply` for each; lists at once where they can be, and then `updates` are overwritten."""
    if any(weight.dtype not in (torch.float32, torch.float64) for weight in weights):
        for weight, update, kept, size in zip(weights, updates, keep, step_size):
            apply(weight, update, keep=kept, step_size=size)
        return
    torch._foreach_mul_(updates, [-size for size in step_size])
    torch._foreach_mul_(weights, keep)
    shaped = [u if u.shape == w.shape else u.view(w.shape) for w, u in zip(weights, updates)]
    torch._foreach_add_(weights, shaped)


def pieces_of(work: Work) -> Iterator[Piece]:
    """Yield the parameters of `work` as this process holds them.

    Raises:
        RecipeError: a parameter is sharded along another dimension, or along several.
    """
    for parameter, gradient, state in zip(work.params, work.grads, work.states):
        shape = matrix_shape(parameter, work.group)
        weight, held = local(parameter), {name: local(value) for name, value in state.items()}
        piece = Piece(work.group, weight, local(gradient), held, shape)
        mesh_dim = None if weight is parameter else sharded_dim(parameter)
        if mesh_dim is not None and len(shape) == 3:
            piece.shape = tuple(weight.shape)
        elif mesh_dim is not None:
            piece.processes = parameter.device_mesh.get_group(mesh_dim)
            piece.first_row, _ = held_rows(shape[0], piece.processes.rank(), piece.processes.size())
        yield piece


def sharded_dim(parameter: Any) -> int | None:
    """Return the dimension of its mesh over which a `DTensor` is sharded by rows; None where it is whole everywhere.

    Raises:
        RecipeError: it is sharded in another way.
    """
    found = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    wrong = [parameter.placements[dim] for dim in found if repr(parameter.placements[dim]) != "Shard(dim=0)"]
    if wrong or len(found) > 1:
        raise RecipeError(
            f"A matrix is placed as {parameter.placements}, and its update needs Shard(0) over one dimension of the "
            "mesh and Replicate over the others: shard the model with fully_shard alone."
        )
    return found[0] if found and parameter.device_mesh.size(found[0]) > 1 else None

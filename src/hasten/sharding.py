"""Sharded parameters: the part that this process holds, and sums over all parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import RecipeError


def local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process holds; all of it where it is not sharded."""
    return tensor.to_local() if _is_sharded_type(tensor) else tensor


def add_up(sums: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return `sums`, one number per parameter over its local part, added up over the processes that share it.

    One all-reduce for all parameters of a mesh, and none where nothing is sharded. Every process must call it with the
    same parameters.

    Args:
        sums: shape [len(params)], float64.
        params: sharded or not, in the same order on every process.

    Raises:
        RecipeError: a parameter is placed in a way for which local sums mean nothing.
    """
    return torch.stack(add_up_each(sums.unbind(), params)) if any(map(_is_sharded_type, params)) else sums


def add_up_each(values: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return `values`, one tensor per parameter of sums over its local part, added up as by `add_up`.

    Args:
        values: of one number format and device, of any shapes.
        params: sharded or not, in the same order on every process.

    Raises:
        RecipeError: a parameter is placed in a way for which local sums mean nothing.
    """
    total = list(values)
    meshes: dict[object, list[int]] = {}
    for place, parameter in enumerate(params):
        if _is_sharded_type(parameter):
            meshes.setdefault(parameter.device_mesh, []).append(place)
    for mesh, places in meshes.items():
        for dim in range(mesh.ndim):
            moved = []
            for place in places:
                placement = params[place].placements[dim]
                if placement.is_shard():
                    moved.append(place)
                elif not placement.is_replicate():
                    raise RecipeError(
                        f"A parameter is placed as {placement}, and an optimizer step needs Shard or Replicate: "
                        "shard the model with fully_shard."
                    )
            if moved:
                joined = torch.cat([total[place].reshape(-1) for place in moved])
                part = joined.to(params[moved[0]].device)
                torch.distributed.all_reduce(part, group=mesh.get_group(dim))
                pieces = part.to(joined.device).split([total[place].numel() for place in moved])
                for place, piece in zip(moved, pieces, strict=True):
                    total[place] = piece.view(total[place].shape)
    return total


def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """Return `local` of each."""
    if any(map(_is_sharded, set(map(type, tensors)))):
        return [local(tensor) for tensor in tensors]
    return tensors


def _is_sharded_type(tensor: Tensor) -> bool:
    return _is_sharded(type(tensor))


@functools.cache
def _is_sharded(kind: type) -> bool:
    # Known without importing torch.distributed.tensor, which costs half a second and which most runs never need.
    return any(parent.__name__ == "DTensor" for parent in kind.__mro__)


def first_row(tensor: Tensor) -> int:
    """Return the first row of `tensor` that this process holds: FSDP2 cuts rows as `torch.chunk` does.

    Raises:
        RecipeError: it is cut along another dimension than its rows.
    """
    if not _is_sharded_type(tensor):
        return 0
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            if placement.dim != 0:
                raise RecipeError(
                    f"A weight is sharded along dimension {placement.dim}, and only rows can be told apart: shard the "
                    "first, as fully_shard does."
                )
            mesh = tensor.device_mesh
            return min(mesh.get_local_rank(dim) * -(-tensor.shape[0] // mesh.size(dim)), tensor.shape[0])
    return 0


def is_in_parts(tensor: Tensor) -> bool:
    """Say whether this process holds some rows of `tensor` only."""
    return _is_sharded_type(tensor) and any(placement.is_shard() for placement in tensor.placements)


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor`; every process has to ask for it."""
    return tensor.full_tensor() if _is_sharded_type(tensor) else tensor


def total_norm(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of all `tensors` together, 0-d: over all processes where they are in parts.

    Args:
        tensors: of one mesh, where they are sharded.
        norm_type: 2 or infinity.
    """
    parts = [tensor for tensor in tensors if is_in_parts(tensor)]
    if not parts:
        return torch.nn.utils.get_total_norm(local_parts(list(tensors)), norm_type)
    own = torch.nn.utils.get_total_norm([local(tensor) for tensor in parts], norm_type)
    rest = [local(tensor) for tensor in tensors if not is_in_parts(tensor)]
    others = torch.nn.utils.get_total_norm(rest, norm_type).to(own.device) if rest else torch.zeros_like(own)
    if norm_type == 2.0:
        (squares,) = add_up_each([own.double() ** 2], parts[:1])
        return (squares + others.double() ** 2).sqrt().to(own.dtype)
    for dim, placement in enumerate(parts[0].placements):
        if placement.is_shard():
            torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, group=parts[0].device_mesh.get_group(dim))
    return torch.maximum(own, others)


def unit_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of every unit of every tensor, shaped to be multiplied with what this process holds of it.

    A unit is a row, or the first index of a tensor of more dimensions; a vector is one.
    """
    norms = [_unit_norms(local(tensor)) for tensor in tensors]
    cut = [place for place, tensor in enumerate(tensors) if tensor.ndim < 2 and is_in_parts(tensor)]
    if cut:
        squares = add_up_each([norms[place].double() ** 2 for place in cut], [tensors[place] for place in cut])
        for place, square in zip(cut, squares, strict=True):
            norms[place] = square.sqrt().to(norms[place].dtype)
    return norms


def anywhere(flag: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return whether `flag` (0-d, bool) is true in any of the processes that share `tensors`."""
    parts = [tensor for tensor in tensors if is_in_parts(tensor)]
    return add_up_each([flag.double()], parts[:1])[0] > 0 if parts else flag


def pick(tensor: Tensor, places: Tensor) -> Tensor:
    """Return the elements at `places` of the flattened whole, 1-d; every process gets all of them.

    Args:
        tensor: in parts or not.
        places: whole numbers, on its device.
    """
    if not is_in_parts(tensor):
        return local(tensor).reshape(-1)[places]
    rows = local(tensor).reshape(-1)
    own = places - first_row(tensor) * tensor.shape[1:].numel()
    is_held = (own >= 0) & (own < rows.numel())
    found = torch.zeros(len(places), dtype=torch.float64, device=rows.device)
    found[is_held] = rows[own[is_held]].double()
    return add_up_each([found], [tensor])[0].to(rows.dtype)


def _unit_norms(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)

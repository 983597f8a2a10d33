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

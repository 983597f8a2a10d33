"""Sharded parameters: the part that this process holds, and sums over all parts."""

from __future__ import annotations

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
    meshes: dict[object, list[int]] = {}
    for place, parameter in enumerate(params):
        if _is_sharded_type(parameter):
            meshes.setdefault(parameter.device_mesh, []).append(place)
    if not meshes:
        return sums
    total = sums.clone()
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
                part = total[moved].to(params[moved[0]].device)
                torch.distributed.all_reduce(part, group=mesh.get_group(dim))
                total[moved] = part.to(total.device)
    return total


def _is_sharded_type(tensor: Tensor) -> bool:
    # Known without importing torch.distributed.tensor, which costs half a second and which most runs never need.
    return type(tensor).__name__ == "DTensor" or "DTensor" in {kind.__name__ for kind in type(tensor).__mro__}


def whole(tensor: Tensor) -> Tensor:
    """Return all of `tensor`, gathered where it is sharded."""
    return tensor.full_tensor() if _is_sharded_type(tensor) else tensor


def local_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a whole `tensor` that this process holds of `parameter`."""
    if not _is_sharded_type(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()

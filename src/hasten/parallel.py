"""How the processes of a run share a model: one alone, a copy in each (DDP), or parts of it in each (FSDP, HSDP).

PyTorch's own engines do the work; here they are values with the same questions to ask, so that the loop is one.
Dimensions of a mesh: copies of the model, and the parts of one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.distributed import ALONE, Ranks
from hasten.errors import RecipeError, RunError
from hasten.sharding import first_row, gathered, is_in_parts, local

Master = Callable[[nn.Parameter], nn.Parameter]


class Saved(Protocol):
    """A whole tensor that lies somewhere, of which rows can be read."""

    shape: torch.Size

    def read(self, first: int | None = None, stop: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Piece:
    """What one process holds of a tensor, on the CPU: its rows from `first` on, of a whole of `shape`."""

    rows: Tensor
    shape: torch.Size
    first: int
    is_whole: bool

    def read(self, first: int | None = None, stop: int | None = None) -> Tensor:
        """Return these rows, which are all that this process ever asks for."""
        assert first is None or first == self.first, (first, self.first)
        return self.rows


class Parallel(Protocol):
    """What the loop asks of the way in which processes share a model."""

    ranks: Ranks
    # Each process's loss is multiplied by it, because gradients are averaged over the processes and not added up.
    loss_factor: float
    # Whether a process holds parts of the weights only.
    is_sharded: bool

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Let this process hold its part of `model`, which then computes in `dtype`."""
        ...

    def wrap(self, forward: nn.Module, master: Master) -> nn.Module:
        """Return the forward pass whose backward pass brings the gradients of all processes together.

        Args:
            forward: of the model.
            master: gives the float32 weights that the optimizer updates for a parameter.
        """
        ...

    def passing(self, forward: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Return what a micro-batch's passes go on in; gradients are brought together in the last one of a step."""
        ...

    def has_collected(self, is_last: bool) -> bool:
        """Say whether the masters have the gradients of a backward pass already."""
        ...

    def total(self, loss: Tensor) -> Tensor:
        """Return the sum over all processes, on its device."""
        ...

    def hold(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return copies on the CPU of what this process holds of named tensors."""
        ...

    def owned(self, held: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the whole tensors that this process is to write, of what all processes hold."""
        ...

    def place(self, saved: Any, like: Tensor) -> Tensor:
        """Return what this process is to hold of a saved tensor in the place of `like`."""
        ...

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors to the first process, on the CPU where they were in parts; nothing to the others."""
        ...


class Alone:
    """One process, which has the whole model."""

    ranks = ALONE
    loss_factor = 1.0
    is_sharded = False

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Leave the model whole."""

    def wrap(self, forward: nn.Module, master: Master) -> nn.Module:
        """Return `forward`."""
        return forward

    def passing(self, forward: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Return nothing special."""
        return nullcontext()

    def has_collected(self, is_last: bool) -> bool:
        """Say no."""
        return False

    def total(self, loss: Tensor) -> Tensor:
        """Return it."""
        return loss

    def hold(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return copies on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def owned(self, held: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return all of them."""
        return dict(held)

    def place(self, saved: Any, like: Tensor) -> Tensor:
        """Return it."""
        return saved

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return them."""
        return dict(named)


class Copies(Alone):
    """A copy of the model in every process, gradients averaged while the backward pass goes on.

    Source: Li et al., arXiv:2006.15704 (`torch.nn.parallel.DistributedDataParallel`).

    Args:
        ranks: all processes of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.loss_factor = float(ranks.size)
        self._has_masters = False

    def wrap(self, forward: nn.Module, master: Master) -> nn.Module:
        """Return `forward` in DDP; gradients of narrow weights are added up in float32, in their masters."""
        from torch.nn.parallel import DistributedDataParallel

        # Buffers are tables that every process has: nothing to send before every pass.
        tables = [name for name, _ in forward.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(forward, tables)
        wrapped = DistributedDataParallel(forward, gradient_as_bucket_view=True)
        self._has_masters = any(master(parameter) is not parameter for parameter in forward.parameters())
        if self._has_masters:
            wrapped.register_comm_hook(None, _through_masters(master, self.ranks.size))
        return wrapped

    def passing(self, forward: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Return a pass that leaves gradients to this process, for all but the last micro-batch."""
        return nullcontext() if is_last else forward.no_sync()

    def has_collected(self, is_last: bool) -> bool:
        """Say yes after the last micro-batch, where weights are narrow."""
        return is_last and self._has_masters

    def total(self, loss: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return _total(loss)

    def owned(self, held: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return all to the first process, which writes for all."""
        return dict(held) if self.ranks.is_main else {}

    def place(self, saved: Saved | Tensor, like: Tensor) -> Tensor:
        """Return the whole."""
        return _read(saved, None, None)

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return them to the first process."""
        return dict(named) if self.ranks.is_main else {}


def _through_masters(master: Master, size: int) -> Callable[[Any, Any], Any]:
    """Return a hook for DDP that averages, of every parameter, the float32 gradient of its master."""
    import torch.distributed as dist

    def reduce(_, bucket):  # DDP refuses annotations that are text
        parameters, buffer = bucket.parameters(), bucket.buffer()
        if master(parameters[0]) is parameters[0]:  # buckets hold one number format: all of it is float32
            return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0].div_(size))
        for parameter, gradient in zip(parameters, bucket.gradients(), strict=True):
            kept = master(parameter)
            kept.grad = gradient.float() if kept.grad is None else kept.grad.add_(gradient)
        joined = torch.cat([master(parameter).grad.reshape(-1) for parameter in parameters])

        def spread(done: Any) -> Tensor:
            pieces = done.value()[0].div_(size).split([parameter.numel() for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                master(parameter).grad.copy_(piece.view_as(parameter))
            return buffer

        return dist.all_reduce(joined, async_op=True).get_future().then(spread)

    return reduce


class Parts:
    """Rows of every weight in every process, gathered block by block when they are needed, by FSDP2.

    Sources: Rajbhandari et al., arXiv:1910.02054 (stage 3); Zhao et al., arXiv:2304.11277.

    Args:
        ranks: all processes of the run.
        copies: of the model, each in parts over as many processes; 1 is FSDP, more is HSDP.
        device: kind of device.
        saving: gloo groups for `owned`, which a thread beside training calls: one for every copy.

    Raises:
        RecipeError: the processes cannot be shared out among so many copies.
    """

    is_sharded = True

    def __init__(self, ranks: Ranks, copies: int, device: str) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if ranks.size % copies:
            raise RecipeError(
                f"parallel.copies={copies} does not divide the {ranks.size} processes of this run: give a divisor."
            )
        self.ranks = ranks
        self.loss_factor = float(ranks.size)
        self._parts = ranks.size // copies
        shape, names = ((copies, self._parts), ("copies", "parts")) if copies > 1 else ((ranks.size,), ("parts",))
        self._mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        self._copy, self._part = divmod(ranks.rank, self._parts)
        # Every process has to make every group; only its own is of use to it.
        groups = [
            dist.new_group(list(range(c * self._parts, (c + 1) * self._parts)), backend="gloo") for c in range(copies)
        ]
        self._group = groups[self._copy]

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Shard every block, then what is left; weights are float32 and are gathered in `dtype`."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        is_narrow = dtype.itemsize < 4
        policy = MixedPrecisionPolicy(dtype if is_narrow else None, torch.float32 if is_narrow else None)
        for block in blocks:
            fully_shard(block, mesh=self._mesh, mp_policy=policy)
        # Its own weights are given back after a pass too, or one after an evaluation would see those of the evaluation.
        fully_shard(model, mesh=self._mesh, mp_policy=policy, reshard_after_forward=True)
        self._model: Any = model

    def wrap(self, forward: nn.Module, master: Master) -> nn.Module:
        """Return `forward`: its parameters do it all."""
        return forward

    def passing(self, forward: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Return a pass that leaves whole gradients to this process, for all but the last micro-batch."""
        self._model.set_requires_gradient_sync(is_last)
        self._model.set_is_last_backward(is_last)
        return nullcontext()

    def has_collected(self, is_last: bool) -> bool:
        """Say no: there are no masters beside the weights."""
        return False

    def total(self, loss: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return _total(loss)

    def hold(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return a `Piece` of each."""
        return {name: _piece(tensor.detach()) for name, tensor in tensors.items()}

    def owned(self, held: Mapping[str, Piece]) -> dict[str, Tensor]:
        """Return whole tensors, shared out among the processes of the first copy by size."""
        import torch.distributed as dist

        if self._copy:
            return {}
        found: dict[str, Tensor] = {}
        loads = [0] * self._parts
        for name in sorted(held, key=lambda name: (-held[name].shape.numel(), name)):
            piece = held[name]
            owner = loads.index(min(loads))
            loads[owner] += piece.shape.numel()
            if piece.is_whole:
                if owner == self._part:
                    found[name] = piece.rows
                continue
            chunk = -(-piece.shape[0] // self._parts)
            padded = piece.rows.new_zeros(chunk, *piece.shape[1:])
            padded[: len(piece.rows)] = piece.rows
            parts = [torch.empty_like(padded) for _ in range(self._parts)] if owner == self._part else None
            dist.gather(padded, parts, group_dst=owner, group=self._group)
            if parts is not None:
                found[name] = torch.cat(parts)[: piece.shape[0]]
        return found

    def place(self, saved: Saved | Tensor, like: Tensor) -> Tensor:
        """Return this process's rows as a sharded tensor where `like` is one, else the whole."""
        from torch.distributed.tensor import DTensor

        if not isinstance(like, DTensor):
            return _read(saved, None, None)
        if tuple(saved.shape) != tuple(like.shape):
            raise RunError(
                f"A saved tensor has the shape {tuple(saved.shape)}, and {tuple(like.shape)} is needed: "
                "it was saved by another optimizer or model."
            )
        rows, first = local(like), first_row(like)
        read = _read(saved, first, first + len(rows)) if is_in_parts(like) else _read(saved, None, None)
        return DTensor.from_local(
            read.to(rows.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather them one after another, and keep them in the first process."""
        found: dict[str, Tensor] = {}
        for name, tensor in named.items():
            entire = gathered(tensor.detach())
            if self.ranks.is_main:
                found[name] = entire.cpu()
        return found


def _read(saved: Saved | Tensor, first: int | None, stop: int | None) -> Tensor:
    if not isinstance(saved, Tensor):
        return saved.read(first, stop)
    return saved if first is None else saved[first:stop]


def _total(loss: Tensor) -> Tensor:
    torch.distributed.all_reduce(loss)
    return loss


def _piece(tensor: Tensor) -> Piece:
    return Piece(local(tensor).to("cpu", copy=True), tensor.shape, first_row(tensor), not is_in_parts(tensor))

"""What element-wise rules share: their state, the decay factor, and a kernel applied to a group's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hasten.optim.kernels import Kernel, Rounding, Stored
from hasten.optim.rule import Group, Work
from hasten.optim.storage import Packed, can_pack, empty_packed, mix_number
from hasten.sharding import local, local_parts

SCALE = "_scale"  # ``exp_avg`` in 8 bits has its scales beside it, as ``exp_avg_scale``.
LOW = "low"  # What rounding to bfloat16 cut off the weight, with ``rounding="kahan"``.


def zeros(parameter: Tensor, group: Group, *names: str, unsigned: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return state of the parameter's shape, all zero: float32 (float64 for float64 weights), or 8 bits.

    Args:
        parameter: the weight.
        group: its settings; ``state_format`` and ``rounding`` are read.
        names: of the state.
        unsigned: those that are never negative.
    """
    state: dict[str, Tensor] = {}
    for name in names:
        if group["state_format"] == "8bit" and can_pack(parameter):
            packed = empty_packed(parameter, is_signed=name not in unsigned)
            state[name], state[name + SCALE] = packed.codes, packed.scales
        else:
            state[name] = wide_zeros(parameter)
    return state | remainder(parameter, group)


def wide_zeros(parameter: Tensor) -> Tensor:
    """Return zeros of the parameter's shape in the format that state is computed in."""
    dtype = parameter.dtype if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


def remainder(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    """Return the place for what rounding cuts off a bfloat16 weight, where that is kept."""
    is_kept = group["rounding"] == "kahan" and parameter.dtype == torch.bfloat16
    return {LOW: torch.zeros_like(parameter)} if is_kept else {}


def remainders(work: Work) -> list[Tensor] | None:
    """Return what rounding has cut off each weight so far, local parts, where that is kept; None where it is not.

    State from before ``rounding`` was changed has none yet: it is made here, since kernels write to it by address.
    """
    if work.group["rounding"] != "kahan":
        return None
    for parameter, state in zip(work.params, work.states, strict=True):
        if LOW not in state:
            state.update(remainder(parameter, work.group))
    # Weights that are not rounded have none, and any tensor stands for it.
    return [local(state.get(LOW, state["step"])) for state in work.states]


def decay_rate(group: Group) -> float:
    """Return the share of a weight that decays in this step: ``lr * weight_decay``, with the present or the peak lr.

    A step at rate 0 moves nothing: torch.distributed.checkpoint makes one before it reads the state of an optimizer.
    """
    if float(group["lr"]) == 0.0:
        return 0.0
    lr = group["lr"] if group["decay_follows_lr"] else group.get("initial_lr", group["lr"])
    return float(lr) * group["weight_decay"]


def stored(work: Work, name: str) -> list[Stored]:
    """Return the state called `name` of every parameter, local parts of sharded ones."""
    if work.group["state_format"] != "8bit":
        return local_parts([state[name] for state in work.states])
    return [
        Packed(local(state[name]), local(state[name + SCALE])) if name + SCALE in state else local(state[name])
        for state in work.states
    ]


def apply(
    kernel: Kernel,
    work: Work,
    scalars: Mapping[str, float | Tensor],
    extra: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Run `kernel` over the parameters of `work`: ``p`` and ``g`` by those names, state by its own; return the sums.

    Args:
        kernel: the update.
        work: what to update.
        scalars: numbers by name; one value, or one for each parameter.
        extra: more lists of local tensors by name, for what is not state.
    """
    tensors = _tensors(kernel, work, extra or {})
    mode, is_packed = work.group["rounding"], work.group["state_format"] == "8bit"
    if mode == "nearest" and not is_packed:
        return kernel(tensors, scalars)
    is_random = mode == "stochastic" or is_packed
    seed = mix_number(work.group["seed"] * 0x9E3779B9 + work.step) if is_random else 0
    return kernel(tensors, scalars, rounding=Rounding(mode, seed), low=remainders(work))


def apply_each(works: Sequence[Work], choose: Callable[[Work], tuple[Kernel, Mapping[str, float]]]) -> None:
    """Run over every work the kernel chosen for it, with its numbers; those of one kernel together where that is more.

    Groups that differ in their numbers only, with and without decay, are one call of machine code.

    Args:
        works: what to update.
        choose: returns a kernel that sums nothing, and its numbers.
    """
    together: dict[Kernel, list[tuple[Mapping[str, Sequence[Tensor]], Mapping[str, float]]]] = {}
    for work in works:
        kernel, numbers = choose(work)
        if work.group["rounding"] == "nearest" and work.group["state_format"] != "8bit":
            together.setdefault(kernel, []).append((_tensors(kernel, work, {}), numbers))
        else:
            apply(kernel, work, numbers)
    for kernel, parts in together.items():
        kernel.each(parts)


def _tensors(kernel: Kernel, work: Work, extra: Mapping[str, Sequence[Tensor]]) -> dict[str, Sequence[Stored]]:
    """Return the local tensors that `kernel` takes, by name."""
    tensors: dict[str, Sequence[Stored]] = dict(extra)
    for name in kernel.tensors:
        if name == "p":
            tensors[name] = local_parts(work.params)
        elif name == "g":
            tensors[name] = local_parts(work.grads)
        elif name not in tensors:
            tensors[name] = stored(work, name)
    return tensors

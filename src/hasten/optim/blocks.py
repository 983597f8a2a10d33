"""Element-wise updates by PyTorch alone, a part of the tensors at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.optim.storage import SALT, Packed, mix_number, round_randomly

Stored = Tensor | Packed

# Elements that are worked on at a time: a few blocks of this size stay in a core's cache.
EAGER_BLOCK = 32768


@dataclass(frozen=True)
class Rounding:
    """How a bfloat16 weight takes its new value.

    Args:
        mode: ``nearest``, ``stochastic``, or ``kahan``: what rounding cut off is kept in a second bfloat16 tensor.
        seed: of this step's random numbers; those of packed state too.
    """

    mode: str = "nearest"
    seed: int = 0


NEAREST = Rounding()


class Update(Protocol):
    """What of a `hasten.optim.kernels.Kernel` is needed here."""

    function: Callable[..., Mapping[str, Any]]
    tensors: tuple[str, ...]
    writes: tuple[str, ...]
    sums: tuple[str, ...]


def run_in_blocks(
    kernel: Update,
    lists: Sequence[Sequence[Stored]],
    scalars: Mapping[str, float | Tensor],
    rounding: Rounding,
    low: Sequence[Tensor] | None,
) -> dict[str, Tensor]:
    """Update the tensors of `lists` with the kernel's own function; return its sums, one number per tensor."""
    first = lists[0][0]
    device = first.codes.device if isinstance(first, Packed) else first.device
    totals = torch.zeros(len(lists[0]), len(kernel.sums), dtype=torch.float64, device=device)
    for k, row in enumerate(zip(*lists, strict=True)):
        numbers = {name: v[k].item() if isinstance(v, Tensor) else v for name, v in scalars.items()}
        is_random = rounding.mode == "stochastic" or any(isinstance(stored, Packed) for stored in row)
        seed = mix_number(rounding.seed + k * 0x9E3779B9) if is_random else 0
        store = Rounding(rounding.mode, seed)
        for start, part, rest in _blocks(row, None if low is None else low[k]):
            named = dict(zip(kernel.tensors, part, strict=True))
            values = {name: _read(t, rest if name == "p" else None) for name, t in named.items()}
            new = kernel.function(**values, **numbers)
            for name in kernel.writes:
                if isinstance(named[name], Packed):
                    named[name].pack(new[name], seed + kernel.tensors.index(name) * SALT)
                    continue
                is_weight = name == "p"
                _write(named[name], new[name], store if is_weight else NEAREST, rest if is_weight else None, start)
            for place, name in enumerate(kernel.sums):
                totals[k, place] += new[name].sum(dtype=torch.float64)
    return {name: totals[:, place] for place, name in enumerate(kernel.sums)}


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in the format to compute in."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _blocks(row: Sequence[Stored], low: Tensor | None) -> Iterator[tuple[int, list[Stored], Tensor | None]]:
    """Yield parts of the tensors of a row that fit a cache, each with the number of its first element."""
    packed = next((t for t in row if isinstance(t, Packed)), None)
    shape = packed.codes.shape if packed is not None else row[0].shape
    if shape.numel() == 0:
        return
    if packed is None and all(t.is_contiguous() and t.shape == shape for t in row):
        rest = None if low is None else low.view(-1)
        flat = [t.view(-1) for t in row]
        for start in range(0, shape.numel(), EAGER_BLOCK):
            cut = slice(start, start + EAGER_BLOCK)
            yield start, [t[cut] for t in flat], None if rest is None else rest[cut]
        return
    inner = max(1, shape[1:].numel())
    rows = max(1, EAGER_BLOCK // inner)
    for top in range(0, shape[0] if shape else 1, rows):
        cut = slice(top, top + rows) if shape else ...
        # What has one element for each column of the only matrix is the same for all of its rows.
        part = [
            Packed(t.codes[cut], t.scales[cut]) if isinstance(t, Packed) else t[cut] if t.shape[:1] == shape[:1] else t
            for t in row
        ]
        yield top * inner, part, None if low is None else low[cut]


def _read(stored: Stored, low: Tensor | None) -> Tensor:
    values = stored.unpack() if isinstance(stored, Packed) else wide(stored)
    return values if low is None else values + low.float()


def _write(stored: Tensor, values: Tensor, rounding: Rounding, low: Tensor | None, start: int) -> None:
    if rounding.mode == "stochastic" and stored.dtype == torch.bfloat16:
        stored.copy_(round_randomly(values.contiguous(), rounding.seed, start))
    else:
        stored.copy_(values)
        if low is not None:
            low.copy_(values - stored.float())

"""How weights and state are stored: block-wise 8-bit numbers, bfloat16 with stochastic rounding or with a remainder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.sharding import local

# Elements of a row that share one scale; `hasten.optim.native` has the same number.
QUANTUM = 256
# Between the random numbers of two tensors of one update; in `hasten.optim.native` too.
SALT = 0x85EBCA6B
# Smaller tensors, and vectors, keep float32 state: they are no memory and matter most (as in Dettmers et al.).
FEWEST_PACKED = 4096


@dataclass(frozen=True)
class Packed:
    """A tensor in 8 bits: codes of its shape, and a float32 scale for every `QUANTUM` elements of a row.

    Codes are companded, so that small values keep their digits: a signed value is ``sign * (code / 127)**2 * scale``,
    one that is never negative ``(code / 255)**4 * scale``, and none above zero becomes zero. Between two codes the
    choice is random and right on average: rounded to the nearest, an average would stand still as soon as what a step
    adds to it is less than half a code. Block-wise scales: Dettmers et al., arXiv:2110.02861; there the codes are a
    table, here a formula, which needs no look-up.
    """

    codes: Tensor
    scales: Tensor

    @property
    def kind(self) -> str:
        """``signed8`` or ``unsigned8``."""
        return "signed8" if self.codes.dtype == torch.int8 else "unsigned8"

    def unpack(self) -> Tensor:
        """Return the values in float32."""
        is_signed = self.kind == "signed8"
        c = self.codes.float() * (1.0 / (127 if is_signed else 255))
        scales = self.scales.repeat_interleave(QUANTUM, dim=-1)[..., : self.codes.shape[-1]]
        return (c * c.abs() if is_signed else c * c * (c * c)) * scales

    def pack(self, values: Tensor, seed: int = 0) -> None:
        """Store `values`, of the shape of the codes.

        Args:
            values: float32.
            seed: of the random choices, which depend on it and on each value alone.
        """
        columns = values.shape[-1]
        missing = -columns % QUANTUM
        quanta = torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, QUANTUM))
        tops = quanta.abs().amax(-1)
        inverse = torch.where(tops > 0, 1.0 / tops, 0.0)
        a = (quanta * inverse[..., None]).abs()
        power, most = (2, 127) if self.kind == "signed8" else (4, 255)
        low = torch.floor((a.sqrt() if power == 2 else a.sqrt().sqrt()) * most)
        under, over = low * low, (low + 1) * (low + 1)
        if power == 4:
            under, over = under * under, over * over
        up = uniform(quanta, seed) < (a * float(most**power) - under) / (over - under)
        q = (low + up).clamp_max(most)
        q = q.copysign(quanta) if power == 2 else torch.where((quanta > 0) & (q < 1), 1.0, q)
        self.codes.copy_(q.flatten(-2)[..., :columns])
        self.scales.copy_(tops)


def can_pack(parameter: Tensor) -> bool:
    """Say whether the state of `parameter` is kept in 8 bits where that is asked for."""
    return parameter.ndim >= 2 and parameter.numel() >= FEWEST_PACKED and parameter.dtype != torch.float64


def empty_packed(parameter: Tensor, *, is_signed: bool) -> Packed:
    """Return zeros in 8 bits for `parameter` (sharded like it, where it is).

    Raises:
        RecipeError: its rows are cut into shards, which would give the same elements other scales.
    """
    if local(parameter).shape[-1] != parameter.shape[-1]:
        raise RecipeError(
            "optimizer.state_format='8bit' needs whole rows, and a parameter is sharded along its last dimension; "
            "shard the first, as fully_shard does."
        )
    quanta = -(-parameter.shape[-1] // QUANTUM)
    codes = torch.zeros_like(parameter, dtype=torch.int8 if is_signed else torch.uint8)
    # A product along the last dimension keeps whatever sharding the rows have.
    scales = torch.zeros_like(parameter.narrow(-1, 0, quanta), dtype=torch.float32)
    return Packed(codes, scales)


def mix(x: Tensor) -> Tensor:
    """Return 32 well mixed bits for every whole number of `x` (int64); the same as in `hasten.optim.native`."""
    x = x & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def uniform(values: Tensor, seed: int) -> Tensor:
    """Return a number in [0, 1) for each of `values` (float32), which depends on the value and the seed alone."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return (mix(bits ^ (seed & 0xFFFFFFFF)) >> 8).to(torch.float32) * (1.0 / 16777216)


def round_randomly(values: Tensor, seed: int, first: int = 0) -> Tensor:
    """Return `values` (float32) in bfloat16, each rounded up with a chance equal to what rounding down would lose.

    Args:
        values: of any shape; element i of the flattened tensor takes random number ``first + i`` of `seed`.
        seed: 32 bits.
        first: number of the first element.
    """
    numbers = torch.arange(first, first + values.numel(), dtype=torch.int64, device=values.device)
    random = mix(seed + numbers).view(values.shape) & 0xFFFF
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    raised = ((bits + random) >> 16).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    return torch.where(values.isfinite(), raised, values.to(torch.bfloat16))


def mix_number(x: int) -> int:
    """Return `mix` of one number: the same operations, at a hundredth of the time of a tensor's."""
    return mix(x)  # type: ignore[arg-type, return-value]

"""What a run costs in arithmetic: parameters, floating-point operations, and attention's share of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.data.batches import Batches
from hasten.model import ModelConfig, flops_per_token
from hasten.model.shape import attention_flops_per_token

if TYPE_CHECKING:
    from torch import Tensor

FORMULA = "6 x matrix weights + 12 x layers x heads x head_dim x positions seen, for each token (PaLM, appendix B)"
# Rows that are looked at to say how many positions a token sees within its document.
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Parameters:
    """How many weights a model has: in all, in the embedding (a tied head included), in everything else."""

    total: int
    embedding: int
    other: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of training.

    Attributes:
        per_token: forward and backward of one token, on average over the run.
        total: of all steps; None while their number is not known.
        attention_share: attention's part of them, by row length.
        seen: positions that a token sees and that are computed, on average, by row length.
        optimizer_per_step: what matrix optimizers (Muon, SOAP) compute in an update, 0 for all others.
        optimizer_share: that, relative to the forward and backward passes of a step.
        formula: how it was counted.
    """

    per_token: float
    total: float | None
    attention_share: Mapping[int, float]
    seen: Mapping[int, float]
    optimizer_per_step: float
    optimizer_share: float
    formula: str = FORMULA


def parameters(config: ModelConfig, total: int) -> Parameters:
    """Return the parameters of a model of `total` weights.

    Example:
        >>> from hasten.model import SIZES
        >>> parameters(ModelConfig(**SIZES["nano"], vocab_size=4096, seq_len=256), 1_837_440)
        Parameters(total=1837440, embedding=524288, other=1313152)
    """
    embedding = config.vocab_size * config.width
    return Parameters(total, embedding, total - embedding)


def flops(
    config: ModelConfig,
    *,
    lengths: Mapping[int, float],
    seen: Mapping[int, float],
    tokens_per_step: float,
    total_steps: int | None,
    optimizer_operations: float,
) -> Flops:
    """Return the floating-point operations of a run.

    Args:
        config: the model's shape.
        lengths: share of the run's steps by row length.
        seen: positions that a token sees, by row length; `positions_seen` counts them.
        tokens_per_step: positions of an optimizer step, padding included, which costs as much as text.
        total_steps: None while they are not known.
        optimizer_operations: of one update.

    Example:
        >>> from hasten.model import SIZES
        >>> nano = ModelConfig(**SIZES["nano"], vocab_size=4096, seq_len=256)
        >>> found = flops(nano, lengths={256: 1.0}, seen={256: 128.5}, tokens_per_step=2048, total_steps=10,
        ...               optimizer_operations=0.0)
        >>> f"{found.per_token:.3g} {found.total:.3g} {found.attention_share[256]:.3f}"
        '8.65e+06 1.77e+11 0.091'
    """
    # `flops_per_token` takes the length of a row that is seen whole: a token of it sees (length + 1) / 2 positions.
    each = {length: flops_per_token(config, 2 * seen[length] - 1) for length in seen}
    attention = {length: attention_flops_per_token(config, seen[length]) for length in seen}
    per_token = sum(share * each[length] for length, share in lengths.items())
    per_step = per_token * tokens_per_step
    return Flops(
        per_token=per_token,
        total=None if total_steps is None else total_steps * (per_step + optimizer_operations),
        attention_share={length: attention[length] / each[length] for length in seen},
        seen=dict(seen),
        optimizer_per_step=optimizer_operations,
        optimizer_share=optimizer_operations / per_step,
    )


def positions_seen(
    batches: Batches, position: tuple[int, ...], length: int, *, skips: bool, windows: Sequence[int | None] = (None,)
) -> float:
    """Return how many positions attention computes for a token, itself included, on average over sampled rows.

    Args:
        batches: of the run.
        position: where the sample begins.
        length: of a row as the model sees it.
        skips: whether attention skips what a token must not see (other documents, what lies outside the window); if
            not, the whole row before it is computed.
        windows: how far back a token sees, at moments of the run; None: without limit.
    """
    if not skips:
        return (length + 1) / 2
    rows = min(SAMPLED_ROWS, max(1, math.floor(batches.source.num_rows)))
    taken, _ = batches.take(position, rows=rows, length=length)
    each = [batch.positions_BT + 1 for batch in taken]
    means = [sum(_clipped(seen_BT, window) for seen_BT in each) / len(each) for window in windows]
    return sum(means) / len(means)


def _clipped(seen_BT: Tensor, window: int | None) -> float:
    return float((seen_BT if window is None else seen_BT.clamp(max=window)).double().mean())

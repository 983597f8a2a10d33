"""Whether the first at a rung leads by more than noise: of the text it is judged on, and of the seeds."""

from __future__ import annotations

import statistics as stdlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hasten.data.shards import PreparedData
from hasten.evaluation import evaluate_shards
from hasten.loop.company import pick_device
from hasten.loop.saved import newest
from hasten.model import Decoder, ModelConfig
from hasten.recipe import Recipe
from hasten.record import RunFolder
from hasten.restarts.judging import expected_gap, ranking
from hasten.statistics import estimate

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Lead:
    """How far the first of a rung leads the second, in nats per token, and what noise there is.

    Args:
        first, second: their seeds.
        lead: difference of their held-out losses.
        low, high: 95 % interval of the lead over other held-out text of the same kind (Student's t of the paired
            differences between the rows that were judged); None where there are too few rows or no weights any more.
        rows: of held-out text that both were judged on.
        spread: standard deviation of the losses of all that were judged; None below three, whose spread would be the
            lead itself.
        by_chance: the lead that the best of so many equally spread draws has on average.
        larger: whether the interval lies above zero and the lead is above `by_chance` (where that is known); None
            where there is no interval.
    """

    first: int
    second: int
    lead: float
    low: float | None
    high: float | None
    rows: int
    spread: float | None
    by_chance: float | None
    larger: bool | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def measure_lead(losses: Mapping[int, float], rows: Mapping[int, list[float]] | None = None) -> Lead | None:
    """Return the lead of the first of a rung over the second; None where there is no second.

    Args:
        losses: held-out loss of every seed that was judged.
        rows: of the first and the second, the loss of every row that they were judged on; None: not known.
    """
    order = ranking(losses)
    if len(order) < 2:
        return None
    first, second = order[:2]
    lead = losses[second] - losses[first]
    spread = stdlib.stdev(losses.values()) if len(losses) > 2 else None
    by_chance = None if spread is None else spread * expected_gap(len(losses))
    low = high = None
    if rows is not None:
        found = estimate([b - a for a, b in zip(rows[first], rows[second], strict=True)])
        low, high = found.low, found.high
    larger = None if low is None else low > 0 and (by_chance is None or lead > by_chance)
    return Lead(first, second, lead, low, high, len(rows[first]) if rows else 0, spread, by_chance, larger)


def row_losses(folder: RunFolder, recipe: Recipe, data: PreparedData, step: int) -> list[float] | None:
    """Return the loss of every held-out row that a paused run was judged on, its weights read from its checkpoint.

    None where its newest checkpoint is of another step.

    Raises:
        CheckpointError: no checkpoint can be trusted.
    """
    loaded, _ = newest(folder.checkpoints)
    if loaded is None or loaded.step != step:
        return None
    config = ModelConfig(**loaded.state["model"])
    model = Decoder(config, seed=0)
    model.load_state_dict(loaded.tensors.get("averaged") or loaded.tensors["model"], strict=not config.tied)
    model = model.to(pick_device(recipe.device))
    seq_len, stream = recipe.lengths.seq_len, data.val
    num_rows = -(-(stream.num_tokens - 1) // seq_len)
    wanted = min(num_rows, max(1, -(-recipe.evaluate.tokens // seq_len)))
    rows = (_Row(stream, number * num_rows // wanted * seq_len, seq_len + 1) for number in range(wanted))
    return [
        evaluate_shards(model, row, seq_len=seq_len, document_token=data.document_token, micro_rows=1).loss
        for row in rows
    ]


class _Row:
    """One row of the held-out stream, as a stream of its own."""

    source_bytes = 1  # bits per byte of a single row are not asked for

    def __init__(self, stream: Any, start: int, length: int) -> None:
        self._stream, self._start = stream, start
        self.num_tokens = min(length, stream.num_tokens - start)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._stream.read(self._start + start, self._start + stop)

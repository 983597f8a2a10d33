"""What a run will be, once its data is prepared and its model is built: numbers, without the tensors."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.checks import Facts, free_bytes
from hasten.checks.capacity import machine_bytes
from hasten.data.lengths import BatchSizes
from hasten.data.shards import PreparedData
from hasten.loop import start
from hasten.model import ModelConfig, count_parameters
from hasten.planning.costs import positions_seen
from hasten.planning.memory import Memory, estimated
from hasten.planning.packings import Packed, packings
from hasten.planning.times import Course
from hasten.recipe import Recipe

if TYPE_CHECKING:
    from hasten.data.batches import Source
    from hasten.optim.plan import Plan as OptimizerPlan

# Moments of a growing window at which it is looked at.
WINDOWS = 8
# Steps that share of a run are asked of, while the steps of a wall-clock budget are not known.
UNKNOWN_STEPS = 10**9


@dataclass(frozen=True)
class Outline:
    """A run before its first step.

    Attributes:
        recipe: of the run.  data: prepared.  config: the model's shape.  device: ``cpu`` or ``cuda``.
        params: weights of the model.
        sizes: rows of a step over the run.
        source: of the rows.
        optimizer: what it does to each parameter.
        memory: as far as it can be counted.
        packed: what packing makes of the corpus, the recipe's first.
        seen: positions that attention computes for a token, by row length.
        window_saves: whether attention over a window costs less than over the row.
        known_steps: of the run; None: those that fit a wall-clock budget.
    """

    recipe: Recipe
    data: PreparedData
    config: ModelConfig
    device: str
    params: int
    sizes: BatchSizes
    source: Source
    optimizer: OptimizerPlan
    memory: Memory
    packed: tuple[Packed, ...]
    seen: dict[int, float]
    window_saves: bool
    known_steps: int | None

    @property
    def tokens_per_step(self) -> int:
        """Positions of an optimizer step, on average over the run where that changes."""
        return round(self.sizes.mean_rows * self.config.seq_len)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one pass over the data."""
        return self.source.num_rows / self.sizes.mean_rows

    @property
    def evaluated_tokens(self) -> int:
        """Held-out tokens that an evaluation during the run reads."""
        return min(self.recipe.evaluate.tokens, max(self.data.val.num_tokens - 1, 0))

    def run(self, steps: int | None) -> dict[str, Any]:
        """Return what the schedules of a run of `steps` are built from."""
        budget = self.recipe.budget
        return {
            "total_steps": steps or UNKNOWN_STEPS,
            "tokens_per_step": self.tokens_per_step,
            "steps_per_epoch": self.steps_per_epoch,
            "seconds": budget.value if budget.unit == "seconds" else None,
        }

    def course(self, steps: int | None) -> Course:
        """Return what the schedules of a run of `steps` say of a step."""
        lengths = self.recipe.lengths
        return Course(
            lengths=lengths.build(seed=self.recipe.seed, **self.run(steps)),
            rows=lambda progress: self.sizes(progress) / self.sizes.rows,
            window=lengths.build_window(**self.run(steps)),
        )

    def source_epochs(self, steps: int) -> dict[str, float]:
        """Return how often `steps` optimizer steps read each source of a mixture; empty where there is none."""
        if not self.recipe.data.weights:
            return {}
        rows = round(steps * self.sizes.mean_rows)
        return dict(zip(self.data.train_names, self.source.component_epochs((rows,))))

    def facts(self, steps: int | None, memory: Memory) -> Facts:
        """Return what `hasten.checks` asks about."""
        chosen = self.packed[0]
        return Facts(
            vocab_size=self.data.vocab_size,
            train_tokens=self.data.train_size.num_tokens,
            val_tokens=self.data.val.num_tokens,
            params=self.params,
            total_steps=steps,
            free_bytes=free_bytes(Path(self.recipe.out or "runs")),
            state_bytes=self.optimizer.state_bytes,
            optimizer_warnings=self.optimizer.warnings,
            width=self.config.width,
            micro_rows=self.sizes.micro_rows,
            steps_per_epoch=self.steps_per_epoch,
            window_saves=self.window_saves,
            room=chosen.room,
            targets=chosen.targets,
            lost_tokens=chosen.lost,
            source_epochs=self.source_epochs(steps) if steps else {},
            needed_bytes=memory.total,
            memory_bytes=memory.machine,
        )


def outline(recipe: Recipe, data: PreparedData, model: Any = None) -> Outline:
    """Return what a run of `recipe` on `data` will be; its state is built, looked at, and dropped again.

    Args:
        recipe: of the run.
        data: prepared.
        model: weights to start from; None: fresh ones.

    Raises:
        HastenError: the data has nothing to predict, or the recipe contradicts itself.
    """
    packed = packings(recipe, data)
    state = start(recipe, data, model=model)
    window = recipe.lengths.name == "window"
    choices = {n: state.model.attention_choice(n, windowed=window).backend for n in recipe.lengths.row_lengths}
    limits = recipe.lengths.build_window(
        total_steps=UNKNOWN_STEPS,
        tokens_per_step=state.tokens_per_step,
        steps_per_epoch=state.steps_per_epoch,
        seconds=recipe.budget.value if recipe.budget.unit == "seconds" else None,
    )
    windows = [limits((moment + 0.5) / WINDOWS) for moment in range(WINDOWS)] if window else [None]
    optimizer = state.optimizer.plan(tokens_per_step=state.tokens_per_step)
    found = Outline(
        recipe=recipe,
        data=data,
        config=state.config,
        device=state.device.type,
        params=count_parameters(state.config),
        sizes=state.batch_sizes,
        source=state.batches.source,
        optimizer=optimizer,
        memory=estimated(state, optimizer_state=optimizer.state_bytes, machine=machine_bytes(state.device)),
        packed=packed,
        seen={
            length: positions_seen(
                state.batches,
                state.position,
                length,
                skips=backend != "dense" and (window or recipe.data.document_mask),
                windows=windows,
            )
            for length, backend in choices.items()
        },
        window_saves=state.model.attention_choice(state.config.seq_len, windowed=True).backend != "dense",
        known_steps=state.total_steps or None,
    )
    del state
    gc.collect()
    return found

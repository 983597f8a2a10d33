"""A run at one moment: what `start` builds, what `advance` moves, what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten.clip import Clip
from hasten.data.batches import Batch, Batches, Buffers, blank
from hasten.data.lengths import BatchSizes, LengthSchedule, WindowSchedule
from hasten.data.reading import read
from hasten.data.shards import PreparedData
from hasten.errors import RecipeError
from hasten.guard import Guard
from hasten.loop.company import Company, pick_device
from hasten.model import Decoder, ModelConfig
from hasten.model.recompute import RECOMPUTING
from hasten.optim import RuledOptimizer
from hasten.optim import optimizer as build_optimizer
from hasten.precision import PRECISIONS, Precision
from hasten.recipe import Recipe
from hasten.schedules import Progress, Schedule

# A micro-batch on a CPU is kept near the caches; on a GPU the logits bound it.
CPU_MICRO_TOKENS = 4096
GPU_LOGITS_BYTES = 4 << 30
# Steps that an optimizer is told of a wall-clock budget until the first plan, which comes before the first step.
UNPLANNED = 10**9


@dataclass
class Clock:
    """The clock a wall-clock budget is held against: seconds of every attempt at a run, summed."""

    before: float = 0.0
    began: float | None = None
    # What all processes of a run take it to be, once they agreed; it then stands still until they agree again.
    agreed: float | None = None

    def start(self) -> None:
        """Let the clock run; a second start changes nothing."""
        self.began = time.perf_counter() if self.began is None else self.began

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.own_seconds if self.agreed is None else self.agreed

    @property
    def own_seconds(self) -> float:
        """Seconds so far by this process's own clock."""
        return self.before + (0.0 if self.began is None else time.perf_counter() - self.began)


@dataclass(frozen=True)
class Jump:
    """A stretch of the data that nobody reads: at position `begin` the run goes on at `end`, past `tokens` places."""

    begin: tuple[int, ...]
    end: tuple[int, ...]
    tokens: int


def nothing_kept() -> None:
    """Say that there is no earlier state to go back to."""


@dataclass(frozen=True)
class Shape:
    """What an optimizer step looks like: how far the run is, and what the schedules make of it.

    `rows` of full length is how much it reads, `length` the longest row it may have, `window` how far back a token
    looks (None: no limit), `lr_factor` what the learning rate is multiplied by for the size of the step
    and by the guard.
    """

    progress: float
    rows: int
    length: int
    window: Tensor | None
    lr_factor: float


@dataclass
class State:
    """Everything a run is, between two optimizer steps.

    `step`, `position` and `tokens` say where it is: optimizer steps done, the place in the data, real target tokens
    trained. `progress` maps steps to [0, 1]; it is None until a wall-clock budget has been planned, and so are the
    schedules that live on it: `schedules` of the optimizer's settings, `lengths` of rows, `window` of attention.
    `clock` is what a wall-clock budget is held against, `phases` says what its seconds went into, and `work` how many
    steps of full size this attempt has done the like of. `jumps` are the stretches of the data that are damaged and
    left out; `kept` returns the state to go back to. `company` are the processes that train together.
    """

    recipe: Recipe
    data: PreparedData
    config: ModelConfig
    model: Decoder
    forward: nn.Module
    precision: Precision
    optimizer: RuledOptimizer
    clip: Clip
    batches: Batches
    buffers: Buffers
    batch_sizes: BatchSizes
    guard: Guard
    device: torch.device
    seed: int
    progress: Progress | None = None
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    lengths: LengthSchedule | None = None
    window: WindowSchedule | None = None
    schedule_steps: int = 0
    step: int = 0
    position: tuple[int, ...] = ()
    work: float = 0.0
    tokens: int = 0
    clock: Clock = field(default_factory=Clock)
    status: str = "running"
    reason: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    jumps: list[Jump] = field(default_factory=list)
    kept: Callable[[], Any] = nothing_kept
    company: Company = field(default_factory=Company)

    @property
    def total_steps(self) -> int:
        """The planned number of optimizer steps; 0 before a wall-clock budget has been planned."""
        return self.progress.total_steps if self.progress else 0

    @property
    def tokens_per_step(self) -> int:
        """Rows times row length of one optimizer step, on average over the run where that changes."""
        return round(self.batch_sizes.mean_rows * self.recipe.lengths.seq_len)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one pass over the data; seldom a whole number."""
        return self.batches.source.num_rows / self.batch_sizes.mean_rows

    def source_epochs(self, steps: int) -> dict[str, float]:
        """Return how often `steps` optimizer steps read each source of a mixture; empty where there is none."""
        if not self.recipe.data.weights:
            return {}
        rows = round(steps * self.batch_sizes.mean_rows)
        return dict(zip(self.data.train_names, self.batches.source.component_epochs((rows,))))

    @property
    def schedule(self) -> Schedule | None:
        """The learning rate's schedule."""
        return self.schedules.get("lr")

    def shape(self) -> Shape:
        """Return what the next optimizer step looks like."""
        progress = self.progress(self.step)
        window = self.window(progress)
        if window is None and self.recipe.lengths.name == "window":
            window = self.recipe.lengths.seq_len  # still a number: a compiled graph without one would be another graph
        return Shape(
            progress=progress,
            rows=self.batch_sizes(progress),
            length=self.lengths(progress, self.step),
            window=None if window is None else torch.tensor(window, device=self.device),
            lr_factor=self.batch_sizes.lr_factor(progress) * self.guard.rate_factor,
        )

    def work_at(self, progress: float, step: int) -> float:
        """Return about the cost of step `step` at `progress`, relative to one of full size; 1 where it is not known."""
        costs = self.notes.get("costs", {})
        full = costs.get(str(self.recipe.lengths.seq_len))
        relative = costs.get(str(self.lengths(progress, step)), full) / full if full else 1.0
        return relative * self.batch_sizes(progress) / self.batch_sizes.rows

    def take(self, shape: Shape) -> tuple[list[Batch], tuple[int, ...]]:
        """Return the micro-batches of the next step on the run's device, and the position after it.

        They are valid until the next step is taken, which writes to the same memory: fresh memory for every large step
        is paid for in page faults.
        """
        batches, position = self.batches.take(self.position, rows=shape.rows, length=shape.length, into=self.buffers)
        # Every process does as many passes as the one with the most rows: each of them is a meeting.
        most = -(-shape.rows // self.batches.world_size)
        batches += [blank(batches[0])] * (-(-most // self.batches.micro_rows) - len(batches))
        return [batch.to(self.device) for batch in batches], position

    def spend(self, phase: str, seconds: float) -> None:
        """Book `seconds` of the run's clock under `phase`."""
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds


def auto_micro_rows(rows_per_step: int, seq_len: int, vocab_size: int, device: torch.device, smallest: int = 0) -> int:
    """Return the rows of a micro-batch: the largest divisor of the step that fits caches (CPU) or memory (GPU).

    At most `smallest` rows, where that is given: the smallest step of a run whose steps grow.
    """
    if device.type == "cpu":
        limit = CPU_MICRO_TOKENS
    else:
        limit = GPU_LOGITS_BYTES // (vocab_size * 4)
    fitting = max(1, min(limit // seq_len, smallest or rows_per_step))
    return max(d for d in range(1, rows_per_step + 1) if rows_per_step % d == 0 and d <= fitting)


def start(
    recipe: Recipe,
    data: PreparedData,
    *,
    seed: int | None = None,
    horizon: int | None = None,
    model: Decoder | None = None,
    company: Company | None = None,
) -> State:
    """Build the state of a run before its first step.

    Args:
        recipe: every choice of the run.
        data: prepared tokens, from `hasten.data.preparation.prepare`.
        seed: decides the initial weights and the order of the data; the recipe's by default.
        horizon: optimizer steps that the schedules span. It is not a stop: `advance` may stop earlier and go on
            later without any schedule noticing. Taken from ``recipe.budget`` when that counts steps, tokens or
            epochs; a wall-clock budget has none until it is planned.
        model: start from these weights instead of fresh ones (fine-tuning).
        company: the processes that train together; None: this one alone.

    Raises:
        RecipeError: the batch does not hold one row for every process.
    """
    seed = recipe.seed if seed is None else seed
    company = company or Company()
    ranks, device = company.ranks, pick_device(recipe.device)
    seq_len = recipe.lengths.seq_len
    if model is None:
        model = Decoder(recipe.model.build(data.vocab_size, seq_len), seed=seed)
    model = model.to(device)
    rows_per_step = recipe.batch.tokens // seq_len
    if rows_per_step < 1:
        raise RecipeError(
            f"batch.tokens={recipe.batch.tokens} is less than one row of lengths.seq_len={seq_len}; "
            f"give at least {seq_len}."
        )
    batch_sizes = recipe.batch.build(rows=rows_per_step, micro_rows=1)
    smallest = min(batch_sizes(point / 1000) for point in range(1001))
    if smallest < ranks.size:
        raise RecipeError(
            f"A step of {smallest} rows (batch.tokens={recipe.batch.tokens}, lengths.seq_len={seq_len}) leaves some of "
            f"the {ranks.size} processes without any: give at least {ranks.size * seq_len} tokens, or fewer processes."
        )
    micro_rows = recipe.batch.micro_rows or auto_micro_rows(rows_per_step, seq_len, data.vocab_size, device, smallest)
    batch_sizes = dataclasses.replace(batch_sizes, micro_rows=micro_rows)  # what steps grow by is the same everywhere
    if ranks.size > 1 and recipe.batch.micro_rows is None:
        own = [rows // ranks.size for rows in (rows_per_step, smallest)]
        micro_rows = auto_micro_rows(own[0], seq_len, data.vocab_size, device, own[1])
    model.run_block = RECOMPUTING[recipe.activation_checkpointing]
    dtype = PRECISIONS[recipe.precision.name]
    company.parallel.shard(model, model.model.layers, dtype)
    precision = Precision(model, recipe.precision.name, is_sharded=company.parallel.is_sharded)
    if company.parallel.is_sharded:
        model.compute_dtype = dtype
    source = read(data, seed=seed, weights=recipe.data.weights, **packing_settings(recipe))
    batches = Batches(
        source,
        seq_len=seq_len,
        micro_rows=micro_rows,
        document_mask=recipe.data.document_mask,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    tokens_per_step = round(batch_sizes.mean_rows * seq_len)
    steps_per_epoch = source.num_rows / batch_sizes.mean_rows
    steps = horizon if horizon is not None else budget_steps(recipe, tokens_per_step, steps_per_epoch)
    state = State(
        recipe=recipe,
        data=data,
        config=model.config,
        model=model,
        forward=model,
        precision=precision,
        optimizer=build_optimizer(
            model,
            recipe.optimizer.name,
            master=precision.master,
            total_steps=steps or UNPLANNED,
            tokens_per_step=tokens_per_step,
            **recipe.optimizer.settings(tokens_per_step=tokens_per_step),
        ),
        clip=recipe.clip.build(),
        batches=batches,
        buffers=Buffers(recipe.data.document_mask),
        batch_sizes=batch_sizes,
        position=source.begin,
        guard=recipe.guard.build(),
        device=device,
        seed=seed,
        company=company,
    )
    if steps is not None:
        set_horizon(state, steps)
    return state


def packing_settings(recipe: Recipe) -> dict[str, Any]:
    """Return how the text becomes rows, as `hasten.data.reading` takes it."""
    return {
        "seq_len": recipe.lengths.seq_len,
        "packing": recipe.data.packing,
        "overflow": recipe.data.overflow,
        "mode": recipe.lengths.reading,
        "lengths": recipe.lengths.row_lengths,
        "shuffle_tokens": recipe.data.shuffle_tokens,
    }


def budget_steps(recipe: Recipe, tokens_per_step: int, steps_per_epoch: float) -> int | None:
    """Return the optimizer steps that the recipe's budget asks for; None for a wall-clock budget."""
    return recipe.budget.to_steps(total_steps=None, tokens_per_step=tokens_per_step, steps_per_epoch=steps_per_epoch)


def set_horizon(state: State, total_steps: int) -> None:
    """Fix the horizon of a run that has none: its progress map and the schedules that live on it."""
    state.progress = Progress(((0, 0.0), (total_steps, 1.0)))
    _tell_optimizer(state, total_steps)
    build_schedule(state, total_steps)


def replan(state: State, total_steps: int) -> None:
    """Give the rest of the run another number of steps, as a new knot of its progress."""
    state.progress = state.progress.replanned(state.step, total_steps)
    _tell_optimizer(state, total_steps)


def _tell_optimizer(state: State, total_steps: int) -> None:
    """Tell the optimizer the horizon; a branch keeps that of the run it came from, whose steps it counts on."""
    if "branch" not in state.notes:
        state.optimizer.set_horizon(total_steps)


@contextmanager
def weights_to_evaluate(state: State) -> Iterator[None]:
    """Have the model hold, inside the block, the weights that its optimizer wants evaluated and exported."""
    state.optimizer.eval()
    state.precision.sync()
    try:
        yield
    finally:
        state.optimizer.train()
        state.precision.sync()


def build_schedule(state: State, total_steps: int) -> None:
    """Build the schedules for a first plan of `total_steps`, which a warm-up given in steps is a share of."""
    state.schedule_steps = total_steps
    run = {
        "total_steps": total_steps,
        "tokens_per_step": state.tokens_per_step,
        "steps_per_epoch": state.steps_per_epoch,
        "seconds": state.recipe.budget.value if state.recipe.budget.unit == "seconds" else None,
    }
    state.schedules = state.recipe.schedule.build_all(**run)
    state.lengths = state.recipe.lengths.build(seed=state.seed, **run)
    state.window = state.recipe.lengths.build_window(**run)

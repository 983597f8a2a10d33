"""What is wrong or doubtful about a recipe with its data and model: all that can be known before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten.checks.findings import Finding, error, warning, worst_first
from hasten.errors import RecipeError
from hasten.recipe import Recipe
from hasten.schedules import Schedule, findings

# Up to here repeated data is worth nearly as much as fresh data: Muennighoff et al. 2023, arXiv:2305.16264.
EPOCHS_WORTH_FRESH_DATA = 4
# Fewer steps than this show a program that runs, not a model that learns.
FEWEST_STEPS = 20
# Bytes of the float32 master weights of a checkpoint, and of the export while it is written beside an older one.
WEIGHT_BYTES, EXPORT_BYTES = 4, 8
# Share of a training token's cost that an evaluated one has (no backward pass); warn where the sum passes this share.
FORWARD_SHARE, EVALUATION_SHARE = 0.35, 0.25
FEWEST_VAL_TOKENS = 1000
# Share of tokens left out, or of positions wasted, that is told.
WORTH_TELLING = 0.02
# Below this share of a step's work, attention over the row is too little for shorter rows to save anything that can be
# measured; below this share of full-length steps at the end, a model hardly learns to use its full length.
ATTENTION_SHARE, FULL_LENGTH_SHARE = 0.06, 0.1
# Float32 weights (or narrow ones and their masters) and gradients.
TRAINED_BYTES = 8
# Share of the memory that a run may take without a word.
MEMORY_SHARE = 0.9
# Below this share of its peak a learning rate teaches next to nothing; from half-time on for as long is told.
TEACHING_SHARE, HALF_TIME = 0.01, (0.5, 0.6)


@dataclass(frozen=True)
class Facts:
    """What is known once the data is prepared and the model is built.

    Args:
        vocab_size: token ids of the tokenizer.
        train_tokens, val_tokens: tokens of each split.
        params: parameters of the model.
        total_steps: optimizer steps of the run; None while a wall-clock budget is not planned.
        free_bytes: space left on the run folder's disk.
        state_bytes: of the optimizer.
        optimizer_warnings: what the optimizer's own plan warns about.
        width: of the model; 0 where it is not known.
        micro_rows: rows of a micro-batch.
        steps_per_epoch: optimizer steps of one pass over the data; None where it is not known.
        window_saves: whether attention over a window costs less than over the row.
        room: positions in the rows of an epoch; 0 where it is not known.
        targets: those of them that carry loss.
        lost_tokens: training tokens in no row, or without one to predict.
        source_epochs: how often the run reads each source of a mixture, by its name.
        needed_bytes: memory that training takes; 0 where it is not known.
        memory_bytes: memory that there is; 0 where it is not known.
    """

    vocab_size: int
    train_tokens: int
    val_tokens: int
    params: int
    total_steps: int | None
    free_bytes: int
    state_bytes: int = 0
    optimizer_warnings: tuple[str, ...] = ()
    width: int = 0
    micro_rows: int = 1
    steps_per_epoch: float | None = None
    window_saves: bool = True
    room: int = 0
    targets: int = 0
    lost_tokens: int = 0
    source_epochs: Mapping[str, float] = field(default_factory=dict)
    needed_bytes: int = 0
    memory_bytes: int = 0


def check(recipe: Recipe, facts: Facts) -> list[Finding]:
    """Return what is wrong or doubtful about `recipe` with this data and model, errors first.

    What needs `facts.total_steps` is left out while that is None; ask `check_horizon` once it is planned.
    """
    about = (_rows, _packing, _vocabulary, _schedule, _disk, _memory)
    findings = [finding for ask in about for finding in ask(recipe, facts)]
    findings += [warning(f"{text[0].upper()}{text[1:]}") for text in facts.optimizer_warnings]
    return worst_first([*findings, *check_horizon(recipe, facts)])


def check_size(params: int, memory_bytes: int) -> list[Finding]:
    """Return what is wrong about a model of `params` parameters on a machine, before it is built.

    Weights and gradients alone take 8 bytes a parameter, whatever the precision; `memory_bytes` 0 is not known.
    """
    if not memory_bytes or params * TRAINED_BYTES <= memory_bytes:
        return []
    needed, there = _size(params * TRAINED_BYTES), _size(memory_bytes)
    return [
        error(
            f"Weights and gradients of {params:,} parameters alone take {needed} of memory, and there are {there}: "
            "give a smaller model, or a machine with more."
        )
    ]


def check_horizon(recipe: Recipe, facts: Facts) -> list[Finding]:
    """Return what is doubtful about the number of steps that a run takes; nothing while it is unknown."""
    if facts.total_steps is None:
        return []
    about = (_steps, _curves, _lengths, _batch_sizes, _evaluation)
    return worst_first([finding for ask in about for finding in ask(recipe, facts, facts.total_steps)])


def _rows(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    seq_len, step_tokens = recipe.lengths.seq_len, recipe.tokens_per_step
    if facts.train_tokens <= seq_len:
        yield error(
            f"The training text has {facts.train_tokens} tokens, and one row takes {seq_len + 1} "
            f"(lengths.seq_len={seq_len} and the token after it): give more text, or a smaller seq_len."
        )
    elif facts.train_tokens < step_tokens:
        yield warning(
            f"batch.tokens={recipe.batch.tokens} is more than the {facts.train_tokens} tokens of the training text, "
            "so every step reads it more than once: give a smaller batch_tokens, or more text."
        )
    if facts.val_tokens < 2:
        yield error(
            f"The held-out text has {facts.val_tokens} tokens, and a loss takes at least 2: give data.val=FILE, or a "
            "larger data.val_share."
        )
    elif facts.val_tokens < FEWEST_VAL_TOKENS:
        yield warning(
            f"The held-out text has only {facts.val_tokens} tokens, so its loss is a rough guess: hold out more."
        )
    if step_tokens != recipe.batch.tokens:
        yield warning(
            f"batch.tokens={recipe.batch.tokens} is not a multiple of lengths.seq_len={seq_len}: every step reads "
            f"{recipe.rows_per_step} whole rows, {step_tokens} tokens."
        )


def _packing(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    if facts.lost_tokens > WORTH_TELLING * facts.train_tokens and recipe.data.overflow != "split":
        yield warning(
            f"data.overflow={recipe.data.overflow} leaves {facts.lost_tokens / facts.train_tokens:.0%} of the training "
            f"tokens out, those of documents longer than lengths.seq_len={recipe.lengths.seq_len}: give "
            "data.overflow=split, or longer rows."
        )
    padding = 1 - facts.targets / facts.room if facts.room else 0.0
    if padding > WORTH_TELLING and facts.train_tokens > recipe.tokens_per_step:
        advice = "give data.packing=best_fit" if recipe.data.packing != "best_fit" else "give longer rows, or more text"
        yield warning(
            f"{padding:.0%} of the positions in the rows are padding (data.packing={recipe.data.packing}), which costs "
            f"as much as text: {advice}."
        )


def _vocabulary(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    if recipe.data.tokenizer == "bpe" and not recipe.init_from and facts.vocab_size < recipe.data.vocab_size:
        yield warning(
            f"The corpus yields only {facts.vocab_size} of data.vocab_size={recipe.data.vocab_size} tokens: "
            "the model has that many, and nothing needs to be done."
        )


def _schedule(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    schedule = recipe.schedule
    name = schedule.name
    if getattr(schedule, "floor", 0.0) == 1:
        yield warning(
            f"schedule.floor=1 keeps schedule={name} at its peak, so it never decays: "
            "give a lower floor, or schedule=constant."
        )
    if schedule.warmup_start == 1 and schedule.warmup.value > 0:
        yield warning(
            f"schedule.warmup_start=1 begins at the peak, so schedule.warmup={schedule.warmup} does nothing: "
            "give a lower start, or schedule.warmup=0."
        )


def _disk(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    # One more than is kept, because a checkpoint is only removed after the next one is verified; and the export, whole
    # and half written.
    keep = recipe.checkpoint.keep
    needed = (facts.params * WEIGHT_BYTES + facts.state_bytes) * (keep + 1) + facts.params * EXPORT_BYTES
    if facts.free_bytes < needed:
        yield error(
            f"The run folder needs about {_size(needed)} for {keep} + 1 checkpoints and the model, and its disk has "
            f"{_size(facts.free_bytes)} left: free some, lower checkpoint.keep, or give out= on another disk."
        )


def _memory(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    needed, there = facts.needed_bytes, facts.memory_bytes
    if not there or needed <= MEMORY_SHARE * there:
        return
    advice = "give a smaller batch.micro_rows, shorter rows or a smaller model, or optimizer.state_format=8bit"
    if needed > there:
        yield error(f"Training takes about {_size(needed)} of memory, and there are {_size(there)}: {advice}.")
    else:
        yield warning(
            f"Training takes about {_size(needed)} of the {_size(there)} of memory, which leaves little for anything "
            f"else: {advice}."
        )


def _steps(recipe: Recipe, facts: Facts, total_steps: int) -> Iterator[Finding]:
    if total_steps < FEWEST_STEPS:
        yield warning(
            f"budget={recipe.budget} gives only {total_steps} optimizer steps of {recipe.tokens_per_step} tokens, too "
            "few to learn from: give a larger budget, or a smaller batch_tokens."
        )
    epochs = total_steps / _steps_per_epoch(recipe, facts)
    for source, times in facts.source_epochs.items():
        if times > EPOCHS_WORTH_FRESH_DATA:
            yield warning(
                f"The mixture reads {source} {times:.1f} times; beyond about {EPOCHS_WORTH_FRESH_DATA} times repeated "
                "text teaches less and less (Muennighoff et al., arXiv:2305.16264): give it a smaller weight, or more "
                "text."
            )
        elif times == 0:
            yield warning(f"The mixture never reads {source}: give it a larger weight, or a larger budget.")
    if epochs > EPOCHS_WORTH_FRESH_DATA and not facts.source_epochs:
        yield warning(
            f"The run reads its {facts.train_tokens} tokens {epochs:.1f} times; beyond about "
            f"{EPOCHS_WORTH_FRESH_DATA} times repeated text teaches less and less (Muennighoff et al., "
            "arXiv:2305.16264): give more text, or a smaller budget."
        )
    warmup = recipe.schedule.warmup
    steps = total_steps * recipe.schedule.warmup_share(**_run(recipe, facts, total_steps))
    if warmup.value > 0 and steps < 1:
        yield warning(
            f"schedule.warmup={warmup} of {total_steps} steps is less than one step, so it does nothing: "
            "give at least 1, or 0 to leave it out."
        )
    elif steps >= total_steps:
        yield error(
            f"schedule.warmup={warmup} is as long as the run of {total_steps} steps: shorten it, or give a "
            "larger budget."
        )


def _steps_per_epoch(recipe: Recipe, facts: Facts) -> float:
    rows = max(1, math.ceil((facts.train_tokens - 1) / recipe.lengths.seq_len))
    return facts.steps_per_epoch or rows / recipe.rows_per_step


def _curves(recipe: Recipe, facts: Facts, total_steps: int) -> Iterator[Finding]:
    try:
        curves = recipe.schedule.build_all(**_run(recipe, facts, total_steps))
    except RecipeError:
        return  # a warm-up as long as the run, which `_steps` refuses
    rate = curves.pop("lr")
    told = () if recipe.schedule.name == "custom" else ("warmup(",)  # those are said in the words of their keys
    if getattr(recipe.schedule, "floor", 0.0) == 1:
        told = (*told, f"{recipe.schedule.name}(")
    yield from (warning(said) for said in findings(rate, total_steps) if not said.startswith(told))
    yield from _half_time(rate)
    for name, curve in curves.items():
        if len({curve(point / 100) for point in range(101)}) == 1:
            yield warning(f"schedule.{name}={curve!r} never changes {name}, so it does nothing: leave it out.")
        yield from map(warning, findings(curve, total_steps, what=name))


def _half_time(rate: Schedule) -> Iterator[Finding]:
    """A rate that is exactly zero is found by `hasten.schedules.findings`."""
    first, last = HALF_TIME
    peak = max(rate(point / 1000) for point in range(1001))
    largest = max(rate(first + (last - first) * point / 100) for point in range(101))
    if 0 < largest < TEACHING_SHARE * peak:
        yield warning(
            f"At half-time the rate is down to {largest / peak:.2g} of its peak and stays there, so the "
            "second half of the run teaches next to nothing: let the decay last to the end, or give a smaller budget."
        )


def _run(recipe: Recipe, facts: Facts, total_steps: int) -> dict[str, Any]:
    return {
        "total_steps": total_steps,
        "tokens_per_step": recipe.tokens_per_step,
        "steps_per_epoch": _steps_per_epoch(recipe, facts),
        "seconds": recipe.budget.value if recipe.budget.unit == "seconds" else None,
    }


def _lengths(recipe: Recipe, facts: Facts, total_steps: int) -> Iterator[Finding]:
    lengths, seq_len = recipe.lengths, recipe.lengths.seq_len
    if lengths.name == "constant":
        return
    run = _run(recipe, facts, total_steps)
    over = lengths.over.share_of_run("lengths.over", **run)
    whole = f"lengths.over={lengths.over} of {total_steps} steps"
    if over * total_steps < 2:
        yield warning(
            f"{whole} is less than two steps, so lengths={lengths.name} changes nothing: give more, or "
            "lengths=constant."
        )
    elif over >= 1:
        yield error(
            f"{whole} is the whole run, so the model never sees its full length of {seq_len} tokens: give less, such "
            "as 60%."
        )
    elif over > 1 - FULL_LENGTH_SHARE:
        yield warning(
            f"{whole} leaves only {1 - over:.0%} of the run at the full length of {seq_len} tokens, at which the model "
            "is evaluated: give less, such as 60%."
        )
    if lengths.name == "window":
        if not facts.window_saves:
            yield warning(
                f"lengths=window saves no time in rows of {seq_len} tokens here, where attention is computed for the "
                "whole row and masked: lengths=linear gives the same short reach and saves the work."
            )
        return
    realised = lengths.build(**run).realised(total_steps)
    missing = [size for size in lengths.row_lengths if size not in realised]
    if over < 1 and over * total_steps >= 2 and missing:
        yield warning(
            f"lengths={lengths.name} never reaches rows of {', '.join(map(str, missing))} tokens in {total_steps} "
            "steps: give fewer lengths.sizes, or a larger lengths.over."
        )
    attention = seq_len / (12 * facts.width + seq_len) if facts.width else 1.0
    if attention < ATTENTION_SHARE:
        yield warning(
            f"At lengths.seq_len={seq_len} and a width of {facts.width}, attention is only about {attention:.0%} of "
            f"the work, so lengths={lengths.name} cannot save more than that: expect a gain from longer rows."
        )


def _batch_sizes(recipe: Recipe, facts: Facts, total_steps: int) -> Iterator[Finding]:
    if recipe.batch.schedule is None:
        return
    sizes = recipe.batch.build(rows=recipe.rows_per_step, micro_rows=facts.micro_rows)
    used = {sizes(step / total_steps) for step in range(0, total_steps, max(1, total_steps // 1000))}
    if len(used) < 2:
        yield warning(
            f"batch.schedule never changes the step: it always has {used.pop()} rows of {recipe.lengths.seq_len} "
            f"tokens in micro-batches of {facts.micro_rows}: give a larger batch_tokens, or leave the schedule out."
        )


def _evaluation(recipe: Recipe, facts: Facts, total_steps: int) -> Iterator[Finding]:
    tokens = min(recipe.evaluate.tokens, facts.val_tokens)
    steps = recipe.evaluate.every.to_steps(
        total_steps=total_steps,
        tokens_per_step=recipe.tokens_per_step,
        steps_per_epoch=_steps_per_epoch(recipe, facts),
    )
    if steps is None:
        return
    share = FORWARD_SHARE * tokens / (max(steps, 1) * recipe.tokens_per_step)
    if share > EVALUATION_SHARE:
        yield warning(
            f"Evaluating {tokens} tokens every {max(steps, 1)} steps takes about {share:.0%} of the time that training "
            "takes: raise evaluate.every, or lower evaluate.tokens."
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

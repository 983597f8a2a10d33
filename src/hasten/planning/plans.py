"""The plan of a run: everything that can be known before it is paid for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.checks import Finding, check, check_machine, this_machine
from hasten.checks.findings import worst_first
from hasten.errors import RecipeError, printable
from hasten.loop import prepare_for
from hasten.planning.answers import answers, mistakes
from hasten.planning.costs import Flops, Parameters, flops, parameters
from hasten.planning.measurement import SECONDS, Measured, measure
from hasten.planning.memory import Memory, measured
from hasten.planning.outline import Outline, outline
from hasten.planning.outlook import Curve, curves, spoken
from hasten.planning.packings import Packed
from hasten.planning.price import Price
from hasten.planning.times import Compiling, Times, compiling, steps_within, times
from hasten.recipe import Recipe, resolve


@dataclass(frozen=True)
class Speed:
    """How fast steps with rows of one length are.

    Attributes:
        length: of a row.
        share: of the run's steps that have such rows.
        seconds_per_step: of full size.
        cpu_seconds_per_step: the same, of the CPU, over all threads.
        tokens_per_second: that carry loss.
        steps_timed: how many it rests on.
    """

    length: int
    share: float
    seconds_per_step: float
    cpu_seconds_per_step: float
    tokens_per_second: float
    steps_timed: int


@dataclass(frozen=True)
class Plan:
    """What a run will be.

    Attributes:
        recipe: every choice, as plain data.  device: ``cpu`` or ``cuda``.  threads: of the CPU; 0 if nothing was timed.
        budget: as the recipe says it.
        steps: of the run; None: as many as fit a wall-clock budget, and nothing was measured.
        rows_per_step, seq_len, micro_rows: of a step of full size.
        positions: that all steps read, padding included.  tokens: those that carry loss; None while not known.
        epochs: passes over the data.  source_epochs: for each source of a mixture.
        train_tokens, val_tokens, documents: of the data.
        parameters, flops, memory: see there.
        packing: what becomes of the corpus in rows: as the recipe says first, then by the other packings.
        lengths: share of the steps by row length.
        speed: of steps at every row length; empty if nothing was measured.
        times: of the run; None if nothing was measured.
        cost: text, if a price was given and the time is known.
        answers: what is worth it here and what is not.
        findings: mistakes, errors first; each with what to do.
        notes: how the recipe was read and how the measurement was done.
        curves: of the schedules.
    """

    recipe: Mapping[str, Any]
    device: str
    threads: int
    budget: str
    steps: int | None
    rows_per_step: int
    seq_len: int
    micro_rows: int
    positions: int | None
    tokens: int | None
    epochs: float | None
    source_epochs: Mapping[str, float]
    train_tokens: int
    val_tokens: int
    documents: int
    parameters: Parameters
    flops: Flops
    memory: Memory
    packing: tuple[Packed, ...]
    lengths: Mapping[int, float]
    speed: tuple[Speed, ...]
    times: Times | None
    cost: str | None
    answers: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    curves: tuple[Curve, ...]

    @property
    def has_errors(self) -> bool:
        """Whether `hasten train` would refuse the recipe."""
        return any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it but the curves as plain data, to be written as JSON."""
        values = dataclasses.asdict(dataclasses.replace(self, curves=()))
        del values["curves"]
        return values


def plan(
    source: Recipe | str | Path | None = None,
    *,
    measure: bool = True,
    price: str | float | None = None,
    seconds: float = SECONDS,
    on_progress: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Plan:
    """Return what a run will be, before it is paid for.

    The data is prepared (and kept for the run), the model is built, and ten real steps at each row length are timed in
    a process that is thrown away: about 20 seconds.

    Args:
        source: a `Recipe`, the path of a TOML file, the name of a built-in recipe, or None for the defaults.
        measure: time real steps; without them neither speed nor time is known, and memory is a lower bound.
        price: of an hour of the machine, as ``2.5`` or ``"2.50 EUR"``.
        seconds: that the measurement aims at.
        on_progress: called with the progress of preparing the data.
        **settings: any recipe key, as for `hasten.train`.

    Raises:
        HastenError: a setting or the data is wrong; says what and how to put it right.

    Example:
        ``hasten.plan(data="my.txt", model="nano", budget="60s").times.training``
    """
    if isinstance(source, Recipe) and settings:
        raise RecipeError("Give a Recipe, or a recipe's name with settings; not a Recipe and settings.")
    resolved = resolve(source, settings)
    return plan_of(
        resolved.recipe, resolved.notes, timed=measure, price=price, seconds=seconds, on_progress=on_progress
    )


def plan_of(
    recipe: Recipe,
    notes: tuple[str, ...] = (),
    *,
    timed: bool = True,
    price: str | float | None = None,
    seconds: float = SECONDS,
    on_progress: Callable[[Any], None] | None = None,
    on_trial: Callable[[], None] | None = None,
) -> Plan:
    """Return the plan of a recipe that is resolved; the arguments are those of `plan`, `on_trial` comes before it."""
    price = None if price is None else Price.parse(price)
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)
    of_machine = check_machine(recipe, this_machine(recipe))
    refused = [finding for finding in of_machine if finding.level == "error"]
    if refused:
        raise RecipeError(refused[0].message)
    found = outline(recipe, prepare_for(recipe, on_progress=on_progress))
    early = check(recipe, found.facts(found.known_steps, found.memory))
    # A run that would be refused, or does not fit, is not tried.
    is_tried = timed and not any(finding.level == "error" for finding in early)
    if is_tried and on_trial is not None:
        on_trial()
    trial = measure(recipe, found.data.place, seconds=seconds) if is_tried else None
    return assembled(found, trial, notes, price=price, of_machine=of_machine)


def assembled(
    found: Outline,
    trial: Measured | None,
    notes: tuple[str, ...] = (),
    *,
    price: Price | None = None,
    of_machine: Sequence[Finding] = (),
) -> Plan:
    """Return the plan of a run from its outline and what was measured.

    Args:
        found: the outline.
        trial: what steps took; None: nothing was timed.
        notes: to hand on.
        price: of an hour.
        of_machine: what is doubtful about the recipe on this machine.
    """
    recipe, chosen = found.recipe, found.packed[0]
    is_timed = trial is not None and not trial.failure
    steps, expected, choice = _times(found, trial) if is_timed else (found.known_steps, None, None)
    memory = found.memory
    if is_timed and trial.peak_bytes is not None:
        memory = measured(found.memory, trial.peak_bytes)
    lengths = found.course(steps).lengths.realised(steps or 1000)
    operations = sum(found.optimizer.operations.values())
    costs = flops(
        found.config,
        lengths=lengths,
        seen=found.seen,
        tokens_per_step=found.tokens_per_step,
        total_steps=steps,
        optimizer_operations=operations,
    )
    utilisation = 1.0 - chosen.padding
    positions = None if steps is None else steps * found.tokens_per_step
    findings = [*check(recipe, found.facts(steps, memory)), *mistakes(found, trial, choice)]
    if trial is None or trial.float32_ratio is None:
        findings += of_machine  # a product timed by itself; measured steps know better
    drawn, said = _curves(found, steps, utilisation)
    return Plan(
        recipe=recipe.to_dict(),
        device=found.device,
        threads=trial.threads if is_timed else 0,
        budget=spoken(recipe.budget),
        steps=steps,
        rows_per_step=found.sizes.rows,
        seq_len=found.config.seq_len,
        micro_rows=found.sizes.micro_rows,
        positions=positions,
        tokens=None if positions is None else round(positions * utilisation),
        epochs=None if steps is None else steps / found.steps_per_epoch,
        source_epochs=found.source_epochs(steps) if steps else {},
        train_tokens=found.data.train_size.num_tokens,
        val_tokens=found.data.val.num_tokens,
        documents=found.data.train_size.num_documents,
        parameters=parameters(found.config, found.params),
        flops=costs,
        memory=memory,
        packing=found.packed,
        lengths=lengths,
        speed=_speed(found, trial, lengths, utilisation) if is_timed else (),
        times=expected,
        cost=None if price is None or expected is None else price.of(expected.total),
        answers=answers(found, costs, trial if is_timed else None, expected, choice, steps=steps),
        findings=tuple(worst_first(findings)),
        notes=(*notes, *(trial.notes if trial is not None else ()), *said),
        curves=drawn,
    )


def _times(found: Outline, trial: Measured) -> tuple[int, Times, Compiling]:
    """Return the steps of a run, the seconds of its parts, and whether it will be compiled."""
    recipe, steps = found.recipe, found.known_steps
    mean = found.course(steps).mean_seconds(trial)
    if steps is None:
        steps, choice = steps_within(recipe, found.device, trial, mean, tokens=found.evaluated_tokens)
    else:
        choice = compiling(recipe, found.device, mean * steps)
    expected = times(
        recipe,
        trial,
        steps=steps,
        training=mean * steps,
        choice=choice,
        tokens=found.evaluated_tokens,
        steps_per_epoch=found.steps_per_epoch,
        tokens_per_step=found.tokens_per_step,
        val_tokens=found.data.val.num_tokens,
        val_bytes=found.data.val.source_bytes,
    )
    return steps, expected, choice


def _speed(found: Outline, trial: Measured, lengths: Mapping[int, float], utilisation: float) -> tuple[Speed, ...]:
    room = found.sizes.rows * found.config.seq_len
    free = [point for point in trial.points if point.window is None]
    found_speeds = []
    for length in sorted({point.length for point in free}):
        same = max((point for point in free if point.length == length), key=lambda point: point.micro_batches)
        seconds = trial.step_seconds(length)
        found_speeds.append(
            Speed(
                length=length,
                share=lengths.get(length, 0.0),
                seconds_per_step=seconds,
                cpu_seconds_per_step=seconds * same.cpu_seconds / same.seconds,
                tokens_per_second=room * utilisation / seconds,
                steps_timed=same.steps,
            )
        )
    return tuple(found_speeds)


def _curves(found: Outline, steps: int | None, utilisation: float) -> tuple[tuple[Curve, ...], tuple[str, ...]]:
    """Return the curves of the schedules; none, and why, where they need a number of steps that is not known."""
    course = found.course(steps)
    try:
        drawn = curves(found.recipe, steps, lengths=course.lengths, rows=found.sizes, utilisation=utilisation or 1.0)
    except RecipeError as error:
        return (), (printable(f"There are no curves: {error}"),)
    return drawn, ()

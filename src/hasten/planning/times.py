"""How long a run takes: from measured steps and what the schedules make of them, evaluations and saving apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hasten.checks import compiler_found
from hasten.duration import Duration
from hasten.loop.compiling import COMPILE_SECONDS, TIME_SAVED
from hasten.planning.measurement import Measured
from hasten.recipe import Recipe

# Moments of a run at which the cost of a step is looked up.
POINTS = 512
# Bytes of held-out text that `xz -9` codes in a second, for the figure beside the run's.
XZ_BYTES_PER_SECOND = 2e6


@dataclass(frozen=True)
class Times:
    """Seconds that a run takes.

    Attributes:
        training: forward, backward, update and reading the data; compiling is not in it.
        evaluations: of the held-out text during the run, the untrained model's included.
        num_evaluations: how many those are.
        checkpoints: saving.
        num_checkpoints: how many.
        compiling: where the run will be compiled.
        ending: the evaluation of the whole held-out text, and what simpler coders make of it.
        total: all of it; preparing the data is done already.
    """

    training: float
    evaluations: float
    num_evaluations: int
    checkpoints: float
    num_checkpoints: int
    compiling: float
    ending: float
    total: float


@dataclass(frozen=True)
class Course:
    """What a run of some number of steps does at every moment: what its schedules say of a step.

    Args:
        lengths: row length at a progress and step.
        rows: share of the rows of a full step at a progress.
        window: how far back a token sees at a progress; None: without limit.
    """

    lengths: Callable[[float, int], int]
    rows: Callable[[float], float]
    window: Callable[[float], int | None]

    def mean_seconds(self, measured: Measured) -> float:
        """Return the seconds of a step on average over the run."""
        moments = [(point + 0.5) / POINTS for point in range(POINTS)]
        each = [
            measured.step_seconds(self.lengths(progress, point), self.rows(progress), self.window(progress))
            for point, progress in enumerate(moments)
        ]
        return sum(each) / POINTS


@dataclass(frozen=True)
class Compiling:
    """Whether a run will be compiled, and why.

    Attributes:
        training_seconds: of its steps, uncompiled.
        cost: seconds that compiling takes.
        saved_share: how much shorter its steps get.
    """

    is_on: bool
    reason: str
    training_seconds: float
    cost: float = 0.0
    saved_share: float = 0.0


def compiling(recipe: Recipe, device: str, training_seconds: float) -> Compiling:
    """Return whether a run with `training_seconds` of uncompiled steps will be compiled, by the rule of the loop.

    What compiling costs and saves is not measured here; both figures are those that the loop decides by.
    """
    cost, saved = COMPILE_SECONDS.get(device, 60.0), TIME_SAVED.get(device, 0.2)
    worth = f"it saves about {training_seconds * saved:.0f} s of {training_seconds:.0f} s and costs about {cost:.0f} s"
    if recipe.compile == "off":
        return Compiling(False, "compile=off", training_seconds)
    if recipe.compile == "auto" and not compiler_found(device):
        return Compiling(False, "there is no compiler on this machine", training_seconds)
    if recipe.compile == "auto" and training_seconds * saved <= 2 * cost:
        return Compiling(False, f"{worth}; it is done from twice its cost on", training_seconds)
    return Compiling(True, worth, training_seconds, cost, saved)


def steps_within(
    recipe: Recipe, device: str, measured: Measured, mean_seconds: float, *, tokens: int
) -> tuple[int, Compiling]:
    """Return the steps that a wall-clock budget has room for beside evaluations and saving, and whether it compiles.

    Args:
        recipe: with a budget in seconds.
        device: ``cpu`` or ``cuda``.
        measured: what the parts take.
        mean_seconds: of a step.
        tokens: held-out tokens of an evaluation.
    """
    budget = recipe.budget.value
    choice = compiling(recipe, device, budget)
    evaluations = times_within(recipe.evaluate.every, seconds=budget, steps=budget / mean_seconds)
    checkpoints = times_within(recipe.checkpoint.every, seconds=budget, steps=budget / mean_seconds)
    left = budget - choice.cost - evaluations * tokens * measured.evaluation_seconds
    left -= checkpoints * measured.checkpoint_seconds
    return max(1, round(left / (mean_seconds * (1.0 - choice.saved_share)))), choice


def times(
    recipe: Recipe,
    measured: Measured,
    *,
    steps: int,
    training: float,
    choice: Compiling,
    tokens: int,
    steps_per_epoch: float,
    tokens_per_step: int,
    val_tokens: int,
    val_bytes: int,
) -> Times:
    """Return the seconds of every part of a run.

    Args:
        recipe: of the run.
        measured: what the parts take.
        steps: of the run.
        training: seconds of its steps, uncompiled.
        choice: whether they are compiled.
        tokens: held-out tokens of an evaluation.
        steps_per_epoch, tokens_per_step: for intervals that are counted in epochs or tokens.
        val_tokens, val_bytes: of the whole held-out text.
    """
    training *= 1.0 - choice.saved_share
    sizes = {"steps": steps, "steps_per_epoch": steps_per_epoch, "tokens_per_step": tokens_per_step}
    evaluations = times_within(recipe.evaluate.every, seconds=training, **sizes) + 1
    checkpoints = times_within(recipe.checkpoint.every, seconds=training, **sizes) + 1
    parts = {
        "training": training,
        "evaluations": evaluations * tokens * measured.evaluation_seconds,
        "checkpoints": checkpoints * measured.checkpoint_seconds,
        "compiling": choice.cost,
        "ending": val_tokens * measured.evaluation_seconds + val_bytes / XZ_BYTES_PER_SECOND,
    }
    return Times(**parts, num_evaluations=evaluations, num_checkpoints=checkpoints, total=sum(parts.values()))


def times_within(
    every: Duration,
    *,
    seconds: float,
    steps: float,
    steps_per_epoch: float = math.inf,
    tokens_per_step: float = 1.0,
) -> int:
    """Return how often something that is due `every` so often comes in a run, its end apart.

    Example:
        >>> times_within(Duration.parse("10%"), seconds=60.0, steps=1000)
        9
        >>> times_within(Duration.parse("5min"), seconds=60.0, steps=1000)
        0
    """
    whole = {
        "steps": steps,
        "share": 1.0,
        "tokens": steps * tokens_per_step,
        "seconds": seconds,
        "epochs": steps / steps_per_epoch,
    }[every.unit]
    # More often than every step is every step.
    return max(0, min(math.ceil(whole / every.value - 1e-9), math.ceil(steps)) - 1) if every.value else math.ceil(steps)

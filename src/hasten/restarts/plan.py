"""The plan of a pool: how far each seed is trained before it is judged, how many go on, and what all of it costs.

With n_0 seeds of which n_i go on from rung i at step r_i, a horizon of H steps costs

    sum over i of n_(i-1) (r_i - r_(i-1)) + (H - r_last)        with r_i the share of H, rounded up

optimizer steps in all. Under a budget of B steps H is the largest horizon that costs at most B.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.duration import Duration
from hasten.errors import RecipeError, printable
from hasten.loop.pausing import pause_step


@dataclass(frozen=True)
class Pool:
    """What was asked for.

    Args:
        seeds: how many are started at first, at least 1.
        first_seed: the others count up from it.
        rungs: where the seeds are judged, as text: shares of the horizon or steps, rising.
        keep: how many go on from each rung; not rising, the last is 1.
        tries: seeds that may be started in all; None: those that fail are not replaced.
        least_gain: with `tries`, the share by which the held-out loss has to fall from rung to rung.
        fixed_horizon: the survivor has the whole budget as its horizon, and the pool comes on top.
    """

    seeds: int
    first_seed: int
    rungs: tuple[str, ...]
    keep: tuple[int, ...]
    tries: int | None
    least_gain: float
    fixed_horizon: bool


@dataclass(frozen=True)
class Stage:
    """A part of the plan: `seeds` runs go from step `begin` to step `end`, at `rung` (None: the end of the horizon)."""

    rung: str | None
    seeds: int
    begin: int
    end: int
    keep: int

    @property
    def steps(self) -> int:
        """Optimizer steps of all its seeds together."""
        return self.seeds * (self.end - self.begin)


@dataclass(frozen=True)
class Plan:
    """How a pool is trained.

    Args:
        horizon: optimizer steps of the survivor, which every schedule sees.
        budget: optimizer steps that were to be had.
        stages: the last one is the survivor's alone.
        tokens: of each stage, of all its seeds together.
        says: how a budget that was not in steps became one.
    """

    horizon: int
    budget: int
    stages: tuple[Stage, ...]
    tokens: tuple[int, ...]
    says: str = ""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole pool, the survivor's included."""
        return sum(stage.steps for stage in self.stages)

    @property
    def rungs(self) -> tuple[Stage, ...]:
        """The stages that end with a judgement."""
        return self.stages[:-1]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_json` wrote."""
        stages = tuple(Stage(**stage) for stage in values["stages"])
        return cls(**{**values, "stages": stages, "tokens": tuple(values["tokens"])})


def read_pool(
    *,
    seeds: int,
    first_seed: int,
    rungs: str | Sequence[str | int],
    keep: str | float | Sequence[int],
    tries: int | None = None,
    least_gain: float = 0.01,
    fixed_horizon: bool = False,
) -> Pool:
    """Return what is asked for, checked.

    Args:
        seeds, first_seed, tries, least_gain, fixed_horizon: as in `Pool`.
        rungs: ``5%,10%,25%``, or a sequence of shares and steps.
        keep: how many go on from each rung (``4,2,1``), or one share below 1 of those that were judged, rounded up;
            the last rung then keeps one.

    Raises:
        RecipeError: a number out of range, or numbers that do not fit together.

    Example:
        >>> read_pool(seeds=8, first_seed=0, rungs="5%,10%,25%", keep=0.5).keep
        (4, 2, 1)
    """
    if seeds < 1:
        raise RecipeError(f"seeds={seeds} is no pool: give at least 1.")
    if tries is not None and tries < seeds:
        raise RecipeError(
            f"tries={tries} is fewer than the {seeds} seeds that are started at first: give at least {seeds}."
        )
    if not 0 <= least_gain < 1:
        raise RecipeError(
            f"least_gain={least_gain:g} is no share of the loss: give at least 0 and below 1, such as 0.01."
        )
    points = _points(rungs)
    return Pool(
        seeds=seeds,
        first_seed=first_seed,
        rungs=tuple(map(str, points)),
        keep=_kept(keep, seeds, len(points)),
        tries=tries,
        least_gain=least_gain,
        fixed_horizon=fixed_horizon,
    )


def plan(pool: Pool, budget: int, *, tokens_of: Callable[[int, int, int], int], says: str = "") -> Plan:
    """Return how `pool` is trained within `budget` optimizer steps.

    Args:
        pool: what was asked for.
        budget: optimizer steps of the whole pool, or of the survivor alone where the horizon is fixed.
        tokens_of: the tokens that a run of a horizon trains on between two steps: ``tokens_of(horizon, begin, end)``.
        says: kept in the plan.

    Raises:
        RecipeError: the budget is so small that two rungs fall on one step, or no step is left after the last.

    Example:
        >>> pool = read_pool(seeds=8, first_seed=0, rungs="5%,10%,25%", keep="4,2,1")
        >>> found = plan(pool, 400, tokens_of=lambda horizon, begin, end: 0)
        >>> found.horizon, [stage.steps for stage in found.stages], found.steps
        (240, [96, 48, 72, 180], 396)
    """
    horizon = budget if pool.fixed_horizon else _horizon(pool, budget)
    stages = _stages(pool, horizon)
    for stage in stages:
        if stage.begin >= stage.end:
            raise RecipeError(
                f"A budget of {budget:,} steps is too small for {pool.seeds} seeds and rungs at "
                f"{', '.join(pool.rungs)}: with a horizon of {horizon:,} steps nothing lies between step {stage.begin} "
                f"and {'the end' if stage.rung is None else f'the rung at {stage.rung}'}. Give a larger budget, fewer "
                "seeds or fewer rungs."
            )
    tokens = tuple(stage.seeds * tokens_of(horizon, stage.begin, stage.end) for stage in stages)
    return Plan(horizon, budget, stages, tokens, says)


# --- below the surface ----------------------------------------------------------------------------------------------


def _points(rungs: str | Sequence[str | int]) -> tuple[Duration, ...]:
    words = [word for word in rungs.split(",") if word.strip()] if isinstance(rungs, str) else list(rungs)
    if not words:
        raise RecipeError("A pool without rungs judges nobody: give at least one, such as rungs=10%.")
    points = tuple(Duration.parse(word, positive=True) for word in words)
    for point in points:
        if point.unit not in ("share", "steps") or (point.unit == "share" and point.value >= 1):
            raise RecipeError(
                f"The rung {point} is neither a share below 100% nor steps: give rungs such as 5%,10%,25%."
            )
    for one, two in itertools.pairwise(points):
        if one.unit == two.unit and one.value >= two.value:
            raise RecipeError(f"The rungs {', '.join(map(str, points))} do not rise: give them in order, each once.")
    return points


def _kept(keep: str | float | Sequence[int], seeds: int, num_rungs: int) -> tuple[int, ...]:
    numbers = _numbers(keep)
    if len(numbers) == 1 and 0 < numbers[0] < 1:
        kept, share = [], numbers[0]
        for _ in range(num_rungs):
            running = kept[-1] if kept else seeds
            kept.append(max(1, -int(-running * share // 1)))
        return (*kept[:-1], 1)
    shown = ",".join(f"{number:g}" for number in numbers)
    if len(numbers) != num_rungs or not all(math.isfinite(number) and number == int(number) >= 1 for number in numbers):
        raise RecipeError(
            f"keep={shown} does not say how many seeds go on from each of the {num_rungs} rungs: give a whole number "
            "of at least 1 for each, such as 4,2,1, or one share below 1, such as 0.5."
        )
    kept = [int(number) for number in numbers]
    if any(more > fewer for fewer, more in itertools.pairwise([seeds, *kept])):
        raise RecipeError(f"keep={shown} lets more seeds go on than there are (seeds={seeds}): give numbers that fall.")
    if kept[-1] != 1:
        raise RecipeError(
            f"keep={shown} leaves {kept[-1]} seeds after the last rung, and one goes on: let it end with 1."
        )
    return tuple(kept)


def _numbers(keep: str | float | Sequence[int]) -> list[float]:
    words = keep.split(",") if isinstance(keep, str) else [keep] if isinstance(keep, (int, float)) else keep
    try:
        return [float(word) for word in words]
    except ValueError:
        raise RecipeError(
            f"keep={printable(str(keep))} is no list of numbers: give how many go on from each rung, such as 4,2,1, or "
            "one share below 1, such as 0.5."
        ) from None


def _stages(pool: Pool, horizon: int) -> tuple[Stage, ...]:
    ends = [pause_step(Duration.parse(rung), horizon) for rung in pool.rungs]
    running, begins = [pool.seeds, *pool.keep], [0, *ends]
    return tuple(
        Stage(rung, seeds, begin, end, keep)
        for rung, seeds, begin, end, keep in zip(
            (*pool.rungs, None), running, begins, (*ends, horizon), (*pool.keep, 1)
        )
    )


def _horizon(pool: Pool, budget: int) -> int:
    """Return the largest horizon whose whole cost is at most `budget`; the cost rises with the horizon."""
    low, high = 1, budget
    while low < high:
        middle = (low + high + 1) // 2
        if sum(stage.steps for stage in _stages(pool, middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return low

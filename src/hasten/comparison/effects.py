"""What an arm changes: paired relative differences of its finished runs to those it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.statistics import BOOTSTRAP_FROM, BOOTSTRAP_LEVEL, Estimate, estimate, relative

# What is measured over whole runs, and where in the description of a run it stands.
WHOLE = {"bits_per_byte": "val_bpb", "train_seconds": "train_seconds", "memory": "memory_bytes"}
TO_LOSS = {"seconds_to_loss": "train_seconds", "steps_to_loss": "steps", "tokens_to_loss": "tokens"}

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Rung:
    """A finished run on a shorter horizon: its share of the budget, and whether it got to the loss asked for."""

    seed: int
    share: float
    run: Run
    reached: bool


@dataclass(frozen=True)
class Effect:
    """Log ratios of an arm to what it is compared with, one for every seed, and what they say together.

    `logs` has None where the arm never got to the loss (censored); then nothing is estimated. In `at_most` seeds
    the shortest horizon tried got there already, so that the truth may be less.
    """

    logs: tuple[float | None, ...]
    found: Estimate | None
    at_most: int = 0

    @property
    def censored(self) -> int:
        """Seeds without a value."""
        return sum(value is None for value in self.logs)

    def to_json(self) -> dict[str, Any]:
        """Return it as relative changes: -0.05 is five percent less."""
        found = self.found
        return {
            "mean": None if found is None else relative(found.mean),
            "low": None if found is None else relative(found.low),
            "high": None if found is None else relative(found.high),
            "n": len(self.logs),
            "p": None if found is None else found.p,
            "each": [relative(value) for value in self.logs],
            "method": "censored" if found is None else found.method,
            "censored": self.censored,
            "at_most": self.at_most,
        }


def interval_of(wanted: str, n: int, *, level: float) -> tuple[str, str]:
    """Return the method that gives the interval of `n` values, and why it is not the one that was wanted; else "".

    Args:
        wanted: ``t`` or ``bootstrap``; in place of a bootstrap of too few values or at too high a level comes t.
        n: number of values.
        level: of the interval.

    Example:
        >>> interval_of("bootstrap", 12, level=0.95), interval_of("bootstrap", 9, level=0.95)
        (('bootstrap', ''), ('t', '9 pairs are too few for a bootstrap, which takes 10'))
    """
    if wanted == "t":
        return "t", ""
    if n < BOOTSTRAP_FROM:
        return "t", f"{n} {'pair is' if n == 1 else 'pairs are'} too few for a bootstrap, which takes {BOOTSTRAP_FROM}"
    if level > BOOTSTRAP_LEVEL:
        return "t", f"this look takes {100 * level:.4g} %, and a bootstrap is good up to {100 * BOOTSTRAP_LEVEL:g} %"
    return "bootstrap", ""


def whole_effects(
    arm: Sequence[Run], against: Sequence[Run], *, level: float, method: str = "t"
) -> dict[str, Effect | None]:
    """Return the effects over whole runs, paired by place; None for one that was not measured in every run.

    Args:
        arm, against: descriptions of finished runs, seed by seed.
        level: of the intervals.
        method: of the intervals, ``t`` or ``bootstrap``.
    """
    return {name: _effect(arm, against, key, level, method) for name, key in WHOLE.items()}


def _effect(arm: Sequence[Run], against: Sequence[Run], key: str, level: float, method: str) -> Effect | None:
    values = [(mine.get(key), other.get(key)) for mine, other in zip(arm, against, strict=True)]
    if not values or any(not mine or not other for mine, other in values):
        return None
    logs = tuple(math.log(mine / other) for mine, other in values)
    return Effect(logs, estimate(logs, level=level, method=method))


def to_loss_effects(
    arm: Sequence[Run], against: Sequence[Run], rungs: Sequence[Sequence[Rung]], *, level: float, method: str = "t"
) -> dict[str, Effect]:
    """Return how much earlier the arm gets to the other's final bits per byte, in seconds, steps and tokens.

    Only ends of finished schedules count. Between the longest horizon that misses the loss and the shortest that gets
    there, the place is interpolated, in the logarithm of time; where the shortest horizon of all gets there, it is that
    one (the truth may be earlier). An arm whose whole run misses the loss is censored.

    Args:
        arm, against: descriptions of finished runs, seed by seed.
        rungs: of the arm, seed by seed: what was run on shorter horizons.
        level: of the intervals.
        method: of the intervals, ``t`` or ``bootstrap``.
    """
    at_most = sum(
        bool(ladder) and mine["val_bpb"] <= other["val_bpb"] and not _before(mine, ladder, "steps")
        for mine, other, ladder in zip(arm, against, rungs, strict=True)
    )
    found = {}
    for name, key in TO_LOSS.items():
        logs = tuple(
            _log_ratio_to_loss(mine, other, ladder, key)
            for mine, other, ladder in zip(arm, against, rungs, strict=True)
        )
        known = [value for value in logs if value is not None]
        is_whole = len(known) == len(logs)
        found[name] = Effect(logs, estimate(known, level=level, method=method) if is_whole else None, at_most)
    return found


def _there(whole: Run, ladder: Sequence[Rung], key: str) -> Run:
    """Return the shortest run that got to the loss; the whole one did."""
    return min([whole, *(rung.run for rung in ladder if rung.reached)], key=lambda run: run[key])


def _before(whole: Run, ladder: Sequence[Rung], key: str) -> Run | None:
    """Return the longest run below that one that missed the loss; None where none did."""
    there = _there(whole, ladder, key)
    missed = [rung.run for rung in ladder if not rung.reached and rung.run["val_bpb"] is not None]
    return max((run for run in missed if run[key] < there[key]), key=lambda run: run[key], default=None)


def _log_ratio_to_loss(whole: Run, other: Run, ladder: Sequence[Rung], key: str) -> float | None:
    target = other["val_bpb"]
    if whole["val_bpb"] > target:
        return None
    there, before = _there(whole, ladder, key), _before(whole, ladder, key)
    if before is None:
        return math.log(there[key] / other[key])
    part = (before["val_bpb"] - target) / (before["val_bpb"] - there["val_bpb"])
    return math.log(before[key]) + part * math.log(there[key] / before[key]) - math.log(other[key])


def next_rung(ladder: Sequence[float], tried: Mapping[float, bool], *, whole_reached: bool) -> float | None:
    """Return the share to try next: the search halves the rungs between one that misses and one that gets there.

    Args:
        ladder: shares, rising.
        tried: whether each share that was run got there.
        whole_reached: whether the whole run did; where not, there is nothing to look for.

    Example:
        >>> next_rung((0.5, 0.65, 0.8), {}, whole_reached=True)
        0.65
        >>> next_rung((0.5, 0.65, 0.8), {0.65: True, 0.5: False}, whole_reached=True) is None
        True
    """
    if not whole_reached:
        return None
    low, high = -1, len(ladder)
    for place, share in enumerate(ladder):
        if share in tried and not tried[share]:
            low = max(low, place)
    for place in range(len(ladder) - 1, low, -1):
        if tried.get(ladder[place]):
            high = place
    return ladder[(low + high) // 2] if high - low > 1 else None

"""How the seeds of a pool are judged: from what their run folders hold, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.record import RunFolder, read_events, read_result

# Points of the integral in `expected_gap`; the integrand is smooth and vanishes at both ends.
POINTS, REACH = 2000, 8.0


@dataclass(frozen=True)
class Course:
    """What is known of one run: held-out losses by step (0: untrained), and whether it diverged or ended.

    `losses` are those over ``evaluate.tokens``, the same tokens for every run and every step.
    """

    losses: Mapping[int, float]
    diverged: bool = False
    reason: str = ""
    finished: bool = False


def read_course(folder: RunFolder) -> Course:
    """Return what a run folder says of its run; an empty course where there is none yet.

    A run that was killed and went on has said some things twice; they are the same, since runs repeat bit for bit.

    Raises:
        RunError: a file of the run is damaged.
    """
    losses: dict[int, float] = {}
    for event in read_events(folder):
        if event["kind"] == "untrained":
            losses[0] = event["val_loss"]
        if event["kind"] == "evaluation" and not event["whole"]:
            losses[event["step"]] = event["val_loss"]
    result = read_result(folder) or {}
    status = result.get("status")
    return Course(losses, status == "diverged", result.get("reason", ""), status == "finished")


def ranking(losses: Mapping[int, float]) -> list[int]:
    """Return the seeds, the lowest loss first; of equal ones the smaller seed.

    Example:
        >>> ranking({3: 2.0, 0: 2.5, 1: 2.0})
        [1, 3, 0]
    """
    return sorted(losses, key=lambda seed: (losses[seed], seed))


def fault(course: Course, step: int | None, *, before: int = 0, least_gain: float | None = None) -> str:
    """Return why a run is given up at a rung; empty where it is not.

    It diverged before, or, with `least_gain`, its held-out loss is not at least that share below the loss at the rung
    before (at the first rung: below that of the untrained model).

    Args:
        course: of the run.
        step: of the rung; None: the end of the horizon, where only divergence counts.
        before: step of the rung before; 0: untrained.
        least_gain: share of the loss, at least 0; None: only divergence counts.

    Example:
        >>> fault(Course({0: 5.0, 10: 4.0, 20: 3.99}), 20, before=10, least_gain=0.01)
        'its held-out loss went from 4.0000 (step 10) to 3.9900 (step 20), a gain of 0.25 % where 1 % is the least'
    """
    if step is None or step not in course.losses:
        reason = f"it diverged: {course.reason}" if course.reason else "it diverged"
        return reason if course.diverged else ""
    loss, earlier = course.losses[step], course.losses.get(before)
    if not math.isfinite(loss):
        return f"it diverged: its held-out loss at step {step} is {loss}"
    if least_gain is None or not earlier or loss <= earlier * (1.0 - least_gain):
        return ""
    return (
        f"its held-out loss went from {earlier:.4f} (step {before}) to {loss:.4f} (step {step}), a gain of "
        f"{100 * (1.0 - loss / earlier):.2f} % where {100 * least_gain:g} % is the least"
    )


def agreement(before: Mapping[int, float], after: Mapping[int, float]) -> tuple[int, float | None]:
    """Return of how many seeds the losses at two rungs are known, and Spearman's rank correlation between them.

    None with fewer than three, or where all losses of a rung are equal. It is of the seeds that went on, which were the
    better half: among all of them it would be higher.

    Example:
        >>> agreement({0: 2.0, 1: 2.1, 2: 2.2, 3: 2.3}, {0: 1.5, 1: 1.7, 2: 1.6})
        (3, 0.5)
    """
    seeds = sorted(before.keys() & after.keys())
    pairs = [(before[seed], after[seed]) for seed in seeds]
    if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs)):
        return len(pairs), None
    from scipy.stats import spearmanr

    return len(pairs), float(spearmanr(*zip(*pairs)).statistic)


def expected_gap(n: int) -> float:
    """Return how far the best of `n` draws from a normal distribution leads the second on average, in its spread.

    ``n * integral of (1 - F) F^(n-1)``, F the normal distribution function.

    Source:
        The mean spacing of order statistics: David and Nagaraja, "Order Statistics" (2003), section 3.1.

    Example:
        >>> round(expected_gap(2), 3), round(expected_gap(8), 3)
        (1.128, 0.571)
    """
    width = 2 * REACH / POINTS
    points = (-REACH + (number + 0.5) * width for number in range(POINTS))
    below = (0.5 * math.erfc(-x / math.sqrt(2)) for x in points)
    return n * width * sum((1.0 - share) * share ** (n - 1) for share in below)

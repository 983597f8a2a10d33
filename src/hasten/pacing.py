"""How many steps a wall-clock budget buys, and when that is worth planning again.

A run with a clock for a budget still needs a number of steps, because the schedules live on steps
(`hasten.schedules.Progress`). The number is planned after a short probe and again whenever the measured speed has
drifted, up to the start of the cool-down. Every plan is a knot of the progress map, so a replay sees the same rates.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# Planning again for less than this relative change would only write knots.
DRIFT_WORTH_A_KNOT = 0.01
# Speed is read over this share of the budget: long enough to be steady, short enough to follow a machine.
WINDOW_SHARE = 0.15
# Observations that are kept: of more every other one is let go, which makes the window's edge a little less exact. A
# step of milliseconds under a budget of days, or under none, would fill the memory.
MOST_SEEN = 256


@dataclass
class Pace:
    """The recent speed of training, in seconds per unit of work, over a sliding window.

    Work is counted in steps of full size; a step of shorter or fewer rows is less than one.

    Args:
        budget: seconds the run may take; the window is `WINDOW_SHARE` of it.
    """

    budget: float
    _seen: deque[tuple[float, float]] = field(default_factory=deque)

    def observe(self, work: float, train_seconds: float) -> None:
        """Note that `work` took `train_seconds` of training in all (evaluation and saving apart)."""
        self._seen.append((work, train_seconds))
        while len(self._seen) > 12 and train_seconds - self._seen[0][1] > WINDOW_SHARE * self.budget:
            self._seen.popleft()
        if len(self._seen) > MOST_SEEN:
            self._seen = deque([*self._seen][::-2][::-1])

    @property
    def seconds_per_work(self) -> float | None:
        """Seconds per unit of work over the window; None before two observations."""
        if len(self._seen) < 2:
            return None
        (first, began), (last, now) = self._seen[0], self._seen[-1]
        return (now - began) / (last - first) if last > first else None


def steps_that_fit(step: int, seconds_left: float, seconds_per_step: float) -> int:
    """Return the total number of steps that ends a run with `seconds_left` at `step`; at least one more step.

    Example:
        >>> steps_that_fit(100, 10.0, 0.5)
        120
        >>> steps_that_fit(100, -3.0, 0.5)
        101
    """
    return step + max(1, round(seconds_left / max(seconds_per_step, 1e-9)))


def worth_planning_again(step: int, total_steps: int, fitting_steps: int) -> bool:
    """Say whether `fitting_steps` differs from the plan by enough of what is left to be worth a knot."""
    return abs(fitting_steps - total_steps) > max(1.0, DRIFT_WORTH_A_KNOT * (total_steps - step))

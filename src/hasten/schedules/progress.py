"""The progress of a run: a piecewise-linear map of optimizer steps to [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Progress:
    """A piecewise-linear map of optimizer steps to [0, 1].

    A budget of steps or tokens has one piece. A wall-clock budget adds a knot whenever it is planned again: the
    progress made stays, only the slope ahead changes.

    Args:
        knots: ``(step, progress)``, both rising, from ``(0, 0.0)`` to ``(total_steps, 1.0)``.

    Example:
        >>> plan = Progress(((0, 0.0), (100, 1.0))).replanned(50, 150)
        >>> plan(50), plan(100), plan(150)
        (0.5, 0.75, 1.0)
    """

    knots: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.knots]
        assert self.knots[0] == (0, 0.0), self.knots
        assert self.knots[-1][1] == 1.0, self.knots
        assert all(a < b for a, b in pairwise(steps)), self.knots
        assert all(low < high for (_, low), (_, high) in pairwise(self.knots)), self.knots

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run as now planned."""
        return self.knots[-1][0]

    def __call__(self, step: int) -> float:
        """Return the progress before optimizer step `step` (counted from 0); 1 from the last one on."""
        for (left, low), (right, high) in pairwise(self.knots):
            if step < right:  # a knot is the left end of the next piece: its progress comes back exactly
                return low + (high - low) * (step - left) / (right - left)
        return 1.0

    def replanned(self, step: int, total_steps: int) -> Progress:
        """Return the map that keeps everything up to `step` and reaches 1 at `total_steps` instead.

        Args:
            step: optimizer steps done; before the end of the old plan and of the new one.
            total_steps: of the new plan.
        """
        assert 0 <= step < min(total_steps, self.total_steps), (step, total_steps, self.total_steps)
        before = tuple(knot for knot in self.knots if knot[0] < step)
        return Progress((*before, (step, self(step)), (total_steps, 1.0)))

    def to_json(self) -> list[list[float]]:
        """Return the knots as plain lists."""
        return [list(knot) for knot in self.knots]

    @classmethod
    def from_json(cls, knots: Sequence[Sequence[float]]) -> Progress:
        """Return the map that `to_json` wrote, exactly."""
        return cls(tuple((int(step), float(progress)) for step, progress in knots))

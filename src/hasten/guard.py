"""A guard that looks at every step and decides whether the run has diverged; the loop acts on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What the guard makes of a step: ``ok`` or ``diverged``, and then why."""

    status: str = "ok"
    reason: str = ""

    @property
    def diverged(self) -> bool:
        """Whether the run should end here."""
        return self.status == "diverged"


@dataclass
class Guard:
    """Calls a run diverged after too many steps in a row that cannot have helped.

    A step is bad when its loss is not finite, or a gradient norm that is not finite went into the weights. A step that
    was skipped because a half-precision gradient overflowed is no more than unlucky, but `max_skipped` of them in a row
    mean that no loss scale fits any more.

    Args:
        patience: bad steps in a row that mean divergence, >= 1.
        max_skipped: skipped steps in a row that mean divergence, >= 1. A scale of 65536 is halved to 1 in 16.

    Example:
        >>> guard = Guard(patience=2)
        >>> guard.judge(float("nan"), 1.0).status, guard.judge(float("nan"), 1.0).status
        ('ok', 'diverged')
    """

    patience: int = 3
    max_skipped: int = 64
    bad: int = 0
    skipped: int = 0

    def judge(self, loss: float, norm: float, *, skipped: bool = False) -> Verdict:
        """Take note of a step's mean loss and gradient norm and say what they mean for the run."""
        is_bad = not math.isfinite(loss) or not (math.isfinite(norm) or skipped)
        self.bad = self.bad + 1 if is_bad else 0
        self.skipped = self.skipped + 1 if skipped else 0
        if self.bad >= self.patience:
            value = f"a loss of {loss:g}" if not math.isfinite(loss) else f"a gradient norm of {norm:g}"
            return Verdict("diverged", f"{value} ended {self.bad} steps in a row without a finite loss and gradient")
        if self.skipped >= self.max_skipped:
            return Verdict("diverged", f"{self.skipped} steps in a row overflowed at every loss scale")
        return Verdict()

    def state_dict(self) -> dict[str, int]:
        """Return the two counts, for a checkpoint."""
        return {"bad": self.bad, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of `state_dict`."""
        self.bad, self.skipped = int(state["bad"]), int(state["skipped"])

"""A guard that looks at every step before its update and says what is to become of it; the loop acts on it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# Fewer accepted steps than this say nothing about what is usual.
FEWEST = 20
# What a deviation is at least, so that where steps hardly differ a small difference is no spike: of the loss a share of
# its median (of 1 nat where it is below that), of the norm's logarithm a number.
LOSS_FLOOR, LOG_NORM_FLOOR = 0.02, 0.3
# The median absolute deviation times this is the standard deviation, where values are normal.
TO_DEVIATION = 1.4826
# The largest share of the last `window` steps that spikes may cost: beyond it the guard is wrong, and not the steps.
MOST_SKIPPED = 0.1
# All tries are back so many windows after the step that made a run go back: it has then made progress of its own.
RECOVERY = 4

Action = Literal["go", "skip", "rollback", "diverged"]
Cause = Literal["", "loss", "gradient", "overflow"]
Kind = Literal["", "nonfinite", "spike"]
Step = tuple[float, float, int]  # loss, norm, length of its rows


@dataclass(frozen=True)
class Verdict:
    """What the guard makes of a step.

    Args:
        action: ``go``: update the weights. ``skip``: leave this update out. ``rollback``: leave it out and go back to
            the last snapshot. ``diverged``: end the run.
        cause: what was wrong: ``loss``, ``gradient`` or ``overflow``; empty where nothing was. With ``go``: a spike
            that was let through.
        kind: ``nonfinite`` or ``spike``; empty where nothing was wrong.
        reason: one clause with the figures.
    """

    action: Action = "go"
    cause: Cause = ""
    kind: Kind = ""
    reason: str = ""


GO = Verdict()


@dataclass
class Guard:
    """Leaves out steps that can only harm, goes back when they come in a row, and says when a run is lost.

    A step is bad when its loss or gradient norm is not finite, or is a spike: more than `threshold` deviations above
    the median of accepted steps, of the newer half of the last `window` ones. A deviation is 1.4826 times their median
    absolute deviation, and at least 2 % of the median loss (of 1 nat, where that is less). Of norms the logarithms are
    judged, with a deviation of at least 0.3. Losses are compared with those of rows of the same length only, since
    short rows have higher ones. Bad steps are skipped and never remembered; `patience` of them in a row mean a
    rollback, and after `max_rollbacks` of those the run has diverged. All tries are back once it is four windows past
    the step that failed.

    What is no divergence is let through, so that a guard cannot starve a run: spikes beyond a tenth of the last
    `window` steps; and, where no try is left, norms that are finite and losses below those that the run began with:
    then the text or the batches have changed, and what is usual is learned anew.

    An fp16 gradient that overflowed is no more than unlucky, and the loss scaler leaves its update out by itself;
    `max_overflows` of them in a row mean that no loss scale fits any more, and the run has diverged.

    The verdict depends on the arguments and the state alone, not on a clock or on chance: ranks that hand in the same
    global loss and norm come to the same one without asking each other.

    Sources: steps skipped beyond six standard deviations over 128 steps, ``SkipStepOptimizer`` of OLMo-core; going back
    and leaving data out, Chowdhery et al., arXiv:2204.02311, section 5.1. How the figures were found: docs/techniques.

    Args:
        threshold: deviations above the median that make a spike, above 0; infinite: nothing finite is bad.
        window: accepted steps that are remembered, at least `FEWEST`.
        patience: bad steps in a row that mean going back, at least 1.
        max_rollbacks: tries before a run has diverged, at least 0.
        lowering: what the learning rate is multiplied by at every try but the first, in (0, 1].
        snapshot_every: steps between the snapshots that the loop goes back to, at least 1.
        max_overflows: overflows in a row that mean divergence, at least 1. A scale of 65536 is halved to 1 in 16.
        is_active: whether bad steps are skipped at all; if not, `patience` of them in a row mean divergence.

    Example:
        >>> guard = Guard()
        >>> all(guard.judge(3.0 + 0.01 * (step % 5), 1.0).action == "go" for step in range(100))
        True
        >>> verdict = guard.judge(9.0, 1.0)
        >>> verdict.action, verdict.cause, verdict.kind
        ('skip', 'loss', 'spike')
        >>> guard.judge(float("nan"), 1.0).action, guard.judge(float("nan"), 1.0).action
        ('skip', 'rollback')
    """

    threshold: float = 8.0
    window: int = 128
    patience: int = 3
    max_rollbacks: int = 3
    lowering: float = 0.5
    snapshot_every: int = 100
    max_overflows: int = 64
    is_active: bool = True
    # In a row: bad steps, and overflows.
    bad: int = field(default=0, init=False)
    overflows: int = field(default=0, init=False)
    # Rollbacks in all, those since the last recovery, and how often the rate was lowered.
    rollbacks: int = field(default=0, init=False)
    tries: int = field(default=0, init=False)
    lowered: int = field(default=0, init=False)
    # Steps judged on the way to where the run is, and how many those were when it last went back.
    steps: int = field(default=0, init=False)
    failed_at: int = field(default=0, init=False)
    # The median loss of the first steps; what is remembered of accepted steps; of the last steps, which were skipped.
    start: float | None = field(default=None, init=False)
    losses: dict[int, deque[float]] = field(default_factory=dict, init=False, repr=False)
    log_norms: deque[float] = field(default_factory=deque, init=False, repr=False)
    skipped: deque[bool] = field(default_factory=deque, init=False, repr=False)
    has_told: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        assert self.threshold > 0, "threshold"
        assert self.window >= FEWEST, "window"
        assert min(self.patience, self.max_overflows, self.snapshot_every) >= 1, "counts"
        assert self.max_rollbacks >= 0, "max_rollbacks"
        assert 0 < self.lowering <= 1, "lowering"
        self.log_norms, self.skipped = deque(maxlen=self.window), deque(maxlen=self.window)

    @property
    def allows_rollback(self) -> bool:
        """Whether the loop is to keep snapshots to go back to."""
        return self.is_active and self.max_rollbacks > 0

    @property
    def rate_factor(self) -> float:
        """What the learning rate is multiplied by from now on: 1 until a second try in a row, then less."""
        return float(self.lowering**self.lowered)

    def judge(self, loss: float, norm: float, *, overflowed: bool = False, length: int = 0) -> Verdict:
        """Take note of a step and say what is to become of it, before its update.

        Args:
            loss: its mean loss in nats, over all micro-batches and ranks.
            norm: of its whole gradient before clipping.
            overflowed: whether an fp16 gradient overflowed, so that the loss scaler leaves the update out.
            length: of its rows, in tokens; losses of different lengths are not compared.
        """
        step = (loss, norm, length)
        self.steps += 1
        self.overflows = self.overflows + 1 if overflowed else 0
        if not math.isfinite(loss):
            return self._judge_bad("loss", "nonfinite", f"a loss of {loss:g}", step)
        if overflowed:
            return self._judge_overflow()
        if not math.isfinite(norm):
            return self._judge_bad("gradient", "nonfinite", f"a gradient norm of {norm:g}", step)
        if spike := _spike(loss, self.losses.get(length, ()), self.threshold, LOSS_FLOOR, LOSS_FLOOR):
            what = f"a loss of {loss:.4g}, {_shown(spike, spike.median, self.threshold)}"
            return self._judge_bad("loss", "spike", what, step)
        if norm > 0 and (spike := _spike(math.log(norm), self.log_norms, self.threshold, LOG_NORM_FLOOR)):
            what = f"a gradient norm of {norm:.4g}, {_shown(spike, math.exp(spike.median), self.threshold)}"
            return self._judge_bad("gradient", "spike", what, step)
        self.bad = 0
        self._accept(step)
        return GO

    def rolled_back(self, state: Mapping[str, Any]) -> None:
        """Note that the run went back to a snapshot: one more try, and no bad step in a row.

        Args:
            state: the guard's `state_dict` in that snapshot, whose remembered steps count again.
        """
        tries, rollbacks, lowered, failed_at = self.tries + 1, self.rollbacks + 1, self.lowered, self.steps
        self.load_state_dict(state)
        self.tries, self.rollbacks, self.lowered, self.failed_at = tries, rollbacks, lowered + (tries > 1), failed_at
        self.bad = self.overflows = 0

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next verdict depends on as plain data, for a checkpoint."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "losses": {str(length): list(losses) for length, losses in self.losses.items()},
            "log_norms": list(self.log_norms),
            "skipped": list(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.losses = {int(length): deque(losses, self.window) for length, losses in state["losses"].items()}
        self.log_norms = deque(state["log_norms"], self.window)
        self.skipped = deque(state["skipped"], self.window)

    # --- what becomes of a step -------------------------------------------------------------------------------------

    def _judge_overflow(self) -> Verdict:
        if self.overflows < self.max_overflows:
            return GO
        what = f"the gradients of {self.overflows} steps in a row overflowed at every loss scale"
        return Verdict("diverged", "overflow", "nonfinite", what)

    def _judge_bad(self, cause: Cause, kind: Kind, what: str, step: Step) -> Verdict:
        self.bad += 1
        if self.bad >= self.patience:
            return self._judge_trouble(cause, kind, what, step)
        if not self.is_active:
            return GO
        if kind == "spike" and sum(self.skipped) >= max(self.patience, int(MOST_SKIPPED * self.window)):
            why = f"{what}; let through, as {sum(self.skipped)} of the last {len(self.skipped)} steps were skipped"
            verdict = GO if self.has_told else Verdict("go", cause, kind, why)
            self._accept(step)
            self.has_told = True
            return verdict
        self.skipped.append(kind == "spike")
        return Verdict("skip", cause, kind, what)

    def _judge_trouble(self, cause: Cause, kind: Kind, what: str, step: Step) -> Verdict:
        """Say what becomes of a run after as many bad steps in a row as patience allows."""
        what += f"; {self.bad} bad steps in a row" if self.bad > 1 else ""
        if self.allows_rollback and self.tries < self.max_rollbacks:
            return Verdict("rollback", cause, kind, what)
        tried = f" after {self.tries} rollbacks" if self.tries else ""
        is_lost = kind == "nonfinite" or (cause == "loss" and self.start is not None and step[0] >= self.start)
        if is_lost:
            return Verdict("diverged", cause, kind, what + tried)
        self.losses, self.bad = {}, 0
        self.log_norms.clear()
        self._accept(step)
        return Verdict("go", cause, kind, f"{what}{tried}; let through, and what is usual is learned anew")

    def _accept(self, step: Step) -> None:
        loss, norm, length = step
        if self.steps >= self.failed_at + RECOVERY * self.window:
            self.tries = 0
        if self.threshold == math.inf:
            return
        losses = self.losses.setdefault(length, deque(maxlen=self.window))
        losses.append(loss)
        if norm > 0:
            self.log_norms.append(math.log(norm))
        if self.start is None and len(losses) == FEWEST:
            self.start = statistics.median(losses)
        self.skipped.append(False)
        self.has_told = self.has_told and any(self.skipped)


_PLAIN = ("bad", "overflows", "rollbacks", "tries", "lowered", "steps", "failed_at", "start", "has_told")


class _Spike(NamedTuple):
    """How far a value is above the median of so many steps."""

    deviations: float
    median: float
    steps: int


def _spike(
    value: float, remembered: Sequence[float], threshold: float, floor: float, share: float = 0.0
) -> _Spike | None:
    """Return how far a value is above the newer half of those remembered, where that is more than `threshold`.

    The newer half, because early in a run, where the loss falls fast, what is old is far above.
    """
    newer = list(remembered)[-max(FEWEST, len(remembered) // 2) :]
    if len(newer) < FEWEST:
        return None
    median = statistics.median(newer)
    floor = max(floor, share * abs(median))
    if value - median <= threshold * floor:  # as almost always
        return None
    deviation = max(floor, TO_DEVIATION * statistics.median([abs(x - median) for x in newer]))
    spike = _Spike((value - median) / deviation, median, len(newer))
    return spike if spike.deviations > threshold else None


def _shown(spike: _Spike, median: float, threshold: float) -> str:
    above = f"{spike.deviations:.3g} deviations above the median {median:.4g}"
    return f"{above} of {spike.steps} steps ({threshold:g} are allowed)"

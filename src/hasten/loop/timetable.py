"""When things are due between two steps: evaluations, checkpoints, and a fresh plan of a wall-clock budget."""

from __future__ import annotations

import math

from hasten.duration import Duration
from hasten.loop.compiling import choose_compile
from hasten.loop.probing import probe
from hasten.loop.state import State, replan, set_horizon
from hasten.loop.telling import Teller
from hasten.pacing import Pace, steps_that_fit, worth_planning_again

# A wall-clock budget is planned again at most this often (as a share of it), and once more just before the cool-down.
PLAN_EVERY_SHARE = 0.04
# The first plan rests on a probe of two passes and is corrected after the first steps. Planning too few steps would
# spend the schedule on them before that; planning too many costs nothing.
FEWEST_PLANNED = 50
PLAN_AFTER_STEPS = (1, 2, 4, 8, 16)
# Moments of the rest of a run at which its lengths and sizes are looked up to say what a step will cost.
PLANNED_POINTS = 256
# What a forward pass costs relative to forward, backward and update.
FORWARD_SHARE = 0.35


class Timetable:
    """What is due now. Asked after every optimizer step, so each answer is a few arithmetic operations."""

    def __init__(self, state: State, tell: Teller) -> None:
        self._tell = tell
        self._budget = state.recipe.budget.value if state.recipe.budget.unit == "seconds" else None
        self._pace = Pace(self._budget or math.inf)
        self._planned_at = 0.0
        self._evaluation_seconds = 0.0
        self._checkpoint_seconds = 0.0
        self._marks: dict[str, float] = {}

    def begin(self, state: State) -> int | None:
        """Start the clock; decide on compilation, plan a wall-clock budget; return the steps that seem to fit it.

        None where there is nothing to plan.

        Both rest on a short probe: forward and backward passes that change nothing.
        """
        state.clock.start()
        state.company.tick(state.clock)
        fitting = None
        if self._budget is not None and state.progress is None:
            seconds_per_step = probe(state)
            seconds_per_step = choose_compile(state, self._tell, seconds_per_step, self._budget, probe)
            tokens = min(state.recipe.evaluate.tokens, state.data.val.num_tokens)
            self._evaluation_seconds = FORWARD_SHARE * seconds_per_step * tokens / state.tokens_per_step
            # The schedules say what a step costs on average, and a plan is needed to build them: plan twice.
            for work_per_step in (1.0, None):
                work_per_step = work_per_step or work_ahead(state)
                left = self._seconds_left(state, progress=0.0)
                fitting = steps_that_fit(0, left, seconds_per_step * work_per_step)
                fitting = state.company.ranks.from_main(fitting)
                set_horizon(state, max(fitting, FEWEST_PLANNED))
            self._tell("plan", total_steps=state.total_steps, knots=state.progress.to_json())
        else:
            left = self._budget - state.clock.seconds if self._budget is not None else None
            before = state.phases.get("probe", 0.0)
            choose_compile(state, self._tell, None, left, probe)
            is_new = state.phases.get("probe", 0.0) == before and not state.notes["compile"]
            if is_new and len(state.recipe.lengths.row_lengths) > 1:
                probe(state, passes=1)  # a lack of memory at the longest row shows now, not when it is first read
        self._planned_at = state.clock.seconds
        self._pace.observe(state.work, self._trained(state))
        for name in ("evaluate", "checkpoint"):
            self._marks[name] = _position(getattr(state.recipe, name).every, state)
        return fitting

    def is_due(self, state: State) -> bool:
        """Say whether anything is due after the step just done."""
        self._pace.observe(state.work, self._trained(state))
        return self._crosses("evaluate", state) or self._crosses("checkpoint", state) or self.plan_due(state)

    def evaluation_due(self, state: State) -> bool:
        """Say whether an evaluation is due, and take it as done."""
        return self._tick("evaluate", state)

    def checkpoint_due(self, state: State) -> bool:
        """Say whether a checkpoint is due, and take it as done."""
        return self._tick("checkpoint", state)

    def evaluation_took(self, seconds: float) -> None:
        """Note what an evaluation costs, for the plan."""
        self._evaluation_seconds = seconds

    def checkpoint_took(self, seconds: float) -> None:
        """Note what a checkpoint costs, for the plan."""
        self._checkpoint_seconds = seconds

    def plan_due(self, state: State) -> bool:
        """Say whether a wall-clock budget should be planned again now: before the cool-down, not too often."""
        if self._budget is None or state.progress(state.step) >= state.schedule.cooldown_start:
            return False
        is_last_chance = state.progress(state.step + 1) >= state.schedule.cooldown_start
        waited = state.clock.seconds - self._planned_at
        return is_last_chance or state.step in PLAN_AFTER_STEPS or waited >= PLAN_EVERY_SHARE * self._budget

    def plan_again(self, state: State) -> None:
        """Give the run the number of steps that now fits its wall-clock budget, as a new knot of its progress."""
        if not self.plan_due(state):
            return
        self._planned_at = state.clock.seconds
        seconds_per_work = self._pace.seconds_per_work
        if seconds_per_work is None:
            return
        seconds_per_step = seconds_per_work * work_ahead(state)
        left = self._seconds_left(state, progress=state.progress(state.step))
        fitting = state.company.ranks.from_main(steps_that_fit(state.step, left, seconds_per_step))
        if not worth_planning_again(state.step, state.total_steps, fitting):
            return
        before = state.total_steps
        replan(state, fitting)
        self._tell(
            "replan",
            total_steps=fitting,
            knots=state.progress.to_json(),
            reason=f"{seconds_per_step:.4g} s a step: {fitting} steps fit, {before} were planned",
        )

    def _seconds_left(self, state: State, *, progress: float) -> float:
        """Return the seconds left for optimizer steps once the evaluations and checkpoints to come are set aside."""
        left = self._budget - state.clock.seconds
        evaluations = _times_left(state.recipe.evaluate.every, state, left, progress)
        checkpoints = _times_left(state.recipe.checkpoint.every, state, left, progress)
        return left - evaluations * self._evaluation_seconds - checkpoints * self._checkpoint_seconds

    def _trained(self, state: State) -> float:
        return state.phases.get("train", 0.0) + state.phases.get("data", 0.0)

    def _crosses(self, name: str, state: State) -> bool:
        return math.floor(_position(getattr(state.recipe, name).every, state) + 1e-9) > math.floor(
            self._marks[name] + 1e-9
        )

    def _tick(self, name: str, state: State) -> bool:
        crossed = self._crosses(name, state)
        if crossed:
            self._marks[name] = _position(getattr(state.recipe, name).every, state)
        return crossed


def work_ahead(state: State) -> float:
    """Return about the cost of a step, relative to one of full size, on average over the rest of the run."""
    begin = state.progress(state.step)
    points = [begin + (1.0 - begin) * (point + 0.5) / PLANNED_POINTS for point in range(PLANNED_POINTS)]
    return sum(state.work_at(progress, point) for point, progress in enumerate(points)) / PLANNED_POINTS


def _position(every: Duration, state: State) -> float:
    """Return where the run is in units of `every`."""
    here = {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.clock.seconds,
        "epochs": state.batches.source.epochs(state.position),
        "share": state.progress(state.step),
    }[every.unit]
    return here / every.value


def _times_left(every: Duration, state: State, seconds_left: float, progress: float) -> int:
    """Return how often something due `every` so often will still come in a wall-clock budget, the end apart."""
    if every.unit == "share":
        times = (1.0 - progress) / every.value
    elif every.unit == "seconds":
        times = seconds_left / every.value
    else:
        times = state.total_steps and (1.0 - progress) * _position(every, state) / max(progress, 1e-9)
    return max(0, math.ceil(times - 1e-9) - 1)

"""What a budget is in optimizer steps and tokens, once the data is read: what a plan needs to know of a recipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from hasten.loop import Event, Hook, State, advance, train
from hasten.loop.probing import probe
from hasten.loop.state import budget_steps, set_horizon
from hasten.loop.timetable import work_ahead
from hasten.recipe import Recipe, resolve
from hasten.restarts.book import Book, seed_recipe
from hasten.restarts.plan import Plan, Pool, plan

# Steps of a trial run: the first pay for allocations, and its horizon only shapes what the schedules make of a step.
WARM_STEPS, FEWEST_STEPS, MOST_STEPS, TRIAL_SECONDS, TRIAL_HORIZON = 2, 3, 20, 3.0, 1000


def size_up(recipe: Recipe, pool: Pool, book: Book, hooks: tuple[Hook, ...] = ()) -> Plan:
    """Return the plan of a pool, after preparing the data and checking the recipe against it, training nothing.

    A time budget becomes steps by a trial of a few real steps: as many as one run alone does in that time. It is kept
    in the plan, so that a pool that goes on has the same horizon.

    Raises:
        HastenError: what `hasten.train` would refuse, or a budget that is too small for the pool.
    """
    state = _started(recipe, book, [_only(hooks, "prepare")])
    budget, says = _in_steps(recipe, state)
    found = plan(pool, budget, tokens_of=_token_counter(state), says=says)
    del state
    # What is doubtful about the run is told of the run as it will be, with the survivor's horizon.
    _started(seed_recipe(recipe, pool.first_seed, found.horizon, book), book, hooks)
    return found


def _only(hooks: Sequence[Hook], *kinds: str) -> Hook:
    """Return a hook that passes only some kinds of events on."""

    def pass_on(event: Event) -> None:
        if event.kind in kinds:
            for hook in hooks:
                hook(event)

    return pass_on


def _started(recipe: Recipe, book: Book, hooks: Sequence[Hook]) -> State:
    """Return the state of a run before its first step, once its data is prepared and everything is checked."""
    states: list[State] = []

    def keep(event: Event) -> None:
        if event.kind == "prepared":
            states.append(event.values["state"])

    checked = resolve(recipe, {"out": str(book.path / "runs" / "checked")}).recipe
    train(checked, dry_run=True, hooks=(*hooks, keep))
    return states[0]


def _in_steps(recipe: Recipe, state: State) -> tuple[int, str]:
    """Return the budget in steps, and what to say about it where it was given as something else."""
    steps = budget_steps(recipe, state.tokens_per_step, state.steps_per_epoch)
    if steps is not None:
        return steps, "" if recipe.budget.unit == "steps" else f"budget={recipe.budget} is {steps:,} steps"
    tried, seconds = _trial(state)
    steps = max(1, int(recipe.budget.value / seconds))
    return steps, (
        f"budget={recipe.budget} is taken as {steps:,} steps, because a step took {seconds:.3g} s in a trial of "
        f"{tried} steps just now; the time that evaluations, saving and starting take comes on top"
    )


def _trial(state: State) -> tuple[int, float]:
    """Return how many steps were tried, and the seconds that one takes on average over a run."""
    if len(state.recipe.lengths.row_lengths) > 1:
        probe(state)  # what a step of each length costs
    set_horizon(state, TRIAL_HORIZON)
    advance(state, WARM_STEPS)
    began, work = time.perf_counter(), state.work
    advance(state, WARM_STEPS + FEWEST_STEPS)
    while time.perf_counter() - began < TRIAL_SECONDS and state.step < WARM_STEPS + MOST_STEPS:
        advance(state, state.step + 1)
    return state.step - WARM_STEPS, (time.perf_counter() - began) / (state.work - work) * work_ahead(state)


def _token_counter(state: State) -> Any:
    """Return how many tokens a run of a horizon trains on between two of its steps."""
    room, targets = (sum(report[key] for report in state.notes["packing"]) for key in ("room", "targets"))
    sizes, seq_len = state.batch_sizes, state.recipe.lengths.seq_len

    def tokens(horizon: int, begin: int, end: int) -> int:
        if sizes.growth is None:
            rows = sizes.rows * (end - begin)
        else:
            rows = sum(sizes(step / horizon) for step in range(begin, end))
        return round(rows * seq_len * targets / room)

    return tokens

"""Going back to the last state that was good, and on past the data that was read since."""

from __future__ import annotations

from hasten.loop.leaving import DAMAGED, GUARDED, count_left_out
from hasten.loop.snapshots import hold, keeps_in_memory, restore, snapshot
from hasten.loop.state import State
from hasten.loop.telling import Teller


def keep_place(state: State) -> None:
    """Keep a copy of `state` to go back to, where one is due: in memory, every ``guard.snapshot_every`` steps.

    None is due while the guard leaves steps out, nor where it cannot go back, or goes back to checkpoints.
    """
    if not keeps_in_memory(state) or state.guard.bad:
        return
    kept = state.kept()
    if kept is None or (state.step % state.guard.snapshot_every == 0 and kept.step != state.step):
        hold(state, snapshot(state))


def go_back(state: State, tell: Teller, reason: str) -> None:
    """Put weights and optimizer where they were last good, and leave out the data that was read since.

    The run goes on behind that data, so it does not come to the same place the same way again. Neither the clock nor
    the place in the data is put back; what was read in vain is counted. Where there is nothing to go back to, the run
    has diverged. Source: Chowdhery et al., arXiv:2204.02311, section 5.1.
    """
    kept = state.kept()
    if kept is None:
        state.status, state.reason = "diverged", f"{reason}, and there is no earlier state to go back to"
        return
    failed_at, read, guard = state.step, _tokens_read(state), state.guard.state_dict()
    notes = state.notes
    goes_on = {name: getattr(state, name) for name in ("position", "clock", "phases", "progress", "jumps")}
    restore(state, kept.tensors, kept.plain)
    for name, value in goes_on.items():
        setattr(state, name, value)
    if "branch" not in state.notes:  # a wall-clock budget may have been planned again since
        state.optimizer.set_horizon(state.total_steps)
    # What goes on from here has happened, whatever the snapshot knew of it.
    damaged = notes.get("left_out", {}).get(DAMAGED, 0) - state.notes.get("left_out", {}).get(DAMAGED, 0)
    if damaged:
        count_left_out(state, DAMAGED, damaged)
    if "micro_rows" in notes:
        state.notes["micro_rows"] = notes["micro_rows"]
    state.guard.load_state_dict(guard)
    state.guard.rolled_back(kept.plain["guard"])
    lost = read - _tokens_read(state)
    count_left_out(state, GUARDED, lost)
    tell(
        "rollback",
        reason=reason,
        failed_at=failed_at,
        number=state.guard.rollbacks,
        rate_factor=state.guard.rate_factor,
        tokens=lost,
    )


def _tokens_read(state: State) -> int:
    """Return the tokens that carry loss of all steps so far, those that the guard left out among them."""
    return state.tokens + state.notes.get("left_out", {}).get(GUARDED, 0)


def goes_back_to_checkpoints(state: State) -> bool:
    """Say whether the run goes back to its checkpoints, which holds no copy in memory and loses more steps."""
    return state.guard.allows_rollback and state.recipe.guard.snapshot == "disk"

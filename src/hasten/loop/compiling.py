"""Whether to compile the model: only where a compiler exists and the work that remains pays for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hasten.checks import compiler_found
from hasten.loop.proving import note_graphs
from hasten.loop.state import State
from hasten.loop.telling import Teller

# What compiling the decoder costs (seconds) and gains (share of a step's time), by kind of device.
COMPILE_SECONDS = {"cpu": 60.0, "cuda": 60.0}
TIME_SAVED = {"cpu": 0.2, "cuda": 0.25}


def choose_compile(
    state: State,
    tell: Teller,
    seconds_per_step: float | None,
    seconds_left: float | None,
    probe: Callable[..., float],
) -> float | None:
    """Compile the forward pass, or not, and say why; return the seconds a step takes afterwards, where known.

    A resumed run repeats the first attempt's choice, because compiled and eager arithmetic differ in the last bits.
    """
    wish = state.recipe.compile
    kind = state.device.type
    if "compile" in state.notes:
        is_on, reason = state.notes["compile"], "as in the first attempt"
    elif wish != "auto":
        is_on, reason = wish == "on", f"compile={wish}"
    elif not compiler_found(kind):
        is_on, reason = False, "no compiler on this machine"
    else:
        if seconds_left is None:
            seconds_per_step = probe(state, passes=1)
            seconds_left = seconds_per_step * (state.total_steps - state.step)
        saved, cost = seconds_left * TIME_SAVED[kind], COMPILE_SECONDS[kind]
        is_on = state.company.ranks.from_main(saved > 2 * cost)
        reason = f"saves about {saved:.0f} s of {seconds_left:.0f} s and costs about {cost:.0f} s"
    state.notes["compile"] = is_on
    if is_on:
        # One graph for each row length; PyTorch gives up after 8 without being told.
        lengths = len(state.recipe.lengths.row_lengths)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * lengths)
        note_graphs(state, "before")
        state.forward = torch.compile(state.model, dynamic=False)
        before = state.phases.get("probe", 0.0)
        seconds_per_step = probe(state)
        note_graphs(state, "warm")
        state.spend("compile", state.phases["probe"] - before)
        state.phases["probe"] = before
    tell("compile", on=is_on, reason=reason)
    return seconds_per_step

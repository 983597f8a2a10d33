"""A run before its first step: text prepared, model built, and everything refused or warned about that can be known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from hasten.checks import (
    TRAINED_BYTES,
    Facts,
    Finding,
    check,
    check_machine,
    check_size,
    free_bytes,
    machine_bytes,
    this_machine,
)
from hasten.data.reading import packing_reports
from hasten.errors import RecipeError
from hasten.loop.company import Company, all_or_none, pick_device
from hasten.loop.snapshots import snapshot_bytes
from hasten.loop.sources import prepare_for, warm_start
from hasten.loop.state import State, packing_settings, start
from hasten.loop.telling import Teller
from hasten.model import count_parameters
from hasten.recipe import Recipe
from hasten.record import RunFolder


def checked_state(recipe: Recipe, folder: RunFolder, together: Company, tell: Teller) -> State:
    """Prepare the data, build the state before the first step, and refuse or warn about what can be known now."""
    ranks = together.ranks
    for turn in (True, False):  # the first process fills the cache, and the others find it full
        with all_or_none(ranks):
            if ranks.is_main == turn:
                report(check_machine(recipe, this_machine(recipe)), tell)
                data = prepare_for(recipe, on_progress=lambda progress: tell("prepare", progress=progress))
    with all_or_none(ranks):
        if not recipe.init_from:  # a model that does not fit must not be tried: the system would kill the process
            params = count_parameters(recipe.model.build(data.vocab_size, recipe.lengths.seq_len))
            report(check_size(params, machine_bytes(pick_device(recipe.device))), tell)
        if together.parallel.is_sharded and recipe.precision.name == "fp16":
            raise RecipeError(
                f"precision=fp16 has no loss scale that the parts of parallel={recipe.parallel.name} agree on: give "
                "precision=bf16, or parallel=ddp."
            )
        state = start(recipe, data, model=warm_start(recipe), company=together)
    reports = packing_reports(data, **packing_settings(recipe))
    state.notes["packing"] = [{**dataclasses.asdict(report), "utilisation": report.utilisation} for report in reports]
    tell("prepared", data=data, state=state, packing=state.notes["packing"])
    with all_or_none(ranks):
        report(check(recipe, facts(state, folder)), tell)
    return state


def report(findings: Iterable[Finding], tell: Teller) -> None:
    """Refuse what is wrong, and tell what is doubtful.

    Raises:
        RecipeError: the first of the findings that is an error.
    """
    for finding in findings:
        if finding.level == "error":
            raise RecipeError(finding.message)
        tell("warning", message=finding.message)


def facts(state: State, folder: RunFolder, planned_steps: int | None = None) -> Facts:
    """Return what is known of a run that has not begun, for `hasten.checks`."""
    total_steps = planned_steps or state.total_steps or None
    plan = state.optimizer.plan(tokens_per_step=state.tokens_per_step)
    packing = state.notes["packing"]
    return Facts(
        vocab_size=state.data.vocab_size,
        train_tokens=state.data.train_size.num_tokens,
        val_tokens=state.data.val.num_tokens,
        params=count_parameters(state.config),
        total_steps=total_steps,
        source_epochs=state.source_epochs(total_steps) if total_steps else {},
        free_bytes=free_bytes(folder.path),
        state_bytes=plan.state_bytes,
        optimizer_warnings=plan.warnings,
        room=sum(report["room"] for report in packing),
        targets=sum(report["targets"] for report in packing),
        lost_tokens=sum(sum(report["lost"].values()) for report in packing),
        width=state.config.width,
        micro_rows=state.batch_sizes.micro_rows,
        steps_per_epoch=state.steps_per_epoch,
        needed_bytes=TRAINED_BYTES * count_parameters(state.config)
        + plan.state_bytes
        + snapshot_bytes(state, plan.state_bytes),
        memory_bytes=machine_bytes(state.device),
        window_saves=state.model.attention_choice(state.config.seq_len, windowed=True).backend != "dense",
    )

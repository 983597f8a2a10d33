"""What an allowed change does to a run that goes on, and what its folder then says."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from hasten import checkpoint
from hasten.errors import RunError, printable
from hasten.loop.identity import Change, as_recipe, identity, recipe_changes
from hasten.loop.saved import fits
from hasten.loop.snapshots import hold, restore, snapshot
from hasten.loop.state import UNPLANNED, State, budget_steps, replan
from hasten.loop.terms import Settled, Terms, refusal, settle
from hasten.optim import RULES
from hasten.optim import optimizer as build_optimizer
from hasten.recipe import Recipe
from hasten.record import RunFolder, write_whole
from hasten.schedules import SETTINGS

# Keys that decide which rows a step reads, beside the text itself.
_ROWS = {"data.packing", "data.overflow", "data.weights"}
_TEXT = {"corpus", "tokenizer"}
_SIZES = {"budget", "batch.tokens", "batch.schedule", "batch.micro_rows"}
_SETTINGS = ("optimizer.", "batch.", "schedule.")


def begin(state: State, loaded: checkpoint.Loaded | None, terms: Terms) -> Settled:
    """Put a freshly started `state` at a checkpoint, if there is one, with what is allowed to change changed from here.

    Rates, decay, clipping, schedules, evaluations and the like are those of the new recipe from the next step on. A
    budget, or a size of steps, that is another now plans the rest of the run anew and leaves what was done. Other text
    is read from its beginning, since rows are another number in another order; text of which only the held-out side
    changed goes on where it was.

    Returns:
        what changed.

    Raises:
        AnotherRun: something changed that was not allowed, or that cannot change at this point of the run.
    """
    now = identity(state)
    if loaded is None:
        return settle(terms, now)
    _refuse_other_model(state, loaded, terms)
    before = as_recipe(terms.saved_recipe)
    since = recipe_changes(terms.saved_recipe, now["recipe"])
    changed = {change.name for change in since}
    changed |= {name for name in _TEXT if loaded.state[f"{name}_sha256"] != now[name]}
    if before is None or before.batch.micro_rows != state.recipe.batch.micro_rows:
        changed.add("batch.micro_rows")
    elif "micro_rows" in loaded.state["notes"]:  # a lack of memory chose it, and it is chosen again
        now = {**now, "micro_rows": loaded.state["notes"]["micro_rows"]}
    settled = settle(terms, now)
    now_set = [_settings(group) for group in state.optimizer.param_groups]
    then_set = now_set
    if moved := [change for change in since if change.name.startswith(_SETTINGS)]:
        then_set = _settings_of(before, state, terms, moved)
        _refuse_missing_state(state, loaded, terms, since)
    plain = _adapted(loaded.state, state, terms, changed)
    fits(state, loaded.tensors, plain)
    restore(state, loaded.tensors, plain)
    if moved:
        _take_settings(state, then_set, now_set)
    if changed & (_SIZES | _TEXT | _ROWS):
        _plan_the_rest(state, terms, since)
    if changed:
        hold(state, snapshot(state))  # what the guard goes back to has the changes too
    return settled


def _fixed(terms: Terms, changes: list[Change], why: str) -> Exception:
    """Return the refusal of changes that were allowed and cannot be."""
    return refusal(terms, [dataclasses.replace(change, kind="fixed", why=why) for change in changes])


def _refuse_other_model(state: State, loaded: checkpoint.Loaded, terms: Terms) -> None:
    theirs, ours = loaded.state["model"], dataclasses.asdict(state.config)
    differing = {key: Change(f"model.{key}", theirs.get(key), ours[key], "fixed") for key in ours}
    differing = {key: change for key, change in differing.items() if change.was != change.now}
    if "vocab_size" in differing and len(differing) == 1:
        change = dataclasses.replace(differing["vocab_size"], name="tokenizer")
        raise _fixed(terms, [change], "kinds of tokens; the saved weights have a row for each")
    if differing:
        raise _fixed(terms, list(differing.values()), "the saved weights have their shape")


def _adapted(plain: Mapping[str, Any], state: State, terms: Terms, changed: set[str]) -> dict[str, Any]:
    """Return a checkpoint's plain data for a state that reads other text, clips or compiles otherwise."""
    anew = {note for note, key in (("compile", "compile"), ("micro_rows", "batch.micro_rows")) if key in changed}
    notes = {name: note for name, note in plain["notes"].items() if name not in anew}
    adapted = {
        **plain,
        "notes": notes,
        "corpus_sha256": state.data.corpus_sha256,
        "tokenizer_sha256": state.data.tokenizer_sha256,
    }
    has_same_text = not changed & _TEXT or terms.saved.get("train_tokens") == identity(state)["train_tokens"]
    if changed & _ROWS or not has_same_text:
        packing = {"packing": state.notes["packing"]}
        adapted |= {"position": list(state.position), "jumps": [], "notes": {**notes, **packing}}
    if any(key.startswith("clip.") for key in changed):
        adapted["clip"] = state.clip.state_dict()
    return adapted


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "total_steps")}


def _settings_of(recipe: Recipe | None, state: State, terms: Terms, moved: list[Change]) -> list[dict[str, Any]]:
    """Return what the groups of the optimizer of `recipe` would be set to, over the model and horizon of `state`."""
    if recipe is None:
        raise _fixed(terms, moved, "this hasten does not read the recipe that the run was made with any more")
    micro_rows = terms.saved.get("micro_rows", state.batches.micro_rows)
    sizes = recipe.batch.build(rows=recipe.rows_per_step, micro_rows=micro_rows)
    tokens_per_step = round(sizes.mean_rows * recipe.lengths.seq_len)
    optimizer = build_optimizer(
        state.model,
        recipe.optimizer.name,
        master=state.precision.master,
        total_steps=state.total_steps or UNPLANNED,
        tokens_per_step=tokens_per_step,
        **recipe.optimizer.settings(tokens_per_step=tokens_per_step),
    )
    return [_settings(group) for group in optimizer.param_groups]


def _take_settings(state: State, then: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """Set the optimizer's groups to what the new recipe says where the old one said something else.

    What a rule counts in its groups stays. Settings that a schedule moved go back to their own value: the schedule, if
    it is still there, sets them before every step.
    """
    for group, was, given in zip(state.optimizer.param_groups, then, now, strict=True):
        for name in SETTINGS:
            if f"initial_{name}" in group:
                _put(group, name, group[f"initial_{name}"])
        for key, value in given.items():
            if was.get(key) == value:
                continue
            group[key] = value
            for name, part in zip(("beta1", "beta2"), value, strict=False) if key == "betas" else ((key, value),):
                if f"initial_{name}" in group:
                    group[f"initial_{name}"] = part


def _put(group: dict[str, Any], name: str, value: Any) -> None:
    if name in group:
        group[name] = value
    else:
        betas = list(group["betas"])
        betas[int(name[-1]) - 1] = value
        group["betas"] = tuple(betas)


def _refuse_missing_state(state: State, loaded: checkpoint.Loaded, terms: Terms, since: list[Change]) -> None:
    """Refuse settings under which the optimizer would need state that the checkpoint does not hold."""
    saved = checkpoint.unpack(loaded.tensors["optimizer"], loaded.state["optimizer"])
    ours, theirs = state.optimizer.param_groups, saved["param_groups"]
    groups = [(group["rule"], len(group["params"])) for group in ours]
    holds = groups == [(group["rule"], len(group["params"])) for group in theirs]
    if holds:
        holds = all(
            _holds(saved["state"].get(key, {}), group, parameter)
            for group, other in zip(ours, theirs, strict=True)
            for parameter, key in zip(group["params"], other["params"], strict=True)
        )
    if not holds:
        changes = [change for change in since if change.name.startswith("optimizer.")]
        raise _fixed(terms, changes, "it needs state that the checkpoint does not hold")


def _holds(saved: Mapping[str, Any], group: Mapping[str, Any], parameter: torch.Tensor) -> bool:
    """Say whether the state of a parameter is all that its rule needs; nothing yet is enough, too."""
    bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    needed = {name: tensor.shape for name, tensor in RULES[group["rule"]].init(bare, group).items()}
    if group["ema"]:
        needed["ema"] = parameter.shape
    return not saved or all(name in saved and saved[name].shape == shape for name, shape in needed.items())


def _plan_the_rest(state: State, terms: Terms, since: list[Change]) -> None:
    """Plan the steps that are left anew, for a budget or a size of steps that is another now."""
    budget = state.recipe.budget
    asked = [change for change in since if change.name == "budget"]
    total = budget_steps(state.recipe, state.tokens_per_step, state.steps_per_epoch)
    if total is None:
        if asked and state.clock.seconds >= budget.value:
            raise _fixed(terms, asked, f"{state.clock.seconds:.0f} s of it are used already")
        if asked and state.progress is not None and state.progress(state.step) >= state.schedule.cooldown_start:
            raise _fixed(terms, asked, "the cool-down has begun, within which no time is planned again: give steps")
    elif state.progress is not None and total != state.total_steps:
        if state.step >= min(total, state.total_steps):
            asked = asked or [Change("budget", state.total_steps, total, "fixed")]
            raise _fixed(terms, asked, f"in steps {total:,}, and {state.step:,} are done")
        replan(state, total)


def write_agreed(state: State, folder: RunFolder, settled: Settled) -> None:
    """Write the recipe and the tokenizer of a run, each whole or not at all: a kill in between must not change the run.

    They are written once, and again where a change was allowed; the recipe before is then kept as
    ``recipe-until-step-N.toml``, and how the run ended before counts no more.
    """
    text = state.recipe.to_toml()
    if settled.allowed:
        folder.result_path.unlink(missing_ok=True)
        before = folder.recipe_path.read_text(encoding="utf-8") if folder.recipe_path.exists() else text
        kept = folder.path / f"recipe-until-step-{state.step}.toml"
        if before != text and not kept.exists():  # one given up before the next checkpoint trained nothing that is left
            write_whole(kept, before)
    if settled.allowed or not folder.recipe_path.exists():
        write_whole(folder.recipe_path, text)
    if settled.allowed or not folder.tokenizer.exists():
        half = folder.tokenizer.with_name("tokenizer.tmp")
        try:
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            state.data.tokenizer.save(half, model_max_length=state.config.seq_len)
            shutil.rmtree(folder.tokenizer, ignore_errors=True)  # a kill right here is put right by the next attempt
            half.replace(folder.tokenizer)
        except OSError as error:
            raise RunError(
                f"Could not write {printable(str(folder.tokenizer))}: {error.strerror}; free or repair the disk and "
                "give the same command again."
            ) from error

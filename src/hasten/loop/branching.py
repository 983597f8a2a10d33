"""Branch and cool: a new run that begins at a checkpoint of another one and brings its learning rate down.

The run that is branched from is read and never written: no lock is taken in its folder, no damaged checkpoint of it is
renamed. The branch has a folder of its own and saves its beginning there, so it goes on after a kill even when the
other run has deleted the checkpoint by then.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten import checkpoint
from hasten.errors import CheckpointError, RecipeError, nearest, printable
from hasten.files import parse_json, read_bytes
from hasten.loop.saved import load
from hasten.loop.snapshots import restore
from hasten.loop.state import State
from hasten.recipe import Recipe, resolve, schema
from hasten.recipe.recipe import Resolved
from hasten.recipe.settings import read_mapping, read_overrides, without_none
from hasten.record import RunFolder
from hasten.schedules import SETTINGS, Progress

# How long a branch is, in the steps that the other run did; 10 to 20 % is enough (arXiv:2405.18392, arXiv:2404.06395).
SHARE_OF_PARENT = 0.1
FLOOR = 0.01
# The shape that did best as a cool-down (arXiv:2405.18392, section 4).
SHAPE = "sqrt"
# What a branch takes over and so cannot choose anew.
FIXED = ("data", "model", "optimizer", "precision", "seed", "init_from", "lengths.seq_len")
_STEP = re.compile(r"step-(\d{8,18})")


def branch_recipe(
    run: str | Path, *, step: int | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Resolved:
    """Return the recipe of a run that begins at a checkpoint of `run` and cools down, and what to say about it.

    Everything is as in the recipe of `run`, but for the schedule: by default ``1 - sqrt(x)`` from the factor of the
    last step down to 0.01, over a tenth of the steps that `run` had done. Rows have their full length from the first
    step on, steps the size that they had, and what else was scheduled stays where it was. The recipe names `run` and
    the step, so it says all that the branch's weights depend on.

    Args:
        run: a run folder.
        step: of the checkpoint; None: the newest that verifies.
        overrides: settings as for `hasten.recipe.resolve`: ``budget``, ``schedule`` and whatever a branch does not
            take over.

    Raises:
        RecipeError: `run` is no run folder, has no such checkpoint, or a setting is wrong.
        CheckpointError: the checkpoint is damaged.
    """
    folder = _run_folder(run)
    loaded, notes = _checkpoint(folder, step)
    recipe = resolve(folder.path).recipe
    settings = _settings(recipe, loaded, str(run), _schedule_name(overrides))
    resolved = resolve(settings, overrides)
    return Resolved(resolved.recipe, (*notes, *resolved.notes))


def read_parent(recipe: Recipe) -> checkpoint.Loaded:
    """Return the checkpoint that a branch's recipe names, once its run's recipe agrees with it.

    Raises:
        RecipeError: there is no such run or checkpoint, or the recipe changes what a branch takes over.
        CheckpointError: it is damaged.
    """
    folder = _run_folder(recipe.branch_from)
    if recipe.branch_step is None:
        raise RecipeError(
            f"branch_from={printable(recipe.branch_from)} needs branch_step=STEP ({_named(_saved_steps(folder))}); "
            "`hasten train --branch` finds it."
        )
    loaded, _ = _checkpoint(folder, recipe.branch_step)
    parent = resolve(folder.path).recipe
    changed = parent.difference(recipe, ignore=[key for key in schema().leaves if not _is_fixed(key)])
    if parent.lengths.reading != recipe.lengths.reading or (
        recipe.lengths.reading == "bucket" and parent.lengths.row_lengths != recipe.lengths.row_lengths
    ):
        changed.append("lengths: rows are read in another way")
    if changed:
        raise RecipeError(
            f"A branch takes over model, optimizer and data of {printable(str(folder.path))}, and the recipe changes "
            f"them ({'; '.join(changed[:4])}): leave that out, or branch with `hasten train --branch`."
        )
    return loaded


def take_over(state: State, loaded: checkpoint.Loaded) -> tuple[str, ...]:
    """Put a freshly started branch at the checkpoint of the run it comes from; return what to warn about.

    Weights, optimizer, random state, place in the data and tokens are that run's; the steps, the clock and the
    schedules are the branch's own, from their beginning. The optimizer goes on counting its own steps, and keeps the
    horizon that its own warm-ups were given: with the branch's short one they would jump to their end.

    Raises:
        RecipeError: the checkpoint is of another model or of other data than the state.
    """
    theirs, ours = loaded.state["model"], dataclasses.asdict(state.config)
    differing = [f"{key} {theirs.get(key)}, here {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
    if differing:
        raise RecipeError(
            f"{printable(str(loaded.path))} holds another model than the recipe describes "
            f"({'; '.join(differing[:4])}): branch with `hasten train --branch`, which takes the recipe from there."
        )
    factor = _factors(loaded).get("lr", 1.0)
    origin = {
        "run": state.recipe.branch_from,
        "run_step": loaded.step,
        "run_tokens": loaded.state["tokens"],
        "factor": factor,
        "checkpoint_sha256": _manifest_sha256(loaded.path),
    }
    # How good the untrained model was is true of the branch too; what else is noted is its own.
    told = {name: loaded.state["notes"][name] for name in ("untrained",) if name in loaded.state["notes"]}
    plain = {
        **loaded.state,
        "step": 0,
        "seconds": 0.0,
        "phases": {},
        "status": "running",
        "reason": "",
        "progress": None,
        "notes": {**state.notes, **told, "branch": origin},
    }
    restore(state, loaded.tensors, plain)
    return tuple(_warnings(state, factor))


def _warnings(state: State, factor: float) -> Iterator[str]:
    run, step = printable(str(state.recipe.branch_from)), state.recipe.branch_step
    floor = getattr(state.recipe.schedule, "floor", None)
    begins_at = state.schedule(0.0) if state.schedule is not None else factor
    if floor is not None and factor <= floor * (1 + 1e-6):
        yield (
            f"The learning rate of {run} at step {step} is already at the floor ({factor:g} of the peak), so there is "
            "nothing to cool down: branch from an earlier checkpoint."
        )
    elif begins_at > factor * 1.05:
        yield (
            f"The schedule begins at {begins_at:g} of the peak, and the last step of {run} was at {factor:g}: give "
            f"schedule.start={factor:g} to go on from there."
        )


def _run_folder(run: str | Path) -> RunFolder:
    folder = RunFolder(Path(run))
    if not folder.recipe_path.is_file():
        raise RecipeError(f"{printable(str(run))} is no run folder (it has no recipe.toml): give the folder of a run.")
    return folder


def _saved_steps(folder: RunFolder) -> list[int]:
    """Return the steps of the checkpoints of a run, oldest first."""
    matches = (_STEP.fullmatch(path.name) for path in folder.checkpoints.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def _named(steps: Sequence[int]) -> str:
    """Return the steps for a message; of very many the last ones."""
    shown = ", ".join(map(str, steps[-12:]))
    return f"there are {'... ' if len(steps) > 12 else ''}{shown}" if steps else "there is none"


def _checkpoint(folder: RunFolder, step: int | None) -> tuple[checkpoint.Loaded, list[str]]:
    """Read a checkpoint without touching anything; without a step the newest that verifies."""
    steps = _saved_steps(folder)
    where = printable(str(folder.path))
    if not steps:
        raise RecipeError(f"{where} has no checkpoint to branch from: train it to its first checkpoint.")
    if step is not None:
        if step not in steps:
            raise RecipeError(
                f"{where} has no checkpoint of step {step}{nearest(str(step), map(str, steps))}; {_named(steps)}."
            )
        return load(_path(folder, step)), []
    notes = []
    for candidate in reversed(steps):
        try:
            return load(_path(folder, candidate)), notes
        except CheckpointError as error:
            notes.append(f"{error} It was passed over.")
    raise CheckpointError(f"No checkpoint of {where} can be trusted: {notes[0]}")


def _path(folder: RunFolder, step: int) -> Path:
    return folder.checkpoints / f"step-{step:08d}"


def _manifest_sha256(path: Path) -> str:
    return str(parse_json(read_bytes(path / "manifest.json"))["sha256"])


def _factors(loaded: checkpoint.Loaded) -> dict[str, float]:
    """Return the factor that the last step of a run had of everything that was scheduled, by its name."""
    groups = checkpoint.unpack(loaded.tensors["optimizer"], loaded.state["optimizer"])["param_groups"]
    factors: dict[str, float] = {}
    for group in groups:
        for name in SETTINGS:
            initial = group.get(f"initial_{name}")
            if name in factors or initial is None or float(initial) == 0:
                continue
            now = group[name] if name in group else group["betas"][int(name[-1]) - 1]
            # The last bits of a quotient of two products would only make the recipe hard to read.
            factors[name] = round(float(now) / float(initial), 12)
    return factors


def _schedule_name(overrides: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the schedule that the settings choose, or the default of a branch."""
    if isinstance(overrides, Mapping):
        givens = read_mapping(overrides, "in the settings")
    else:
        givens = read_overrides([overrides] if isinstance(overrides, str) else overrides)
    chosen = [given.value for given in givens if given.key in ("schedule", "schedule.name")]
    return chosen[-1] if chosen and chosen[-1] in schema().tables["schedule"] else SHAPE


def _settings(recipe: Recipe, loaded: checkpoint.Loaded, run: str, schedule: str) -> dict[str, Any]:
    """Return a branch's settings before anything is overridden: those of `recipe`, with its own schedules ended."""
    settings = recipe.to_dict()
    factors = _factors(loaded)
    start = factors.pop("lr", 1.0)
    known = schema().tables["schedule"][schedule].model_fields
    own = {
        "warmup": "0",
        "start": start,
        "floor": min(getattr(recipe.schedule, "floor", None) or FLOOR, FLOOR),
        **{name: f"constant({factor!r})" for name, factor in factors.items()},
    }
    settings["schedule"] = {"name": schedule, **{key: value for key, value in own.items() if key in known}}
    settings["lengths"] = _full_lengths(recipe)
    settings["batch"] = _present_batch(recipe, loaded)
    settings |= {
        "budget": str(max(1, round(SHARE_OF_PARENT * loaded.step))),
        "target_loss": None,
        "out": None,
        "branch_from": run,
        "branch_step": loaded.step,
    }
    return without_none(settings)


def _full_lengths(recipe: Recipe) -> dict[str, Any]:
    """Return rows of full length: a schedule of lengths would begin again. Buckets keep their place in the data."""
    if recipe.lengths.reading == "bucket":
        return {**recipe.to_dict()["lengths"], "over": "1"}
    return {"name": "constant", "seq_len": recipe.lengths.seq_len}


def _present_batch(recipe: Recipe, loaded: checkpoint.Loaded) -> dict[str, Any]:
    """Return the size that steps had: the rate's factor holds what that size multiplied it by."""
    batch = {"tokens": recipe.batch.tokens, "micro_rows": recipe.batch.micro_rows}
    if recipe.batch.schedule is None:
        return batch
    sizes = recipe.batch.build(rows=recipe.rows_per_step, micro_rows=recipe.batch.micro_rows or 1)
    progress = Progress.from_json(loaded.state["progress"])(max(loaded.step - 1, 0))
    return {**batch, "tokens": sizes(progress) * recipe.lengths.seq_len}


def _is_fixed(key: str) -> bool:
    return key in FIXED or key.partition(".")[0] in FIXED

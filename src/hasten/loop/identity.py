"""What a run is made with: recipe, text, code, machine; and in what two of these differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hasten.errors import HastenError, RecipeError, nearest, one_line
from hasten.loop.company import pick_device
from hasten.loop.state import State
from hasten.recipe import Recipe, resolve, schema
from hasten.recipe.names import RENAMED, SHORT
from hasten.recipe.settings import without_none
from hasten.record.environment import code_sha256

CRASH_LOOP = "crash-loop"
# What a run is made with beside its recipe, and must go on with.
BESIDE = ("corpus", "tokenizer", "code", "torch", "device")
# What changes the last bits of the losses and nothing else.
_LAST_BITS = ("threads", "micro_rows", "world_size")
# Keys that say how something is chosen that is compared itself, and where the run lies.
_CHOOSERS = ("out", "device", "threads", "batch.micro_rows")
# Keys of a recipe that change the last bits of the losses and nothing else.
_HOW = ("parallel", "activation_checkpointing")
_FIXED = {
    "model": "the saved weights have their shape",
    "precision": "the saved weights are of that format",
    "optimizer.name": "the saved state is that of another update rule",
    "optimizer.state_format": "the saved state is in another format",
    "seed": "the first weights and the order of the text follow from it",
    "lengths.seq_len": "the model and the rows of the text are made for it",
    "data.shuffle_tokens": "the place in the text is counted in rows of that order",
    "data.vocab_size": "the saved weights have a row for each token",
    "init_from": "the run began there",
    "branch_from": "the run began there",
    "branch_step": "the run began there",
}
_SAME_ORDER = "the same text in the same order; the losses differ in their last bits"
_ROW_LENGTHS = ("lengths.name", "lengths.mode", "lengths.start", "lengths.sizes")
_SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was.

    Args:
        name: a key of the recipe, or what else was compared.
        was: its value before; `now`: its value now. Plain data.
        kind: ``refused`` unless it is allowed, ``told`` or ``fixed``: it cannot change within a run.
        why: what there is to say about it.
    """

    name: str
    was: Any
    now: Any
    kind: str
    why: str = ""

    def __str__(self) -> str:
        line = f"{self.name}: was {_shown(self.was)}, is {_shown(self.now)}"
        return f"{line} ({self.why})" if self.why else line

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, as events hold it."""
        return {"name": self.name, "was": self.was, "is": self.now}


@dataclass(frozen=True)
class Allowed:
    """Which changes may be made, by what was typed for each and the name that it stands for."""

    names: Mapping[str, str]

    def covers(self, name: str) -> bool:
        """Say whether `name` may change: it or its table is named."""
        return any(_covers(given, name) for given in self.names.values())

    def unused(self, changed: Iterable[str]) -> list[str]:
        """Return what was typed and allows none of `changed`."""
        changed = list(changed)
        return [typed for typed, given in self.names.items() if not any(_covers(given, name) for name in changed)]


class AnotherRun(RecipeError):
    """A folder holds another run than the one that was asked for; a line for every difference."""

    def __init__(self, head: str, lines: Iterable[str], advice: str) -> None:
        self.lines = tuple(lines)
        self._text = "\n".join(
            [one_line(head, 400), *(f"  {one_line(line, 300)}" for line in self.lines), one_line(advice, 1500)]
        )
        super().__init__(self._text)

    def __str__(self) -> str:
        return self._text


def read_allow(given: Iterable[str]) -> Allowed:
    """Return which changes ``--allow`` names.

    Args:
        given: keys of a recipe (``lr``, ``optimizer.lr``), tables (``schedule``), ``corpus``, ``tokenizer``, ``code``,
            ``torch``, ``device`` and ``crash-loop``.

    Raises:
        RecipeError: a name is none of these; the nearest is named.

    Example:
        >>> read_allow(["lr"]).covers("optimizer.lr"), read_allow(["schedule"]).covers("schedule.floor")
        (True, True)
    """
    keys = schema()
    apart = (*BESIDE, CRASH_LOOP)
    aliases = {**RENAMED, **SHORT}
    names: dict[str, str] = {}
    for typed in [given] if type(given) is str else given:
        key = typed.strip().replace("-", "_")
        if typed in apart:
            names[typed] = typed
        elif keys.knows(key):
            names[typed] = key
        elif key in aliases:
            names[typed] = aliases[key]
        else:
            known = [*apart, *keys.leaves, *aliases]
            raise RecipeError(
                f"--allow {one_line(typed)} names nothing that can change{nearest(typed, known)}; give a key of the "
                f"recipe, or {', '.join(apart)}."
            )
    return Allowed(names)


def identity(state: State) -> dict[str, Any]:
    """Return what the run in `state` is made with, as its checkpoints hold it."""
    return {
        **known_early(state.recipe),
        "recipe_sha256": state.recipe.sha256,
        "corpus": state.data.corpus_sha256,
        "train_tokens": _train_tokens(state.data.manifest),
        "tokenizer": state.data.tokenizer_sha256,
        "device": state.device.type,
        "micro_rows": state.batches.micro_rows,
        "rows_grow_by": state.batch_sizes.micro_rows,
        "world_size": state.batches.world_size,
    }


def known_early(recipe: Recipe) -> dict[str, Any]:
    """Return the part of `identity` that is known before any text is read."""
    import hasten

    return {
        "recipe": recipe.to_dict(),
        "hasten": hasten.__version__,
        "code": code_sha256(),
        "torch": str(torch.__version__),
        "device": pick_device(recipe.device).type,
        "threads": torch.get_num_threads(),
    }


def _train_tokens(manifest: Mapping[str, Any]) -> str:
    """Return a sha256 over the files of the training side: the same where only the held-out text is another."""
    shards = [shard for split, entry in manifest["splits"].items() if split != "val" for shard in entry["shards"]]
    files = [shard[part]["sha256"] for shard in shards for part in ("tokens", "index")]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, agreed: Mapping[str, Any] | None = None
) -> list[Change]:
    """Return in what `now` differs from `saved`, of what both of them have.

    Args:
        saved: an `identity`, or a part of one, from a checkpoint or a recipe.
        now: the same of the run that is to go on.
        agreed: values by name that were agreed on since and count in place of the saved ones.

    Example:
        >>> [str(change) for change in differences({"threads": 1}, {"threads": 2})]
        ['threads: was 1, is 2 (the same text in the same order; the losses differ in their last bits)']
    """
    agreed = agreed or {}
    changes = []
    if "recipe" in saved and "recipe" in now:
        changes += recipe_changes(saved["recipe"], now["recipe"])
    for name in BESIDE:
        if name in saved and name in now:
            was, is_now = agreed.get(name, value_of(saved, name)), value_of(now, name)
            if was != is_now:
                changes.append(Change(name, was, is_now, "refused"))
    for name in _LAST_BITS:
        if name in saved and name in now and saved[name] != now[name]:
            changes.append(Change(name, saved[name], now[name], "told", _SAME_ORDER))
    sizes = [made_with.get("rows_grow_by") for made_with in (saved, now)]
    if None not in sizes and sizes[0] != sizes[1] and now["recipe"]["batch"]["schedule"] is not None:
        why = "the size of steps under batch.schedule follows it"
        changes.append(Change("batch.micro_rows", *sizes, "refused", why))
    return changes


def value_of(made_with: Mapping[str, Any], name: str) -> str:
    """Return what is compared, and agreed on, under one of the names `BESIDE` a recipe."""
    value = str(made_with[name])
    return f"{value} (hasten {made_with['hasten']})" if name == "code" else value


def recipe_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return in what two recipes, as `Recipe.to_dict` gives them, differ.

    Keys that an older hasten did not know count with their defaults.
    """
    before, after = as_recipe(was), as_recipe(now)
    if before is not None:
        was = before.to_dict()
    free = set(before.free_on_resume if before else ()) & set(after.free_on_resume if after else ())
    fixed = _fixed(before, after)
    old, new = dict(_leaves(was)), dict(_leaves(now))
    changes = []
    for key in {**old, **new}:
        if key in _CHOOSERS or old.get(key) == new.get(key):
            continue
        kind, why = ("told", "") if key in free else ("refused", "")
        if key.partition(".")[0] in _HOW:
            kind, why = "told", _SAME_ORDER
        if reason := fixed(key):
            kind, why = "fixed", f"it cannot change within a run: {reason}"
        changes.append(Change(key, old.get(key), new.get(key), kind, why))
    return changes


def as_recipe(choices: Mapping[str, Any]) -> Recipe | None:
    """Return the recipe that `Recipe.to_dict` gave; None where this hasten does not know such a recipe any more."""
    try:
        return resolve(without_none(choices)).recipe
    except HastenError:
        return None


def _fixed(before: Recipe | None, after: Recipe | None) -> Callable[[str], str]:
    """Return a function that says why a key cannot change; empty for one that can."""
    recipes = [recipe for recipe in (before, after) if recipe is not None]
    rows = {(r.lengths.reading, r.lengths.row_lengths if r.lengths.reading == "bucket" else ()) for r in recipes}

    def reason(key: str) -> str:
        if len(rows) > 1 and key in _ROW_LENGTHS:
            return "the place in the text is counted in rows of those lengths"
        return _FIXED.get(key) or _FIXED.get(key.partition(".")[0], "")

    return reason


def _covers(given: str, name: str) -> bool:
    return name == given or name.startswith(f"{given}.") or (given == "tokenizer" and name == "data.tokenizer")


def _leaves(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{leaf}", inner) for leaf, inner in value.items())
        else:
            yield key, value


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return one_line(_SHA256.sub(r"\1", text), 120)

"""On what a run may go on: what it was saved with, what was agreed on since, and what may change now."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hasten import checkpoint
from hasten.data.corpus import open_corpus
from hasten.errors import CheckpointError, HastenError, printable
from hasten.loop.identity import (
    BESIDE,
    Allowed,
    AnotherRun,
    Change,
    differences,
    known_early,
    recipe_changes,
)
from hasten.loop.telling import Teller
from hasten.recipe import Recipe, resolve
from hasten.record import RunFolder, read_events

NOT_RECORDED = "code, torch, device and threads"


@dataclass(frozen=True)
class Terms:
    """On what the run of a folder may go on.

    Args:
        folder: of the run.
        step: of the checkpoint that it goes on from; None where nothing was trained yet.
        saved: the identity in that checkpoint; empty without one.
        recipe: the recipe that its owner agreed on last; None in a new folder.
        agreed: what else was agreed on since the checkpoint, by name.
        allowed: what may change now.
    """

    folder: RunFolder
    step: int | None
    saved: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    agreed: Mapping[str, Any]
    allowed: Allowed

    @property
    def saved_recipe(self) -> Mapping[str, Any] | None:
        """The recipe that the checkpoint was made with; an older one does not hold it, and it is that of the folder."""
        return self.saved.get("recipe", self.recipe)


@dataclass(frozen=True)
class Settled:
    """What is changed in a run that goes on: what was `allowed` for that, and what is only `told`."""

    allowed: tuple[Change, ...] = ()
    told: tuple[Change, ...] = ()

    def to_json(self, loops: tuple[Change, ...] = ()) -> dict[str, Any]:
        """Return it as the event of the start holds it, with a crash loop that was allowed; empty for nothing."""
        both = {"allowed": (*self.allowed, *loops), "told": self.told}
        return {name: [change.to_json() for change in changes] for name, changes in both.items() if changes}


def read_terms(folder: RunFolder, loaded: checkpoint.Loaded | None, allowed: Allowed) -> Terms:
    """Return on what the run in `folder` may go on from the checkpoint `loaded`.

    What was allowed once is agreed on from then on, also where the run was killed before its next checkpoint: a recipe
    by the folder's ``recipe.toml``, everything else by the events.
    """
    recipe = resolve(folder.recipe_path).recipe.to_dict() if folder.recipe_path.exists() else None
    if loaded is None:
        return Terms(folder, None, {}, recipe, {}, allowed)
    agreed = {
        change["name"]: change["is"]
        for event in read_events(folder)
        if event.get("kind") == "resume" and type(event.get("step")) is int and event["step"] >= loaded.step
        for change in _tables(event.get("allowed"))
        if change.get("name") in BESIDE and isinstance(change.get("is"), str)
    }
    return Terms(folder, loaded.step, _identity_in(loaded.state), recipe, agreed, allowed)


def _identity_in(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the identity that a checkpoint holds; of an older one what it does hold of it.

    Raises:
        CheckpointError: it is none that a run saved.
    """
    if "identity" not in plain:
        return {"corpus": plain["corpus_sha256"], "tokenizer": plain["tokenizer_sha256"]}
    found = plain["identity"]
    texts, numbers = (*BESIDE, "hasten", "train_tokens"), ("threads", "micro_rows", "rows_grow_by", "world_size")
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("recipe"), dict)
        or not all(isinstance(found.get(name), str) for name in texts)
        or not all(type(found.get(name)) is int for name in numbers)
    ):
        raise CheckpointError(
            "The checkpoint does not say with what it was made, as every run's does; use another checkpoint."
        )
    return found


def _tables(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def settle(terms: Terms, now: Mapping[str, Any]) -> Settled:
    """Return what changes, once all of it is allowed.

    Args:
        terms: of the run.
        now: its `identity`, or the part of it that is known.

    Raises:
        AnotherRun: something changed that was not allowed, or that cannot change within a run.
    """
    beside = {key: value for key, value in terms.saved.items() if key != "recipe"}
    changes = [*_recipe_changes(terms, now["recipe"]), *differences(beside, now, agreed=terms.agreed)]
    if terms.step is not None and "code" not in terms.saved:
        changes.append(Change(NOT_RECORDED, "not recorded by an older hasten", "as they are here", "told"))
    if any(change.kind == "fixed" or _is_refused(change, terms) for change in changes):
        raise refusal(terms, [*changes, *_other_text(terms, now)])
    return Settled(
        tuple(change for change in changes if change.kind == "refused"),
        tuple(change for change in changes if change.kind == "told"),
    )


def settle_early(terms: Terms, recipe: Recipe) -> None:
    """Refuse what can be refused before any text is read; as `settle`."""
    settle(terms, known_early(recipe))


def changed_recipe(terms: Terms, recipe: Recipe) -> list[Change]:
    """Return in what `recipe` differs from the one agreed on, but for what may change freely."""
    agreed = terms.recipe or terms.saved_recipe
    changes = [] if agreed is None else recipe_changes(agreed, recipe.to_dict())
    return [dataclasses.replace(change, why="") for change in changes if change.kind != "told"]


def refuse_changed_end(terms: Terms, recipe: Recipe) -> None:
    """Refuse another recipe for a run that has finished, because no change could act on it.

    Raises:
        AnotherRun: the recipe differs.
    """
    if changes := changed_recipe(terms, recipe):
        raise AnotherRun(
            f"{printable(str(terms.folder.path))} holds a finished run of another recipe:",
            map(str, changes),
            "Give another out= for a new run, delete the folder, or go on from its end with hasten train --branch.",
        )


def refusal(terms: Terms, changes: Iterable[Change]) -> AnotherRun:
    """Return the refusal of those of `changes` that are not allowed or cannot be, with what to do."""
    refused = [change for change in changes if change.kind == "fixed" or _is_refused(change, terms)]
    advice = "Restore that, or give another out= for a new run."
    if all(change.kind == "refused" for change in refused):
        names = " ".join(f"--allow {name}" for name in _allow_names(refused))
        advice = f"Restore that, give another out= for a new run, or go on with it changed: {names}"
    where = "has trained no step yet" if terms.step is None else f"goes on from step {terms.step:,}"
    head = f"{printable(str(terms.folder.path))} holds a run made with something else, which {where}:"
    return AnotherRun(head, map(str, refused), advice)


def tell_changes(settled: Settled, loops: tuple[Change, ...], allowed: Allowed, tell: Teller) -> None:
    """Say what changes, and which ``--allow`` allowed nothing.

    Args:
        settled: what changes.
        loops: a crash loop that is allowed to go on.
        allowed: what was given.
        tell: to whom.
    """
    for change in settled.allowed:
        tell("note", message=f"allowed, from here on: {change}")
    for change in settled.told:  # a key that may change freely says nothing about itself, and asks for no attention
        tell("warning" if change.why or change.name == NOT_RECORDED else "note", message=str(change))
    for name in allowed.unused(change.name for change in (*settled.allowed, *settled.told, *loops)):
        tell("note", message=f"--allow {name} allows nothing: that is as it was.")


def _recipe_changes(terms: Terms, now: Mapping[str, Any]) -> list[Change]:
    """Return what changed in the recipe since it was agreed on, and what cannot change since the checkpoint."""
    if (agreed := terms.recipe or terms.saved_recipe) is None:
        return []
    if terms.step is None:  # nothing was trained that a change could be at odds with
        return [_refused(change) for change in recipe_changes(agreed, now) if change.kind != "told"]
    since = recipe_changes(terms.saved_recipe, now)
    fixed = {change.name for change in since if change.kind == "fixed"}
    asked = [change for change in recipe_changes(agreed, now) if change.kind != "told" and change.name not in fixed]
    return [*(change for change in since if change.kind != "refused"), *map(_refused, asked)]


def _refused(change: Change) -> Change:
    return dataclasses.replace(change, kind="refused", why="")


def _is_refused(change: Change, terms: Terms) -> bool:
    return change.kind == "refused" and not terms.allowed.covers(change.name)


def _other_text(terms: Terms, now: Mapping[str, Any]) -> list[Change]:
    """Return whether the text changed too, for a refusal that comes before it is prepared."""
    if "corpus" in now or "corpus" not in terms.saved:
        return []
    with contextlib.suppress(HastenError, OSError):
        data = resolve(now["recipe"]).recipe.data
        if "-" not in (*data.build().train, *data.build().val):  # standard input can be read once
            return differences({"corpus": terms.saved["corpus"]}, {"corpus": open_corpus(data.build()).sha256})
    return []


def _allow_names(changes: Iterable[Change]) -> list[str]:
    """Return what to give to ``--allow`` for `changes`: a table whose variant changed as a whole, else the keys."""
    names = [change.name for change in changes]
    tables = {name.removesuffix(".name") for name in names if name.endswith(".name")}
    short = [name.partition(".")[0] if name.partition(".")[0] in tables else name for name in names]
    return list(dict.fromkeys(short))

"""The folder of a pool of seeds: what was asked for, what was planned, and what came out.

FOLDER/restart.json   the recipe, the pool and the plan; written once, before the first step
       leads.json     whether the first of each rung led by more than noise; measured while its weights are there
       result.json    what came out
       runs/seed-K/   an ordinary run folder for each seed, its recipe.toml included
       logs/seed-K.txt
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hasten.duration import Duration
from hasten.errors import RecipeError, RunError, printable
from hasten.files import parse_json, read_bytes
from hasten.recipe import Recipe, resolve
from hasten.record import RunFolder, write_whole
from hasten.restarts.plan import Plan, Pool

FORMAT = 1
# What may change between two calls, because it changes neither a weight nor what is compared.
FREE = ("out", "checkpoint.keep", "checkpoint.every")


@dataclass(frozen=True)
class Book:
    """Where the files of a pool are."""

    path: Path

    @property
    def plan_path(self) -> Path:
        """What was asked for and planned."""
        return self.path / "restart.json"

    @property
    def leads_path(self) -> Path:
        """The leads at the rungs, by step."""
        return self.path / "leads.json"

    @property
    def result_path(self) -> Path:
        """What came out."""
        return self.path / "result.json"

    def run(self, seed: int) -> RunFolder:
        """Return the run folder of a seed."""
        return RunFolder(self.path / "runs" / f"seed-{seed}")

    def log(self, seed: int) -> Path:
        """Return the file with what the run of a seed printed."""
        return self.path / "logs" / f"seed-{seed}.txt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one process.

        Raises:
            RunError: another process holds it, or it cannot be written.
        """
        with RunFolder(self.path).lock():
            yield


def seed_recipe(recipe: Recipe, seed: int, horizon: int, book: Book) -> Recipe:
    """Return the ordinary recipe of one seed: that of the pool with the survivor's horizon."""
    changes = {"seed": seed, "budget": str(Duration(horizon, "steps")), "out": str(book.run(seed).path)}
    return resolve(recipe, changes).recipe


def write_seed(recipe: Recipe, seed: int, horizon: int, book: Book) -> Path:
    """Write the recipe of a seed into its run folder, once; return its path."""
    path = book.run(seed).recipe_path
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, seed_recipe(recipe, seed, horizon, book).to_toml())
    return path


def read_plan(book: Book, recipe: Recipe, pool: Pool) -> Plan | None:
    """Return the plan of a pool that was begun; None where the folder is new.

    Raises:
        RecipeError: it was begun with another recipe or other settings, or the folder holds something else.
        RunError: a file of it is damaged.
    """
    saved = read_json(book.plan_path)
    if saved is None:
        if book.path.is_dir() and any(path.name != ".lock" for path in book.path.iterdir()):
            raise RecipeError(
                f"{printable(str(book.path))} exists and holds no pool of seeds: give another folder with --out."
            )
        return None
    try:
        theirs = resolve(saved["recipe"]).recipe
        changed = theirs.difference(recipe, ignore=FREE)
        asked = asdict(pool)
        changed += [
            f"{name.replace('_', '-')}: {_said(value)} -> {_said(asked[name])}"
            for name, value in saved["pool"].items()
            if name != "first_seed" and value != _plain(asked[name])
        ]
        plan = Plan.from_json(saved["plan"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(book.plan_path) from error
    if changed:
        raise RecipeError(
            f"{printable(str(book.path))} holds a pool that was begun with other settings ({'; '.join(changed[:4])}): "
            "give the settings it was begun with to go on, or another folder with --out."
        )
    return plan


def write_plan(book: Book, recipe: Recipe, pool: Pool, plan: Plan) -> None:
    """Write what was asked for and planned."""
    write_json(
        book.plan_path,
        {"format": FORMAT, "recipe": recipe.to_toml(), "pool": asdict(pool), "plan": plan.to_json()},
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a JSON file of the folder holds; None where there is none.

    Raises:
        RunError: it is no JSON object.
    """
    try:
        values = parse_json(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if type(values) is not dict:
        raise _damaged(path)
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file of the folder, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    write_whole(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def _damaged(path: Path) -> RunError:
    return RunError(f"{printable(str(path))} is damaged; restore it from a copy, or delete the folder to start afresh.")


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return list(value) if type(value) is tuple else value


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if type(value) in (tuple, list) else printable(str(value))

"""The runs of a study: ordinary run folders, named by what is in them, done once and side by side."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.comparison.lineup import Variant
from hasten.comparison.study import share_of_budget
from hasten.errors import HastenError, RunError, printable
from hasten.pool import LOCAL, Engine, Job, Outcome, Places, last_words, train_command, wait_until_free
from hasten.recipe import Recipe, resolve
from hasten.record import RunFolder, read_result, write_whole

# A run that died is tried once more: a machine may have been out of memory for a moment.
TRIES = 2
DIVERGED = 3
ENDED = ("finished", "diverged")

Tell = Callable[..., None]


@dataclass(frozen=True)
class Planned:
    """One run: a variant with a seed, at a share of the budget, in a folder that the recipe's hash names."""

    variant: str
    seed: int
    share: float
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def recipe_path(self) -> Path:
        """The file that the run reads."""
        return self.folder.parent.parent / "recipes" / f"{self.name}.toml"

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.parent.parent / "logs" / f"{self.name}.txt"


def known_folders(folder: Path) -> dict[str, Path]:
    """Return the run folders that a study has already, by the start of their recipe's hash."""
    runs = folder / "runs"
    return {path.name.rpartition("-")[2]: path for path in sorted(runs.iterdir())} if runs.is_dir() else {}


def plan_run(
    variant: Variant, folder: Path, known: dict[str, Path], *, seed: int, threads: int, share: float = 1.0
) -> Planned:
    """Return the run of `variant` with `seed`; the folder of the same recipe, whoever's it was, is used again.

    Args:
        variant: who runs.
        folder: of the study.
        known: run folders by the start of their recipe's hash; this run's is added.
        seed: of initial weights and order of the text.
        threads: CPU threads, where the recipe does not say.
        share: of the budget.
    """
    budget = str(share_of_budget(variant.recipe.budget, share)) if share != 1.0 else str(variant.recipe.budget)
    settings = {"seed": seed, "budget": budget, "threads": variant.recipe.threads or threads}
    recipe = resolve(variant.recipe, settings).recipe
    digest = recipe.sha256[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", variant.name.lower()).strip("-")[:32] or "arm"
    name = f"{slug}-s{seed}" + (f"-{share:g}" if share != 1.0 else "") + f"-{digest}"
    return Planned(variant.name, seed, share, recipe, known.setdefault(digest, folder / "runs" / name))


def result_of(run: Planned) -> dict[str, Any] | None:
    """Return the result of a run that ended; None for one that has not, or that cannot be read."""
    try:
        result = read_result(RunFolder(run.folder))
    except HastenError:
        return None
    return result if result is not None and result.get("status") in ENDED else None


def described(run: Planned, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what ``verdicts.json`` says of a run."""
    result = result or {}
    phases = result.get("phases", {})
    trained = [phases[name] for name in ("train", "data") if name in phases]
    return {
        "seed": run.seed,
        "run": run.name,
        "status": result.get("status", "missing"),
        "val_bpb": result.get("val_bpb"),
        "val_loss": result.get("val_loss"),
        "steps": result.get("steps"),
        "tokens": result.get("tokens"),
        "train_seconds": sum(trained) if trained else None,
        "seconds": result.get("seconds"),
        "memory_bytes": result.get("memory_bytes"),
        "lr": run.recipe.optimizer.lr,
    }


def do(runs: Sequence[Planned], places: Places, tell: Tell, allow: Sequence[str] = (), engine: Engine = LOCAL) -> float:
    """Do the runs that have not ended, side by side on `engine`, in their order; return the seconds that they ran.

    Those that were begun go on though what `allow` names has changed, such as ``code``.

    Raises:
        RunError: one failed again; its last words are in it.
    """
    waiting = [run for run in _once(runs) if result_of(run) is None]
    by_name = {run.name: run for run in waiting}
    spent, tries, again = 0.0, dict.fromkeys(by_name, 0), list(waiting)
    while again:
        queue, again = again, []
        jobs = _jobs(queue, places, allow)
        for outcome in engine.run_all(jobs, workers=places.workers, tell=lambda text: tell("note", message=text)):
            run = by_name[outcome.job.name]
            spent += outcome.seconds
            result = result_of(run)
            if result is not None and outcome.code in (0, DIVERGED):
                _clean(run)
                tell("run", run=described(run, result), variant=run.variant, share=run.share)
                continue
            tries[run.name] += 1
            if tries[run.name] >= TRIES or outcome.code == 2:
                raise RunError(_failed(run, outcome))
            tell("note", message=f"{run.name} ended with code {outcome.code} and is tried once more.")
            again.append(run)
    return spent


def _once(runs: Iterable[Planned]) -> list[Planned]:
    return list({run.name: run for run in runs}.values())


def _jobs(runs: Sequence[Planned], places: Places, allow: Sequence[str]) -> Iterator[Job]:
    for run in runs:
        run.recipe_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(run.recipe_path, run.recipe.model_copy(update={"out": str(run.folder)}).to_toml())
        wait_until_free(run.folder)
        command = train_command(run.recipe_path, allow=allow)
        yield Job(run.name, command, run.log, places.threads, places.gpus, (run.recipe_path,), run.folder)


def _clean(run: Planned) -> None:
    """Remove the checkpoints of a run that ended: its result, its record and its model stay."""
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def _failed(run: Planned, outcome: Outcome) -> str:
    said = last_words(run.log) or f"exit code {outcome.code}"
    return f"{run.variant}, seed {run.seed}: {said} (all it printed is in {printable(str(run.log))})"


def same_text(runs: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> None:
    """Refuse to compare runs that were judged on different held-out text.

    Raises:
        RunError: they were; the variants are named.
    """
    seen: dict[int, str] = {}
    for variant, results in runs.items():
        for result in results:
            if result and result.get("val_bytes"):
                seen.setdefault(result["val_bytes"], variant)
    if len(seen) > 1:
        (one, first), (other, second) = list(seen.items())[:2]
        raise RunError(
            f"{first} was judged on {one} bytes of held-out text and {second} on {other}: give data.val=FILE to the "
            "base, so that all are judged on the same."
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; what is not finite is null."""
    write_whole(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a study has: its planned runs, each planned once, and what has come of them so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.comparison.effects import Rung, next_rung
from hasten.comparison.lineup import Lineup, Pair, Variant
from hasten.comparison.runs import ENDED, Planned, described, known_folders, plan_run, result_of
from hasten.comparison.study import Study
from hasten.pool import Places
from hasten.recipe import resolve

# Away from the seeds of the comparison: a rate chosen on a seed would be flattered by it.
TUNING_SEED = 100_000


class Ledger:
    """The runs of a study.

    Args:
        study: what is compared.
        folder: of the study.
        who: the variants and the comparisons.
        room: how many runs go side by side, and the threads of each.
    """

    def __init__(self, study: Study, folder: Path, who: Lineup, room: Places) -> None:
        self.study, self.folder, self.who, self.room = study, folder, who, room
        self.rates: dict[str, float] = {}
        self._folders = known_folders(folder)
        self._planned: dict[tuple, Planned] = {}
        self._ended: dict[str, dict[str, Any]] = {}

    def run(self, name: str, index: int, share: float = 1.0) -> Planned:
        """Return the run of the variant `name` with seed number `index`, with its tuned learning rate if it has one."""
        rate = self.rates.get(name)
        key = (name, index, share, rate)
        if key not in self._planned:
            variant = self.who.variant(name)
            if rate is not None:
                variant = dataclasses.replace(variant, recipe=resolve(variant.recipe, {"lr": rate}).recipe)
            self._planned[key] = self._plan(variant, variant.recipe.seed + index, share)
        return self._planned[key]

    def attempt(self, name: str, factor: float) -> Planned:
        """Return the run that tries `factor` times the learning rate of the variant `name`, on the seed for that."""
        key = (name, "try", factor)
        if key not in self._planned:
            variant = self.who.variant(name)
            rate = float(f"{variant.recipe.optimizer.lr * factor:.6g}")
            recipe = resolve(variant.recipe, {"lr": rate}).recipe
            tried = Variant(f"{name} lr {rate:g}", recipe, variant.changes)
            self._planned[key] = self._plan(tried, self.study.base.seed + TUNING_SEED, 1.0)
        return self._planned[key]

    def _plan(self, variant: Variant, seed: int, share: float) -> Planned:
        return plan_run(variant, self.folder, self._folders, seed=seed, threads=self.room.threads, share=share)

    def result(self, run: Planned) -> dict[str, Any] | None:
        """Return what ``result.json`` holds of a run that ended; None for one that has not."""
        if run.name not in self._ended:
            result = result_of(run)
            if result is None:
                return None
            self._ended[run.name] = result
        return self._ended[run.name]

    def shown(self, run: Planned) -> dict[str, Any]:
        """Return what ``verdicts.json`` says of a run."""
        return described(run, self.result(run))

    def runs_of(self, name: str, seeds: int) -> list[dict[str, Any]]:
        """Return what is said of the runs of a variant, seed by seed."""
        return [self.shown(self.run(name, index)) for index in range(seeds)]

    def interleaved(self, seeds: int) -> list[Planned]:
        """Return everyone's runs, a seed at a time, each seed beginning with another one, so that drift meets all."""
        names = [variant.name for variant in self.who.variants]
        order = [(index, names[index % len(names) :] + names[: index % len(names)]) for index in range(seeds)]
        return [self.run(name, index) for index, turn in order for name in turn]

    def rungs(self, pair: Pair, index: int) -> list[Rung]:
        """Return the shorter runs of a pair's arm that have ended, held against the other's final bits per byte."""
        target = self.shown(self.run(pair.against, index))["val_bpb"]
        rungs = []
        for share in self.study.ladder:
            shown = self.shown(self.run(pair.arm, index, share))
            if target is not None and shown["status"] in ENDED:
                bits = shown["val_bpb"]
                rungs.append(Rung(shown["seed"], share, shown, bits is not None and bits <= target))
        return rungs

    def rungs_due(self, seeds: int) -> list[Planned]:
        """Return the shorter runs to do next, at most one for every seed of every comparison."""
        due = []
        for index in range(seeds):
            for pair in self.who.pairs:
                share = self._next_share(pair, index)
                if share is not None:
                    due.append(self.run(pair.arm, index, share))
        return due

    def _next_share(self, pair: Pair, index: int) -> float | None:
        mine, other = (self.shown(self.run(name, index))["val_bpb"] for name in (pair.arm, pair.against))
        if mine is None or other is None or mine == other:
            return None
        tried = {rung.share: rung.reached for rung in self.rungs(pair, index)}
        return next_rung(self.study.ladder, tried, whole_reached=mine <= other)

    def seconds(self, seeds: int) -> float:
        """Return the seconds that the runs of the comparison took, each counted once."""
        shares = (1.0, *self.study.ladder)
        names = [variant.name for variant in self.who.variants]
        runs = [self.run(name, index, share) for name in names for index in range(seeds) for share in shares]
        return total_seconds([self.result(run) for run in {run.name: run for run in runs}.values()])


def total_seconds(results: Sequence[Mapping[str, Any] | None]) -> float:
    """Return the seconds that runs took; None is one that has not ended."""
    return sum(result["seconds"] or 0.0 for result in results if result)

"""Who runs, and who is compared with whom: the arms of a study under its mode."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.comparison.study import Arm, Study, changed
from hasten.errors import RecipeError
from hasten.recipe import Recipe


@dataclass(frozen=True)
class Variant:
    """A recipe that runs with every seed, under its name; `changes` are those to the base of the study, as given."""

    name: str
    recipe: Recipe
    changes: Mapping[str, str]


@dataclass(frozen=True)
class Pair:
    """A comparison: the variant `arm` against the variant `against`, under a name of its own."""

    name: str
    arm: str
    against: str


@dataclass(frozen=True)
class Lineup:
    """The variants of a study, that which the others are compared with first, and the comparisons."""

    variants: tuple[Variant, ...]
    pairs: tuple[Pair, ...]

    def variant(self, name: str) -> Variant:
        """Return the variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)


def lineup(study: Study) -> Lineup:
    """Return who runs in `study`, and the comparisons that its mode asks for.

    Raises:
        RecipeError: the settings of an arm are wrong, or those of two arms contradict each other where both run.
    """
    base = Variant("base", study.base, {})
    if study.mode == "leave-one-out":
        return _leave_one_out(study)
    if study.mode == "grid":
        sets = [chosen for size in range(1, len(study.arms) + 1) for chosen in itertools.combinations(study.arms, size)]
        names = ["+".join(arm.name for arm in chosen) for chosen in sets]
        variants = [_together(study, n, arms) for n, arms in zip(names, sets, strict=True) if not _clash(arms)]
    else:
        variants = [_together(study, arm.name, (arm,)) for arm in study.arms]
    everyone = (base, *variants)
    if study.mode == "head-to-head":
        pairs = [
            Pair(f"{arm.name} vs {against.name}", arm.name, against.name)
            for against, arm in itertools.combinations(everyone, 2)
        ]
    else:
        pairs = [Pair(variant.name, variant.name, "base") for variant in variants]
    return Lineup(everyone, tuple(pairs))


def _leave_one_out(study: Study) -> Lineup:
    clash = _clash(study.arms)
    if clash:
        raise RecipeError(f"Two arms set {clash}, so they cannot run together: leave-one-out needs arms that can.")
    everything = _together(study, "all", study.arms)
    variants = [
        _together(study, f"without {out.name}", tuple(arm for arm in study.arms if arm is not out))
        for out in study.arms
    ]
    return Lineup((everything, *variants), tuple(Pair(v.name, v.name, "all") for v in variants))


def _clash(arms: tuple[Arm, ...]) -> str:
    """Return a key that two of `arms` set; empty where none is set twice."""
    keys = [text.partition("=")[0] for arm in arms for text in arm.settings]
    return next((key for key in keys if keys.count(key) > 1), "")


def _together(study: Study, name: str, arms: tuple[Arm, ...]) -> Variant:
    recipe, changes = study.base, {}
    for arm in arms:
        recipe = changed(recipe, arm.settings, f"arm {arm.name!r}")
        changes |= {key: value for key, _, value in (text.partition("=") for text in arm.settings)}
    return Variant(name, recipe, changes)

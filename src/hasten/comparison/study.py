"""What a study compares, as frozen data and as `study.toml`: read again when it goes on, extended, never changed."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.duration import Duration
from hasten.errors import RecipeError, RunError, nearest, printable
from hasten.files import read_bytes
from hasten.recipe import Recipe, resolve
from hasten.record import write_whole
from hasten.statistics import check_interval

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

FORMAT = 1
MODES = ("add-one", "leave-one-out", "grid", "head-to-head")
# Two searches of at most two runs each find the rung, and a gain of a third is seen.
LADDER = (0.5, 0.65, 0.8)
MARGIN = 0.01
MOST_IN_GRID = 5
NAME = "letters, digits, spaces and - _ . + ="
# Keys that an arm may not set: what is compared must be given the same, and judged on the same text.
FIXED = {
    "budget": "every arm has the same budget",
    "target_loss": "every arm runs to the end of its budget",
    "out": "the runs of a study have their own folders",
    "val": "every arm is judged on the same held-out text",
    "data.val": "every arm is judged on the same held-out text",
    "data.val_share": "every arm is judged on the same held-out text",
    "branch_from": "a branch is no recipe of its own",
    "branch_step": "a branch is no recipe of its own",
}


@dataclass(frozen=True)
class Arm:
    """One variant: a name, and the settings in which it differs from the base (none: the base under another name)."""

    name: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """What is compared, and how it is judged.

    Args:
        base: the recipe that the arms are changes of; its `seed` is the first seed.
        arms: the variants.
        mode: ``add-one`` (each arm alone against the base), ``leave-one-out`` (all together against all but one),
            ``grid`` (every combination) or ``head-to-head`` (everyone against everyone).
        seeds: paired runs of each; with `half_width` the number to begin with.
        ladder: shares of the budget, rising, below 1, at which an arm that ends below the base is run again to find
            how early it is there; empty: not asked.
        margin: a relative difference in bits per byte up to which two arms are as good as equal.
        lr_tries: learning rates tried for every arm, the base too, before the comparison; 0: none.
        half_width: seeds are added until every interval is at most this wide to either side; None: `seeds` it is.
        max_seeds: the most seeds that are added up to.
        spend: seconds of runs after which no more seeds are added; None: no such limit.
        interval: ``t`` or ``bootstrap``, from 10 seeds on; no run depends on it, so it may be another when the study
            goes on or is reported again.
    """

    base: Recipe
    arms: tuple[Arm, ...]
    mode: str = "add-one"
    seeds: int = 3
    ladder: tuple[float, ...] = LADDER
    margin: float = MARGIN
    lr_tries: int = 0
    half_width: float | None = None
    max_seeds: int = 20
    spend: float | None = None
    interval: str = "t"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RecipeError(f"There is no mode {self.mode!r}{nearest(self.mode, MODES)}; give {', '.join(MODES)}.")
        if self.seeds < 1:
            raise RecipeError(f"seeds={self.seeds} is no comparison: give at least 2 (1 shows no noise at all).")
        if self.lr_tries and self.lr_tries < 2:
            raise RecipeError(f"lr_tries={self.lr_tries} is no search: give at least 2, better 3 or 5.")
        if not 0 < self.margin < 1:
            raise RecipeError(f"margin={self.margin} is no share of a loss: give one such as 1% or 0.01.")
        if self.half_width is not None and not 0 < self.half_width < 1:
            raise RecipeError(f"half_width={self.half_width} (--until) is no share: give one such as 1% or 0.01.")
        check_interval(self.interval)
        if list(self.ladder) != sorted(set(self.ladder)) or any(not 0 < share < 1 for share in self.ladder):
            raise RecipeError(f"ladder={list(self.ladder)} must rise, above 0 and below 1, such as 0.5,0.65,0.8.")
        if not self.arms:
            raise RecipeError('There is nothing to compare: give --arm NAME:"KEY=VALUE ...", once for every arm.')
        self._check_names()
        self._check_base()
        if self.mode == "grid" and len(self.arms) > MOST_IN_GRID:
            raise RecipeError(
                f"A grid of {len(self.arms)} arms has {2 ** len(self.arms)} combinations: give at most {MOST_IN_GRID}."
            )
        if self.mode == "leave-one-out" and len(self.arms) < 2:
            raise RecipeError("leave-one-out needs at least two arms, to leave one of them out.")

    def _check_base(self) -> None:
        train = self.base.data.train
        if "-" in ((train,) if isinstance(train, str) else train):
            raise RecipeError("data=- is read once, and a study reads it for every run: put the text into a file.")
        if self.base.target_loss is not None:
            raise RecipeError("target_loss ends runs early, and a study compares whole ones: leave it out.")
        if self.base.branch_from is not None:
            raise RecipeError("branch_from begins within another run, and a study's runs begin afresh: leave it out.")

    def _check_names(self) -> None:
        names = [arm.name for arm in self.arms]
        for name in names:
            plain = name.isascii() and all(c.isalnum() or c in " -_.+=" for c in name)
            if not name or not name[0].isalnum() or not plain or len(name) > 60:
                raise RecipeError(f"{printable(name)!r} is no name for an arm: give up to 60 {NAME}, a letter first.")
            if name.lower() in ("base", "all"):
                raise RecipeError(f"An arm cannot be called {name!r}, which the study itself uses: give another name.")
            if names.count(name) > 1:
                raise RecipeError(f"Two arms are called {name!r}: give each a name of its own.")

    def to_toml(self) -> str:
        """Return the study as TOML; `read_study` of that text is this study again."""
        import tomli_w

        plain: dict[str, Any] = {"format": FORMAT}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("base", "arms") and value is not None:
                plain[field.name] = list(value) if field.name == "ladder" else value
        plain["arms"] = {arm.name: list(arm.settings) for arm in self.arms}
        plain["base"] = tomllib.loads(self.base.to_toml())
        return tomli_w.dumps(plain)


def read_arm(text: str) -> Arm:
    """Return the arm that ``NAME:KEY=VALUE KEY=VALUE`` says; the settings alone name an arm too.

    Example:
        >>> read_arm("fast:lr=0.02 optimizer=muon")
        Arm(name='fast', settings=('lr=0.02', 'optimizer=muon'))
        >>> read_arm("lr=0.02").name, read_arm("twin").settings
        ('lr=0.02', ())
    """
    name, colon, rest = text.partition(":")
    if not colon or "=" in name:
        name, rest = text, text if "=" in text else ""
    try:
        settings = tuple(shlex.split(rest))
    except ValueError as error:
        raise RecipeError(
            f'--arm {printable(text)!r} cannot be read ({error}): write --arm NAME:"KEY=VALUE ...".'
        ) from None
    return Arm(name.strip(), settings)


def changed(base: Recipe, settings: Sequence[str], who: str) -> Recipe:
    """Return `base` with the settings of an arm; `who` it is names it in messages.

    Raises:
        RecipeError: a setting is wrong, or is one in which arms may not differ.
    """
    if not settings:
        return base
    for text in settings:
        key = text.partition("=")[0].strip().lstrip("-").replace("-", "_")
        if key in FIXED:
            raise RecipeError(f"{who} sets {printable(text)}, but {FIXED[key]}: leave it out, or give it to the base.")
    try:
        recipe = resolve(base, list(settings)).recipe
    except RecipeError as error:
        raise RecipeError(f"{who}: {error}") from None
    fixed = {**recipe.to_dict(), **{key: base.to_dict()[key] for key in ("budget", "target_loss", "out")}}
    if fixed != recipe.to_dict() or recipe.data.val != base.data.val or recipe.data.val_share != base.data.val_share:
        raise RecipeError(f"{who} changes the budget or the held-out text, which must be the same for every arm.")
    return recipe


def read_study(path: Path) -> Study:
    """Return the study of a TOML file: ``[arms]`` and ``base``, and any other argument of `Study`.

    `base` is a table of settings, or a text (or list of texts) as on the command line: a recipe first, if any, then
    ``key=value``. An arm is a table of settings, a text or a list of texts.

    Raises:
        RecipeError: it cannot be read, or says what no study can be.
    """
    try:
        raw = tomllib.loads(read_bytes(path).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{printable(str(path))} cannot be read as a study: {printable(str(error))}.") from None
    version = raw.pop("format", FORMAT)
    if version != FORMAT:
        raise RecipeError(f"{printable(str(path))} has format {version!r}; this hasten reads {FORMAT}.")
    known = [field.name for field in dataclasses.fields(Study)]
    for key in raw:
        if key not in known:
            raise RecipeError(f"A study has no {printable(key)!r}{nearest(key, known)}; it has {', '.join(known)}.")
    arms = raw.pop("arms", {})
    if not isinstance(arms, Mapping):
        raise RecipeError(f'arms in {printable(str(path))} must be a table: [arms], then NAME = "KEY=VALUE ...".')
    try:
        base = _base(raw.pop("base", {}))
        if "ladder" in raw:
            raw["ladder"] = tuple(raw["ladder"])
        return Study(base, tuple(Arm(name, _texts(value)) for name, value in arms.items()), **raw)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{printable(str(path))} has a value of the wrong kind: {printable(str(error))}.") from None


def _base(given: Any) -> Recipe:
    if isinstance(given, Mapping):
        return resolve(given).recipe
    words = shlex.split(given) if isinstance(given, str) else list(given)
    sources = [word for word in words if "=" not in word]
    if len(sources) > 1:
        raise RecipeError(f"base names two recipes, {printable(sources[0])} and {printable(sources[1])}: keep one.")
    return resolve(sources[0] if sources else None, [word for word in words if "=" in word]).recipe


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(shlex.split(value))
    if isinstance(value, Mapping):
        return tuple(f"{key}={_text(setting)}" for key, setting in _flat(value).items())
    return tuple(str(text) for text in value)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(f'"{item}"' if isinstance(item, str) else str(item) for item in value) + "]"
    return str(value)


def as_arms(arms: Mapping[str, Any] | Sequence[Arm]) -> tuple[Arm, ...]:
    """Return arms given from Python: a mapping of names to settings, in any of the forms of a study file."""
    if isinstance(arms, Mapping):
        return tuple(Arm(name, _texts(settings)) for name, settings in arms.items())
    return tuple(arms)


def extended(old: Study, new: Study, where: Path) -> Study:
    """Return the study that goes on: `old` with the further arms and seeds of `new`.

    Raises:
        RunError: the base or an arm is another than before.
    """
    differs = old.base.difference(new.base, ignore=("out",))
    if differs:
        raise RunError(
            f"{printable(str(where))} compares changes of another base ({'; '.join(differs[:3])}): "
            "give another --out, or the base it began with."
        )
    if old.mode != new.mode:
        raise RunError(f"{printable(str(where))} was begun with --mode {old.mode}: give that, or another --out.")
    known = {arm.name: arm for arm in old.arms}
    for arm in new.arms:
        if arm.name in known and known[arm.name].settings != arm.settings:
            before, now = (" ".join(a.settings) or "the base" for a in (known[arm.name], arm))
            raise RunError(
                f"Arm {arm.name!r} of {printable(str(where))} is {printable(before)}, not {printable(now)}: give it "
                "another name."
            )
    if old.lr_tries != new.lr_tries:
        raise RunError(
            f"{printable(str(where))} was begun with --lr-tries {old.lr_tries}, and its rates are taken: give that, or "
            "another --out."
        )
    arms = (*old.arms, *(arm for arm in new.arms if arm.name not in known))
    return dataclasses.replace(new, base=old.base, arms=arms, seeds=max(old.seeds, new.seeds))


def write_study(study: Study, path: Path) -> None:
    """Write ``study.toml``, whole or not at all."""
    write_whole(path, study.to_toml())


def share_of_budget(budget: Duration, share: float) -> Duration:
    """Return `share` of a budget: whole steps or tokens, at least one.

    Example:
        >>> str(share_of_budget(Duration.parse("400"), 0.65)), str(share_of_budget(Duration.parse("60s"), 0.5))
        ('260', '30s')
    """
    value = budget.value * share
    return Duration(max(1, round(value)) if budget.unit in ("steps", "tokens") else value, budget.unit)

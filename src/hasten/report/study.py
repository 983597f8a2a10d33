"""A study as its ``verdicts.json`` tells it: arms, effects and runs, checked as they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import RunError, printable
from hasten.files import parse_json, read_bytes

VERDICTS = "verdicts.json"
FORMAT = 1
KINDS = ("pays", "costs", "none", "unknown", "identical", "diverged")


@dataclass(frozen=True)
class Effect:
    """A relative change against another arm: -0.05 is 5 % less. None is what could not be said.

    `censored` seeds never got there; in `at_most` seeds the shortest budget tried did, so the truth may be less.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None
    method: str
    censored: int
    at_most: int = 0


@dataclass(frozen=True)
class StudyRun:
    """One run of an arm. `run` is the name of its folder in ``STUDY/runs``."""

    seed: int
    run: str
    status: str
    val_bpb: float | None
    val_loss: float | None
    steps: int | None
    tokens: int | None
    train_seconds: float | None
    seconds: float | None
    memory_bytes: int | None
    lr: float | None


@dataclass(frozen=True)
class Rung:
    """A run of a share of the budget, tried for whether it reaches the loss that the base ends with."""

    seed: int
    share: float
    run: str
    val_loss: float | None
    val_bpb: float | None
    reached: bool


@dataclass(frozen=True)
class Arm:
    """What was changed, what came out. The base is an arm too, without a verdict.

    `variant` and `against` are who ran; `name` is that of their comparison, which differs where many share a variant.
    """

    name: str
    variant: str
    against: str
    changes: Mapping[str, Any]
    verdict: str
    reason: str
    further_seeds: int | None
    n: int
    p: float | None
    p_raw: float | None
    mean_bits_per_byte: float | None
    sd_bits_per_byte: float | None
    effects: Mapping[str, Effect]
    ladder: Sequence[Rung]
    runs: Sequence[StudyRun]

    def count(self, status: str) -> int:
        """Return how many of its runs ended so."""
        return sum(run.status == status for run in self.runs)


@dataclass(frozen=True)
class Search:
    """The learning rates that were tried for one arm (rate as written, final loss), and the one taken."""

    tried: Sequence[tuple[str, float | None]]
    taken: float | None
    at_edge: bool


@dataclass(frozen=True)
class Tuning:
    """The learning-rate search of a study: tries per arm, what they cost, what each arm got."""

    tries: int | None
    seed: int | None
    cost_seconds: float | None
    arms: Mapping[str, Search]


@dataclass(frozen=True)
class Study:
    """Everything that ``verdicts.json`` says."""

    name: str
    answer: str
    mode: str
    budget: str
    seeds: Sequence[Any]
    looks: int | None
    sequential: bool
    level: float
    margin: float
    method: str
    correction: str
    primary: str
    ladder: Sequence[Any]
    workers: int | None
    threads: int | None
    tuning: Tuning | None
    cost_seconds: float | None
    complete: bool
    runs_missing: int
    base: Arm
    arms: Sequence[Arm]

    @property
    def everyone(self) -> list[Arm]:
        """The base and the arms, in the order of the study."""
        return [self.base, *self.arms]

    @property
    def variants(self) -> list[Arm]:
        """Everyone that ran, once, however many comparisons it is in."""
        return list({arm.variant: arm for arm in reversed(self.everyone)}.values())[::-1]

    @property
    def primaries(self) -> list[str]:
        """The effects that verdicts rest on."""
        return self.primary.split(" and ")

    def reference(self, arm: Arm) -> Arm:
        """Return what an arm is compared with."""
        return next((other for other in self.everyone if other.variant == arm.against), self.base)


def is_study(folder: Path) -> bool:
    """Say whether a folder is a study's, finished or not."""
    return (folder / VERDICTS).is_file() or (folder / "study.toml").is_file()


def read_study(folder: Path) -> Study:
    """Return what the study in `folder` found.

    Raises:
        RunError: there is no ``verdicts.json`` yet, or it is damaged, half-written or of another format.
    """
    path = folder / VERDICTS
    shown = printable(str(path))
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise RunError(
            f"The study {printable(str(folder))!r} has no {VERDICTS} yet; give the command of the study again, "
            "which goes on with it and writes the file."
        ) from None
    except OSError as error:
        raise RunError(f"{shown} could not be read ({error.strerror or 'no reason given'}); {_REPAIR}") from None
    try:
        whole = parse_json(content)
    except ValueError:
        raise RunError(f"{shown} is not whole JSON; {_REPAIR}") from None
    try:
        return _study(_Place(whole, ""))
    except _DamageError as damage:
        raise RunError(f"{shown}: {damage}; {_REPAIR}") from None


_REPAIR = "give the command of the study again, which writes it anew from the runs."


class _DamageError(ValueError):
    """What is wrong at which place of the file."""


@dataclass(frozen=True)
class _Place:
    """An object inside the file, and the way to it, for what is said when it is wrong."""

    value: Any
    at: str

    def __post_init__(self) -> None:
        if type(self.value) is not dict:
            raise _DamageError(f"{self.at or 'the file'} should be an object, not {_shown(self.value)}")

    def _get(self, key: str, kinds: tuple[type, ...], expected: str, otherwise: Any) -> Any:
        value = self.value.get(key)
        if value is None:
            return otherwise
        if type(value) not in kinds:
            raise _DamageError(f"{self._way(key)} should be {expected}, not {_shown(value)}")
        return value

    def _way(self, key: str) -> str:
        return printable(f"{self.at}.{key}" if self.at else key)

    def needed(self, key: str) -> None:
        if self.value.get(key) is None:
            raise _DamageError(f"{self._way(key)} is missing")

    def text(self, key: str, otherwise: str = "") -> str:
        return str(self._get(key, (str,), "text", otherwise))

    def flag(self, key: str, otherwise: bool = False) -> bool:
        return bool(self._get(key, (bool,), "true or false", otherwise))

    def number(self, key: str) -> float | None:
        if self.value.get(key) in ("nan", "inf", "-inf"):
            return None
        value = self._get(key, (int, float), "a number", None)
        return None if value is None or not math.isfinite(value) else float(value)

    def whole(self, key: str, otherwise: Any = None) -> Any:
        value = self.number(key)
        return otherwise if value is None else int(value)

    def plain(self, key: str) -> dict[str, Any]:
        return dict(self._get(key, (dict,), "an object", {}))

    def rows(self, key: str) -> list[Any]:
        return list(self._get(key, (list,), "a list", []))

    def inside(self, key: str) -> _Place | None:
        return None if self.value.get(key) is None else _Place(self.value[key], self._way(key))

    def each(self, key: str) -> list[_Place]:
        return [_Place(value, f"{self._way(key)}[{index}]") for index, value in enumerate(self.rows(key))]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _study(place: _Place) -> Study:
    if place.value.get("format") != FORMAT:
        raise _DamageError(f"format is {_shown(place.value.get('format'))}, and this version of hasten reads {FORMAT}")
    for key in ("study", "base"):
        place.needed(key)
    study, base = _Place(place.value["study"], "study"), _Place(place.value["base"], "base")
    level, margin = study.number("level"), study.number("margin")
    return Study(
        name=study.text("name", "study"),
        answer=study.text("answer"),
        mode=study.text("mode"),
        budget=study.text("budget"),
        seeds=study.rows("seeds"),
        looks=study.whole("looks"),
        sequential=study.flag("sequential"),
        level=0.95 if level is None else level,
        margin=0.0 if margin is None else abs(margin),
        method=study.text("method"),
        correction=study.text("correction"),
        primary=study.text("primary", "bits_per_byte"),
        ladder=study.rows("ladder"),
        workers=study.whole("workers"),
        threads=study.whole("threads"),
        tuning=_tuning(study.inside("tuning")),
        cost_seconds=study.number("cost_seconds"),
        complete=study.flag("complete"),
        runs_missing=study.whole("runs_missing", 0),
        base=_arm(base, is_base=True),
        arms=[_arm(arm) for arm in place.each("arms")],
    )


def _arm(place: _Place, *, is_base: bool = False) -> Arm:
    place.needed("name")
    verdict = "base" if is_base else place.text("verdict", "unknown")
    if not is_base and verdict not in KINDS:
        raise _DamageError(f"{place.at}.verdict is {_shown(verdict)}, not one of {', '.join(KINDS)}")
    runs = [_run(run) for run in place.each("runs")]
    return Arm(
        name=place.text("name"),
        variant=place.text("arm", place.text("name")),
        against="" if is_base else place.text("against", "base"),
        changes=place.plain("changes"),
        verdict=verdict,
        reason=place.text("reason"),
        further_seeds=place.whole("further_seeds"),
        n=place.whole("n", len(runs)),
        p=place.number("p"),
        p_raw=place.number("p_raw"),
        mean_bits_per_byte=place.number("mean_bits_per_byte"),
        sd_bits_per_byte=place.number("sd_bits_per_byte"),
        effects=_effects(place.inside("effects")),
        ladder=[_rung(rung) for rung in place.each("ladder")],
        runs=runs,
    )


def _effects(place: _Place | None) -> dict[str, Effect]:
    if place is None:
        return {}
    found = {name: place.inside(name) for name in place.value}
    return {
        name: Effect(
            mean=effect.number("mean"),
            low=effect.number("low"),
            high=effect.number("high"),
            n=effect.whole("n", 0),
            p=effect.number("p"),
            method=effect.text("method"),
            censored=effect.whole("censored", 0),
            at_most=effect.whole("at_most", 0),
        )
        for name, effect in found.items()
        if effect is not None
    }


def _run(place: _Place) -> StudyRun:
    return StudyRun(
        seed=place.whole("seed", 0),
        run=place.text("run"),
        status=place.text("status", "missing"),
        val_bpb=place.number("val_bpb"),
        val_loss=place.number("val_loss"),
        steps=place.whole("steps"),
        tokens=place.whole("tokens"),
        train_seconds=place.number("train_seconds"),
        seconds=place.number("seconds"),
        memory_bytes=place.whole("memory_bytes"),
        lr=place.number("lr"),
    )


def _rung(place: _Place) -> Rung:
    return Rung(
        seed=place.whole("seed", 0),
        share=place.number("share") or 0.0,
        run=place.text("run"),
        val_loss=place.number("val_loss"),
        val_bpb=place.number("val_bpb"),
        reached=place.flag("reached"),
    )


def _tuning(place: _Place | None) -> Tuning | None:
    if place is None:
        return None
    arms = place.inside("arms")
    searched = {} if arms is None else {name: arms.inside(name) for name in arms.value}
    return Tuning(
        tries=place.whole("tries"),
        seed=place.whole("seed"),
        cost_seconds=place.number("cost_seconds"),
        arms={name: _search(search) for name, search in searched.items() if search is not None},
    )


def _search(place: _Place) -> Search:
    tried = place.inside("tried")
    return Search(
        tried=[] if tried is None else [(rate, tried.number(rate)) for rate in tried.value],
        taken=place.number("taken"),
        at_edge=place.flag("at_edge"),
    )

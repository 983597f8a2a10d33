"""A study from its first run to its verdicts: stopped and continued anywhere, extended by arms and by seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.checks import machine_bytes
from hasten.comparison.conclusions import conclude, level_of
from hasten.comparison.effects import interval_of
from hasten.comparison.ledger import TUNING_SEED, Ledger, total_seconds
from hasten.comparison.lineup import Variant, lineup
from hasten.comparison.runs import Planned, do, write_json
from hasten.comparison.study import Arm, Study, as_arms, extended, read_study, write_study
from hasten.errors import RecipeError, RunError, printable
from hasten.files import parse_json, read_bytes
from hasten.loop import prepare_for
from hasten.loop.company import pick_device
from hasten.model import count_parameters
from hasten.pool import LOCAL, Engine, open_engine
from hasten.recipe import resolve
from hasten.record import RunFolder

PROCESS_BYTES, RUN_BYTES = 600_000_000, 24

Tell = Callable[..., None]


@dataclass(frozen=True)
class Comparison:
    """What a study found: its folder, and what ``verdicts.json`` holds."""

    folder: Path
    verdicts: Mapping[str, Any]

    def verdict(self, arm: str) -> str:
        """Return the verdict on the arm of that name.

        Raises:
            RecipeError: there is none of that name.
        """
        for entry in self.verdicts["arms"]:
            if entry["name"] == arm:
                return entry["verdict"]
        raise RecipeError(
            f"The study has no arm {arm!r}; it has {', '.join(a['name'] for a in self.verdicts['arms'])}."
        )


def compare(
    study: Study | str | Path | None = None,
    *,
    arms: Mapping[str, Any] | Sequence[Arm] = (),
    out: str | Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    threads: int | None = None,
    allow: Sequence[str] = (),
    tell: Tell = lambda kind, **values: None,
    **settings: Any,
) -> Comparison:
    """Measure which changes of a recipe pay, and return the verdicts.

    Every arm has the budget of the base and runs with the same seeds, which decide the initial weights and the order
    of the text, so that noise cancels in the differences. The study is a folder: called again it goes on where it
    stopped, with more seeds or arms it does those; finished runs are never done twice.

    Args:
        study: a `Study`, a study file, or what `hasten.resolve` takes as the base (a recipe file or its name).
        arms: names and settings, ``{"muon": "optimizer=muon", "fast": {"lr": 0.02}}``; added to those of `study`.
        out: the folder; ``studies/<base>`` when it is not given.
        engine: where the runs are done: ``local``, or ``ray`` (a Ray cluster: see docs/scaling.md). A study may change
            it at any time.
        workers: runs side by side; as many as there are cores when it is not given (one on a GPU).
        threads: CPU threads of each.
        allow: what may have changed since a run of the study began, as `hasten.train` takes it (``code``).
        tell: called with a kind (``plan``, ``run``, ``look``, ``note``) and what there is to know.
        **settings: those of `Study` (``seeds``, ``mode``, ``ladder``, ``lr_tries``, ``half_width`` ...), and recipe
            keys of the base.

    Raises:
        HastenError: a setting, an arm or the folder is wrong, or a run failed; says what and how to put it right.

    Example:
        ``hasten.compare(data="my.txt", budget="60s", arms={"muon": "optimizer=muon"}, seeds=3).verdict("muon")``
    """
    given = asked(study, as_arms(arms), settings)
    folder = Path(out) if out is not None else Path("studies") / given.base.default_run_name()
    return run_study(given, folder, engine=engine, workers=workers, threads=threads, allow=allow, tell=tell)


def asked(source: Study | str | Path | None, arms: tuple[Arm, ...], settings: Mapping[str, Any]) -> Study:
    """Return the study that the arguments of `compare` describe."""
    own = {item.name for item in dataclasses.fields(Study)} - {"base", "arms"}
    of_study = {key: value for key, value in settings.items() if key in own and value is not None}
    of_base = {key: value for key, value in settings.items() if key not in own}
    if isinstance(source, Study) or is_study_file(source):
        study = source if isinstance(source, Study) else read_study(Path(source))
        base = resolve(study.base, of_base).recipe if of_base else study.base
        return dataclasses.replace(study, base=base, arms=(*study.arms, *arms), **of_study)
    return Study(resolve(source, of_base).recipe, arms, **of_study)


def is_study_file(source: object) -> bool:
    """Say whether `source` is a TOML file with arms in it."""
    path = Path(str(source)) if source is not None else Path()
    if path.suffix != ".toml" or not path.is_file():
        return False
    text = read_bytes(path).decode(errors="replace")
    return any(line.strip().startswith("[arms") for line in text.splitlines())


def run_study(
    study: Study,
    folder: Path,
    *,
    engine: str = "local",
    workers: int | None = None,
    threads: int | None = None,
    allow: Sequence[str] = (),
    tell: Tell,
) -> Comparison:
    """Run `study` in `folder`, or go on with what is there; return its verdicts."""
    with open_engine(engine) as opened:
        return _run_on(opened, study, folder, workers, threads, tuple(allow), tell)


def _run_on(
    engine: Engine,
    study: Study,
    folder: Path,
    workers: int | None,
    threads: int | None,
    allow: tuple[str, ...],
    tell: Tell,
) -> Comparison:
    room = engine.places(study.base.device, workers, threads or study.base.threads)
    known = folder / "study.toml"
    if known.is_file():
        study = extended(read_study(known), study, folder)
    who = lineup(study)
    sizes = []
    for variant in _with_data_of_their_own(who.variants):
        data = prepare_for(variant.recipe)  # once, and not by every run at the same time; no folder for wrong text
        sizes.append(count_parameters(variant.recipe.model.build(data.vocab_size, variant.recipe.lengths.seq_len)))
    if workers is None:
        memory = _memory(study) if room.memory_bytes is None else room.memory_bytes
        room = dataclasses.replace(room, workers=side_by_side(room.workers, max(sizes), memory))
    with RunFolder(folder).lock():
        if not known.is_file() and any(path.name != ".lock" for path in folder.iterdir()):
            raise RunError(f"{printable(str(folder))} holds something else than a study: give another --out.")
        write_study(study, known)
        return _Conduct(Ledger(study, folder, who, room), tell, allow, engine).conduct()


def _with_data_of_their_own(variants: Sequence[Variant]) -> list[Variant]:
    """Return a variant for each text and model that is to be prepared."""
    return list({repr((v.recipe.data, v.recipe.model, v.recipe.lengths.seq_len)): v for v in variants}.values())


def _memory(study: Study) -> int:
    return machine_bytes(pick_device(study.base.device))


def side_by_side(workers: int, params: int, memory_bytes: int) -> int:
    """Return how many runs of `params` parameters fit into memory side by side: at most `workers`, at least 1.

    Reckoned with 24 bytes a parameter (weights, gradients, two moments, what the update needs) and 0.6 GB a process;
    `memory_bytes` 0 is not known.

    Example:
        >>> side_by_side(64, params=10**8, memory_bytes=24 * 10**9), side_by_side(2, params=10**6, memory_bytes=0)
        (8, 2)
    """
    return max(1, min(workers, memory_bytes // (PROCESS_BYTES + RUN_BYTES * params))) if memory_bytes else workers


def next_look(seeds: int, most: int) -> int:
    """Return the seeds of the look after one at `seeds`: half as many again, since every look costs certainty."""
    return min(max(seeds + 1, -(-3 * seeds // 2)), most)


@dataclass
class _Conduct:
    """A study under way."""

    ledger: Ledger
    tell: Tell
    allow: tuple[str, ...] = ()
    engine: Engine = LOCAL
    looks: list[int] = field(default_factory=list)
    judged_by: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0
    tuning: dict[str, Any] | None = None

    def conduct(self) -> Comparison:
        """Run what is missing, look, add seeds where that was asked for; return the verdicts."""
        study = self.ledger.study
        before = _noted(self.ledger.folder)
        self.looks, self.seconds = before.get("looked_at", []), before.get("pool_seconds", 0.0)
        self.judged_by = before.get("judged_by") or [["t"] for _ in self.looks]
        self._say_plan()
        self._tune(before.get("tuning"))
        seeds = study.seeds if study.half_width is None else max([study.seeds, *self.looks])
        while True:
            self._do(self.ledger.interleaved(seeds), seeds)
            while due := self.ledger.rungs_due(seeds):
                self._do(due, seeds)
            self._look(seeds)
            verdicts = self._write(seeds)
            self.tell("look", seeds=seeds, verdicts=verdicts)
            further = next_look(seeds, study.max_seeds)
            if self._is_enough(verdicts) or further <= seeds:
                return Comparison(self.ledger.folder, verdicts)
            seeds = further

    def _look(self, seeds: int) -> None:
        """Note that verdicts are given at `seeds`, and by which interval; both at the same look cost error."""
        if self._is_new(seeds):
            self.looks.append(seeds)
            self.judged_by.append([])
        method, _ = self._interval(seeds)
        if method not in self.judged_by[-1]:
            self.judged_by[-1].append(method)

    def _is_new(self, seeds: int) -> bool:
        return not self.looks or self.looks[-1] != seeds

    def _interval(self, seeds: int) -> tuple[str, str]:
        """Return the method of the intervals at a look after `seeds`, and why it is not the one asked for."""
        study = self.ledger.study
        looks = [*self.looks, seeds] if self._is_new(seeds) else self.looks
        return interval_of(study.interval, seeds, level=level_of(study, looks))

    def _do(self, planned: Sequence[Planned], seeds: int) -> None:
        """Run what is missing; whatever happens, what is there is written down."""
        if all(self.ledger.result(run) is not None for run in planned):
            return

        def note(kind: str, **values: Any) -> None:
            self._write(seeds)
            self.tell(kind, **values)

        try:
            self._write(seeds)
            self.seconds += do(planned, self.ledger.room, note, self.allow, self.engine)
        finally:
            self._write(seeds)

    def _write(self, seeds: int) -> dict[str, Any]:
        content = conclude(
            self.ledger, seeds, self.looks, judged_by=self.judged_by, tuning=self.tuning, pool_seconds=self.seconds
        )
        write_json(self.ledger.folder / "verdicts.json", content)
        return content

    def _factors(self) -> list[float]:
        """Return what learning rates are multiplied by in the search; nothing where there is none."""
        tries = self.ledger.study.lr_tries
        return [2.0 ** (place - (tries - 1) // 2) for place in range(tries)]

    def _waiting(self, runs: Sequence[Planned]) -> int:
        return len({run.name for run in runs if self.ledger.result(run) is None})

    def _tune(self, noted: Mapping[str, Any] | None) -> None:
        """Give every variant the best of the same number of learning rates, found on a seed of its own."""
        factors, names = self._factors(), [variant.name for variant in self.ledger.who.variants]
        if not factors:
            return
        self._do([self.ledger.attempt(name, factor) for factor in factors for name in names], 0)
        seed = self.ledger.study.base.seed + TUNING_SEED
        self.tuning = {"tries": len(factors), "seed": seed, "cost_seconds": 0.0, "arms": {}}
        for name in names:
            results = {
                run.recipe.optimizer.lr: self.ledger.result(run)
                for run in (self.ledger.attempt(name, factor) for factor in factors)
            }
            losses = {lr: result["val_bpb"] for lr, result in results.items() if result and result["val_bpb"]}
            if not losses:
                raise RunError(f"Every learning rate tried for {name} diverged: give it a smaller lr.")
            taken = min(losses, key=losses.__getitem__)
            self.ledger.rates[name] = taken
            self.tuning["cost_seconds"] += total_seconds(list(results.values()))
            self.tuning["arms"][name] = {
                "tried": {f"{lr:.6g}": losses.get(lr) for lr in sorted(results)},
                "taken": taken,
                "at_edge": taken in (min(results), max(results)),
            }
        if noted is None or noted.get("arms") != self.tuning["arms"]:
            self.tell("tuned", tuning=self.tuning)

    def _is_enough(self, verdicts: Mapping[str, Any]) -> bool:
        """Say whether no more seeds are to be added."""
        if self.ledger.study.half_width is None:
            return True
        if self.ledger.study.spend is not None and verdicts["study"]["cost_seconds"] >= self.ledger.study.spend:
            self.tell("note", message="No more seeds: the runs have taken the time that --spend allows.")
            return True
        for arm in verdicts["arms"]:
            effect = arm["effects"]["bits_per_byte"]
            if arm["verdict"] in ("identical", "diverged") or effect is None:
                continue
            if effect["low"] is None or (effect["high"] - effect["low"]) / 2 > self.ledger.study.half_width:
                return False
        return True

    def _say_plan(self) -> None:
        seeds = self.ledger.study.seeds
        most = 0
        if self.ledger.study.ladder:
            most = seeds * len(self.ledger.who.pairs) * len(self.ledger.study.ladder).bit_length()
        names, tries = [variant.name for variant in self.ledger.who.variants], self._factors()
        self.tell(
            "plan",
            runs=self._waiting(self.ledger.interleaved(seeds)) if not tries else seeds * len(names),
            most_rungs=most,
            tries=self._waiting([self.ledger.attempt(name, factor) for factor in tries for name in names]),
            budget=self.ledger.study.base.budget,
            places=self.ledger.room,
            arms=[variant.name for variant in self.ledger.who.variants],
            seeds=seeds,
            folder=self.ledger.folder,
            ladder=self.ledger.study.ladder,
        )
        _, why = self._interval(seeds)
        if why:
            self.tell("note", message=f"interval=bootstrap: {why}; the t interval is given.")


def _noted(folder: Path) -> dict[str, Any]:
    """Return what an earlier attempt at the study wrote down of it; empty where it did not."""
    try:
        return parse_json(read_bytes(folder / "verdicts.json"))["study"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}

"""A pool of seeds from beginning to end: trained, judged, halved, until one of them has finished its horizon."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import RecipeError, RunError, printable
from hasten.loop import Hook, prepare_for
from hasten.loop.telling import Teller
from hasten.pool import Engine, Job, Places, last_words, open_engine, train_command
from hasten.recipe import Recipe, resolve
from hasten.restarts.book import Book, read_json, read_plan, write_json, write_plan, write_seed
from hasten.restarts.judging import Course, fault, ranking, read_course
from hasten.restarts.lead import Lead, measure_lead, row_losses
from hasten.restarts.outcome import Rung, outcome
from hasten.restarts.plan import Plan, Pool, Stage, read_pool
from hasten.restarts.sizing import size_up

RUNGS, SEEDS, KEEP, LEAST_GAIN = ("5%", "10%", "25%"), 8, 0.5, 0.01
_SEED = "seed "  # how the job of a seed is called


@dataclass(frozen=True)
class RestartResult:
    """What came of a pool of seeds.

    Args:
        status: ``finished``, ``failed`` (no seed was left: `reason` says why) or ``planned`` (a dry run).
        reason: why it failed, in words.
        folder: of the pool.
        survivor: the seed that finished its horizon; None where none did.
        run: its run folder.
        values: what ``result.json`` holds; of a dry run the plan.
        already_finished: this call found nothing left to do.
    """

    status: str
    reason: str
    folder: Path
    survivor: int | None
    run: Path | None
    values: dict[str, Any]
    already_finished: bool = False


def restart(
    source: Recipe | str | Path | None = None,
    *,
    seeds: int = SEEDS,
    rungs: str | Sequence[str | int] = RUNGS,
    keep: str | float | Sequence[int] = KEEP,
    tries: int | None = None,
    least_gain: float = LEAST_GAIN,
    fixed_horizon: bool = False,
    out: str | Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    threads: int | None = None,
    allow: Sequence[str] = (),
    dry_run: bool = False,
    hooks: Iterable[Hook] = (),
    **settings: Any,
) -> RestartResult:
    """Train a pool of seeds, let the best go on from rung to rung, and return the one that finished.

    Every seed (initial weights and order of the data) is an ordinary run whose schedules span the survivor's horizon.
    At each rung it pauses, evaluated on the same held-out tokens as the others; the best go on bit for bit. The whole
    pool costs at most the budget, so the survivor's horizon is shorter than the budget. Called again it goes on from
    whatever is there.

    Args:
        source: a `Recipe`, the path of a TOML file, the name of a built-in recipe, or None for the defaults; its seed
            is the first of the pool.
        seeds: how many are started.
        rungs: where they are judged: shares of the horizon, or steps.
        keep: how many go on from each rung (``"4,2,1"``), or one share below 1 of those that were judged.
        tries: seeds that may be started in all, at least `seeds`: one that diverges, or whose held-out loss falls by
            less than `least_gain` from one rung to the next, is given up and a new one starts. None: none is replaced,
            and slow ones are only ranked. What was given up comes on top of the budget.
        least_gain: that share of the loss.
        fixed_horizon: the survivor has the whole budget as its horizon, and the pool comes on top.
        out: the folder of the pool; ``restarts/<name of the recipe>`` when it is not given.
        engine: where the runs are done: ``local``, or ``ray`` (a Ray cluster: see docs/scaling.md). A pool may change
            it between two calls.
        workers: runs side by side; None: one for each core, or one on a GPU.
        threads: CPU threads of each; None: the recipe's, or one.
        allow: what may have changed since a run of the pool began, as `hasten.train` takes it (``code``).
        dry_run: prepare the data, check the recipe and plan; train nothing.
        hooks: callables that look at every `Event`.
        **settings: any recipe key.

    Raises:
        HastenError: a setting, the data or the folder is wrong, or a run broke off; says what to do.

    Source:
        Jamieson and Talwalkar, "Non-stochastic best arm identification" (2016), with the seeds as arms. There every
        round has the same cost; here the rungs are given.

    Example:
        ``hasten.restart(data="my.txt", budget=2000, seeds=8).survivor``
    """
    resolved = resolve(source, settings)
    recipe = _accepted(resolved.recipe)
    pool = read_pool(
        seeds=seeds,
        first_seed=recipe.seed,
        rungs=rungs,
        keep=keep,
        tries=tries,
        least_gain=least_gain,
        fixed_horizon=fixed_horizon,
    )
    hooks = tuple(hooks)
    for note in resolved.notes:
        Teller(hooks)("note", message=note)
    with open_engine(engine) as opened:
        place = opened.places(recipe.device, workers, threads or recipe.threads)
        recipe = resolve(recipe, {"threads": place.threads}).recipe
        book = Book(Path(out or recipe.out or Path("restarts") / recipe.default_run_name()))
        return _restarted(recipe, pool, book, opened, place, tuple(allow), hooks, dry_run=dry_run)


def _restarted(
    recipe: Recipe,
    pool: Pool,
    book: Book,
    engine: Engine,
    place: Places,
    allow: tuple[str, ...],
    hooks: tuple[Hook, ...],
    *,
    dry_run: bool,
) -> RestartResult:
    tell = Teller(hooks)
    plan = read_plan(book, recipe, pool)
    if dry_run:
        plan = plan or size_up(recipe, pool, book, hooks)
        tell("pool", plan=plan, pool=pool, workers=place.workers)
        return RestartResult("planned", "", book.path, None, None, json.loads(json.dumps(plan.to_json())))
    with book.lock():
        plan = read_plan(book, recipe, pool)  # another process may have begun meanwhile
        if plan is not None and (values := read_json(book.result_path)) is not None:
            return _result(book, values, already_finished=True)
        if plan is None:
            plan = size_up(recipe, pool, book, hooks)
            write_plan(book, recipe, pool, plan)
        tell("pool", plan=plan, pool=pool, workers=place.workers)
        values = _Halving(recipe, pool, plan, book, engine, place, allow, tell).values()
        write_json(book.result_path, values)
    return _result(book, read_json(book.result_path) or values)


def _accepted(recipe: Recipe) -> Recipe:
    """Return the recipe if a pool can be made of it."""
    sources = (recipe.data.train,) if type(recipe.data.train) is str else recipe.data.train
    if "-" in sources:
        raise RecipeError("data=- is standard input, which only one run can read: save the text in a file first.")
    if recipe.branch_from is not None:
        raise RecipeError("branch_from continues one run with its seed, so there is no pool of seeds: leave it out.")
    if recipe.target_loss is not None:
        raise RecipeError(
            f"target_loss={recipe.target_loss:g} may end a run before it is judged at the rungs: leave target_loss out."
        )
    return recipe


def _result(book: Book, values: dict[str, Any], *, already_finished: bool = False) -> RestartResult:
    survivor = values["survivor"]
    run = None if survivor is None else book.run(survivor).path
    return RestartResult(values["status"], values["reason"], book.path, survivor, run, values, already_finished)


class _Halving:
    """A pool under way. Nothing it decides is remembered: it is read off the run folders, so a kill costs nothing."""

    def __init__(
        self,
        recipe: Recipe,
        pool: Pool,
        plan: Plan,
        book: Book,
        engine: Engine,
        place: Places,
        allow: tuple[str, ...],
        tell: Teller,
    ) -> None:
        self._recipe, self._pool, self._plan, self._book = recipe, pool, plan, book
        self._engine, self._place, self._allow, self._tell = engine, place, allow, tell
        self._steps: list[int | None] = [*(stage.end for stage in plan.rungs), None]  # None: the end
        self._fresh = itertools.count(pool.first_seed)
        self._passed: dict[int, int] = {}  # rungs, by seed, of every seed that was started
        self._given_up: dict[int, str] = {}

    def values(self) -> dict[str, Any]:
        """Train, judge and halve until one run has finished; return what ``result.json`` is to hold."""
        running = [self._start() for _ in range(self._pool.seeds)]
        rungs: list[Rung] = []
        for number, stage in enumerate(self._plan.stages):
            running = self._bring(running, number + 1)
            if not running or stage.rung is None:
                break
            losses = {seed: self._course(seed).losses[stage.end] for seed in running}
            running = ranking(losses)[: stage.keep]
            rungs.append(Rung(stage, losses, tuple(running), self._lead(stage, losses)))
            self._tell("rung", number=number, rungs=tuple(rungs))
        survivor = running[0] if running else None
        runs = {seed: self._book.run(seed) for seed in self._passed}
        return outcome(self._plan, self._pool, rungs, runs, self._given_up, survivor)

    def _start(self) -> int:
        seed = next(self._fresh)
        self._passed[seed] = 0
        return seed

    def _course(self, seed: int) -> Course:
        return read_course(self._book.run(seed))

    def _bring(self, running: list[int], goal: int) -> list[int]:
        """Train every run past `goal` rungs, one rung after the other; return those that arrive.

        A run that is given up leaves its place to a new seed, if there is one to be had. What is on disk already is
        passed in the same order, so that the same seeds take the same places when a pool goes on.
        """
        least_gain = None if self._pool.tries is None else self._pool.least_gain
        while waiting := [seed for seed in running if self._passed[seed] < goal]:
            points = {seed: self._steps[self._passed[seed]] for seed in waiting}
            jobs = {seed: step for seed, step in points.items() if not self._has_reached(seed, step)}
            if jobs:
                self._train(jobs)
            for seed, step in points.items():
                passed = self._passed[seed]
                before = self._steps[passed - 1] if passed else 0
                reason = fault(self._course(seed), step, before=before or 0, least_gain=least_gain)
                if not reason:
                    self._passed[seed] += 1
                    continue
                self._given_up[seed] = reason
                heirs = [self._start()] if len(self._passed) < (self._pool.tries or 0) else []
                place = running.index(seed)
                running = [*running[:place], *heirs, *running[place + 1 :]]
                self._tell("given_up", seed=seed, reason=reason, heir=heirs[0] if heirs else None)
        return running

    def _has_reached(self, seed: int, step: int | None) -> bool:
        course = self._course(seed)
        return course.diverged or (course.finished if step is None else step in course.losses)

    def _train(self, jobs: Mapping[int, int | None]) -> None:
        self._tell("wave", jobs=jobs, logs=self._book.path / "logs")
        waiting = (self._job(seed, step) for seed, step in jobs.items())
        outcomes = self._engine.run_all(
            waiting, workers=self._place.workers, tell=lambda text: self._tell("note", message=text)
        )
        with closing(outcomes):
            for ended in outcomes:
                seed = int(ended.job.name.removeprefix(_SEED))
                if not self._has_reached(seed, jobs[seed]):  # what counts is what it left, not its exit code
                    raise self._broken(seed, ended.code)
                self._tell("run", seed=seed, course=self._course(seed), step=jobs[seed], seconds=ended.seconds)

    def _job(self, seed: int, step: int | None) -> Job:
        path = write_seed(self._recipe, seed, self._plan.horizon, self._book)
        # The folder may have been moved since the recipe was written.
        command = (*train_command(path, until=step, allow=self._allow), f"out={path.parent}")
        return Job(
            f"{_SEED}{seed}", command, self._book.log(seed), self._place.threads, self._place.gpus, (path,), path.parent
        )

    def _broken(self, seed: int, code: int) -> RunError:
        log = self._book.log(seed)
        last = last_words(log) or "it printed nothing"
        return RunError(
            f"The run of seed {seed} broke off with exit code {code} ({last[:600]}); see "
            f"{printable(str(log))}, put it right and give the same command again."
        )

    def _lead(self, stage: Stage, losses: dict[int, float]) -> Lead | None:
        """Return the lead at a rung, from the file where it was measured before, or measured now and written there."""
        leads = read_json(self._book.leads_path) or {}
        key = str(stage.end)
        if key in leads:
            return None if leads[key] is None else Lead(**leads[key])
        rows: dict[int, list[float]] | None = None
        if len(losses) > 1:
            data = prepare_for(self._recipe)
            found = {
                seed: row_losses(self._book.run(seed), self._recipe, data, stage.end) for seed in ranking(losses)[:2]
            }
            rows = None if None in found.values() else found
        lead = measure_lead(losses, rows)
        write_json(self._book.leads_path, {**leads, key: None if lead is None else lead.to_json()})
        return lead

"""From a recipe to a finished run folder: what happens before, between and after the optimizer steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from hasten import checkpoint
from hasten.checkpoint import Writer
from hasten.checks import check_horizon
from hasten.duration import Duration
from hasten.errors import RecipeError, RunError, printable
from hasten.loop.between import between_steps, newest_saved, save_last, validate
from hasten.loop.branching import branch_recipe, read_parent, take_over
from hasten.loop.changes import begin, write_agreed
from hasten.loop.company import Company, all_or_none, company
from hasten.loop.crashes import LONGEST_WAIT, hold_back, read_attempts, told_of_last
from hasten.loop.finish import Result, finish, paused, stopped
from hasten.loop.identity import Allowed, read_allow
from hasten.loop.interrupt import stop_on_signals
from hasten.loop.pausing import pause_point, pause_step
from hasten.loop.proving import note_first_weights
from hasten.loop.readiness import checked_state, facts, report
from hasten.loop.recovery import goes_back_to_checkpoints
from hasten.loop.saved import newest
from hasten.loop.state import State
from hasten.loop.steps import advance
from hasten.loop.telling import Event, Hook, Teller
from hasten.loop.terms import (
    Settled,
    Terms,
    changed_recipe,
    read_terms,
    refuse_changed_end,
    settle_early,
    tell_changes,
)
from hasten.loop.timetable import Timetable
from hasten.model import count_parameters
from hasten.recipe import Recipe, resolve
from hasten.record import Record, RunFolder, cut_back, environment, read_result


def train(
    source: Recipe | str | Path | None = None,
    *,
    hooks: Iterable[Hook] = (),
    dry_run: bool = False,
    until: str | int | None = None,
    command: str | None = None,
    allow: Iterable[str] = (),
    longest_wait: float = LONGEST_WAIT,
    **settings: Any,
) -> Result:
    """Train a language model as a recipe says and return how the run ended.

    The run folder (``out``) then holds the model in Hugging Face format (``final/``), the metrics, the events, the
    checkpoints and ``result.json``. Called again with the same recipe it resumes from the newest good checkpoint, or
    says that the run is finished. With ``branch_from=RUN`` (and ``branch_step``) it is a branch of that run, which
    it only reads: see `hasten.loop.branching`.

    Args:
        source: a `Recipe`, the path of a TOML file, the name of a built-in recipe, or None for the defaults.
        hooks: callables that look at every `Event`; they may not change anything.
        dry_run: prepare the data and check the recipe against it, then stop before the first step.
        until: optimizer steps, or a share such as ``25%``, after which the run is evaluated, saved and left as
            ``paused``; no schedule notices, and the next call goes on bit for bit.
        command: the command line to write into the record.
        allow: what may have changed in a run that goes on: keys of the recipe (``lr``), tables (``schedule``),
            ``corpus``, ``tokenizer``, ``code``, ``torch``, ``device``; or ``crash-loop``.
        longest_wait: seconds that a run which keeps dying at one step waits at most before it is tried again.
        **settings: any recipe key; ``data="my.txt"``, ``budget="60s"``, ``optimizer={"lr": 1e-3}``.

    Raises:
        HastenError: a setting, the data or the folder is wrong; says what and how to put it right.

    Example:
        ``hasten.train(data="my.txt", model="nano", budget="60s").values["val_bpb"]``
    """
    recipe, notes = _resolved(source, settings)
    pause = None if until is None else pause_point(until, recipe)
    asked = _Asked(tuple(hooks), dry_run, pause, command, read_allow(allow), longest_wait)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with company(recipe) as together:
        if not together.ranks.is_main:  # one process speaks for all
            asked = dataclasses.replace(asked, hooks=())
        return _train(recipe, notes, asked, together)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What the caller of `train` asked for beside the recipe."""

    hooks: tuple[Hook, ...]
    dry_run: bool
    pause: Duration | None
    command: str | None
    allowed: Allowed
    longest_wait: float


def _train(recipe: Recipe, notes: Iterable[str], asked: _Asked, together: Company) -> Result:
    tell, ranks = Teller(asked.hooks), together.ranks
    for note in notes:
        tell("note", message=note)
    folder = RunFolder(Path(recipe.out or Path("runs") / recipe.default_run_name()))
    with ExitStack() as held:
        with all_or_none(ranks):
            if ranks.is_main:
                folder.check_place()
                # A folder is made only after everything was checked, so a wrong setting leaves nothing behind.
                if folder.path.is_dir():
                    held.enter_context(folder.lock())
        loaded, passed_over = newest(folder.checkpoints, ranks)
        for note in passed_over:
            tell("warning", message=note)
        with all_or_none(ranks):
            done, terms = _continue_from(recipe, folder, loaded, asked.pause, asked.allowed)
        if done is not None and not asked.dry_run:
            return done
        parent = read_parent(recipe) if recipe.branch_from and loaded is None else None
        state = checked_state(recipe, folder, together, tell)
        if parent is not None:
            for message in take_over(state, parent):
                tell("warning", message=message)
        if loaded is None:
            torch.manual_seed(state.seed)  # what is saved of a run depends on nothing that the process did before
        settled = begin(state, loaded, terms) if done is None else Settled()
        if asked.dry_run:
            return Result("dry", "", folder.path, {})
        with all_or_none(ranks):
            if ranks.is_main and not folder.path.is_dir():
                held.enter_context(folder.lock())
        if not ranks.is_main:
            ranks.share(None)  # the first process makes the folder ready, and writes into it for all
            return _run(state, folder, None, (), None, asked.pause, {})
        attempts = read_attempts(folder)
        loops = hold_back(state, folder, attempts, asked.allowed, tell, longest_wait=asked.longest_wait)
        tell_changes(settled, loops, asked.allowed, tell)
        before = {**told_of_last(attempts), **settled.to_json(loops)}
        with _open_record(state, folder, settled, len(attempts) + 1, tell) as record:
            ranks.share(None)
            return _run(state, folder, record, asked.hooks, asked.command, asked.pause, before)


def _resolved(source: Recipe | str | Path | None, settings: Mapping[str, Any]) -> tuple[Recipe, tuple[str, ...]]:
    if isinstance(source, Recipe) and not settings:
        return source, ()
    if isinstance(source, Recipe):
        raise RecipeError("Give a Recipe, or a recipe's name with settings; not a Recipe and settings.")
    if source is None and settings.get("branch_from"):
        others = {key: value for key, value in settings.items() if key not in ("branch_from", "branch_step")}
        resolved = branch_recipe(settings["branch_from"], step=settings.get("branch_step"), overrides=others)
        return resolved.recipe, resolved.notes
    resolved = resolve(source, settings)
    return resolved.recipe, resolved.notes


def _continue_from(
    recipe: Recipe, folder: RunFolder, loaded: checkpoint.Loaded | None, pause: Duration | None, allowed: Allowed
) -> tuple[Result | None, Terms]:
    """Return the result if nothing is left to do after the newest checkpoint, and what may have changed."""
    result, terms = _read_end(folder), read_terms(folder, loaded, allowed)
    if result is None:
        settle_early(terms, recipe)
        return None, terms
    # A finished run whose checkpoints were cleaned away is finished all the same; one whose last checkpoint was
    # damaged goes on from the older one.
    is_done = result["status"] == "finished" and (loaded is None or loaded.state["status"] == "finished")
    if result["status"] == "paused" and pause is not None and loaded is not None:
        is_done = min(result["steps"], loaded.state["step"]) >= pause_step(pause, result["total_steps"])
    is_done = is_done or result["status"] == "diverged"
    if is_done and result["status"] == "finished":
        refuse_changed_end(terms, recipe)
    if not is_done or changed_recipe(terms, recipe):
        settle_early(terms, recipe)
        return None, terms
    return Result(result["status"], result["reason"], folder.path, result, already_finished=True), terms


def _read_end(folder: RunFolder) -> dict[str, Any] | None:
    """Return the result that a run left, None where there is none, of which anyone may have written the file."""
    result = read_result(folder)
    is_odd = result is not None and (
        not isinstance(result.get("status"), str)
        or any(type(result.get(key, 0)) is not int for key in ("steps", "total_steps"))
    )
    if is_odd:
        raise RunError(f"{printable(str(folder.result_path))} is damaged; delete it and give the same command again.")
    return result


@contextmanager
def _open_record(state: State, folder: RunFolder, settled: Settled, attempt: int, tell: Teller) -> Iterator[Record]:
    """Yield the record of this attempt; what an earlier attempt logged after its last checkpoint is cut off first."""
    write_agreed(state, folder, settled)
    cut_back(folder, state.step)
    record = Record(folder, attempt, on_trouble=lambda message: tell("warning", message=message))
    try:
        yield record
    finally:
        record.close()


def _run(
    state: State,
    folder: RunFolder,
    record: Record | None,
    hooks: tuple[Hook, ...],
    command: str | None,
    pause: Duration | None,
    before: Mapping[str, Any],
) -> Result:
    def write(event: Event) -> None:
        if event.kind == "step":
            record.metric(step=event.step, **event.values)
        elif event.kind == "saving":
            record.sync()
        else:
            if event.kind == "rollback":
                record.cut_back(event.step)
            record.event(event.kind, step=event.step, **event.values)

    hooks = hooks if record is None else (write, *hooks)
    tell = Teller(hooks, state)
    note_first_weights(state)
    _tell_start(state, tell, command, before)
    together = state.company
    with Writer(folder.checkpoints, state.recipe.checkpoint.keep, together.saving) as writer:
        with stop_on_signals(together.request):
            if goes_back_to_checkpoints(state):
                state.kept = lambda: newest_saved(writer, together.ranks, tell)
            if state.step == 0 and "branch" in state.notes:
                tell("branch", **state.notes["branch"])
                save_last(state, writer, tell)  # from here on the branch needs the other run no more
            elif goes_back_to_checkpoints(state) and (state.step == 0 or "allowed" in before):
                save_last(state, writer, tell)
            if state.status == "running":
                timetable = Timetable(state, tell)
                fitting = timetable.begin(state)
                if fitting is not None:
                    report(check_horizon(state.recipe, facts(state, folder, fitting)), tell)
                state.forward = together.parallel.wrap(state.forward, state.precision.master)

                def end() -> int:  # a wall-clock budget moves it
                    return state.total_steps if pause is None else pause_step(pause, state.total_steps)

                while state.status == "running" and state.step < end() and not together.stop:
                    advance(
                        state,
                        end(),
                        hooks=hooks,
                        pause=lambda state: bool(together.stop) or timetable.is_due(state),
                    )
                    if state.status == "running":
                        between_steps(state, writer, timetable, tell)
                if together.stop and state.status == "running" and state.step < state.total_steps:
                    return stopped(state, folder, writer, tell, together.stop)
                if pause is not None and state.status == "running" and state.step < state.total_steps:
                    return paused(state, folder, writer, tell, f"until={pause}")
        return finish(state, folder, writer, tell)


def _attention(state: State) -> dict[str, Any]:
    """Return which back end attends at every row length, and why."""
    windowed = state.recipe.lengths.name == "window"
    if not windowed and not state.recipe.data.document_mask:
        return {}
    lengths = state.recipe.lengths.row_lengths
    return {str(n): dataclasses.asdict(state.model.attention_choice(n, windowed=windowed)) for n in lengths}


def _tell_start(state: State, tell: Teller, command: str | None, before: Mapping[str, Any]) -> None:
    """Say what is about to run and what was `before`, and how good the untrained model is (once in a run)."""
    if state.step:
        tell("resume", seconds=state.clock.seconds, environment=environment(), command=command, **before)
    else:
        manifest = state.data.manifest
        tell(
            "start",
            recipe=state.recipe.to_dict(),
            environment=environment(),
            command=command,
            model=dataclasses.asdict(state.config),
            params=count_parameters(state.config),
            data={
                "corpus": manifest["corpus"],
                "corpus_sha256": state.data.corpus_sha256,
                "tokenizer_sha256": state.data.tokenizer_sha256,
                "vocab_size": state.data.vocab_size,
                "counts": manifest["counts"],
                "packing": state.notes["packing"],
                **{
                    f"{split}_{name}": getattr(size, name)
                    for split, size in (("train", state.data.train_size), ("val", state.data.val))
                    for name in ("num_tokens", "num_documents", "source_bytes")
                },
            },
            micro_rows=state.batches.micro_rows,
            attention=_attention(state),
            device=str(state.device),
            **before,
        )
    if "untrained" not in state.notes:
        evaluation = validate(state, max_tokens=state.recipe.evaluate.tokens)
        state.notes["untrained"] = {"loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte}
        tell("untrained", val_loss=evaluation.loss, val_bpb=evaluation.bits_per_byte, tokens=evaluation.tokens)

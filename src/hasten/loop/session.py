"""From a recipe to a finished run folder: what happens before, between and after the optimizer steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from hasten import checkpoint
from hasten.checks import (
    TRAINED_BYTES,
    Facts,
    Finding,
    check,
    check_horizon,
    check_machine,
    check_size,
    free_bytes,
    machine_bytes,
    this_machine,
)
from hasten.data.preparation import prepare
from hasten.data.reading import packing_reports
from hasten.data.shards import PreparedData
from hasten.duration import Duration
from hasten.errors import RecipeError, printable
from hasten.loop.between import between_steps, save, validate
from hasten.loop.branching import branch_recipe, read_parent, take_over
from hasten.loop.finish import Result, finish, paused, stopped
from hasten.loop.interrupt import stop_on_signals
from hasten.loop.pausing import pause_point, pause_step
from hasten.loop.proving import note_first_weights
from hasten.loop.snapshots import restore
from hasten.loop.state import State, packing_settings, pick_device, start
from hasten.loop.steps import Event, Hook, Teller, advance
from hasten.loop.timetable import Timetable
from hasten.model import Decoder, count_parameters, read_model
from hasten.recipe import Recipe, resolve
from hasten.record import Record, RunFolder, cut_back, environment, read_events, read_result


def train(
    source: Recipe | str | Path | None = None,
    *,
    hooks: Iterable[Hook] = (),
    dry_run: bool = False,
    until: str | int | None = None,
    command: str | None = None,
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
        **settings: any recipe key; ``data="my.txt"``, ``budget="60s"``, ``optimizer={"lr": 1e-3}``.

    Raises:
        HastenError: a setting, the data or the folder is wrong; says what and how to put it right.

    Example:
        ``hasten.train(data="my.txt", model="nano", budget="60s").values["val_bpb"]``
    """
    recipe, notes = _resolved(source, settings)
    pause = None if until is None else pause_point(until, recipe)
    hooks = tuple(hooks)
    tell = Teller(hooks)
    for note in notes:
        tell("note", message=note)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    folder = RunFolder(Path(recipe.out or Path("runs") / recipe.default_run_name()))
    with ExitStack() as held:
        # A folder is made only after everything was checked, so a wrong setting leaves nothing behind.
        if folder.path.is_dir():
            held.enter_context(folder.lock())
        loaded, done = _continue_from(recipe, folder, pause, tell)
        if done is not None and not dry_run:
            return done
        parent = read_parent(recipe) if recipe.branch_from and loaded is None else None
        state = _checked_state(recipe, folder, tell)
        if parent is not None:
            for message in take_over(state, parent):
                tell("warning", message=message)
        if dry_run:
            return Result("dry", "", folder.path, {})
        if not folder.path.is_dir():
            held.enter_context(folder.lock())
        if loaded is not None:
            restore(state, loaded.tensors, loaded.state)
        with _open_record(state, folder) as record:
            return _run(state, folder, record, hooks, command, pause)


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
    recipe: Recipe, folder: RunFolder, pause: Duration | None, tell: Teller
) -> tuple[checkpoint.Loaded | None, Result | None]:
    """Return the checkpoint to go on from, if any, and the result if nothing is left to do."""
    _refuse_other_recipe(recipe, folder)
    loaded, notes = checkpoint.newest(folder.checkpoints)
    for note in notes:
        tell("warning", message=note)
    result = read_result(folder)
    if result is None:
        return loaded, None
    # A finished run whose checkpoints were cleaned away is finished all the same; one whose last checkpoint was
    # damaged goes on from the older one.
    is_done = result["status"] == "finished" and (loaded is None or loaded.state["status"] == "finished")
    if result["status"] == "paused" and pause is not None and loaded is not None:
        is_done = min(result["steps"], loaded.state["step"]) >= pause_step(pause, result["total_steps"])
    if is_done or result["status"] == "diverged":
        return loaded, Result(result["status"], result["reason"], folder.path, result, already_finished=True)
    return loaded, None


def _checked_state(recipe: Recipe, folder: RunFolder, tell: Teller) -> State:
    """Prepare the data, build the state before the first step, and refuse or warn about what can be known now."""
    _report(check_machine(recipe, this_machine(recipe)), tell)
    data = prepare_for(recipe, on_progress=lambda progress: tell("prepare", progress=progress))
    if not recipe.init_from:  # a model that does not fit must not be tried: the system would kill the process
        params = count_parameters(recipe.model.build(data.vocab_size, recipe.lengths.seq_len))
        _report(check_size(params, machine_bytes(pick_device(recipe.device))), tell)
    state = start(recipe, data, model=_warm_start(recipe))
    reports = packing_reports(data, **packing_settings(recipe))
    state.notes["packing"] = [{**dataclasses.asdict(report), "utilisation": report.utilisation} for report in reports]
    tell("prepared", data=data, state=state, packing=state.notes["packing"])
    _report(check(recipe, _facts(state, folder)), tell)
    return state


def _report(findings: Iterable[Finding], tell: Teller) -> None:
    for finding in findings:
        if finding.level == "error":
            raise RecipeError(finding.message)
        tell("warning", message=finding.message)


def _facts(state: State, folder: RunFolder, planned_steps: int | None = None) -> Facts:
    total_steps = planned_steps or state.total_steps or None
    plan = state.optimizer.plan(tokens_per_step=state.tokens_per_step)
    packing = state.notes["packing"]
    return Facts(
        vocab_size=state.data.vocab_size,
        train_tokens=state.data.train_size.num_tokens,
        val_tokens=state.data.val.num_tokens,
        params=count_parameters(state.config),
        total_steps=total_steps,
        source_epochs=state.source_epochs(total_steps) if total_steps else {},
        free_bytes=free_bytes(folder.path),
        state_bytes=plan.state_bytes,
        optimizer_warnings=plan.warnings,
        room=sum(report["room"] for report in packing),
        targets=sum(report["targets"] for report in packing),
        lost_tokens=sum(sum(report["lost"].values()) for report in packing),
        width=state.config.width,
        micro_rows=state.batch_sizes.micro_rows,
        steps_per_epoch=state.steps_per_epoch,
        needed_bytes=TRAINED_BYTES * count_parameters(state.config) + plan.state_bytes,
        memory_bytes=machine_bytes(state.device),
        window_saves=state.model.attention_choice(state.config.seq_len, windowed=True).backend != "dense",
    )


def _write_once(state: State, folder: RunFolder) -> None:
    """Write the recipe and the tokenizer, each whole or not at all: a kill in between must not change the run."""
    if not folder.recipe_path.exists():
        half = folder.recipe_path.with_name("recipe.toml.tmp")
        half.write_text(state.recipe.to_toml(), encoding="utf-8")
        half.replace(folder.recipe_path)
    if not folder.tokenizer.exists():
        half = folder.tokenizer.with_name("tokenizer.tmp")
        half.mkdir(exist_ok=True)
        state.data.tokenizer.save(half, model_max_length=state.config.seq_len)
        half.replace(folder.tokenizer)


@contextmanager
def _open_record(state: State, folder: RunFolder) -> Iterator[Record]:
    """Yield the record of this attempt; what an earlier attempt logged after its last checkpoint is cut off first."""
    _write_once(state, folder)
    attempt = 1 + sum(event["kind"] in ("start", "resume") for event in read_events(folder))
    cut_back(folder, state.step)
    record = Record(folder, attempt)
    try:
        yield record
    finally:
        record.close()


def _run(
    state: State,
    folder: RunFolder,
    record: Record,
    hooks: tuple[Hook, ...],
    command: str | None,
    pause: Duration | None,
) -> Result:
    def write(event: Event) -> None:
        if event.kind == "step":
            record.metric(step=event.step, **event.values)
        else:
            record.event(event.kind, step=event.step, **event.values)

    hooks = (write, *hooks)
    tell = Teller(hooks, state)
    note_first_weights(state)
    _tell_start(state, tell, command)
    if state.step == 0 and "branch" in state.notes:
        tell("branch", **state.notes["branch"])
        save(state, folder, tell)  # from here on the branch needs the other run no more
    with stop_on_signals() as request:
        if state.status == "running":
            timetable = Timetable(state, tell)
            fitting = timetable.begin(state)
            if fitting is not None:
                _report(check_horizon(state.recipe, _facts(state, folder, fitting)), tell)

            def end() -> int:  # a wall-clock budget moves it
                return state.total_steps if pause is None else pause_step(pause, state.total_steps)

            while state.status == "running" and state.step < end() and not request.name:
                advance(
                    state,
                    end(),
                    hooks=hooks,
                    pause=lambda state: bool(request.name) or timetable.is_due(state),
                )
                if state.status == "running":
                    between_steps(state, folder, timetable, tell)
            if request.name and state.status == "running" and state.step < state.total_steps:
                return stopped(state, folder, tell, request.name)
            if pause is not None and state.status == "running" and state.step < state.total_steps:
                return paused(state, folder, tell, f"until={pause}")
    return finish(state, folder, tell)


def _attention(state: State) -> dict[str, Any]:
    """Return which back end attends at every row length, and why."""
    windowed = state.recipe.lengths.name == "window"
    if not windowed and not state.recipe.data.document_mask:
        return {}
    lengths = state.recipe.lengths.row_lengths
    return {str(n): dataclasses.asdict(state.model.attention_choice(n, windowed=windowed)) for n in lengths}


def _tell_start(state: State, tell: Teller, command: str | None) -> None:
    """Say what is about to run, and how good the untrained model is (once in a run)."""
    if state.step:
        tell("resume", seconds=state.clock.seconds, environment=environment(), command=command)
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
        )
    if "untrained" not in state.notes:
        evaluation = validate(state, max_tokens=state.recipe.evaluate.tokens)
        state.notes["untrained"] = {"loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte}
        tell("untrained", val_loss=evaluation.loss, val_bpb=evaluation.bits_per_byte, tokens=evaluation.tokens)


def prepare_for(recipe: Recipe, *, on_progress: Callable[[Any], None] | None = None) -> PreparedData:
    """Return the prepared data that `recipe` asks for, from the cache where it is there already.

    A run that starts from another one (``init_from``) reads text with that one's tokenizer.
    """
    tokenizer = recipe.data.tokenizer
    if recipe.init_from:
        if tokenizer != type(recipe.data)().tokenizer:
            raise RecipeError(
                f"init_from={printable(recipe.init_from)} brings its own tokenizer; leave data.tokenizer out."
            )
        tokenizer = str(_final_folder(recipe.init_from))
    return prepare(
        recipe.data.build(),
        tokenizer=tokenizer,
        vocab_size=recipe.data.vocab_size,
        on_progress=on_progress,
    )


def _warm_start(recipe: Recipe) -> Decoder | None:
    """Return the model that ``init_from`` names, for the recipe's row length; None where it names none."""
    if not recipe.init_from:
        return None
    saved = read_model(_final_folder(recipe.init_from))
    model = Decoder(dataclasses.replace(saved.config, seq_len=recipe.lengths.seq_len), seed=recipe.seed)
    model.load_state_dict(saved.state_dict())
    return model


def _final_folder(run: str) -> Path:
    """Return the model folder that `run` names: a run folder's ``final``, or a model folder itself."""
    for folder in (Path(run) / "final", Path(run)):
        if (folder / "config.json").is_file():
            return folder
    raise RecipeError(
        f"init_from={printable(run)} holds no trained model; give a finished run folder or a model folder."
    )


def _refuse_other_recipe(recipe: Recipe, folder: RunFolder) -> None:
    if not folder.recipe_path.exists():
        return
    changed = resolve(folder.recipe_path).recipe.difference(recipe, ignore=recipe.free_on_resume)
    if changed:
        raise RecipeError(
            f"{printable(str(folder.path))} holds a run of another recipe ({'; '.join(changed[:4])}); "
            "give another out=, or delete the folder."
        )

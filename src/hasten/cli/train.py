"""``hasten train``: from text to a trained model and a report."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.toml] [KEY=VALUE ...]",
            help="A recipe (a TOML file or the name of a built-in one) and settings that override it.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve, prepare and check; print; train nothing.")
    ] = False,
    branch: Annotated[
        Path | None,
        typer.Option("--branch", metavar="RUN", help="Begin at a checkpoint of this run and cool it down."),
    ] = None,
    at: Annotated[
        int | None, typer.Option("--at", metavar="STEP", help="Which checkpoint to branch from.", show_default="newest")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="STEP|SHARE", help="Pause there, evaluated and saved; e.g. 500 or 25%."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="NAME",
            help="Go on although this changed: a key of the recipe, corpus, tokenizer, code, torch, device; "
            "crash-loop: try again what keeps dying. Repeatable.",
        ),
    ] = None,
    attached: Annotated[
        bool, typer.Option("--attached", hidden=True, help="Save and stop when standard input closes.")
    ] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write report.html at the end.")] = False,
) -> int:
    """Train a model on text. The same command resumes a run that was stopped.

    \b
    hasten train                                       the built-in corpus, three minutes
    hasten train data=my.txt budget=15min              your own text
    hasten train data=books/ val=test.txt model=micro lr=2e-3 out=runs/books
    hasten train recipe.toml seed=1                    a recipe, with one thing changed
    hasten train --branch runs/a                       a usable model from a run at a constant rate
    hasten train recipe.toml lr=1e-3 --allow lr        go on with a run, at another rate from here on
    hasten train --branch runs/a --at 2000 budget=400 schedule=linear
    """
    from hasten.cli.arguments import split_arguments
    from hasten.cli.display import Display
    from hasten.distributed import current
    from hasten.errors import RecipeError
    from hasten.loop import train as run
    from hasten.recipe import resolve

    source, settings = split_arguments(arguments or [])
    resolved = resolve(source, settings) if branch is None else _branched(branch, at, source, settings)
    if branch is None and at is not None:
        raise RecipeError(f"--at {at} says which checkpoint to branch from: give --branch RUN too.")
    command = shlex.join(["hasten", *sys.argv[1:]])
    if attached:
        _stop_when_left()
    if not current().is_main:  # the first process of several speaks for all
        result = run(resolved.recipe, dry_run=dry_run, until=until, allow=allow or ())
        return _exit_code(result.status, result.reason)
    with Display() as display:
        for note in resolved.notes:
            display.note(note)
        result = run(resolved.recipe, hooks=[display], dry_run=dry_run, until=until, command=command, allow=allow or ())
    if result.status == "dry":
        display.dry(resolved.recipe)
    elif result.status == "paused":
        display.paused(result)
    elif result.status == "stopped":
        display.stopped(result)
    else:
        page = None
        if not no_report:
            from hasten.report import write_report

            page = write_report([result.folder])
        display.finished(result, page)
    return _exit_code(result.status, result.reason)


def _exit_code(status: str, reason: str) -> int:
    from hasten.cli import DIVERGED, DONE

    if status == "stopped":
        return 128 + signal.Signals[reason].value  # 130, 143, 129
    return DIVERGED if status == "diverged" else DONE


def _stop_when_left() -> None:
    """Stop as on SIGTERM, everything saved, once whoever started this process is gone, however it ended.

    Its end of our standard input closes with it, on every system and even after SIGKILL.
    """

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock a thread may not hold when Python ends
            pass
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _branched(run: Path, step: int | None, source: str | None, settings: list[str]) -> Any:
    """Return the recipe of a branch, which comes from the run that it is of."""
    from hasten.errors import RecipeError, printable
    from hasten.loop.branching import branch_recipe

    if source is not None:
        raise RecipeError(f"--branch takes the recipe of {printable(str(run))}: leave {printable(source)!r} out.")
    return branch_recipe(run, step=step, overrides=settings)

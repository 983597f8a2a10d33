"""The list of verbs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hasten.cli import compare, evaluate, export, generate, plan, prepare, report, restart, runs, train

EPILOG = "Exit codes: 0 done, 2 wrong input, 3 diverged, 130/143/129 stopped by a signal with everything saved."

app = typer.Typer(
    name="hasten",
    help="Train language models faster, and measure what each technique is worth.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=EPILOG,
)

VERBS = {
    "train": train.train,
    "plan": plan.plan,
    "compare": compare.compare,
    "restart": restart.restart,
    "evaluate": evaluate.evaluate,
    "generate": generate.generate,
    "export": export.export,
    "report": report.report,
    "prepare": prepare.prepare,
    "runs": runs.runs,
}

NEED_ARGUMENTS = ("evaluate", "export", "generate", "prepare", "report")


def _exits(verb: Callable[..., int]) -> Callable[..., None]:
    """Let a verb's return value be the exit code of the process."""

    @functools.wraps(verb)
    def run(*args: Any, **options: Any) -> None:
        raise typer.Exit(verb(*args, **options))

    return run


for name, verb in VERBS.items():
    app.command(name, no_args_is_help=name in NEED_ARGUMENTS)(_exits(verb))


def _version(asked: bool) -> None:
    if asked:
        from hasten import __version__

        typer.echo(f"hasten {__version__}")
        raise typer.Exit


@app.callback()
def hasten(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train language models faster, and measure what each technique is worth."""

"""``hasten prepare``: text into token shards, ahead of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hasten.data.shards import PreparedData
    from hasten.recipe import Recipe


def prepare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE.toml] [KEY=VALUE ...]",
            help="A recipe and settings, as for `hasten train`; only the data and tokenizer settings matter here.",
        ),
    ],
    engine: Annotated[
        str,
        typer.Option(
            help="Where text is encoded: local, or ray, the cluster of RAY_ADDRESS or of `ray start`, else one here."
        ),
    ] = "local",
    duplicates: Annotated[
        bool,
        typer.Option("--duplicates", help="Tell which documents are there more than once, exactly or nearly."),
    ] = False,
    duplicates_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where that is written as JSON; without it beside the prepared data."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="URL", help="Copy the prepared data there too, such as s3://bucket/folder.")
    ] = None,
) -> int:
    """Tokenize a corpus into the cache that `hasten train` reads. Training prepares by itself; this does it ahead.

    \b
    hasten prepare data=books/
    hasten prepare data=dump.jsonl.gz data.text_key=body data.vocab_size=8192
    hasten prepare data=dump.jsonl.gz --engine ray --duplicates
    hasten prepare data=books/ --to s3://bucket/books
    """
    from hasten.cli.arguments import split_arguments
    from hasten.cli.display import Display, describe_corpus
    from hasten.errors import printable
    from hasten.loop.telling import Event
    from hasten.recipe import resolve

    wants_report = duplicates or duplicates_file is not None
    asked = {"--engine": engine != "local", "--duplicates": wants_report, "--to": to is not None}
    resolved = resolve(*split_arguments(arguments))
    _refuse_prepared(resolved.recipe, [option for option, is_given in asked.items() if is_given])
    with Display() as display:

        def show(progress: Any) -> None:
            display(Event("prepare", 0, {"progress": progress}))

        for note in resolved.notes:
            display.note(note)
        data = _prepared(resolved.recipe, engine, show)
        report = _report(resolved.recipe, data, show) if wants_report else None
    typer.echo(describe_corpus(data))
    for note in data.manifest["notes"]:
        typer.echo(printable(note))
    if report:
        file = duplicates_file or data.folder.with_name(f"{data.folder.name}.duplicates.json")
        report.write(file)
        for sentence in report.sentences():
            typer.echo(sentence)
        typer.echo(f"duplicates in {printable(str(file))}")
    typer.echo(f"prepared in {printable(str(data.folder))}")
    if to:
        from hasten.data.remote import upload

        typer.echo(f"copied to {printable(upload(data.folder, to))}")
    return 0


def _refuse_prepared(recipe: Recipe, options: list[str]) -> None:
    from hasten.data.places import prepared_place
    from hasten.errors import RecipeError, printable

    if options and (place := prepared_place(recipe.data.build())):
        raise RecipeError(f"{options[0]} needs text, and data={printable(place)} is prepared already: name its text.")


def _prepared(recipe: Recipe, engine: str, show: Callable[[Any], None]) -> PreparedData:
    from hasten.data.preparation import prepare
    from hasten.errors import RecipeError
    from hasten.loop import prepare_for

    if engine == "local":
        return prepare_for(recipe, on_progress=show)
    if recipe.init_from:
        raise RecipeError(
            f"--engine {engine} and init_from do not go together here: name the tokenizer of that run instead, with "
            "data.tokenizer=RUN/final."
        )
    choices = recipe.data
    return prepare(
        choices.build(), tokenizer=choices.tokenizer, vocab_size=choices.vocab_size, engine=engine, on_progress=show
    )


def _report(recipe: Recipe, data: PreparedData, show: Callable[[Any], None]) -> Any:
    from hasten.data.corpus import open_corpus
    from hasten.data.duplicates import find_duplicates

    return find_duplicates(open_corpus(recipe.data.build()), data, on_progress=show)

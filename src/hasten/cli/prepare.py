"""``hasten prepare``: text into token shards, ahead of training."""

from __future__ import annotations

from typing import Annotated

import typer


def prepare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE.toml] [KEY=VALUE ...]",
            help="A recipe and settings, as for `hasten train`; only the data and tokenizer settings matter here.",
        ),
    ],
) -> int:
    """Tokenize a corpus into the cache that `hasten train` reads. Training prepares by itself; this does it ahead.

    \b
    hasten prepare data=books/
    hasten prepare data=dump.jsonl.gz data.text_key=body data.vocab_size=8192
    """
    from hasten.cli.arguments import split_arguments
    from hasten.cli.display import Display, describe_corpus
    from hasten.errors import printable
    from hasten.loop import prepare_for
    from hasten.loop.telling import Event
    from hasten.recipe import resolve

    resolved = resolve(*split_arguments(arguments))
    with Display() as display:
        for note in resolved.notes:
            display.note(note)
        data = prepare_for(
            resolved.recipe, on_progress=lambda progress: display(Event("prepare", 0, {"progress": progress}))
        )
    typer.echo(describe_corpus(data))
    for note in data.manifest["notes"]:
        typer.echo(printable(note))
    typer.echo(f"prepared in {printable(str(data.folder))}")
    return 0

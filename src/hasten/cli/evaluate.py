"""``hasten evaluate``: how well a trained model predicts a text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a model folder.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT ...", help="Files, folders or globs, as for data.val.")],
    text_key: Annotated[str, typer.Option(help="The key of the text in JSON and parquet records.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Print the loss per token and the bits per byte of a model over the whole of a text, every byte counted once.

    \b
    hasten evaluate runs/python-nano-1a2b3c4d test.txt
    """
    from hasten.cli.models import model_folder
    from hasten.evaluation import evaluate as measure

    found = measure(model_folder(model), texts, text_key=text_key)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        typer.echo(
            f"{found.bits_per_byte:.4f} bits per byte, loss {found.loss:.4f} nats per token "
            f"over {found.tokens:,} tokens, {found.bytes:,} bytes"
        )
    return 0

"""``hasten generate``: text from a trained model, as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a model folder.")],
    prompt: Annotated[str, typer.Argument(help="What the text begins with.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from this share of the probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
) -> int:
    """Write text with a trained model.

    \b
    hasten generate runs/python-nano-1a2b3c4d "def main(" --temperature 0.5
    """
    from hasten.cli.models import model_folder
    from hasten.errors import printable
    from hasten.generation import generate as write

    folder = model_folder(model)
    typer.echo(printable(prompt), nl=False)
    for piece in write(folder, prompt=prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed):
        typer.echo(printable(piece), nl=False)
    typer.echo()
    return 0

"""``hasten export``: a model folder that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write.")],
    step: Annotated[int | None, typer.Option(help="Take this checkpoint; the newest good one otherwise.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bf16 or fp16.")] = "float32",
) -> int:
    """Write a checkpoint of a run as a Hugging Face folder, which `transformers` loads.

    \b
    hasten export runs/books --to my-model --dtype bf16
    hasten export runs/books --to early --step 1000
    """
    from hasten.data.tokenizer import load_tokenizer
    from hasten.errors import RunError, printable
    from hasten.exports import export as write
    from hasten.loop.saved import load, newest
    from hasten.model import ModelConfig
    from hasten.record import RunFolder

    folder = RunFolder(run)
    if not folder.checkpoints.is_dir():
        raise RunError(f"{printable(str(run))} holds no checkpoints; give a run folder.")
    if step is None:
        loaded, notes = newest(folder.checkpoints)
        for note in notes:
            typer.echo(f"! {note}")
        if loaded is None:
            raise RunError(f"{printable(str(run))} holds no checkpoint yet.")
    else:
        loaded = load(folder.checkpoints / f"step-{step:08d}")
    config = ModelConfig(**loaded.state["model"])
    weights = loaded.tensors.get(
        "averaged", loaded.tensors["model"]
    )  # What the optimizer wants read, where it averages.
    place = write(weights, config, load_tokenizer(folder.tokenizer), to, dtype=dtype)
    typer.echo(f"step {loaded.step} as {dtype} in {printable(str(place))}")
    return 0

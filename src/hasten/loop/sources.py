"""What a run is made from: its text, and the model that it starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.data.places import open_prepared, prepared_place
from hasten.data.preparation import prepare
from hasten.data.shards import PreparedData
from hasten.errors import RecipeError, printable
from hasten.model import Decoder, read_model
from hasten.recipe import Recipe


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
    if place := prepared_place(recipe.data.build()):
        return open_prepared(
            place,
            recipe.data.build(),
            tokenizer=tokenizer,
            vocab_size=recipe.data.vocab_size,
            packing=recipe.data.packing,
            shuffle_tokens=recipe.data.shuffle_tokens,
            on_progress=on_progress,
        )
    return prepare(
        recipe.data.build(),
        tokenizer=tokenizer,
        vocab_size=recipe.data.vocab_size,
        on_progress=on_progress,
    )


def warm_start(recipe: Recipe) -> Decoder | None:
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

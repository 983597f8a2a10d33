"""A recipe: every choice of one training run, resolved, comparable and writable as TOML."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tomli_w
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from hasten.duration import Duration
from hasten.errors import RecipeError, nearest, printable
from hasten.files import read_bytes
from hasten.recipe import names
from hasten.recipe.choices import (
    CheckpointChoices,
    ClipNormChoices,
    Clips,
    EvaluateChoices,
    ModelChoices,
    PrecisionChoices,
)
from hasten.recipe.data import DataChoices
from hasten.recipe.fields import Choices, Span, Text
from hasten.recipe.guards import Guards, SpikesChoices
from hasten.recipe.lengths import BatchChoices, ConstantLengths, Lengths
from hasten.recipe.names import Given
from hasten.recipe.optimizers import AdamWChoices, Optimizers
from hasten.recipe.parallels import DDPChoices, Parallels
from hasten.recipe.schedules import CosineChoices, Schedules
from hasten.recipe.schema import Expected, Schema
from hasten.recipe.settings import combine, read_mapping, read_overrides, read_toml, sentence, without_none

RECIPES = Path(__file__).parent.parent / "recipes"


class Recipe(Choices):
    """Every choice of a run.

    Args:
        data, model, lengths, batch, optimizer, schedule, clip, guard, precision, parallel, evaluate, checkpoint:
            tables, each described at its class in `hasten.recipe.choices`, or in the file of its name.
        activation_checkpointing: what of the forward pass is done again in the backward pass to save memory: ``none``,
            ``selective`` (all but matrix products and attention), ``full`` (every block).
        compile: whether the forward pass is compiled; ``auto`` where a compiler exists and the run pays for it.
        budget: when the run ends: steps, tokens, epochs or wall-clock time.
        target_loss: held-out loss (nats per token) at which the run ends early.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        seed: of the initial weights and of the order of the data.
        threads: CPU threads; PyTorch's own choice when it is not given.
        out: the run folder; ``runs/<default_run_name>`` when it is not given.
        init_from: a run folder or an exported model to start from.
        branch_from: a run folder; the run begins at a checkpoint of it, its optimizer and place in the data included.
        branch_step: the optimizer step of that checkpoint.
    """

    data: DataChoices = DataChoices()
    model: ModelChoices = ModelChoices()
    lengths: Lengths = ConstantLengths()
    batch: BatchChoices = BatchChoices()
    optimizer: Optimizers = AdamWChoices()
    schedule: Schedules = CosineChoices()
    clip: Clips = ClipNormChoices()
    guard: Guards = SpikesChoices()
    precision: PrecisionChoices = PrecisionChoices()
    parallel: Parallels = DDPChoices()
    evaluate: EvaluateChoices = EvaluateChoices()
    checkpoint: CheckpointChoices = CheckpointChoices()
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: Literal["auto", "on", "off"] = "auto"
    budget: Span = Duration.parse("3min")
    target_loss: Annotated[float, Field(gt=0.0)] | None = None
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"), Expected("'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    ] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    out: Text | None = None
    init_from: Text | None = None
    branch_from: Text | None = None
    branch_step: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        seq_len, tokens = self.lengths.seq_len, self.batch.tokens
        if tokens < seq_len:
            raise ValueError(
                f"batch.tokens={tokens} is less than one row of lengths.seq_len={seq_len}: give at least {seq_len}."
            )
        micro_rows = self.batch.micro_rows
        if micro_rows is not None and micro_rows > self.rows_per_step:
            raise ValueError(
                f"batch.micro_rows={micro_rows} is more than the {self.rows_per_step} rows of a step "
                f"(batch.tokens={tokens} / lengths.seq_len={seq_len}): give at most {self.rows_per_step}."
            )
        if self.budget.unit == "share":
            raise ValueError(f"budget={self.budget} is a share of itself: give steps, tokens, epochs or a time.")
        if self.lengths.reading == "bucket":
            self._refuse_unbucketed()
        self._refuse_long_warmup()
        self._refuse_two_starts()
        return self

    def _refuse_unbucketed(self) -> None:
        if self.data.weights is not None:
            raise ValueError(
                "lengths.mode='bucket' cannot keep data.weights, because the sources have different shares of short "
                "and long documents: give lengths.mode=view, or leave data.weights out."
            )
        if self.data.packing != "best_fit":
            raise ValueError(
                f"data.packing={self.data.packing!r} has no meaning with lengths.mode='bucket', whose rows are packed "
                "by best fit: leave it out, or give lengths.mode=view."
            )

    def _refuse_two_starts(self) -> None:
        """A run that starts from another one has that one's model and tokenizer; choices beside them would be lost."""
        if self.init_from is None:
            return
        data, default = self.data, DataChoices()
        for key, is_chosen in (
            ("model", self.model != ModelChoices()),
            ("data.tokenizer", data.tokenizer != default.tokenizer),
            ("data.vocab_size", data.vocab_size != default.vocab_size),
        ):
            if is_chosen:
                raise ValueError(f"init_from={self.init_from!r} brings its own model and tokenizer: leave {key} out.")

    def _refuse_long_warmup(self) -> None:
        warmup, budget = self.schedule.warmup, self.budget
        if warmup.unit == "seconds" and budget.unit != "seconds":
            raise ValueError(
                f"schedule.warmup={warmup} is a time, but budget={budget} is not: give it in steps, tokens or percent."
            )
        if warmup.unit == "share":
            is_long = warmup.value >= 1
        elif warmup.unit == budget.unit:
            is_long = warmup.value >= budget.value
        elif {warmup.unit, budget.unit} == {"steps", "tokens"}:
            is_long = self._in_tokens(warmup) >= self._in_tokens(budget)
        else:  # Known only with the data or the speed: `build` refuses it then.
            is_long = False
        if is_long:
            raise ValueError(
                f"schedule.warmup={warmup} is as long as the run (budget={budget}): shorten it, "
                "or give a larger budget."
            )

    def _in_tokens(self, duration: Duration) -> float:
        return duration.value * (self.tokens_per_step if duration.unit == "steps" else 1)

    @property
    def rows_per_step(self) -> int:
        """Whole rows that an optimizer step reads."""
        return self.batch.tokens // self.lengths.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Rows times row length of an optimizer step."""
        return self.rows_per_step * self.lengths.seq_len

    @property
    def sha256(self) -> str:
        """Hash over every choice except `out`: the same recipe in another folder is the same recipe."""
        choices = {key: value for key, value in self.to_dict().items() if key != "out"}
        return hashlib.sha256(json.dumps(choices, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return every choice as plain, nested, JSON-able data; durations as text."""
        return {key: _name_first(value) for key, value in self.model_dump(mode="json").items()}

    def to_toml(self) -> str:
        """Return the recipe as TOML, defaults included; `resolve` of that text is this recipe again."""
        return tomli_w.dumps(without_none(self.to_dict()))

    def default_run_name(self) -> str:
        """Return ``<corpus>-<model>-<8 hex digits of sha256>``, safe as a file name."""
        sources = (self.data.train,) if isinstance(self.data.train, str) else self.data.train
        first = "stdin" if sources[0] == "-" else Path(sources[0]).name.partition(".")[0] or Path(sources[0]).name
        plain = re.sub(r"[^A-Za-z0-9_]+", "-", first).strip("-")[:40].strip("-") or "text"
        more = f"-and-{len(sources) - 1}-more" if len(sources) > 1 else ""
        return f"{plain}{more}-{self.model.name}-{self.sha256[:8]}"

    def difference(self, other: Recipe, *, ignore: Sequence[str] = ()) -> list[str]:
        """Return one line per choice in which `other` differs: ``optimizer.lr: 0.001 -> 0.002``.

        Args:
            other: the recipe on the right of the arrow.
            ignore: keys to leave out; for a resumed run, `free_on_resume`.
        """
        mine, others = _leaves(self.to_dict()), _leaves(other.to_dict())
        keys = [key for key in {**mine, **others} if key not in ignore]
        return [
            f"{key}: {_plain(mine.get(key))} -> {_plain(others.get(key))}"
            for key in keys
            if mine.get(key) != others.get(key)
        ]

    @property
    def free_on_resume(self) -> tuple[str, ...]:
        """Keys that may change between the parts of one run, because they cannot change its weights.

        How often to evaluate and to save is free under a budget of steps, tokens or epochs; under a wall-clock
        budget it costs training time, and with a `target_loss` the evaluation decides when the run ends.
        """
        free = ["out", "checkpoint.keep"]
        if self.budget.unit != "seconds":
            free.append("checkpoint.every")
            if self.target_loss is None:
                free += ["evaluate.every", "evaluate.tokens"]
        return tuple(free)


class Resolved(NamedTuple):
    """A recipe, and what to tell the user about how it was read."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


@functools.cache
def schema() -> Schema:
    """Return the keys of a recipe."""
    return Schema(Recipe)


def resolve(
    source: Recipe | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Resolved:
    """Return the recipe that `source` and `overrides` describe, the overrides last.

    Args:
        source: a TOML file, the folder of a run, the name of a built-in recipe, TOML text (with a line end in it),
            a mapping, a recipe, or None for the defaults.
        overrides: ``key=value`` texts, or a mapping of typed values with nested or dotted keys.

    Raises:
        RecipeError: a setting is unknown, of the wrong type, out of range, given twice or at odds with another.

    Example:
        >>> resolve(None, ["learning_rate=3e-4", "budget=60s"]).recipe.optimizer.lr
        0.0003
    """
    keys, notes = schema(), []
    layers: list[list[Given]] = []
    for givens in (_read_source(source), _read_overrides(overrides)):
        earlier = {given.key: given.value for layer in layers for given in layer}

        def known(key: str, earlier: Mapping[str, Any] = earlier) -> Any:
            return earlier.get(key, keys.default(key))

        ours, said = names.translate(givens, known, keys.knows)
        layers.append(ours)
        notes += said
    more_names = {**names.SHORT, **names.RENAMED}
    nested = combine(keys, layers, more_names)
    try:
        recipe = Recipe.model_validate(nested)
    except ValidationError as error:
        raise sentence(error, keys, layers) from None
    return Resolved(recipe, tuple(dict.fromkeys(notes)))


def _read_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> list[Given]:
    if isinstance(overrides, Mapping):
        return read_mapping(overrides, "in the settings")
    return read_overrides([overrides] if isinstance(overrides, str) else overrides)


def _read_source(source: Recipe | Mapping[str, Any] | str | Path | None) -> list[Given]:
    if source is None:
        return []
    if isinstance(source, Recipe):
        return read_mapping(without_none(source.to_dict()), "in the recipe")
    if isinstance(source, Mapping):
        return read_mapping(source, "in the recipe")
    if isinstance(source, str) and "\n" in source:
        return read_toml(source, "given")
    path = _recipe_path(source)
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{printable(str(path))} cannot be read as a recipe: {printable(str(error))}.") from None
    return read_toml(text, f"in {printable(path.name)}")


def _recipe_path(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir() and (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    if path.suffix == ".toml" or path.is_file():
        return path
    built_in = sorted(file.stem for file in RECIPES.glob("*.toml"))
    if str(source) in built_in:
        return RECIPES / f"{source}.toml"
    raise RecipeError(
        f"There is no recipe {printable(str(source))!r}{nearest(str(source), built_in) or '.'} Give a TOML file, the "
        f"folder of a run, or a built-in recipe ({', '.join(built_in) or 'none'})."
    )


def _name_first(value: Any) -> Any:
    return {**({"name": value["name"]} if "name" in value else {}), **value} if isinstance(value, dict) else value


def _leaves(tables: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{leaf}": inner for leaf, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return printable(value) if isinstance(value, str) and value.isprintable() else json.dumps(value)

"""Every choice of a run as frozen data: the tables of a recipe, their defaults and what they build.

The defaults stand here and nowhere else. Rooms that need torch are imported only when something is built, so that
reading a recipe is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from hasten.duration import Duration
from hasten.errors import RecipeError
from hasten.recipe.fields import Choices, Count, Sources, Span, SpanOrNone, Text

if TYPE_CHECKING:
    from hasten.clip import ClipBoth, ClipNorm, ClipValue, NoClip
    from hasten.data.corpus import CorpusSpec
    from hasten.data.lengths import ConstantLength
    from hasten.model import ModelConfig
    from hasten.schedules import Schedule


class DataChoices(Choices):
    """Which text is trained on, which is held out, and how both become tokens.

    Args:
        train: sources of the training text: a built-in corpus, a file, a folder, a glob or ``-``; or a list of them.
        val: sources of the held-out text; without them a share of the documents is held out.
        val_share: that share, above 0 and at most 0.5.
        text_key: the key that holds the text of a JSON record or a parquet row.
        separator: text between the documents of one large file.
        tokenizer: ``bpe`` (trained on the corpus), ``bytes``, or the path of a `tokenizer.json` or its folder.
        vocab_size: of a ``bpe`` tokenizer, at least 257.
        document_mask: whether a token sees only its own document.
    """

    train: Sources = "python"
    val: Sources | None = None
    val_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05
    text_key: Text = "text"
    separator: Text | None = None
    tokenizer: Text = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 4096
    document_mask: bool = True

    @model_validator(mode="after")
    def _agree(self) -> Self:
        default = type(self).model_fields
        if self.val is None and self.val_share == 0:
            raise ValueError("data.val_share=0 holds nothing out: give data.val=FILE, or a share above 0.")
        if self.val is not None and self.val_share not in (0, default["val_share"].default):
            raise ValueError(
                f"data.val_share={self.val_share:g} has no effect beside data.val={self.val!r}: leave one of them out."
            )
        if both := sorted(set(_listed(self.train)) & set(_listed(self.val))):
            raise ValueError(f"data.val={both[0]!r} is also trained on: hold out other text, or leave data.val out.")
        if self.tokenizer != "bpe" and self.vocab_size != default["vocab_size"].default:
            raise ValueError(
                f"data.vocab_size={self.vocab_size} has no effect with data.tokenizer={self.tokenizer!r}, "
                "whose vocabulary is its own: leave data.vocab_size out."
            )
        return self

    def build(self) -> CorpusSpec:
        """Return what `hasten.data.corpus.open_corpus` opens."""
        from hasten.data.corpus import CorpusSpec

        return CorpusSpec(
            train=_listed(self.train),
            val=_listed(self.val),
            val_share=self.val_share,
            text_key=self.text_key,
            separator=self.separator,
        )


def _listed(sources: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if sources is None else (sources,) if isinstance(sources, str) else sources


class ModelChoices(Choices):
    """The decoder: a preset by name, any of its sizes replaced by number.

    Args:
        name: the preset; the sizes of each are in `hasten.model.SIZES`.
        num_layers, width, num_heads, num_kv_heads, head_dim, mlp_width: replace the preset's, at least 1.
        tied: whether the head is the embedding; replaces the preset's.
    """

    name: Literal["nano", "micro", "mini", "small", "medium"] = "nano"
    num_layers: Count | None = None
    width: Count | None = None
    num_heads: Count | None = None
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    mlp_width: Count | None = None
    tied: bool | None = None

    def build(self, vocab_size: int, seq_len: int) -> ModelConfig:
        """Return the model's shape for a vocabulary and a row length.

        Raises:
            RecipeError: two sizes do not fit together.
        """
        from hasten.model import preset

        sizes = self.model_dump(exclude={"name"}, exclude_none=True)
        return preset(self.name, vocab_size=vocab_size, seq_len=seq_len, **sizes)


class ConstantLengths(Choices):
    """Rows of one length throughout.

    Args:
        seq_len: tokens of a row, at least 2.
    """

    name: Literal["constant"] = "constant"
    seq_len: Annotated[int, Field(ge=2, le=2**24)] = 256

    def build(self) -> ConstantLength:
        """Return the schedule of row lengths."""
        from hasten.data.lengths import ConstantLength

        return ConstantLength(self.seq_len)


class BatchChoices(Choices):
    """How much text an optimizer step reads.

    Args:
        tokens: of one optimizer step; the step takes as many whole rows as fit.
        micro_rows: rows that pass through the model at once; found from the memory when it is not given. It
            changes speed and memory, never the sum that a step follows.
    """

    tokens: Count = 2048
    micro_rows: Count | None = None


class WarmupChoices(Choices):
    """A warm-up before anything else; the base of every schedule's table.

    Args:
        warmup: a duration; 0 for none.
        warmup_start: factor of the peak that the first step begins at, in [0, 1].
    """

    warmup: SpanOrNone = Duration.parse("2%")
    warmup_start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01

    def build(
        self,
        *,
        total_steps: int,
        tokens_per_step: int,
        steps_per_epoch: float | None = None,
        seconds: float | None = None,
    ) -> Schedule:
        """Return the schedule of a run of `total_steps`.

        Args:
            total_steps: optimizer steps of the whole run.
            tokens_per_step: rows times row length of a step.
            steps_per_epoch: steps of one pass over the data; needed where the warm-up is given in epochs.
            seconds: the run's wall-clock budget; needed where the warm-up is given in seconds.

        Raises:
            RecipeError: the warm-up takes the whole run, or cannot be converted.
        """
        from hasten.schedules import warmup

        share = self.warmup_share(
            total_steps=total_steps, tokens_per_step=tokens_per_step, steps_per_epoch=steps_per_epoch, seconds=seconds
        )
        if share >= 1:
            raise RecipeError(
                f"schedule.warmup={self.warmup} is as long as the run of {total_steps} steps: shorten it, or give "
                "a larger budget."
            )
        rest = self._rest()
        return warmup(share, start=self.warmup_start) | rest if share > 0 else rest

    def warmup_share(
        self,
        *,
        total_steps: int,
        tokens_per_step: int,
        steps_per_epoch: float | None = None,
        seconds: float | None = None,
    ) -> float:
        """Return the share of the run that the warm-up takes; the arguments and errors are those of `build`."""
        warmup = self.warmup
        if warmup.value == 0:
            return 0.0
        if warmup.unit == "share":
            return warmup.value
        if warmup.unit == "seconds":
            if not seconds:
                raise RecipeError(
                    f"schedule.warmup={warmup} is a time, but the budget is not: give it in steps, tokens or percent."
                )
            return warmup.value / seconds
        steps = {
            "steps": warmup.value,
            "tokens": warmup.value / tokens_per_step,
            "epochs": warmup.value * (steps_per_epoch or 0.0),
        }[warmup.unit]
        return steps / total_steps

    def _rest(self) -> Schedule:
        from hasten.schedules import SCHEDULES

        settings = self.model_dump(exclude={"name", "warmup", "warmup_start"})
        return SCHEDULES[getattr(self, "name")](**settings)  # noqa: B009


class DecayChoices(WarmupChoices):
    """A decay after the warm-up.

    Args:
        floor: factor of the peak that the last step ends at, in [0, 1].
    """

    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01


class CosineChoices(DecayChoices):
    """Half a cosine from the peak to the floor."""

    name: Literal["cosine"] = "cosine"


class LinearChoices(DecayChoices):
    """A straight line from the peak to the floor."""

    name: Literal["linear"] = "linear"


class SqrtChoices(DecayChoices):
    """Square-root decay: ``floor + (1 - floor) * (1 - sqrt(x))``."""

    name: Literal["sqrt"] = "sqrt"


class ConstantChoices(WarmupChoices):
    """The peak throughout."""

    name: Literal["constant"] = "constant"


class NoClipChoices(Choices):
    """Gradients as they are."""

    name: Literal["none"] = "none"

    def build(self) -> NoClip:
        """Return the clip."""
        from hasten.clip import NoClip

        return NoClip()


class ClipNormChoices(Choices):
    """The gradient scaled down to a global norm.

    Args:
        max_norm: that norm.
    """

    name: Literal["norm"] = "norm"
    max_norm: Annotated[float, Field(gt=0.0)] = 1.0

    def build(self) -> ClipNorm:
        """Return the clip."""
        from hasten.clip import ClipNorm

        return ClipNorm(self.max_norm)


class ClipValueChoices(Choices):
    """Every element of the gradient clamped.

    Args:
        max_value: largest absolute value.
    """

    name: Literal["value"] = "value"
    max_value: Annotated[float, Field(gt=0.0)] = 1.0

    def build(self) -> ClipValue:
        """Return the clip."""
        from hasten.clip import ClipValue

        return ClipValue(self.max_value)


class ClipBothChoices(Choices):
    """Every element clamped, then the whole scaled down to a norm.

    Args:
        max_norm: largest global norm.
        max_value: largest absolute value of an element.
    """

    name: Literal["norm_and_value"] = "norm_and_value"
    max_norm: Annotated[float, Field(gt=0.0)] = 1.0
    max_value: Annotated[float, Field(gt=0.0)] = 1.0

    def build(self) -> ClipBoth:
        """Return the clip."""
        from hasten.clip import ClipBoth

        return ClipBoth(self.max_norm, self.max_value)


class PrecisionChoices(Choices):
    """The number format of the matrices and activations; master weights, norms and states stay float32."""

    name: Literal["float32", "bf16", "fp16"] = "float32"


class EvaluateChoices(Choices):
    """Evaluation during the run; the one at the end reads all of the held-out text.

    Args:
        every: how often.
        tokens: held-out tokens that each reads.
    """

    every: Span = Duration.parse("10%")
    tokens: Count = 8192


class CheckpointChoices(Choices):
    """Saving during the run.

    Args:
        every: how often.
        keep: how many are kept.
    """

    every: Span = Duration.parse("5min")
    keep: Count = 2


Schedules = Annotated[
    CosineChoices | LinearChoices | SqrtChoices | ConstantChoices,
    Field(discriminator="name"),
]
Clips = Annotated[
    ClipNormChoices | ClipValueChoices | ClipBothChoices | NoClipChoices,
    Field(discriminator="name"),
]

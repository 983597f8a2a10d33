"""Every choice of a run as frozen data: the tables of a recipe, their defaults and what they build.

The defaults stand here and nowhere else. Rooms that need torch are imported only when something is built, so that
reading a recipe is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hasten.duration import Duration
from hasten.recipe.fields import Choices, Count, Span

if TYPE_CHECKING:
    from hasten.clip import AGC, ClipBoth, ClipNorm, ClipValue, NoClip, ZClip
    from hasten.model import ModelConfig


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


class AGCChoices(Choices):
    """The gradient of every unit scaled down to a share of its weights' norm.

    Args:
        clipping: that share.
        eps: what the norm of weights counts as at least.
    """

    name: Literal["agc"] = "agc"
    clipping: Annotated[float, Field(gt=0.0)] = 0.01
    eps: Annotated[float, Field(gt=0.0)] = 1e-3

    def build(self) -> AGC:
        """Return the clip."""
        from hasten.clip import AGC

        return AGC(self.clipping, self.eps)


class ZClipChoices(Choices):
    """The gradient scaled down to what is usual where its norm is far above the mean of the steps before.

    Args:
        threshold: deviations above the mean that are left as they are.
        alpha: share of mean and variance that is kept at each step.
        warmup_steps: steps before the first that may be clipped.
    """

    name: Literal["zclip"] = "zclip"
    threshold: Annotated[float, Field(gt=0.0)] = 2.5
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.97
    warmup_steps: Annotated[int, Field(ge=2, le=2**24)] = 25

    def build(self) -> ZClip:
        """Return the clip, which has seen nothing yet."""
        from hasten.clip import ZClip

        return ZClip(self.threshold, self.alpha, self.warmup_steps)


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


Clips = Annotated[
    ClipNormChoices | ClipValueChoices | ClipBothChoices | AGCChoices | ZClipChoices | NoClipChoices,
    Field(discriminator="name"),
]

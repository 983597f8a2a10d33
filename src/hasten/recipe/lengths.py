"""How long rows are and how many tokens a step reads."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from hasten.duration import Duration
from hasten.recipe.fields import Choices, Count, Span, as_tuple
from hasten.recipe.schedules import Expression
from hasten.recipe.schema import Expected

if TYPE_CHECKING:
    from hasten.data.lengths import BatchSizes, LengthSchedule, WindowSchedule

Length = Annotated[int, Field(ge=2, le=2**24)]
Sizes = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(as_tuple),
    Field(min_length=2),
    Expected("a rising list of at least two row lengths, as [64, 256, 1024]"),
]


class LengthChoices(Choices):
    """Rows of one length; the base of every table of lengths.

    Args:
        seq_len: tokens of the longest row, at least 2; the length the model is made for and evaluated at.
    """

    seq_len: Length = 256

    def build(self, *, seed: int = 0, **run: Any) -> LengthSchedule:
        """Return the schedule of row lengths.

        Args:
            seed: of the replay.
            **run: the arguments of `hasten.duration.Duration.share_of_run`, where rows grow.
        """
        from hasten.data.lengths import LengthSchedule

        return LengthSchedule(self.seq_len)

    def build_window(self, **run: Any) -> WindowSchedule:
        """Return the schedule of the attention window; the arguments are those of `build`."""
        from hasten.data.lengths import WindowSchedule

        return WindowSchedule(self.seq_len)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Every length that a row may have, ascending."""
        return (self.seq_len,)

    @property
    def reading(self) -> Literal["view", "bucket"]:
        """How shorter rows come about."""
        return "view"


class ConstantLengths(LengthChoices):
    """Rows of one length throughout."""

    name: Literal["constant"] = "constant"


class GrowingLengths(LengthChoices):
    """Short rows first, longer ones later; the tokens of a step stay the same.

    Args:
        start: shortest length.
        over: how much of the run the rows grow over; they have their full length from then on.
        sizes: the lengths to use, rising; by default `seq_len` halved down to `start`.
        mode: ``view`` cuts rows of full length into shorter ones, so that tokens and their order are those of a run
            without a schedule; ``bucket`` packs documents of similar length into rows of their own length.
        replay: share of the later steps that read short rows again, in [0, 1).
    """

    start: Length = 64
    over: Span = Duration.parse("60%")
    sizes: Sizes | None = None
    mode: Literal["view", "bucket"] = "view"
    replay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.sizes is None and self.start >= self.seq_len:
            raise ValueError(
                f"lengths.start={self.start} is not below lengths.seq_len={self.seq_len}, so rows never grow: give a "
                "shorter start, or lengths=constant."
            )
        sizes = self.row_lengths
        if len(sizes) < 2:
            raise ValueError(
                f"lengths.seq_len={self.seq_len} has no half of at least lengths.start={self.start}, so rows never "
                "grow: give lengths.sizes, another seq_len or a shorter start."
            )
        if sizes[-1] != self.seq_len or any(self.seq_len % size for size in sizes):
            raise ValueError(
                f"lengths.sizes={list(sizes)} must be divisors of lengths.seq_len={self.seq_len} and end with it."
            )
        if any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"lengths.sizes={list(sizes)} must rise.")
        if self.over.unit == "share" and self.over.value > 1:
            raise ValueError(f"lengths.over={self.over} is longer than the run, so rows never have their full length.")
        return self

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Every length that a row may have, ascending."""
        from hasten.data.lengths import halvings

        return self.sizes or halvings(self.seq_len, self.start)

    @property
    def reading(self) -> Literal["view", "bucket"]:
        """How shorter rows come about."""
        return self.mode

    def build(self, *, seed: int = 0, **run: Any) -> LengthSchedule:
        """Return the schedule of row lengths; the arguments are those of `LengthChoices.build`."""
        from hasten.data.lengths import LengthSchedule

        return LengthSchedule(
            self.seq_len,
            self.row_lengths,
            growth=getattr(self, "name"),  # noqa: B009
            share=min(self.over.share_of_run("lengths.over", **run), 1.0),
            degree=getattr(self, "degree", 2.0),
            replay=self.replay,
            seed=seed,
        )


class LinearLengths(GrowingLengths):
    """Rows that grow along a straight line."""

    name: Literal["linear"] = "linear"


class StepsLengths(GrowingLengths):
    """Every size for an equal part of `over`; with the default sizes the length doubles each time."""

    name: Literal["steps"] = "steps"


class SqrtLengths(GrowingLengths):
    """Rows that grow with the square root of progress: fast first."""

    name: Literal["sqrt"] = "sqrt"


class RootLengths(GrowingLengths):
    """Rows that grow with a root of progress.

    Args:
        degree: of the root; above 1 grows fast first, below 1 late.
    """

    name: Literal["root"] = "root"
    degree: Annotated[float, Field(gt=0.0)] = 2.0


class WindowLengths(LengthChoices):
    """Rows of full length in which attention looks back over a window that grows.

    Args:
        start: tokens of the first window, the token itself included.
        over: how much of the run the window grows over; attention is not limited from then on.
    """

    name: Literal["window"] = "window"
    start: Annotated[int, Field(ge=1, le=2**24)] = 64
    over: Span = Duration.parse("60%")

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.start >= self.seq_len:
            raise ValueError(
                f"lengths.start={self.start} is not below lengths.seq_len={self.seq_len}, so the window limits "
                "nothing: give a smaller start, or lengths=constant."
            )
        return self

    def build_window(self, **run: Any) -> WindowSchedule:
        """Return the schedule of the attention window; the arguments are those of `LengthChoices.build`."""
        from hasten.data.lengths import WindowSchedule

        share = min(self.over.share_of_run("lengths.over", **run), 1.0)
        return WindowSchedule(self.seq_len, start=self.start, share=share)


class BatchChoices(Choices):
    """How much text an optimizer step reads.

    Args:
        tokens: of one optimizer step; the step takes as many whole rows as fit.
        micro_rows: rows that pass through the model at once; found from the memory when it is not given. It
            changes speed and memory, never the sum that a step follows.
        schedule: a schedule of the step's size as a factor of `tokens` over the run, such as
            ``"stages((0, 0.25), (0.3, 0.5), (0.6, 1.0))"``; the step takes as many whole micro-batches as fit.
        lr_power: with a schedule, the learning rate is multiplied by the step's relative size to this power.
    """

    tokens: Count = 2048
    micro_rows: Count | None = None
    schedule: Expression | None = None
    lr_power: Annotated[float, Field(ge=0.0, le=2.0)] = 0.5

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if self.schedule is None and self.lr_power != type(self).model_fields["lr_power"].default:
            raise ValueError(
                f"batch.lr_power={self.lr_power:g} has no effect without batch.schedule: leave one out, or give both."
            )
        return self

    def build(self, *, rows: int, micro_rows: int) -> BatchSizes:
        """Return the schedule of rows of a step.

        Args:
            rows: of a step of `tokens`.
            micro_rows: of a micro-batch; divides `rows`.
        """
        from hasten.data.lengths import BatchSizes

        if self.schedule is None:
            return BatchSizes(rows, micro_rows)
        from hasten.schedules import parse

        return BatchSizes(rows, micro_rows, growth=parse(self.schedule), lr_power=self.lr_power)


Lengths = Annotated[
    ConstantLengths | LinearLengths | StepsLengths | SqrtLengths | RootLengths | WindowLengths,
    Field(discriminator="name"),
]

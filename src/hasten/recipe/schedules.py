"""How the learning rate follows the progress of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hasten.duration import Duration
from hasten.errors import RecipeError
from hasten.recipe.fields import Choices, SpanOrNone

if TYPE_CHECKING:
    from hasten.schedules import Schedule


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


Schedules = Annotated[
    CosineChoices | LinearChoices | SqrtChoices | ConstantChoices,
    Field(discriminator="name"),
]

"""What a run does about steps that can only harm it, and which of them it looks for."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from hasten.guard import FEWEST, Guard
from hasten.recipe.fields import Choices, Count

Snapshot = Literal["memory", "disk"]


class NoGuardChoices(Choices):
    """Every step taken as it comes; a run whose loss or gradient is not finite for several steps has diverged.

    Args:
        patience: bad steps in a row after which the run goes back, or has diverged.
    """

    name: Literal["none"] = "none"
    patience: Annotated[int, Field(ge=1, le=1000)] = 3

    @property
    def snapshot(self) -> Snapshot:
        """Where a run would go back to: it never does."""
        return "memory"

    def build(self) -> Guard:
        """Return the guard."""
        return Guard(threshold=math.inf, patience=self.patience, max_rollbacks=0, is_active=False)


class FiniteChoices(Choices):
    """Steps left out whose loss or gradient is not finite; several in a row undone.

    Args:
        patience: bad steps in a row after which the run goes back, or has diverged.
        max_rollbacks: how often it goes back without recovery in between before it has diverged; 0: never.
        rate_factor: what the learning rate is multiplied by at every such try but the first.
        snapshot_every: steps between the states that it can go back to.
        snapshot: where they are kept; ``memory`` costs a copy of the weights and of the optimizer's state.
    """

    name: Literal["finite"] = "finite"
    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    max_rollbacks: Annotated[int, Field(ge=0, le=100)] = 3
    rate_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    snapshot_every: Count = 100
    snapshot: Snapshot = "memory"

    @model_validator(mode="after")
    def _acts(self) -> Self:
        fields = type(self).model_fields
        for key in ("rate_factor", "snapshot_every", "snapshot") if self.max_rollbacks == 0 else ():
            if getattr(self, key) != fields[key].default:
                raise ValueError(
                    f"guard.{key}={getattr(self, key)} has no effect with guard.max_rollbacks=0: leave one out."
                )
        return self

    def build(self) -> Guard:
        """Return the guard, which has seen nothing yet."""
        return self._guard(threshold=math.inf)

    def _guard(self, **rule: float) -> Guard:
        return Guard(
            patience=self.patience,
            max_rollbacks=self.max_rollbacks,
            lowering=self.rate_factor,
            snapshot_every=self.snapshot_every,
            **rule,
        )


class SpikesChoices(FiniteChoices):
    """Steps left out whose loss or gradient is not finite or a spike; several in a row undone.

    Args:
        threshold: deviations above the median that make a spike.
        window: accepted steps that are remembered.
    """

    name: Literal["spikes"] = "spikes"
    threshold: Annotated[float, Field(ge=3.0, le=1000.0)] = 8.0
    window: Annotated[int, Field(ge=FEWEST, le=4096)] = 128

    def build(self) -> Guard:
        """Return the guard, which has seen nothing yet."""
        return self._guard(threshold=self.threshold, window=self.window)


Guards = Annotated[SpikesChoices | FiniteChoices | NoGuardChoices, Field(discriminator="name")]

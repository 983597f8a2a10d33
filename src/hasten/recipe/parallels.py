"""How the processes that torchrun starts share a run: copies of the model, or parts of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hasten.recipe.fields import Choices


class DDPChoices(Choices):
    """A copy of the model in every process; gradients are averaged. One process without torchrun has the only one."""

    name: Literal["ddp"] = "ddp"

    @property
    def copies(self) -> int | None:
        """How many copies of the model there are; None: one in every process."""
        return None


class FSDPChoices(Choices):
    """Weights, gradients and optimizer state in parts, one in every process."""

    name: Literal["fsdp"] = "fsdp"

    @property
    def copies(self) -> int | None:
        """How many copies of the model there are: one over all processes."""
        return 1


class HSDPChoices(Choices):
    """Several copies of the model, each in parts over some of the processes.

    Args:
        copies: of the model; the number of processes is a multiple of it. Usually one on every machine.
    """

    name: Literal["hsdp"] = "hsdp"
    copies: Annotated[int, Field(ge=1, le=1 << 16)] = 2


Parallels = Annotated[DDPChoices | FSDPChoices | HSDPChoices, Field(discriminator="name")]

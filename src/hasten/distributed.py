"""Which of how many processes this one is, and what the processes of a run say to each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from hasten.errors import RunError, printable


@dataclass(frozen=True)
class World:
    """This process's `rank` among `size` processes.

    Args:
        rank: from 0 to `size` - 1.
        size: processes of the run, at least 1.

    Raises:
        RunError: no such rank.
    """

    rank: int
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise RunError(
                f"RANK={self.rank} is not one of WORLD_SIZE={self.size} processes; ranks count from 0. "
                "Start with torchrun, or unset both."
            )

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


class Ranks:
    """The processes of a run, as one of them sees the others; small plain values go from one to another.

    What is said here goes over gloo, between CPUs, so it never waits for a GPU. Every process has to make the same
    calls in the same order. Two threads need a `Ranks` each, with a group of its own.

    Args:
        world: which process this is.
        group: a gloo process group of all of them; None where it is alone, or for the default group.

    Example:
        >>> ALONE.share("done"), ALONE.from_main("go")
        (['done'], 'go')
    """

    def __init__(self, world: World, group: Any = None) -> None:
        self.rank, self.size, self.is_main = world.rank, world.size, world.is_main
        self._group = group

    def share(self, value: Any) -> list[Any]:
        """Return what every process gave, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def from_main(self, value: Any) -> Any:
        """Return what the first process gave."""
        return self.share(value if self.is_main else None)[0]

    def sums(self, values: list[float]) -> list[float]:
        """Return the sums of numbers over all processes: one all-reduce in float64."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()


ALONE = Ranks(World(0, 1))


def is_launched() -> bool:
    """Say whether something like ``torchrun`` started this process as one of a number."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def current() -> World:
    """Return the world that ``torchrun`` describes in the environment; alone without it.

    Raises:
        RunError: ``RANK`` or ``WORLD_SIZE`` is no number, or they do not fit together.

    Example:
        >>> World(rank=0, size=4).is_main
        True
    """
    return World(_whole_number("RANK", 0), _whole_number("WORLD_SIZE", 1))


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise RunError(
            f"{name}={printable(text)} is no whole number; start with torchrun, or unset RANK and WORLD_SIZE."
        ) from None

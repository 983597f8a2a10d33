"""Which of how many processes this one is."""

from __future__ import annotations

import os
from dataclasses import dataclass

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

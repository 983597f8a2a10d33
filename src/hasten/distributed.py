"""Which of how many processes this one is."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process's `rank` among `size` processes."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def current() -> World:
    """Return the world that ``torchrun`` describes in the environment; alone without it."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

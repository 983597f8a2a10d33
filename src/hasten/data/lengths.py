"""How long rows are, as a function of the progress of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hasten.errors import RecipeError


@dataclass(frozen=True)
class ConstantLength:
    """Rows of `seq_len` tokens throughout.

    Example:
        >>> ConstantLength(256)(0.5)
        256
    """

    seq_len: int

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise RecipeError(f"lengths.seq_len={self.seq_len} is no length; give at least 1.")

    def __call__(self, progress: float) -> int:
        """Return the tokens of a row at `progress` in [0, 1]."""
        return self.seq_len


LENGTHS: dict[str, Callable[..., ConstantLength]] = {"constant": ConstantLength}

"""How long rows are, and how far back a token may look, as functions of the progress of a run.

Short rows first: attention costs less, and long rows early make gradients noisy (Li et al., arXiv:2108.06084). The
tokens of a step stay the same under every schedule, so the learning rate needs no change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from hasten.data.order import order_key
from hasten.errors import RecipeError, nearest

# Steps that are looked at to say which lengths a run uses; more would only cost time.
SAMPLED_STEPS = 4096
_WORD = 1 << 64


def _linear(x: float, degree: float) -> float:
    return x


def _root(x: float, degree: float) -> float:
    return x ** (1.0 / degree)


GROWTHS: dict[str, Callable[[float, float], float]] = {
    "linear": _linear,
    "sqrt": _root,
    "root": _root,
    "steps": _linear,
}


@dataclass(frozen=True)
class LengthSchedule:
    """The tokens of a row at every progress: growing over the first `share` of a run, `seq_len` from then on.

    ``wanted = start + (seq_len - start) * growth(progress / share)``, brought down to the next member of `sizes`, so
    that compiled shapes stay few; ``steps`` holds every shorter size for an equal part of it instead. After that,
    `replay` of the steps read short rows again: which ones is a hash of (seed, step), so nothing needs to be stored.

    Args:
        seq_len: tokens of the longest row, which the model is made for.
        sizes: ascending lengths, each a divisor of `seq_len`, the last one `seq_len` itself.
        growth: ``constant``, ``linear``, ``sqrt``, ``root`` or ``steps``; or a function of ``progress / share`` in
            [0, 1] that returns one in [0, 1].
        share: of the run over which rows grow, in (0, 1].
        degree: of the root; 2 is the square root.
        replay: share of the later steps that read short rows again, in [0, 1).
        seed: of the replay.

    Raises:
        RecipeError: a length that is no divisor, or a share out of range.

    Example:
        >>> schedule = LengthSchedule(1024, (256, 512, 1024), growth="steps", share=0.6)
        >>> [schedule(progress) for progress in (0.0, 0.29, 0.3, 0.59, 0.6)]
        [256, 256, 512, 512, 1024]
    """

    seq_len: int
    sizes: tuple[int, ...] = ()
    growth: str | Callable[[float], float] = "constant"
    share: float = 0.6
    degree: float = 2.0
    replay: float = 0.0
    seed: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise RecipeError(f"lengths.seq_len={self.seq_len} is no length; give at least 1.")
        object.__setattr__(self, "sizes", self.sizes or (self.seq_len,))
        if self.sizes[-1] != self.seq_len or any(a >= b for a, b in zip(self.sizes, self.sizes[1:])):
            raise RecipeError(
                f"lengths.sizes={list(self.sizes)} must rise and end with lengths.seq_len={self.seq_len}."
            )
        for size in self.sizes:
            if size < 1 or self.seq_len % size:
                raise RecipeError(
                    f"A row length of {size} does not divide lengths.seq_len={self.seq_len}, so rows cannot be cut "
                    f"into whole ones: give divisors of {self.seq_len}, as {list(halvings(self.seq_len, 1))}."
                )
        if isinstance(self.growth, str) and self.growth not in ("constant", *GROWTHS):
            raise RecipeError(f"{self.growth!r} is no way for rows to grow{nearest(self.growth, GROWTHS)}.")
        if not 0.0 < self.share <= 1.0:
            raise RecipeError(f"lengths.over={self.share:.4g} of a run is outside (0, 1]: give a share such as 60%.")
        if not 0.0 <= self.replay < 1.0:
            raise RecipeError(f"lengths.replay={self.replay:g} is outside [0, 1): give a share of steps such as 0.1.")
        if not self.degree > 0:
            raise RecipeError(f"lengths.degree={self.degree:g} is no root: give a number above 0.")

    def __call__(self, progress: float, step: int = 0) -> int:
        """Return the tokens of a row at `progress` in [0, 1]; `step` decides only what is replayed."""
        if self.growth == "constant" or len(self.sizes) == 1:
            return self.seq_len
        if progress >= self.share:
            return self._replayed(step)
        x = max(progress, 0.0) / self.share
        if self.growth == "steps":
            return self.sizes[min(int(x * (len(self.sizes) - 1) + 1e-9), len(self.sizes) - 2)]
        grown = self.growth(x) if callable(self.growth) else GROWTHS[self.growth](x, self.degree)
        wanted = self.sizes[0] + (self.seq_len - self.sizes[0]) * grown
        return max((size for size in self.sizes if size <= wanted + 1e-9), default=self.sizes[0])

    def _replayed(self, step: int) -> int:
        if not self.replay:
            return self.seq_len
        drawn = order_key(self.seed, step, "replay") / _WORD
        if drawn >= self.replay:
            return self.seq_len
        return self.sizes[min(int(drawn / self.replay * (len(self.sizes) - 1)), len(self.sizes) - 2)]

    def realised(self, total_steps: int) -> dict[int, float]:
        """Return the share of a run's steps that each length gets, shortest first; lengths never used are absent."""
        stride = max(1, total_steps // SAMPLED_STEPS)
        steps = range(0, total_steps, stride)
        counts = Counter(self(step / total_steps, step) for step in steps)
        return {length: counts[length] / len(steps) for length in sorted(counts)}

    @cached_property
    def is_constant(self) -> bool:
        """Whether every row has the full length."""
        return self.growth == "constant" or len(self.sizes) == 1


@dataclass(frozen=True)
class WindowSchedule:
    """How many tokens back, itself included, a token may look: growing over the first `share` of a run.

    ``start + (seq_len - start) * progress / share``, then everything (None). Rows keep their full length.
    Source: SkyLadder, Zhu et al., arXiv:2503.15450.

    Args:
        seq_len: tokens of a row.
        start: of the window, 1 to `seq_len`.
        share: of the run over which the window grows, in [0, 1]; 0: it is never limited.

    Example:
        >>> window = WindowSchedule(1024, start=64, share=0.5)
        >>> window(0.0), window(0.25), window(0.5)
        (64, 544, None)
    """

    seq_len: int
    start: int = 0
    share: float = 0.0

    def __call__(self, progress: float) -> int | None:
        """Return the window at `progress` in [0, 1]; None where it is not limited."""
        if progress >= self.share:
            return None
        return math.floor(self.start + (self.seq_len - self.start) * max(progress, 0.0) / self.share + 1e-9)


@dataclass(frozen=True)
class BatchSizes:
    """Rows of a step at every progress: whole micro-batches, so that shapes stay the same.

    Args:
        rows: of a step where the schedule says 1, at least 1.
        micro_rows: of a micro-batch; divides `rows`.
        growth: factor of `rows` as a function of progress, in (0, 1].
        lr_power: the learning rate is multiplied by ``(rows now / rows) ** lr_power``; 0.5 follows the square-root
            rule for Adam-like optimizers (Malladi et al., arXiv:2205.10287), 0 leaves the rate alone.

    Example:
        >>> sizes = BatchSizes(32, 4, growth=lambda progress: 0.25 if progress < 0.5 else 1.0)
        >>> sizes(0.0), sizes(0.5), sizes.lr_factor(0.0), sizes.mean_rows
        (8, 32, 0.5, 20.0)
    """

    rows: int
    micro_rows: int = 1
    growth: Callable[[float], float] | None = None
    lr_power: float = 0.5

    def __call__(self, progress: float) -> int:
        """Return the rows of a step at `progress`."""
        if self.growth is None:
            return self.rows
        wanted = self.rows * self.growth(progress)
        return max(self.micro_rows, min(self.rows, math.floor(wanted / self.micro_rows + 1e-9) * self.micro_rows))

    def lr_factor(self, progress: float) -> float:
        """Return what the learning rate is multiplied by at `progress`."""
        return 1.0 if self.growth is None else (self(progress) / self.rows) ** self.lr_power

    @cached_property
    def mean_rows(self) -> float:
        """Rows of a step on average over a run."""
        if self.growth is None:
            return float(self.rows)
        points = SAMPLED_STEPS
        return sum(self((point + 0.5) / points) for point in range(points)) / points


def halvings(seq_len: int, start: int) -> tuple[int, ...]:
    """Return `seq_len` halved again and again while it stays whole and at least `start`, ascending.

    Example:
        >>> halvings(1024, 64), halvings(96, 20)
        ((64, 128, 256, 512, 1024), (24, 48, 96))
    """
    sizes = [seq_len]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= max(start, 1):
        sizes.append(sizes[-1] // 2)
    return tuple(reversed(sizes))

"""Many points as few: what a chart of a few hundred pixels can show of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 360


@dataclass(frozen=True)
class Thinned:
    """A series of at most `MAX_POINTS` bins: mean, lowest and highest of `per_bin` points each.

    `low` and `high` are None where nothing had to be thinned (`per_bin` 1).
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    per_bin: int


def thin(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> Thinned:
    """Return `y` over `x` with at most `max_points` bins; no spike is lost, since every bin keeps its extremes.

    A series of up to twice `max_points` stays as it is. Values that are not finite leave gaps.
    """
    y = np.where(np.isfinite(y), y, np.nan)
    if len(y) <= 2 * max_points:
        return Thinned(x, y, None, None, 1)
    starts = np.linspace(0, len(y), max_points + 1).astype(int)[:-1]
    known = np.isfinite(y)
    num_known = np.add.reduceat(known.astype(float), starts)
    total = np.add.reduceat(np.where(known, y, 0.0), starts)
    mean = np.divide(total, num_known, out=np.full(max_points, np.nan), where=num_known > 0)
    low = np.minimum.reduceat(np.where(known, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, y, -np.inf), starts)
    low, high = np.where(num_known > 0, low, np.nan), np.where(num_known > 0, high, np.nan)
    middle = np.add.reduceat(x, starts) / np.diff(np.append(starts, len(y)))
    return Thinned(middle, mean, low, high, round(len(y) / max_points))


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over `window` points around each point, fewer at the ends; points without a value stay so."""
    half = window // 2
    if half < 1 or len(y) < 3:
        return y
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    # At the start the window shrinks on both sides: a one-sided mean would bend the steep fall there.
    places = np.arange(len(y))
    reach = np.minimum(half, places)
    left, right = places - reach, np.minimum(places + reach + 1, len(y))
    number = counts[right] - counts[left]
    means = np.divide(sums[right] - sums[left], number, out=np.full(len(y), np.nan), where=number > 0)
    return np.where(known, means, np.nan)


def smoothing_window(num_points: int) -> int:
    """Return an odd window that takes the noise out of `num_points` and leaves the shape; 1 for short series."""
    return 1 if num_points < 40 else max(3, num_points // 40) | 1


@dataclass(frozen=True)
class Overlaid:
    """Several series as one: their mean, lowest and highest at the same places."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def overlay(series: Sequence[tuple[np.ndarray, np.ndarray]], points: int = 200) -> Overlaid | None:
    """Return several series `(x, y)` as one, over the stretch of x that every one of them covers.

    Between its points a series is a straight line; its values that are not finite are left out. None where a series
    has no point or where no stretch is covered by all.
    """
    known = []
    for x, y in series:
        finite = np.isfinite(x) & np.isfinite(y)
        order = np.argsort(x[finite], kind="stable")
        known.append((x[finite][order], y[finite][order]))
    if not known or any(not len(x) for x, _ in known):
        return None
    start, end = max(x[0] for x, _ in known), min(x[-1] for x, _ in known)
    if start > end:
        return None
    every = np.unique(np.concatenate([x for x, _ in known]))
    every = every[(every >= start) & (every <= end)]
    grid = every if len(every) <= points else np.linspace(start, end, points)
    values = np.stack([np.interp(grid, x, y) for x, y in known])
    return Overlaid(grid, values.mean(0), values.min(0), values.max(0))

"""What optimizer steps did, counted as plain data that a checkpoint holds.

A tally is a dict of what JSON knows, so that a run that was stopped goes on counting where it was. Counting a step is
arithmetic on a few numbers; nothing here touches a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1
# Gradient norms are counted in bins a sixteenth of a doubling wide: a quantile is then right to 2.2 %.
BINS_PER_DOUBLING = 16
SMALLEST_NORM = 2.0**-100


@dataclass(frozen=True)
class Seen:
    """What one optimizer step did.

    Args:
        targets: tokens that carried loss.  positions: tokens read, padding included.
        seq_len: of its rows.  micro_batches: that it was made of.  window: how far back a token looked, if limited.
        norm: of the gradient before clipping.  limit: the largest that the clip leaves, infinite where there is none.
        clipped, skipped: whether the gradient was changed, and whether the update was left out.
        loss_scale: 1 where none is used.
        groups: by the name of a parameter group, what its settings were in this step.
        looks: how often each thing was seen in a step that was looked at closely, by kind and name.
    """

    targets: int
    positions: int
    seq_len: int
    micro_batches: int
    window: int | None
    norm: float
    limit: float
    clipped: bool
    skipped: bool
    loss_scale: float
    groups: Mapping[str, Mapping[str, float]]
    looks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def empty() -> dict[str, Any]:
    """Return the tally of no step."""
    return {
        "format": FORMAT,
        "steps": 0,
        "targets": 0,
        "positions": 0,
        "lengths": {},
        "sizes": {},
        "micro_batches": {},
        "windows": {"limited": 0, "narrower": 0, "min": None, "max": None},
        "clip": {"clipped": 0, "above": 0},
        "norm": {"bins": {}, "max": 0.0, "broken": 0},
        "skipped": 0,
        "loss_scale": {"falls": 0, "rises": 0},
        "groups": {},
        "looks": {},
    }


def count(tally: dict[str, Any], seen: Seen) -> None:
    """Add a step to `tally`."""
    tally["steps"] += 1
    tally["targets"] += seen.targets
    tally["positions"] += seen.positions
    of_length = tally["lengths"].setdefault(str(seen.seq_len), [0, 0])
    of_length[0] += 1
    of_length[1] += seen.targets
    _add(tally["sizes"], seen.positions)
    _add(tally["micro_batches"], seen.micro_batches)
    if seen.window is not None:
        _count_window(tally["windows"], seen.window, seen.seq_len)
    _count_norm(tally["norm"], seen.norm)
    tally["clip"]["clipped"] += seen.clipped
    tally["clip"]["above"] += seen.limit < seen.norm < math.inf
    tally["skipped"] += seen.skipped
    scale = tally["loss_scale"]
    before = scale.get("last", seen.loss_scale)
    scale["falls"] += seen.loss_scale < before
    scale["rises"] += seen.loss_scale > before
    _spread(scale, seen.loss_scale)
    for name, settings in seen.groups.items():
        group = tally["groups"].setdefault(name, {})
        for setting, value in settings.items():
            _spread(group.setdefault(setting, {}), value)
    for kind, counts in seen.looks.items():
        known = tally["looks"].setdefault(kind, {})
        for name, number in counts.items():
            known[name] = known.get(name, 0) + number


def quantile(tally: Mapping[str, Any], share: float) -> float | None:
    """Return the gradient norm below which `share` of the steps were, to 2.2 %; None where there was no step.

    Example:
        >>> tally = empty()
        >>> for norm in (1.0, 2.0, 4.0):
        ...     _count_norm(tally["norm"], norm)
        >>> round(quantile(tally, 0.5), 1)
        2.0
    """
    bins = {int(number): steps for number, steps in tally["norm"]["bins"].items()}
    wanted, done = share * sum(bins.values()), 0
    for number in sorted(bins):
        done += bins[number]
        if done >= wanted:
            return float(min(2.0 ** ((number + 0.5) / BINS_PER_DOUBLING), tally["norm"]["max"]))
    return None


def _add(counts: dict[str, int], value: int) -> None:
    counts[str(value)] = counts.get(str(value), 0) + 1


def _count_window(windows: dict[str, Any], window: int, seq_len: int) -> None:
    windows["limited"] += 1
    windows["narrower"] += window < seq_len
    reach = min(window, seq_len)
    windows["min"] = reach if windows["min"] is None else min(windows["min"], reach)
    windows["max"] = reach if windows["max"] is None else max(windows["max"], reach)


def _count_norm(norms: dict[str, Any], norm: float) -> None:
    if not math.isfinite(norm):
        norms["broken"] += 1
        return
    norms["max"] = max(norms["max"], norm)
    place = str(math.floor(BINS_PER_DOUBLING * math.log2(max(norm, SMALLEST_NORM))))
    norms["bins"][place] = norms["bins"].get(place, 0) + 1


def _spread(spread: dict[str, float], value: float) -> None:
    """Note first, least, greatest and last value."""
    if "first" not in spread:
        spread.update(first=value, min=value, max=value, last=value)
        return
    if value < spread["min"]:
        spread["min"] = value
    elif value > spread["max"]:
        spread["max"] = value
    spread["last"] = value

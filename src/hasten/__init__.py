"""hasten: train language models to a given loss in a fraction of the time, and measure what each technique is worth."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.comparison import compare
    from hasten.errors import CheckpointError, DataError, HastenError, RecipeError, RunError
    from hasten.evaluation import evaluate
    from hasten.exports import export
    from hasten.generation import generate
    from hasten.loop import advance, start, train
    from hasten.optim import optimizer
    from hasten.planning.plans import plan
    from hasten.recipe import resolve
    from hasten.restarts import restart

__version__ = "0.1.0"

# Public name -> module it comes from. Nothing is imported before it is asked for.
_HOMES = {
    "CheckpointError": "hasten.errors",
    "DataError": "hasten.errors",
    "HastenError": "hasten.errors",
    "RecipeError": "hasten.errors",
    "RunError": "hasten.errors",
    "advance": "hasten.loop",
    "compare": "hasten.comparison",
    "evaluate": "hasten.evaluation",
    "export": "hasten.exports",
    "generate": "hasten.generation",
    "optimizer": "hasten.optim",
    "plan": "hasten.planning.plans",
    "resolve": "hasten.recipe",
    "restart": "hasten.restarts",
    "start": "hasten.loop",
    "train": "hasten.loop",
}

__all__ = [
    "CheckpointError",
    "DataError",
    "HastenError",
    "RecipeError",
    "RunError",
    "advance",
    "compare",
    "evaluate",
    "export",
    "generate",
    "optimizer",
    "plan",
    "resolve",
    "restart",
    "start",
    "train",
]


# Rooms of parts, for ``hasten.optim.Lion`` after nothing but ``import hasten``.
_ROOMS = ("clip", "data", "optim", "schedules")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"hasten.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])

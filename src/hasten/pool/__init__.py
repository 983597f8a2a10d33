"""Runs side by side: a job is a command with a log, an engine is where jobs run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from hasten.errors import RecipeError, nearest, printable
from hasten.pool import local, ray
from hasten.pool.job import Engine, Job, Outcome, Places, last_words, train_command, wait_until_free
from hasten.pool.local import LOCAL, num_cores, places, run_all

__all__ = [
    "ENGINES",
    "LOCAL",
    "Engine",
    "Job",
    "Outcome",
    "Places",
    "last_words",
    "num_cores",
    "open_engine",
    "places",
    "run_all",
    "train_command",
    "wait_until_free",
]


def open_engine(name: str) -> AbstractContextManager[Engine]:
    """Return a context with the engine of that name; what it starts for itself ends with the context.

    Args:
        name: a key of `ENGINES`.

    Raises:
        RecipeError: there is none of that name.
        RunError: on entering, it cannot be used here; says why.

    Example:
        >>> with open_engine("local") as engine:
        ...     engine.places("cpu", 2, 1)
        Places(workers=2, threads=1, gpus=0, memory_bytes=None)
    """
    if name not in ENGINES:
        raise RecipeError(
            f"engine={printable(name)!r} is no engine{nearest(name, ENGINES)}; there are {', '.join(sorted(ENGINES))}."
        )
    return ENGINES[name]()


ENGINES: dict[str, Callable[[], AbstractContextManager[Engine]]] = {"local": local.opened, "ray": ray.opened}

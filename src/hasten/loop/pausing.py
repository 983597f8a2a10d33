"""Where a run is asked to pause: a step or a share of a horizon that is known before the first step."""

from __future__ import annotations

from hasten.duration import Duration
from hasten.errors import RecipeError, printable
from hasten.recipe import Recipe


def pause_point(until: str | int, recipe: Recipe) -> Duration:
    """Return the point that `until` names: optimizer steps, or a share of the run.

    Raises:
        RecipeError: it names neither, or the run has a wall-clock budget, whose horizon moves.
    """
    point = Duration.parse(until, positive=True)
    if point.unit not in ("steps", "share"):
        raise RecipeError(f"until={printable(str(until))} is neither steps nor a share: give until=500 or until=25%.")
    if recipe.budget.unit == "seconds":
        raise RecipeError(
            f"until={point} needs a horizon that does not move, and budget={recipe.budget} is a time: give a budget in "
            "steps, tokens or epochs."
        )
    return point


def pause_step(point: Duration, total_steps: int) -> int:
    """Return the optimizer step at which a run of `total_steps` pauses: at least 1, at most the last.

    Example:
        >>> pause_step(Duration.parse("25%"), 10), pause_step(Duration.parse(500), 10)
        (3, 10)
    """
    steps = point.to_steps(total_steps=total_steps, tokens_per_step=1)
    return min(max(steps, 1), total_steps)

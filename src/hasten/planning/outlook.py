"""The curves of a recipe over its run, and what else is known of it without its data: pure data, nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hasten.duration import Duration
from hasten.errors import RecipeError
from hasten.recipe import Recipe
from hasten.schedules import Schedule, findings

# Moments of a run that are looked at; a run of fewer steps is looked at after every one of them.
POINTS = 1000
# Stands for the steps of a run, and of an epoch, whose number is not known: only shares of it are asked for.
UNKNOWN_STEPS, UNKNOWN_EPOCH = 10**9, 10**6


@dataclass(frozen=True)
class Curve:
    """One quantity over a run.

    Args:
        name: of the quantity: ``learning rate``, ``row length``, ...
        label: of the recipe, where several are compared.
        progress: in [0, 1], rising.
        values: at each of those.
        total_steps: of the run; None while it is not known, so that only shares of it are.
        by_steps: whether a value holds until the next one, as a row length does.
        tokens: read by then, rising; None while not known.
    """

    name: str
    label: str
    progress: tuple[float, ...]
    values: tuple[float, ...]
    total_steps: int | None = None
    by_steps: bool = False
    tokens: tuple[float, ...] | None = None


def known_steps(recipe: Recipe) -> int | None:
    """Return the optimizer steps of a run; None where the data or the speed decides.

    Example:
        >>> from hasten.recipe import resolve
        >>> known_steps(resolve(None, ["budget=20ktok", "batch_tokens=2048"]).recipe)
        10
    """
    if recipe.budget.unit not in ("steps", "tokens"):
        return None
    return recipe.budget.to_steps(total_steps=None, tokens_per_step=_tokens_per_step(recipe))


def curves(
    recipe: Recipe,
    total_steps: int | None = None,
    *,
    label: str = "",
    lengths: Callable[[float], float] | None = None,
    rows: Callable[[float], float] | None = None,
    utilisation: float = 1.0,
) -> tuple[Curve, ...]:
    """Return what a run of `recipe` does over its progress, the learning rate first.

    Always: learning rate, row length, tokens of a step; weight decay, momentum and betas where they are scheduled,
    the attention window where it grows.

    Args:
        recipe: every choice of the run.
        total_steps: of the run; None: taken from the recipe's budget, or unknown.
        label: of the recipe, where several are compared.
        lengths: tokens of the longest row at a progress; None: the recipe's.
        rows: full rows of a step at a progress; None: the recipe's.
        utilisation: share of the positions that carry loss, above 0: these are the tokens that are counted.

    Raises:
        RecipeError: a span of the recipe is counted in steps or tokens, and the run's steps are not known.

    Example:
        >>> from hasten.recipe import resolve
        >>> recipe = resolve(None, ["budget=100", "schedule=linear", "schedule.warmup=10", "lr=0.01"]).recipe
        >>> rate = curves(recipe)[0]
        >>> rate.name, rate.values[0], rate.values[10], rate.values[100]
        ('learning rate', 0.0001, 0.01, 0.0001)
    """
    total_steps = known_steps(recipe) if total_steps is None else total_steps
    run = _run(recipe, total_steps)
    schedules = recipe.schedule.build_all(**run)
    sizes = recipe.batch.build(rows=recipe.rows_per_step, micro_rows=recipe.batch.micro_rows or 1)
    seq_len, optimizer = recipe.lengths.seq_len, recipe.optimizer
    rows = rows or sizes
    number = min(total_steps or POINTS, POINTS)
    progress = tuple(point / number for point in range(number + 1))
    tokens = _tokens(rows, number, total_steps, seq_len * utilisation) if total_steps else None

    def curve(name: str, value: Callable[[float], float], *, by_steps: bool = False) -> Curve:
        return Curve(name, label, progress, tuple(value(x) for x in progress), total_steps, by_steps, tokens)

    found = [curve("learning rate", lambda x: optimizer.lr * schedules["lr"](x) * sizes.lr_factor(x))]
    for name, initial in _initial(optimizer):
        if name in schedules:
            found.append(curve(name.replace("_", " "), lambda x, n=name, v=initial: v * schedules[n](x)))
    found.append(curve("row length", lengths or recipe.lengths.build(seed=recipe.seed, **run), by_steps=True))
    found.append(curve("tokens of a step", lambda x: rows(x) * seq_len, by_steps=True))
    window = recipe.lengths.build_window(**run)
    if window(0.0) is not None:
        found.append(curve("attention window", lambda x: window(x) or seq_len))
    return tuple(found)


def _tokens(rows: Callable[[float], float], number: int, total_steps: int, tokens_of_row: float) -> tuple[float, ...]:
    """Return the tokens read after each of `number` equal parts of a run: step for step where a part is a step."""
    place = 0.0 if number == total_steps else 0.5
    of_part = tokens_of_row * total_steps / number
    return tuple(accumulate((of_part * rows((part + place) / number) for part in range(number)), initial=0.0))


def facts(recipe: Recipe, total_steps: int | None = None) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Return what is known of a run before its data is read: pairs of a name and a text, and what is doubtful.

    Args:
        recipe: every choice of the run.
        total_steps: of the run; None: taken from the recipe's budget, or unknown.

    Raises:
        RecipeError: as `curves`.
    """
    total_steps = known_steps(recipe) if total_steps is None else total_steps
    run = _run(recipe, total_steps)
    schedules = recipe.schedule.build_all(**run)
    lengths = recipe.lengths.build(seed=recipe.seed, **run)
    rate, per_step = schedules["lr"], _tokens_per_step(recipe)
    where = {"seconds": "as many as fit the time", "epochs": "as many as the data gives"}
    said = [
        ("budget", spoken(recipe.budget)),
        ("steps", f"{total_steps:,}" if total_steps else where[recipe.budget.unit]),
        ("tokens", f"{total_steps * per_step:,.0f}" if total_steps else f"{per_step:,.0f} a step"),
        ("batch", f"{counted(recipe.rows_per_step, 'row')} of {counted(recipe.lengths.seq_len, 'token')} a step"),
        ("warm-up", _warmup(rate, total_steps)),
        ("learning rate", _rates(curves(recipe, total_steps)[0])),
    ]
    said += [(f"  {name.replace('_', ' ')}", repr(schedule)) for name, schedule in schedules.items()]
    said[-len(schedules)] = ("  schedule", repr(rate))
    realised = lengths.realised(total_steps or POINTS)
    said.append(("row length", ", ".join(f"{length} ({share:.0%})" for length, share in realised.items())))
    doubts = findings(rate, total_steps or UNKNOWN_STEPS)
    for name, schedule in list(schedules.items())[1:]:
        doubts += findings(schedule, total_steps or UNKNOWN_STEPS, what=name)
    return said, doubts


def spoken(budget: Duration) -> str:
    """Return a budget with its unit.

    Example:
        >>> spoken(Duration(1, "steps")), spoken(Duration(100, "steps")), spoken(Duration(60, "seconds"))
        ('1 step', '100 steps', '1min')
    """
    return f"{budget} {'step' if budget.value == 1 else 'steps'}" if budget.unit == "steps" else str(budget)


def counted(number: int, what: str) -> str:
    """Return a number of things, one of them in the singular.

    Example:
        >>> counted(1, "document"), counted(1200, "row")
        ('1 document', '1,200 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _initial(optimizer: Any) -> Iterator[tuple[str, float]]:
    """Yield the settings that can be scheduled beside the learning rate, with what the recipe sets them to."""
    values = optimizer.model_dump()
    for name in ("weight_decay", "momentum"):
        if name in values:
            yield name, values[name]
    for place, beta in enumerate(values.get("betas", ())[:2], 1):
        yield f"beta{place}", beta


def _warmup(schedule: Schedule, total_steps: int | None) -> str:
    first = schedule.parts[0]
    if not first.piece.rises:
        return "none"
    share = first.end - first.begin
    part = f"{100 * share:.3g}% of the run"
    if not total_steps:
        return part
    steps = f"{share * total_steps:,.4g}"
    return f"{steps} {'step' if steps == '1' else 'steps'}, {part}"


def _rates(curve: Curve) -> str:
    first, *_, last = curve.values
    return f"{first:.3g} at first, {max(curve.values):.3g} at most, {last:.3g} at the end"


def _tokens_per_step(recipe: Recipe) -> int:
    sizes = recipe.batch.build(rows=recipe.rows_per_step, micro_rows=recipe.batch.micro_rows or 1)
    return round(sizes.mean_rows * recipe.lengths.seq_len)


def _run(recipe: Recipe, total_steps: int | None) -> dict[str, Any]:
    """Return what the schedules of a recipe are built from."""
    budget = recipe.budget
    if total_steps is None:
        _refuse_counted_spans(recipe)
    in_epochs = total_steps is None and budget.unit == "epochs"
    return {
        "total_steps": total_steps or (budget.value * UNKNOWN_EPOCH if in_epochs else UNKNOWN_STEPS),
        "tokens_per_step": _tokens_per_step(recipe),
        "steps_per_epoch": UNKNOWN_EPOCH if in_epochs else None,
        "seconds": budget.value if budget.unit == "seconds" else None,
    }


def _refuse_counted_spans(recipe: Recipe) -> None:
    """A run whose steps are not known has no share for a span of steps."""
    allowed = {"share", recipe.budget.unit}
    for table in ("schedule", "lengths"):
        choices = getattr(recipe, table)
        for key in type(choices).model_fields:
            span = getattr(choices, key)
            if isinstance(span, Duration) and span.value > 0 and span.unit not in allowed:
                raise RecipeError(
                    f"{table}.{key}={span} is no known share of a run of budget={recipe.budget}: give it in percent, "
                    "or give a budget in steps or tokens."
                )

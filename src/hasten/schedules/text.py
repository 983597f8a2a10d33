"""The text form of a schedule: what its ``repr`` prints, read back without running anything."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from hasten.errors import RecipeError, nearest, printable
from hasten.schedules.curves import SCHEDULES, cooldown, hold, warmup, wsd
from hasten.schedules.pieces import Schedule

NAMES: dict[str, Callable[..., Schedule]] = {
    **SCHEDULES,
    "cooldown": cooldown,
    "hold": hold,
    "trapezoid": wsd,
    "warmup": warmup,
}
LONGEST = 2000
_AS = "write it as warmup(0.1, start=0.1) | cosine(floor=0.01)"


def parse(text: str) -> Schedule:
    """Return the schedule that `text` describes: calls of known names joined with ``|``.

    Arguments are numbers, texts, None and tuples of those. Nothing is evaluated: the text is taken apart by `ast`, and
    anything else in it is refused. ``parse(repr(schedule)) == schedule`` for every schedule.

    Raises:
        RecipeError: the text is no schedule, or a number in it is out of range.

    Example:
        >>> parse("warmup(0.1, start=0.1) | cosine(floor=0.01)")
        warmup(0.1, start=0.1) | cosine(floor=0.01)
    """
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(f"{text!r} is no schedule: {_AS}.")
    if len(text) > LONGEST:
        raise RecipeError(f"A schedule of {len(text)} characters is too long to be one; give at most {LONGEST}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser: what it doubts is refused below
            tree = ast.parse(f"(\n{text}\n)", mode="eval")  # in brackets a line may end anywhere
        return _schedule(tree.body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecipeError(f"{_shown(text)} cannot be read as a schedule: {_AS}.") from None


def _schedule(node: ast.expr, text: str) -> Schedule:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _schedule(node.left, text) | _schedule(node.right, text)
    if isinstance(node, ast.Name) and node.id in NAMES:
        raise RecipeError(f"{node.id} in {_shown(text)} lacks its brackets: write {node.id}(...).")
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise RecipeError(f"{_source(node)} in {_shown(text)} is no schedule: {_AS}.")
    name = node.func.id
    if name not in NAMES:
        raise RecipeError(
            f"{name!r} in {_shown(text)} is no schedule{nearest(name, NAMES)}; there are {', '.join(sorted(NAMES))}."
        )
    signature = inspect.signature(NAMES[name])
    settings = {}
    for keyword in node.keywords:
        if keyword.arg not in signature.parameters:
            known = [key for key, given in signature.parameters.items() if given.kind != given.VAR_POSITIONAL]
            near = nearest(str(keyword.arg), known)
            raise RecipeError(f"{name} has no {keyword.arg!r}{near}; it has {', '.join(known)}.")
        settings[keyword.arg] = _value(keyword.value, text)
    arguments = [_value(argument, text) for argument in node.args]
    try:
        signature.bind(*arguments, **settings)
    except TypeError as error:
        raise RecipeError(f"{_source(node)} cannot be read: {error}; it is {name}{_spoken(signature)}.") from None
    return NAMES[name](*arguments, **settings)


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant) and (node.value is None or type(node.value) in (int, float, str)):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item, text) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = _value(node.operand, text)
        if type(number) in (int, float):
            return -number if isinstance(node.op, ast.USub) else number
    raise RecipeError(
        f"{_source(node)} in {_shown(text)} cannot be given to a schedule: give numbers, texts or tuples of them."
    )


def _spoken(signature: inspect.Signature) -> str:
    """Return a signature without its annotations."""
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _source(node: ast.expr) -> str:
    return _shown(ast.unparse(node))


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(printable(text if len(text) <= 80 else text[:77] + "..."))

"""What the tables of a recipe are made of: strict, frozen, and the kinds of value that several keys share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator

from hasten.duration import Duration
from hasten.errors import HastenError
from hasten.recipe.schema import Expected


class Choices(BaseModel):
    """A table of settings: strict, frozen, without unknown keys, without infinities."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _duration(value: Any, *, positive: bool) -> Duration:
    if isinstance(value, bool) or not isinstance(value, (int, str, Duration)):
        raise ValueError("expected a duration such as 2000 (steps), 5%, 20Mtok, 60s, 15min, 2h or 1ep.")
    try:
        # Twice, because text carries twelve digits: what is read back from a saved recipe is then the same value.
        parsed = Duration.parse(str(value), positive=positive)
        return Duration.parse(str(parsed), positive=positive)
    except HastenError as error:
        raise ValueError(str(error)) from None


def _positive_duration(value: Any) -> Duration:
    return _duration(value, positive=True)


def _any_duration(value: Any) -> Duration:
    return _duration(value, positive=False)


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple: TOML and JSON have only lists, a frozen value only tuples."""
    return tuple(value) if isinstance(value, list) else value


def _as_sources(value: Any) -> Any:
    """One source is text, several are a tuple, whether they came as a list or not: equal choices are equal recipes."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else tuple(value)
    return value


_EXAMPLES = "a duration such as 2000 (steps), 5%, 20Mtok, 60s, 15min, 2h or 1ep"
Text = Annotated[str, Field(min_length=1)]
Span = Annotated[Duration, PlainValidator(_positive_duration), PlainSerializer(str), Expected(_EXAMPLES)]
SpanOrNone = Annotated[Duration, PlainValidator(_any_duration), PlainSerializer(str), Expected(_EXAMPLES)]
Sources = Annotated[
    Text | Annotated[tuple[Text, ...], Field(min_length=1)],
    BeforeValidator(_as_sources),
    Expected("a built-in corpus, a file, a folder, a glob, '-', or a list of those"),
]
Count = Annotated[int, Field(ge=1, le=2**40)]

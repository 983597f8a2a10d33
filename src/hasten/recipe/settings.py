"""Nested settings as people give them: text and mappings read, put over one another, and refused in one sentence."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hasten.errors import RecipeError, nearest, one_line
from hasten.recipe.names import ON_COMMAND_LINE, Given
from hasten.recipe.schema import Schema, takes

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

_NUMBER = re.compile(r"[+-]?(\d[\d_]*)?\.?\d*(e[+-]?\d+)?", re.IGNORECASE)


# Reading


def read_toml(text: str, origin: str) -> list[Given]:
    """Return the settings of a TOML document, tables flattened to dotted keys.

    Raises:
        RecipeError: the text is not TOML; says where.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # Also numbers of thousands of digits, and thousands of brackets.
        raise RecipeError(f"The text {origin} is not TOML: {one_line(str(error))}.") from None
    return read_mapping(tables, origin)


def read_mapping(settings: Mapping[str, Any], origin: str) -> list[Given]:
    """Return the settings of a nested mapping, its keys plain or dotted."""
    return [
        Given(_normal(key), value, None, key, origin)
        for key, value in _flat(settings)
        if not isinstance(value, Mapping)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", os.fspath(value) if isinstance(value, os.PathLike) else value


def read_overrides(overrides: Sequence[str]) -> list[Given]:
    """Return the settings of ``key=value`` texts: the value is TOML where it can be read as such, else bare text.

    Raises:
        RecipeError: a text without ``=`` or key, or a list that is not TOML.

    Example:
        >>> [(given.key, given.value) for given in read_overrides(["lr=3e-4", "data=my file.txt"])]
        [('lr', 0.0003), ('data', 'my file.txt')]
    """
    givens = []
    for text in overrides:
        name, equals, raw = text.partition("=")
        name, raw = name.strip(), raw.strip()
        if not equals or not name:
            raise RecipeError(f"{one_line(text)!r} is not a setting: write key=value, as in lr=3e-4 or budget=60s.")
        if not raw:
            raise RecipeError(f"{one_line(name)} has no value: write {one_line(name)}=VALUE.")
        value = _value(raw, name)
        if isinstance(value, Mapping):
            givens += [
                replace(inner, name=f"{name}.{inner.name}", key=_normal(f"{name}.{inner.key}"))
                for inner in read_mapping(value, ON_COMMAND_LINE)
            ]
        else:
            givens.append(Given(_normal(name), value, raw, name))
    return givens


def _normal(key: str) -> str:
    return key.lstrip("-").replace("-", "_")


def _value(raw: str, name: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        parsed = {}
    if set(parsed) == {"value"} and isinstance(parsed["value"], (bool, int, float, str, list, dict)):
        return parsed["value"]
    if raw.startswith("[") and raw.endswith("]") and "," in raw:
        numbers = [item.strip() for item in raw[1:-1].split(",")]
        if all(re.match(r"[+-]?\.?\d", item) and _NUMBER.fullmatch(item) for item in numbers):  # TOML has no `.5`.
            return [float(item) for item in numbers]
        items = ", ".join(f'"{item.strip()}"' for item in raw[1:-1].split(","))
        raise RecipeError(
            f"{one_line(f'{name}={raw}')} looks like a list but its items are not quoted: "
            f"write {one_line(f'{name}=[{items}]')} (in a shell, inside single quotes)."
        )
    if re.match(r"[+-]?\.?\d", raw) and _NUMBER.fullmatch(raw):  # TOML has no `.5`, `1.` or `007`.
        number = float(raw)
        return int(number) if number.is_integer() and raw.lstrip("+-").isdigit() else number
    return raw


# Putting one layer over another


def combine(schema: Schema, layers: Sequence[Sequence[Given]], more_names: Mapping[str, str]) -> dict[str, Any]:
    """Return one nested mapping of `layers`, later over earlier, values of text layers brought to their key's type.

    A table that changes its `name` keeps the keys that the new one has too, and drops those that only repeat the old
    one's defaults: ``optimizer=lion`` over a recipe that writes AdamW's default rate out takes Lion's.

    Raises:
        RecipeError: an unknown key, a key given twice in one layer, or a key that the chosen variant has no use for.
    """
    merged: dict[str, tuple[int, Given]] = {}
    names_by_layer: list[dict[str, str]] = []
    names = dict(schema.default_names)
    for number, layer in enumerate(layers):
        here: dict[str, Given] = {}
        for given in layer:
            given = _settled(schema, given, more_names, names)
            if given.key in here:
                raise RecipeError(f"{given.key} is given twice, as {here[given.key]} and as {given}; keep one.")
            here[given.key] = given
        merged.update({key: (number, given) for key, given in here.items()})
        names = {**names, **{table: here[f"{table}.name"].value for table in names if f"{table}.name" in here}}
        names_by_layer.append(names)
    for table in schema.tables:
        if schema.has_variants(table):
            _refuse_unused(schema, table, merged, names_by_layer)
    nested: dict[str, Any] = {table: {"name": names[table]} for table in schema.tables if names[table]}
    for key, (_, given) in merged.items():
        table, _, leaf = key.partition(".")
        if leaf:
            nested.setdefault(table, {})[leaf] = given.value
        else:
            nested[table] = given.value
    return nested


def _settled(schema: Schema, given: Given, more_names: Mapping[str, str], chosen: Mapping[str, str]) -> Given:
    """Return `given` with the full key of a leaf and a value of that leaf's kind."""
    if given.key in schema.tables:
        siblings = [key for key in schema.leaves if key.startswith(given.key + ".")]
        if f"{given.key}.name" not in siblings or not isinstance(given.value, str):
            raise RecipeError(f"{given} sets a whole table: name one of its keys, {', '.join(siblings)}.")
        given = replace(given, key=f"{given.key}.name")
    if given.key not in schema.leaves:
        raise schema.unknown(given, more_names, chosen)
    table, _, leaf = given.key.rpartition(".")
    names = schema.names(table) if leaf == "name" else []
    if isinstance(given.value, str) and given.value not in names and given.value.lower() in names:
        given = replace(given, value=given.value.lower(), raw=None)  # Muon, as the class is called.
    if leaf == "name" and given.value not in names:
        shown = given.raw if given.raw is not None else given.value
        near = nearest(str(shown), names)
        raise RecipeError(
            f"{_shown(given.key, given.value, given)}: expected {schema.expected(given.key)}{near or '.'}"
        )
    fields = list(schema.leaves[given.key].values())
    return given if given.raw is None else replace(given, value=_typed(given.value, given.raw, fields[0]))


def _typed(value: Any, raw: str, field: FieldInfo) -> Any:
    """Bring what was typed at a command line to the kind its key takes: `out=7` is text, `lr=.1` a number."""
    if raw.lower() == "none" and takes(field, type(None)):
        return None
    if takes(field, str):
        return value if isinstance(value, (str, list)) else raw
    if takes(field, bool) and raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    if takes(field, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _refuse_unused(
    schema: Schema, table: str, merged: dict[str, tuple[int, Given]], names_by_layer: Sequence[Mapping[str, str]]
) -> None:
    """Drop keys of another variant that only repeat its defaults; refuse the others."""
    name = names_by_layer[-1][table] if names_by_layer else schema.default_names[table]
    fields = schema.tables[table][name].model_fields
    for key, (layer, given) in list(merged.items()):
        leaf = key.partition(".")[2]
        if key.partition(".")[0] != table or leaf == "name":
            continue
        old = names_by_layer[layer][table]
        # What only repeats the default of the old variant was no choice: the new variant has its own.
        if old != name and _repeats_default(schema, key, old, given.value):
            del merged[key]
            continue
        if leaf in fields:
            continue
        chosen = merged.get(f"{table}.name")
        by = f"{chosen[1]} {chosen[1].origin}" if chosen else f"the default {table}={name!r}"
        owners = " or ".join(repr(variant) for variant in schema.leaves[key])
        raise RecipeError(
            f"{_shown(key, given.value, given)} has no meaning for {by}: it belongs to {table}={owners}; "
            f"choose one of those or leave {key} out."
        )


def _repeats_default(schema: Schema, key: str, variant: str, value: Any) -> bool:
    return variant in schema.leaves[key] and _same(value, schema.default(key, variant))


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    return type(value) is not bool and (value == default or str(value) == str(default))


# Refusing


def sentence(error: ValidationError, schema: Schema, layers: Sequence[Sequence[Given]]) -> RecipeError:
    """Return the first thing that `error` found wrong as one sentence with key, value and expectation."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if isinstance(part, str)]
    told = str(first["ctx"]["error"]) if first["type"] == "value_error" else ""
    table = location[0] if location else ""
    key = next((f"{table}.{leaf}" for leaf in location[1:] if f"{table}.{leaf}" in schema.leaves), table)
    variant = next((part for part in location[1:] if part in schema.tables.get(table, ())), "")
    if key not in schema.leaves:
        return RecipeError(told or f"{table or 'The recipe'}: {first['msg']}.")
    given = next((g for layer in reversed(layers) for g in layer if g.key in (key, table)), None)
    value = first["input"] if given is None else given.value
    if told:
        return RecipeError(f"{key}: {told}" if given is None else f"{_shown(key, value, given)}: {told}")
    return RecipeError(f"{_shown(key, value, given)}: expected {schema.expected(key, variant)}.")


def _shown(key: str, value: Any, given: Given | None) -> str:
    if given is None:
        return f"{key}={one_line(repr(value))}"
    name = _normal(given.name)
    is_short_form = key.endswith(f".{name}") or key.startswith(f"{name}.") or name == key
    typed = "" if is_short_form or not name else f" (given as {one_line(given.name)})"
    where = "" if given.origin == ON_COMMAND_LINE else f" {given.origin}"
    return f"{key}={replace(given, value=value).shown()}{typed}{where}"


def without_none(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables without what is None, which TOML cannot write; every such key of a recipe defaults to None.

    Example:
        >>> without_none({"out": None, "batch": {"tokens": 512, "schedule": None}})
        {'batch': {'tokens': 512}}
    """
    return {
        key: without_none(value) if isinstance(value, Mapping) else value
        for key, value in tables.items()
        if value is not None
    }

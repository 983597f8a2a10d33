"""The keys of a settings model, read off its types: which tables and variants there are, and what each key takes.

Works for any pydantic model whose fields are either plain values (leaves) or tables of leaves; a table can have
variants told apart by `name`. It knows nothing of what the settings mean.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hasten.errors import RecipeError, nearest, one_line
from hasten.recipe.names import Given


@dataclass(frozen=True)
class Expected:
    """Metadata of a field: what to say was expected, where the annotation alone does not say it well."""

    text: str


class Schema:
    """The keys of a settings model: which tables, which variants, which leaves."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.tables: dict[str, dict[str, type[BaseModel]]] = {}
        self.leaves: dict[str, dict[str, FieldInfo]] = {}
        self.default_names: dict[str, str] = {}
        for name, field in model.model_fields.items():
            variants = _variants(field.annotation)
            if not variants:
                self.leaves[name] = {"": field}
                continue
            self.tables[name] = variants
            default = field.get_default(call_default_factory=True)
            self.default_names[name] = getattr(default, "name", "")
            for variant, table in variants.items():
                for leaf, leaf_field in table.model_fields.items():
                    self.leaves.setdefault(f"{name}.{leaf}", {})[variant] = leaf_field

    def knows(self, key: str) -> bool:
        """Say whether `key` is a leaf or a table."""
        return key in self.leaves or key in self.tables

    def variant(self, table: str, name: str) -> str:
        """Return the key of `tables[table]` that a table called `name` uses."""
        return name if name in self.tables[table] else next(iter(self.tables[table]))

    def has_variants(self, table: str) -> bool:
        return len(self.tables[table]) > 1

    def names(self, table: str) -> list[str]:
        """Return every name that a table can have."""
        if self.has_variants(table):
            return list(self.tables[table])
        field = self.leaves.get(f"{table}.name")
        return list(get_args(field[""].annotation)) if field else []

    def default(self, key: str, name: str = "") -> Any:
        """Return the default of a leaf, in the variant called `name` where there are several."""
        fields = self.leaves[key]
        table = key.partition(".")[0]
        wanted = name or self.default_names.get(table, "")
        return fields.get(wanted, next(iter(fields.values()))).get_default(call_default_factory=True)

    def expected(self, key: str, name: str = "") -> str:
        """Say in a few words what a leaf accepts, in the variant called `name` where there are several."""
        if key.endswith(".name"):
            names = self.names(key[: -len(".name")])
            return one_of(names)
        fields = self.leaves[key]
        return describe(fields.get(name, next(iter(fields.values()))))

    def unknown(self, given: Given, more_names: Mapping[str, str], chosen: Mapping[str, str]) -> RecipeError:
        """Return the refusal of a key that does not exist, with the nearest that do.

        Args:
            given: the setting.
            more_names: other accepted names, each with the key it sets.
            chosen: the name that each table has so far.
        """
        table, _, leaf = given.key.partition(".")
        if given.key.count(".") > 1 or (leaf and table in self.leaves):
            parent = given.key.rpartition(".")[0]
            while parent and not self.knows(parent):
                parent = parent.rpartition(".")[0]
            if parent in self.leaves:
                return RecipeError(f"Unknown key '{one_line(given.key)}': {parent} is a single value, not a table.")
        targets = {**{key: key for key in self.leaves}, **more_names}
        for key in self.leaves:
            targets.setdefault(key.rpartition(".")[2], key)
        if table in self.tables:
            siblings = {key.partition(".")[2]: key for key in self.leaves if key.startswith(f"{table}.")}
            hint = _meant(nearest(leaf, siblings), siblings) or _meant(nearest(leaf, targets), targets)
            fields = self.tables[table].get(chosen.get(table, ""), next(iter(self.tables[table].values()))).model_fields
            listed = [key for leaf, key in siblings.items() if leaf in fields]
            hint = hint or f"; {table} has {', '.join(listed)}."
        else:
            wanted = leaf or table
            hint = _meant(nearest(given.key, targets), targets) or _meant(nearest(wanted, targets), targets)
            if not hint:
                tops = sorted({key.partition(".")[0] for key in self.leaves})
                hint = f"; the keys at the top are {', '.join(tops)}."
        return RecipeError(f"Unknown key '{one_line(given.key)}' {given.origin}{hint}")


def _meant(hint: str, targets: Mapping[str, str]) -> str:
    """Return `hint` with every name replaced by the full key that it stands for."""
    keys = dict.fromkeys(targets[word] for word in re.findall(r"'([^']+)'", hint))
    return f", did you mean {' or '.join(map(repr, keys))}?" if keys else ""


def _variants(annotation: Any) -> dict[str, type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}
    if get_origin(annotation) in (Union, types.UnionType):
        members = get_args(annotation)
        if all(isinstance(member, type) and issubclass(member, BaseModel) for member in members):
            return {member.model_fields["name"].default: member for member in members}
    return {}


def one_of(names: Sequence[str]) -> str:
    """Return ``one of 'a', 'b'``, or ``'a'`` for a single name."""
    listed = ", ".join(repr(name) for name in names)
    return f"one of {listed}" if len(names) > 1 else listed


def describe(field: FieldInfo) -> str:
    """Say in a few words what a field accepts, from its annotation and bounds."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Sequence[Any]) -> str:
    metadata = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    told = next((item.text for item in metadata if isinstance(item, Expected)), None)
    if told is not None:
        return told
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(members[0], [*members[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(m, metadata) for m in members if m is not type(None))
    if origin is Literal:
        return one_of(members)
    if origin is tuple:
        return f"a list of {len(members)}, each {_describe(members[0], ())}"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return " and ".join(["a whole number" if annotation is int else "a number", *_bounds(metadata)]).replace(
            " and ", " ", 1
        )
    return "text that is not empty" if annotation is str else "another value"


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    for item in metadata:
        for sign, word in words.items():
            bound = getattr(item, sign, None) if isinstance(item, annotated_types.BaseMetadata) else None
            if bound is not None:
                yield f"{word} {bound:g}" if isinstance(bound, float) else f"{word} {bound}"


def takes(field: FieldInfo, kind: type) -> bool:
    """Say whether a field accepts text, a flag, a whole number or None, as `kind` says."""
    return _accepts(field.annotation, kind)


def _accepts(annotation: Any, kind: type) -> bool:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType, Annotated):
        return any(_accepts(member, kind) for member in (members[:1] if origin is Annotated else members))
    if origin is Literal:
        return kind is str
    if isinstance(annotation, type) and not issubclass(annotation, (int, float, type(None))):
        return kind is str  # str, and values such as durations that are written as text
    return annotation is kind

"""A nested value taken apart: its tensors under names, everything else as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hasten.errors import CheckpointError, one_line

_TAGS = ("$tensor", "$tuple", "$dict")


def pack(nested: Any) -> tuple[dict[str, Tensor], Any]:
    """Take `nested` apart into named tensors and a JSON value; `unpack` is the inverse, types and all.

    Taken are tensors, None, bool, int, float (nan and infinity too), str, list, tuple, and dicts with str or int
    keys: what the ``state_dict()`` of optimizers and schedulers is made of. A tensor that occurs twice is stored
    once and comes back as one tensor. Tensors are not copied.

    Raises:
        CheckpointError: a value of another type is in it; its place is named.

    Example:
        >>> pack({"lr": 0.1, "betas": (0.9, 0.95), "state": {0: None}})
        ({}, {'lr': 0.1, 'betas': {'$tuple': [0.9, 0.95]}, 'state': {'$dict': [[0, None]]}})
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def take(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                name = place or "tensor"
                while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
                    name += "'"
                names[id(value)], tensors[name] = name, value
            return {"$tensor": names[id(value)]}
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            items = [take(item, _join(place, index)) for index, item in enumerate(value)]
            return items if type(value) is list else {"$tuple": items}
        if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
            pairs = [[key, take(item, _join(place, key))] for key, item in value.items()]
            is_plain = all(type(key) is str and not key.startswith("$") for key in value)
            return dict(pairs) if is_plain else {"$dict": pairs}
        raise CheckpointError(
            f"{place or 'The value'} is a {type(value).__name__}, which a checkpoint cannot hold; "
            "give tensors, numbers, text, lists, tuples, or dicts with text or whole-number keys."
        )

    return tensors, take(nested, "")


def unpack(tensors: Mapping[str, Tensor], layout: Any) -> Any:
    """Put together what `pack` took apart.

    Raises:
        CheckpointError: `layout` is not the work of `pack`, or a tensor is missing.
    """

    def put(value: Any) -> Any:
        if isinstance(value, list):
            return [put(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {key: put(item) for key, item in value.items()}
        content = value[tag]
        if len(value) != 1 or tag not in _TAGS:
            raise CheckpointError(f"Packed data has an unknown tag {one_line(tag)!r}; use another checkpoint.")
        if tag == "$tensor":
            if not isinstance(content, str) or content not in tensors:
                raise CheckpointError(
                    f"Packed data names tensor {one_line(repr(content))}, which is missing; use another checkpoint."
                )
            return tensors[content]
        if tag == "$tuple":
            return tuple(put(item) for item in content)
        return {key: put(item) for key, item in content}

    try:
        return put(layout)
    except (RecursionError, TypeError, ValueError):
        raise CheckpointError("Packed data is malformed; use another checkpoint.") from None


def _join(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)

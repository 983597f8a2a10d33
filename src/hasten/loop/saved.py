"""Saved state that anyone may have written: held against what `capture` writes, before any of it is used.

A checkpoint's hashes say that it is whole, not that it is ours: whoever can write a file can hash it. So types, sizes
and names are looked at first; what is then restored can be strange, and nothing worse.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten import checkpoint
from hasten.distributed import ALONE, Ranks
from hasten.errors import CheckpointError, RecipeError, one_line, printable
from hasten.loop.proving import named_groups, sample
from hasten.loop.state import State
from hasten.model import ModelConfig
from hasten.optim import RULES
from hasten.proof.tally import empty

_MOST = 1 << 53
_DEEPEST = 40
_SMALL = 1 << 14  # more than a random state has
_LONGEST_TEXT = 100_000
_Kind = tuple[str, Callable[[Any], bool]]


def load(path: Path) -> checkpoint.Loaded:
    """Return the checkpoint in the folder `path`, verified and of the form that a run's has.

    Raises:
        CheckpointError: it is damaged, or is no run's.
        RunError: it cannot be read for a reason outside of it.
    """
    loaded = checkpoint.load(path)
    checked(loaded.state, loaded.tensors)
    return loaded


def newest(root: Path, ranks: Ranks = ALONE) -> tuple[checkpoint.Loaded | None, list[str]]:
    """Return the newest checkpoint under `root` that verifies, as `load`, and a line for each that was passed over.

    Several ranks get the same one, whose tensors stay in their files.

    Raises:
        CheckpointError: none can be trusted, or the newest that is whole is no run's: that is no damage, and starting
            from an older one is the user's decision.
    """
    loaded, notes = checkpoint.newest(root, ranks)
    if loaded is not None:
        checked(loaded.state, loaded.tensors)
    return loaded, notes


def checked(plain: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
    """Refuse the plain data of a checkpoint, and its groups of tensors, unless they have the form that a run's have.

    What it holds of guard and clip is looked at by `fits` alone, which knows theirs; keys that are not known here are
    left to whoever reads them.

    Raises:
        CheckpointError: a key is missing or its value of another kind; the key is named.
    """
    wrong = next(_faults(plain), "") or next(_missing(plain, tensors), "")
    if wrong:
        raise CheckpointError(f"The checkpoint's state is not one that a run saved ({wrong}); use another checkpoint.")


def fits(state: State, tensors: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose tensors and settings are of other names, shapes or kinds than those of `state`.

    Raises:
        CheckpointError: what differs is named.
        RecipeError: the weights are of another model than the recipe describes.
    """
    checked(plain, tensors)
    tensors = {group: {name: _seen(kept) for name, kept in named.items()} for group, named in tensors.items()}
    _fit_weights(state, tensors["model"])
    wrong = next(_misfits(state, tensors, plain), "")
    if wrong:
        raise CheckpointError(f"The checkpoint does not fit this run ({wrong}); use another checkpoint.")


def _seen(tensor: Any) -> Tensor:
    """Return a tensor of which shape and format can be looked at; one that is still in its file, if it is small."""
    if isinstance(tensor, Tensor):
        return tensor
    is_small = tensor.shape.numel() <= _SMALL
    return tensor.read() if is_small else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _fit_weights(state: State, saved: Mapping[str, Tensor]) -> None:
    masters = {name: tuple(master.shape) for name, master in state.precision.named_masters().items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    differing = sorted(name for name in {*masters, *found} if masters.get(name) != found.get(name))
    if differing:
        raise RecipeError(
            "The checkpoint holds another model than the recipe describes; "
            f"differing weights: {', '.join(one_line(name) for name in differing[:3])}."
        )


def _misfits(state: State, tensors: Mapping[str, Any], plain: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `restore` could not take over, or training not go on with."""
    now, random = torch.get_rng_state(), tensors["random"]
    if {name: (t.dtype, t.shape) for name, t in random.items()} != {"torch": (now.dtype, now.shape)}:
        yield "its random state is of another kind"
    try:
        torch.Generator().set_state(random["torch"])
    except RuntimeError as error:
        yield f"its random state is none: {one_line(str(error))}"
    if len(plain["position"]) != len(state.position):
        yield "its place in the data is of another kind"
    for jump in plain.get("jumps", ()):
        if not len(jump["begin"]) == len(jump["end"]) == len(state.position):
            yield "a stretch of the data that is left out is of another kind"
    yield from (f"its precision {fault}" for fault in _unlike(plain["precision"], state.precision.state_dict()))
    for name, part in (("guard", state.guard), ("clip", state.clip)):
        if plain["format"] == 2:  # theirs had another form then, and is not taken over
            continue
        yield from (f"its {name} {fault}" for fault in _unlike(plain[name], part.state_dict()))
        try:
            copy.deepcopy(part).load_state_dict(plain[name])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            yield f"its {name} cannot be taken over: {one_line(str(error))}"
    notes = plain["notes"]
    packing = {key: state.notes[key] for key in ("packing",) if key in state.notes and key in notes}
    yield from (f"its notes: {fault}" for fault in _unlike(notes, packing))
    first = {name: sample(group).numel() for name, group in named_groups(state)} if "first_weights" in notes else {}
    for name, numel in first.items():
        began = notes["first_weights"].get(name)
        if not isinstance(began, list) or len(began) != numel or not all(map(_is_number, began)):
            yield "its first weights are of other groups"
    saved = checkpoint.unpack(tensors["optimizer"], plain["optimizer"])
    yield from (f"its optimizer {fault}" for fault in _optimizer_misfits(state, saved))


def _optimizer_misfits(state: State, saved: Any) -> Iterator[str]:
    fresh = state.optimizer.state_dict()
    if not isinstance(saved, dict) or set(saved) != set(fresh):
        yield "has another form"
    groups, states = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or len(groups) != len(fresh["param_groups"]) or not isinstance(states, dict):
        yield "has another number of groups"
    for mine, theirs in zip(fresh["param_groups"], groups, strict=True):
        if not isinstance(theirs, dict) or any(theirs.get(key) != mine.get(key) for key in ("params", "name", "rule")):
            yield "has groups of other parameters, or of another rule"
        known = {key: value for key, value in mine.items() if key in theirs}
        yield from (f"settings: {fault}" for fault in _unlike(theirs, known, settings=True))
        try:
            RULES[mine["rule"]].check({**mine, **theirs})
        except RecipeError as error:
            yield f"settings: {error}"
    parameters = [(parameter, group) for group in state.optimizer.param_groups for parameter in group["params"]]
    for number, held in states.items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(held, dict):
            yield "has the state of a parameter that there is not"
        if held:
            yield from (f"state {fault}" for fault in _state_misfits(held, *parameters[number]))


def _state_misfits(held: Mapping[Any, Any], parameter: Tensor, group: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of a parameter's state is not of the names, shapes and kinds of number that its rule makes."""
    bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    needed = {"step": torch.zeros(()), **RULES[group["rule"]].init(bare, group)}
    if group["ema"]:
        needed["ema"] = bare
    known = {"trained": bare, "ema": bare, **dict.fromkeys(("radius", "on_sphere"), torch.zeros(())), **needed}
    for name in {*needed} - {*held}:
        yield f"lacks {name}"
    for name, tensor in held.items():
        if not isinstance(tensor, Tensor) or name not in known:
            yield f"has {one_line(str(name))!r}, which its rule has not"
        expected = known[name]
        is_like = tensor.dtype == expected.dtype or (tensor.is_floating_point() and expected.is_floating_point())
        if tensor.shape != expected.shape or not is_like:
            yield f"has {one_line(str(name))!r} of another shape or format"
    if not _is_finite(float(held["step"])):
        yield "has a step that is no number of steps"


def _unlike(saved: Any, fresh: Any, *, settings: bool = False) -> Iterator[str]:
    """Yield where plain data is of another kind than `fresh`: other types, and in settings other words or signs."""
    if isinstance(fresh, Mapping):
        if not isinstance(saved, Mapping):
            yield "is no table"
        if not fresh and not settings and not _is_numeric(saved):
            yield "is no table of numbers"
        for key in fresh:
            if key not in saved:
                yield f"lacks {one_line(str(key))}"
            yield from (f"{one_line(str(key))} {fault}" for fault in _unlike(saved[key], fresh[key], settings=settings))
    elif isinstance(fresh, (list, tuple)) and any(isinstance(item, Mapping) for item in fresh):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(fresh):
            yield "is no list of as many tables"
        yield from (fault for one, other in zip(saved, fresh) for fault in _unlike(one, other))
    elif isinstance(fresh, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or not (settings or _is_numeric(saved)):
            yield "is no list of numbers"
        if settings and len(saved) != len(fresh):
            yield "is a list of another length"
        pairs = zip(saved, fresh) if settings else ()
        yield from (fault for one, other in pairs for fault in _unlike(one, other, settings=True))
    elif type(fresh) is bool or fresh is None or isinstance(fresh, str):
        if not (type(saved) is type(fresh) or (fresh is None and not settings and _is_numeric(saved))):
            yield "is of another kind"
    elif isinstance(fresh, (int, float)):
        if not _is_number(saved):
            yield "is no number"
        if settings and type(fresh) is int and fresh > 0 and not saved > 0:
            yield "is not above 0"


def _is_numeric(value: Any) -> bool:
    """Say whether it is numbers alone, in tables and lists, or what may stand for one that there is not."""
    if isinstance(value, (list, tuple, Mapping)):
        return all(map(_is_numeric, value.values() if isinstance(value, Mapping) else value))
    return value is None or isinstance(value, bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    """Say whether it is a number that a float holds; one that is not finite is."""
    return type(value) is float or (type(value) is int and abs(value) < _MOST)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < _LONGEST_TEXT


def _is_position(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) < 10_000 and all(map(_is_count, value))


def _is_progress(value: Any) -> bool:
    if value is None:
        return True
    is_listed = isinstance(value, list) and len(value) >= 2
    if not is_listed or not all(isinstance(k, list) and len(k) == 2 and _is_count(k[0]) for k in value):
        return False
    if not all(_is_finite(share) for _, share in value):
        return False
    is_rising = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(value))
    return is_rising and value[0] == [0, 0.0] and value[-1][1] == 1.0


def _is_jumps(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not all(map(_is_table, value)):
        return False
    ends = [jump.get(end) for jump in value for end in ("begin", "end")]
    return all(map(_is_position, ends)) and all(_is_count(jump.get("tokens")) for jump in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_notes(value: Any) -> bool:
    """Say whether the notes that are worked with are of their kind; what else is noted is only shown."""
    if not isinstance(value, dict):
        return False
    costs, rows, proof = value.get("costs", {}), value.get("micro_rows", 1), value.get("proof")
    graphs = value.get("graphs", {})
    tables = (value.get(name, {}) for name in ("branch", "first_weights", "left_out", "untrained"))
    return (
        (proof is None or _is_tally(proof))
        and isinstance(costs, dict)
        and all(_is_finite(cost) and cost > 0 for cost in costs.values())
        and all(isinstance(table, dict) for table in tables)
        and _is_count(rows)
        and rows > 0
        and isinstance(value.get("packing", []), list)
        and isinstance(graphs, dict)
        and all(_is_numbers(mark) and {"graphs", "breaks"} <= mark.keys() for mark in graphs.values())
    )


def _is_tally(value: Any) -> bool:
    """Say whether it is a tally of what acted: that of no step, with its open tables filled by counts."""
    if next(_unlike(value, empty()), ""):
        return False
    counts = (value["sizes"], value["micro_batches"], value["norm"]["bins"], *value["looks"].values())
    groups = value["groups"].values()
    if not all(map(_is_table, groups)) or not all(map(_is_counts, counts)):
        return False
    pairs, windows = value["lengths"].values(), value["windows"]
    return (
        all(_is_spread(spread) for spread in (value["loss_scale"], *(of for group in groups for of in group.values())))
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) for pair in pairs)
        and all(length.isdecimal() and len(length) < 16 for length in value["lengths"])
        and all(re.fullmatch(r"-?[0-9]{1,6}", number) for number in value["norm"]["bins"])
        and all(windows[end] is None or _is_count(windows[end]) for end in ("min", "max"))
    )


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_spread(value: Any) -> bool:
    return _is_numbers(value) and ("first" not in value or {"min", "max", "last"} <= value.keys())


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


_COUNT: _Kind = ("a whole number of at least 0", _is_count)
_TEXT: _Kind = ("a text", _is_text)
_TABLE: _Kind = ("a table", _is_table)
# What `capture` writes, and since which format.
_KINDS: dict[str, _Kind] = {
    "format": _COUNT,
    "step": _COUNT,
    "position": ("a list of whole numbers", _is_position),
    "tokens": _COUNT,
    "seconds": ("a number of seconds", _is_finite),
    "phases": ("a table of seconds", _is_numbers),
    "status": _TEXT,
    "reason": _TEXT,
    "seed": ("a whole number", lambda value: type(value) is int and 0 <= value < 1 << 63),
    "progress": ("knots that rise from 0 to 1", _is_progress),
    "schedule_steps": _COUNT,
    "precision": _TABLE,
    "guard": _TABLE,
    "optimizer": _TABLE,
    "notes": ("a table of what a run notes", _is_notes),
    "model": _TABLE,
    "corpus_sha256": _TEXT,
    "tokenizer_sha256": _TEXT,
}
_KINDS_SINCE_3: dict[str, _Kind] = {
    "identity": _TABLE,
    "clip": _TABLE,
    "jumps": ("a list of stretches of the data", _is_jumps),
}


def _faults(plain: Any) -> Iterator[str]:
    if not isinstance(plain, Mapping):
        yield "it is no table"
    if _is_deep(plain):
        yield "it is nested too deeply"
    kinds = _KINDS if plain.get("format") == 2 else {**_KINDS, **_KINDS_SINCE_3}
    for key, (expected, is_right) in kinds.items():
        if key not in plain:
            yield f"{key} is missing"
        if not is_right(plain[key]):
            yield f"{key} should be {expected}"
    if plain["progress"] is not None and plain["schedule_steps"] < 1:
        yield "schedule_steps should be at least 1"
    if set(plain["model"]) != {field.name for field in dataclasses.fields(ModelConfig)}:
        yield "model should have every size of a model, and no other key"
    try:
        ModelConfig(**plain["model"])
    except RecipeError as error:
        yield printable(str(error))[:200]


def _missing(plain: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]] | None) -> Iterator[str]:
    if tensors is None:
        return
    for group in ("model", "optimizer", "random"):
        if group not in tensors:
            yield f"{group}.safetensors is missing"
    if plain["model"]["num_layers"] > len(tensors["model"]):
        yield "model should have as many layers as there are weights for"


def _is_deep(value: Any, depth: int = 0) -> bool:
    if depth > _DEEPEST:
        return True
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(_is_deep(item, depth + 1) for item in items)

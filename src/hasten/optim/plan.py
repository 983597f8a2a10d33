"""What an optimizer will do to each parameter, and what it costs, as a printable table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from hasten.optim.matrices import SETTINGS, matrix_shape, parts
from hasten.optim.rule import Group

# An optimizer that adds more than this to a training step deserves a larger batch.
WARNED_SHARE = 0.10


@dataclass(frozen=True)
class Row:
    """One parameter and how it is updated.

    Args:
        name: of the parameter.
        shape: of the whole parameter, sharded or not.
        group: name of its group.
        rule: name of the rule.
        weight_decay: of its group.
        lr_scale: what the learning rate is multiplied by.
        state_bytes: what the optimizer keeps for it.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    rule: str
    weight_decay: float
    lr_scale: float
    state_bytes: int

    @property
    def numel(self) -> int:
        """How many numbers the parameter has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Every parameter with its group, rule, decay, rate and state; prints as a table.

    Args:
        rows: a row for each parameter, in the order of the groups.
        warnings: what makes a training step needlessly slow.
        operations: floating-point operations that each matrix rule (Muon, SOAP) computes in a step, by its name.
    """

    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    operations: Mapping[str, float] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps in total."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        heading = ("parameter", "", "shape", "group", "rule", "decay", "lr scale", "state")
        lines = [
            (name, f"x{len(rows)}" if len(rows) > 1 else "", _shape(rows[0].shape), *_shared(rows))
            for name, rows in _collapsed(self.rows)
        ]
        totals = [
            (_tensors(rows), "", _count(rows), *_shared(rows))
            for _, rows in _in_order(self.rows, lambda row: row.group)
        ]
        total = (_tensors(self.rows), "", _count(self.rows), "total", "", "", "", _bytes(self.state_bytes))
        table = _aligned([heading, *lines, *totals, total])
        rule = "-" * max(map(len, table))
        body = [table[0], rule, *table[1 : len(lines) + 1], rule, *table[len(lines) + 1 :]]
        return "\n".join([*body, *(f"warning: {text}" for text in self.warnings)])


def plan(
    groups: Sequence[Group],
    named: Mapping[Tensor, str],
    state_bytes: Callable[[Tensor, Group], int],
    tokens_per_step: int | None = None,
) -> Plan:
    """Return what an optimizer of these groups does to each parameter.

    Args:
        groups: of the optimizer; ``name``, ``rule``, ``weight_decay`` and ``lr_scale`` are shown.
        named: the names of the parameters; those without one are called by group and number.
        state_bytes: of a parameter under the settings of its group.
        tokens_per_step: of one optimizer step, to warn where matrix rules cost more than 10 % of the training step
            (6 operations per weight and token). A tied embedding counts, as a head; one beside a head does not.

    Example:
        >>> import torch
        >>> weight = torch.zeros(4, 2)
        >>> print(plan([{"name": "matrices", "rule": "lion", "weight_decay": 0.1, "params": [weight]}], {weight: "w"},
        ...            lambda parameter, group: 4 * parameter.numel()))
        parameter    shape  group     rule  decay  lr scale  state
        ----------------------------------------------------------
        w            4x2    matrices  lion  0.1    1         32 B
        ----------------------------------------------------------
        1 tensor     8      matrices  lion  0.1    1         32 B
        1 tensor     8      total                            32 B
    """
    rows = []
    for number, group in enumerate(groups):
        title = str(group.get("name", f"group {number}"))
        for place, parameter in enumerate(group["params"]):
            rows.append(
                Row(
                    name=named.get(parameter, f"{title}[{place}]"),
                    shape=tuple(parameter.shape),
                    group=title,
                    rule=str(group.get("rule", "")),
                    weight_decay=float(group.get("weight_decay", 0.0)),
                    lr_scale=float(group.get("lr_scale", 1.0)),
                    state_bytes=state_bytes(parameter, group),
                )
            )
    operations = _rule_operations(groups)
    return Plan(tuple(rows), _warnings(groups, operations, tokens_per_step) if tokens_per_step else (), operations)


# --- cost -----------------------------------------------------------------------------------------------------------


def matrices_of(parameter: Tensor, group: Group) -> list[tuple[int, int, int]]:
    """Return ``(count, rows, columns)`` of the matrices that a matrix rule sees in a parameter.

    Example:
        >>> import torch
        >>> matrices_of(torch.zeros(8, 64, 32), {"split_sizes": (32, 32)})
        [(8, 32, 32), (8, 32, 32)]
    """
    if parameter.ndim < 2:
        return []
    settings = {**SETTINGS, **group}
    *stack, rows, columns = matrix_shape(parameter, settings)
    sizes = [[stop - start for start, stop in (part.rows, part.columns)] for part in parts((rows, columns), settings)]
    return [(math.prod(stack), *size) for size in sizes]


def muon_operations(rows: int, columns: int, group: Group) -> float:
    """Return the floating-point operations of one orthogonalisation, ``ns_steps (4 m^2 n + 2 m^3)`` with ``m <= n``.

    Where it takes fewer, those of iterating on the Gram matrix and meeting the long side twice. Twelve layers of width
    384 (query-key-value unsplit) take 190 and 120 GFLOP that way.
    """
    m, n = sorted((rows, columns))
    steps = int(group.get("ns_steps", 5))
    plain = steps * (2 * n / m + 1)
    gram = 4 * steps - 3 + 2 * n / m
    return 2.0 * m**3 * min(plain, gram)


def soap_operations(rows: int, columns: int, group: Group) -> float:
    """Return the floating-point operations of one step of SOAP on a matrix, its share of the refresh included.

    Each preconditioned side ``k`` takes three products a step (the statistics, into the basis and back),
    ``6 k^2 l``, and a power iteration with QR, ``5 k^3``, every ``precondition_frequency`` steps.
    """
    sides = [(rows, columns), (columns, rows)]
    if group.get("one_sided", False):
        sides = [min(sides)]
    limit, period = group.get("max_precond_dim", 10_000), group.get("precondition_frequency", 10)
    return sum(6.0 * k * k * other + 5.0 * k**3 / period for k, other in sides if k <= limit)


OPERATIONS: dict[str, tuple[Callable[[int, int, Group], float], ...]] = {
    "muon": (muon_operations,),
    "normuon": (muon_operations,),
    "soap": (soap_operations,),
    "soap_muon": (soap_operations, muon_operations),
}
ADVICE = {
    "soap": "a larger batch, one_sided=True or a higher precondition_frequency makes it cheaper",
    "soap_muon": "a larger batch, one_sided=True or a higher precondition_frequency makes it cheaper",
}


def _rule_operations(groups: Sequence[Group]) -> dict[str, float]:
    used = {str(group.get("rule", "")) for group in groups}
    return {
        rule: sum(
            count * cost(rows, columns, group)
            for group in groups
            if group.get("rule") == rule
            for parameter in group["params"]
            for count, rows, columns in matrices_of(parameter, group)
            for cost in costs
        )
        for rule, costs in OPERATIONS.items()
        if rule in used
    }


def _warnings(groups: Sequence[Group], operations_of: Mapping[str, float], tokens_per_step: int) -> tuple[str, ...]:
    has_head = any(group.get("kind") == "head" for group in groups)
    used = [group for group in groups if not (has_head and group.get("kind") == "embeddings")]
    weights = sum(parameter.numel() for group in used for parameter in group["params"] if parameter.ndim > 1)
    training = 6.0 * weights * tokens_per_step
    warnings = []
    for rule, operations in operations_of.items():
        if training and operations > WARNED_SHARE * training:
            advice = ADVICE.get(rule, "a larger batch makes it cheaper")
            warnings.append(
                f"{rule} computes {_operations(operations)} a step, {operations / training:.0%} of what "
                f"{tokens_per_step} tokens take to train on ({_operations(training)}); {advice}."
            )
    return tuple(warnings)


# --- table ----------------------------------------------------------------------------------------------------------


def _collapsed(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Return rows that differ only in numbers inside their names under one name, with ``*`` for the numbers."""
    found = _in_order(rows, lambda row: (_numbered(row.name), row.shape, *_shared([row])))
    return [(_one_name([row.name for row in same]), same) for _, same in found]


def _numbered(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _one_name(names: list[str]) -> str:
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*(name.split(".") for name in names)))


def _in_order(rows: Iterable[Row], key: Callable[[Row], object]) -> list[tuple[object, list[Row]]]:
    places: dict[object, int] = {}
    ordered = sorted(rows, key=lambda row: places.setdefault(key(row), len(places)))
    return [(value, list(same)) for value, same in groupby(ordered, key=key)]


def _shared(rows: Sequence[Row]) -> tuple[str, ...]:
    first, size = rows[0], sum(row.state_bytes for row in rows)
    return first.group, first.rule, f"{first.weight_decay:g}", f"{first.lr_scale:g}", _bytes(size)


def _count(rows: Sequence[Row]) -> str:
    return f"{sum(row.numel for row in rows):,}"


def _tensors(rows: Sequence[Row]) -> str:
    return f"{len(rows)} tensor{'s' * (len(rows) != 1)}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _operations(number: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1e12, "TFLOP"), (1e9, "GFLOP")) if number >= s), (1e6, "MFLOP"))
    return f"{number / scale:.3g} {unit}"


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]

"""Projections that hold several matrices: which of a module's are fused, and where they come apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead", "nheads", "heads")
HEAD_WIDTHS = ("head_dim", "head_size", "d_head", "dim_head", "attention_head_size")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_head_kv", "n_query_groups")
QUERIES_PER_KEY = ("num_key_value_groups", "num_queries_per_kv", "n_rep")


@dataclass(frozen=True, eq=False)
class Projection:
    """A matrix from inputs to outputs.

    Args:
        weight: of two dimensions.
        output_dim: -2 where rows are outputs, as in ``nn.Linear``; -1 where columns are.
    """

    weight: nn.Parameter
    output_dim: int

    @property
    def inputs(self) -> int:
        """Width of what it reads."""
        return self.weight.shape[-3 - self.output_dim]

    @property
    def outputs(self) -> int:
        """Width of what it writes."""
        return self.weight.shape[self.output_dim]


def fused_parts(
    module: nn.Module, projections: Sequence[Projection]
) -> Iterator[tuple[nn.Parameter, tuple[int, ...], int]]:
    """Yield ``(weight, split_sizes, output_dim)`` of each projection of `module` that is several in one.

    The evidence is the width ``q`` of what a neighbour, the output projection, reads:

    - query, key and value: ``q + 2 kv`` outputs, the output projection writes what this one reads, and no third
      projection reads the same. The integers that attention modules keep (``num_heads``, ``head_dim``,
      ``num_key_value_groups``, ...) must agree where there are any; without them ``kv`` must divide ``q``. Of ``3 q``
      outputs, two of the three signs (writes back, reads alone, counts heads) are enough.
    - key and value: ``2 kv`` outputs beside a third projection, to ``q``, of what the output projection writes.
    - gate and up of an MLP: ``2 q`` outputs in a module that counts no heads.

    Parts must follow each other. Query, key and value that alternate head by head (GPT-NeoX, BLOOM, Falcon) have the
    same shapes and are reported as if they did not.

    Args:
        module: the owner, whose integer attributes are read.
        projections: its own and its children's.
    """
    is_sequence = isinstance(module, nn.Sequential)
    for fused in projections:
        siblings = [other for other in projections if other is not fused]
        is_consumed = any(s.inputs == fused.outputs != fused.inputs for s in siblings)
        if is_consumed:
            continue
        for output in siblings:
            sizes = (_halves if is_sequence else _parts)(module, fused, output, siblings)
            if sizes:
                yield fused.weight, sizes, fused.output_dim
                break


def _parts(
    module: nn.Module, fused: Projection, output: Projection, siblings: list[Projection]
) -> tuple[int, ...] | None:
    query, width = output.inputs, fused.outputs
    kv = (width - query) // 2
    counts_heads = any(_integer(module, names) for names in (HEADS, HEAD_WIDTHS, KEY_VALUE_HEADS, QUERIES_PER_KEY))
    is_possible = 0 < kv <= query and width == query + 2 * kv and _agrees(module, query, kv)
    returns = output.outputs == fused.inputs
    others = _readers_of_the_same(module, fused, output, siblings)
    queries = [other for other in siblings if other is not output and other.outputs == query]
    if is_possible and kv == query and returns + (not others) + counts_heads >= 2:
        return query, kv, kv
    if is_possible and returns and not others and (counts_heads or (query % kv == 0 and width != 2 * query)):
        return query, kv, kv
    is_cross = len(queries) == 1 and queries[0].inputs == output.outputs and set(others) <= set(queries)
    if is_cross and width % 2 == 0:
        heads, head_width = _integer(module, KEY_VALUE_HEADS), _head_width(module, query)
        is_counted = bool(heads and head_width) and width == 2 * heads * head_width
        return (width // 2, width // 2) if is_counted or width == 2 * query else None
    return None if counts_heads else _halves(module, fused, output, siblings)


def _halves(
    module: nn.Module, fused: Projection, output: Projection, siblings: list[Projection]
) -> tuple[int, ...] | None:
    is_double = fused.outputs == 2 * output.inputs
    is_alone = not _readers_of_the_same(module, fused, output, siblings)
    return (output.inputs, output.inputs) if is_double and is_alone else None


def _agrees(module: nn.Module, query: int, kv: int) -> bool:
    """Whether the integers of `module` allow queries and keys of these widths."""
    per_key, heads, head_width = (
        _integer(module, QUERIES_PER_KEY),
        _integer(module, KEY_VALUE_HEADS),
        _head_width(module, query),
    )
    if per_key and kv * per_key != query:
        return False
    return not head_width or (query % head_width == kv % head_width == 0 and heads in (None, kv // head_width))


def _head_width(module: nn.Module, query: int) -> int | None:
    heads = _integer(module, HEADS)
    return _integer(module, HEAD_WIDTHS) or (query // heads if heads and query % heads == 0 else None)


def _readers_of_the_same(
    module: nn.Module, fused: Projection, output: Projection, siblings: list[Projection]
) -> list[Projection]:
    """Return other projections of the input of `fused`, without gates per head and without the first half of an MLP."""
    heads = _integer(module, HEADS) or 1
    rest = [other for other in siblings if other is not output]
    readers = [other for other in rest if other.inputs == fused.inputs and other.outputs > heads]
    return [
        reader
        for reader in readers
        if not any(other.inputs == reader.outputs != fused.inputs for other in rest if other is not reader)
    ]


def _integer(module: nn.Module, names: tuple[str, ...]) -> int | None:
    kept = vars(module)
    values = [kept[name] for name in names if isinstance(kept.get(name), int) and not isinstance(kept[name], bool)]
    return next((value for value in values if value > 0), None)

"""Whole matrices at one process each, from rows that all processes hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# A round sends at most this many elements per process: 256 MB in float32, three times that in all.
ROUND_ELEMENTS = 1 << 26


class Exchange:
    """Moves matrices sharded by rows to their owners and back: one all-to-all each way, however many they are.

    Rows are spread as `torch.chunk` and FSDP2 spread them: the first processes hold ``ceil(rows / processes)`` each,
    later ones fewer or none. Every process has to make the same exchange.

    Args:
        shapes: (rows, columns) of each matrix.
        costs: what each costs its owner; the costliest goes first to the owner with the least.
        group: the processes that share the rows.
        dtype: on the way.
        device: of the parts.

    Attributes:
        parts: the rows of each matrix that this process holds; write them before `collect`, read them after
            `give_back`.
        owned: which of the matrices this process owns.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        costs: Sequence[float],
        *,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._group, self._shapes = group, list(shapes)
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        owners = balanced(costs, self._size)
        self.owned = [number for number, owner in enumerate(owners) if owner == self._rank]
        self._sent = [
            sum(self._elements(n, self._rank) for n, owner in enumerate(owners) if owner == rank)
            for rank in range(self._size)
        ]
        self._received = [sum(self._elements(n, rank) for n in self.owned) for rank in range(self._size)]
        self._send = torch.zeros(sum(self._sent), dtype=dtype, device=device)
        starts, at = {}, 0
        for number in sorted(range(len(shapes)), key=lambda n: (owners[n], n)):
            starts[number] = at
            at += self._elements(number, self._rank)
        self.parts = [
            self._send[starts[n] : starts[n] + self._elements(n, self._rank)].view(-1, columns)
            for n, (_, columns) in enumerate(self._shapes)
        ]

    def collect(self) -> list[Tensor]:
        """Return the whole matrices of `owned`, in that order."""
        self._pool = self._send.new_empty(sum(self._received))
        dist.all_to_all_single(self._pool, self._send, self._received, self._sent, group=self._group)
        matrices = [self._send.new_empty(self._shapes[number]) for number in self.owned]
        for matrix, rows, piece in self._pieces(matrices):
            matrix[rows] = piece
        return matrices

    def give_back(self, matrices: Sequence[Tensor]) -> None:
        """Write the rows of every process's `matrices` (of `owned`, in that order) to `parts`."""
        for matrix, rows, piece in self._pieces(matrices):
            piece.copy_(matrix[rows])
        dist.all_to_all_single(self._send, self._pool, self._sent, self._received, group=self._group)
        del self._pool

    def _elements(self, number: int, rank: int) -> int:
        rows, columns = self._shapes[number]
        start, stop = held_rows(rows, rank, self._size)
        return (stop - start) * columns

    def _pieces(self, matrices: Sequence[Tensor]):
        at = 0
        for rank in range(self._size):
            for number, matrix in zip(self.owned, matrices):
                rows, columns = self._shapes[number]
                count = self._elements(number, rank)
                yield matrix, slice(*held_rows(rows, rank, self._size)), self._pool[at : at + count].view(-1, columns)
                at += count


def held_rows(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first and the last but one of `rows` that `rank` of `size` processes holds.

    Example:
        >>> [held_rows(5, rank, 4) for rank in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    chunk = -(-rows // size)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def balanced(costs: Sequence[float], size: int) -> list[int]:
    """Return an owner for each cost: the costliest first, always to the owner with the least so far.

    Example:
        >>> balanced([1, 5, 4, 1], 2)
        [1, 0, 1, 0]
    """
    owners, loads = [0] * len(costs), [0.0] * size
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owner = min(range(size), key=lambda rank: (loads[rank], rank))
        owners[number] = owner
        loads[owner] += costs[number]
    return owners


def rounds(sizes: Sequence[int], costs: Sequence[float], size: int, limit: int = ROUND_ELEMENTS) -> list[list[int]]:
    """Return numbers of matrices by round: costliest first, each round of at most `limit` elements a process.

    Example:
        >>> rounds([4, 8, 4], [1.0, 2.0, 1.0], size=1, limit=8)
        [[1], [0, 2]]
    """
    found: list[list[int]] = []
    total = 0
    for number in sorted(range(len(sizes)), key=lambda n: (-costs[n], n)):
        if not found or total + sizes[number] > limit * size:
            found.append([])
            total = 0
        found[-1].append(number)
        total += sizes[number]
    return found

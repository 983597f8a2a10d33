"""Mixtures: the rows of several sources in exact proportions, every place of the endless order computed on its own.

Dimensions: C components, R rows, T tokens of a row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from hasten.data.batches import Draw
from hasten.data.documents import DocumentPart
from hasten.data.rows import Order, Rows
from hasten.errors import DataError

# Shares are kept to 2**-48: over 10**12 rows the counts are then off by less than 0.002 rows.
_BITS = 48
_HALF, _MASK = 1 << (_BITS - 1), (1 << _BITS) - 1
# Places that are computed together: _BITS + 14 bits still fit int64.
_MOST_PLACES = 1 << 14
# A smaller share would be a source that a run never reads.
SMALLEST_SHARE = 2.0**-40


class Proportions:
    """Which component each place of an endless order belongs to, so that every component has its share at all places.

    After any number n of places, component c has had ``share_c * n`` of them, off by less than 1.7: by 0.5 for two
    components, by 1 for three. Nothing is drawn at random, so a step, too, is mixed in proportion.

    A binary tree: each node sends ``floor(n * share + 1/2)`` of its first n places to its lighter child and the others
    to the heavier one. Both counts only grow, so every place leads to one component and to one place of its own there.
    The tree is Huffman's: weights then grow towards the root at least as Fibonacci's numbers do, and the halves that
    rounding adds at each node shrink with them, to half of ``1/1 + 1/1 + 1/2 + 1/3 + 1/5 + ... = 3.36`` at most. The
    rejected alternative, random order within blocks of 4,096 places with exact counts, is exact at the blocks' ends
    but 16 rows off (one standard deviation, two equal components) in their middle.

    Args:
        weights: of the components, above 0; only their ratios matter.

    Raises:
        DataError: no weight, or one that is not above 0, not finite, or less than 2**-40 of their sum.

    Example:
        >>> proportions = Proportions((0.75, 0.25))
        >>> proportions.at(0, 8).tolist(), proportions.taken(1000)
        ([0, 1, 0, 0, 0, 1, 0, 0], (750, 250))
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = _shares(weights)
        self._children: list[tuple[int, int, int]] = []  # share of the lighter child, it, the heavier child
        nodes = [(share, number) for number, share in enumerate(self.shares)]
        heapq.heapify(nodes)
        while len(nodes) > 1:
            (light, lighter), (heavy, heavier) = heapq.heappop(nodes), heapq.heappop(nodes)
            self._children.append((round(light / (light + heavy) * (1 << _BITS)), lighter, heavier))
            heapq.heappush(nodes, (light + heavy, len(self.shares) + len(self._children) - 1))

    def taken(self, place: int) -> tuple[int, ...]:
        """Return how many of the places before `place` each component has; their sum is `place`."""
        return tuple(self._counts(place)[: len(self.shares)])

    def at(self, place: int, count: int) -> np.ndarray:
        """Return the component of each of the places ``place, ..., place + count - 1``, int64."""
        parts = [
            self._at(begin, min(_MOST_PLACES, place + count - begin))
            for begin in range(place, place + count, _MOST_PLACES)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _counts(self, place: int) -> list[int]:
        """Return the places before `place` of every node: the components, then the inner nodes, the root last."""
        num_components = len(self.shares)
        counts = [0] * (num_components + len(self._children))
        counts[-1] = place
        for node in reversed(range(num_components, len(counts))):
            share, lighter, heavier = self._children[node - num_components]
            counts[lighter] = (counts[node] * share + _HALF) >> _BITS
            counts[heavier] = counts[node] - counts[lighter]
        return counts

    def _at(self, place: int, count: int) -> np.ndarray:
        num_components = len(self.shares)
        counts = self._counts(place)
        where = [np.arange(count)] * len(counts)
        for node in reversed(range(num_components, len(counts))):
            share, lighter, heavier = self._children[node - num_components]
            here = where[node]
            rest = (counts[node] * share + _HALF) & _MASK
            sent = (rest + np.arange(len(here) + 1) * share) >> _BITS
            is_lighter = sent[1:] > sent[:-1]
            where[lighter], where[heavier] = here[is_lighter], here[~is_lighter]
        components = np.empty(count, np.int64)
        for component in range(num_components):
            components[where[component]] = component
        return components


class MixedRows:
    """Rows of several sources under one numbering; their order keeps the proportions of the weights.

    Row r of component c has the number ``bounds[c] + r``. An epoch is as many rows as the sources have together; a
    source that is read more often than its size asks for comes round several times in it, the others not quite once.

    Args:
        components: rows of one length with one token of padding.
        weights: one for each, above 0: shares of rows, so of tokens.
        names: of the sources, for `parts`; left out, their numbers.

    Raises:
        DataError: as `Proportions`; or another number of weights than of components, rows of different lengths.
    """

    def __init__(self, components: Sequence[Rows], weights: Sequence[float], names: Sequence[str] = ()) -> None:
        if len(weights) != len(components):
            raise DataError(f"{len(weights)} weights for {len(components)} sources of a mixture; give one for each.")
        self.components, self.proportions = tuple(components), Proportions(weights)
        self.names = tuple(names) or tuple(map(str, range(len(components))))
        lengths = sorted({rows.seq_len for rows in components})
        if len(lengths) > 1 or len({rows.filler for rows in components}) > 1:
            raise DataError(
                f"The sources of a mixture have rows of {lengths} tokens; pack them all to one length, with one "
                "tokenizer."
            )
        self.seq_len, self.filler = lengths[0], components[0].filler
        self.num_targets = sum(rows.num_targets for rows in components)
        self.bounds = np.cumsum([0] + [rows.num_rows for rows in components])
        self.num_rows = int(self.bounds[-1])
        self.far = components[0].far  # the sources of a mixture are prepared together

    def fill(
        self, row_numbers_R: np.ndarray, tokens_RT: np.ndarray, labels_RT: np.ndarray, ids_RT: np.ndarray | None = None
    ) -> np.ndarray:
        """Write rows into C-contiguous arrays of shape ``(R, seq_len)``; return each row's number of real targets."""
        component_R = self.bounds.searchsorted(row_numbers_R, side="right") - 1
        numbers_R = row_numbers_R - self.bounds[component_R]
        targets_R = np.empty(len(row_numbers_R), np.int64)
        outputs = [array for array in (tokens_RT, labels_RT, ids_RT) if array is not None]
        for component in np.unique(component_R).tolist():
            here = np.flatnonzero(component_R == component)
            parts = [np.empty((len(here), self.seq_len), array.dtype) for array in outputs]
            targets_R[here] = self.components[component].fill(numbers_R[here], *parts)
            for array, part in zip(outputs, parts):
                array[here] = part
        return targets_R

    def blocks(self, row_numbers_R: np.ndarray) -> np.ndarray:
        """Return the numbers of the blocks of `far` that hold rows, int64."""
        component_R = self.bounds.searchsorted(row_numbers_R, side="right") - 1
        needed = [
            self.components[component].blocks(row_numbers_R[component_R == component] - self.bounds[component])
            for component in np.unique(component_R).tolist()
        ]
        return np.concatenate([np.empty(0, np.int64), *needed])

    def parts(self, row_number: int) -> list[DocumentPart]:
        """Return what a row holds of which documents, in order, with the name of their source."""
        component = int(self.bounds.searchsorted(row_number, side="right")) - 1
        parts = self.components[component].parts(row_number - int(self.bounds[component]))
        return [part._replace(source=self.names[component]) for part in parts]

    def order(self, seed: int, purpose: str = "rows") -> Order:
        """Return the endless order: the components by their proportions, the rows of each one in a shuffled order.

        Unlike that of other rows, it has every number once in an epoch only where the weights are as the sizes.
        """
        return _MixedOrder(self, seed, purpose)


class _MixedOrder:
    def __init__(self, rows: MixedRows, seed: int, purpose: str) -> None:
        self.size, self._rows = rows.num_rows, rows
        self._orders = [part.order(seed, f"{purpose} {number}") for number, part in enumerate(rows.components)]

    def at(self, place: int, count: int) -> np.ndarray:
        """Return the numbers at places ``place, ..., place + count - 1``, int64; `place` at least 0."""
        components = self._rows.proportions.at(place, count)
        taken = self._rows.proportions.taken(place)
        numbers = np.empty(count, np.int64)
        for component, order in enumerate(self._orders):
            here = np.flatnonzero(components == component)
            numbers[here] = self._rows.bounds[component] + order.at(taken[component], len(here))
        return numbers


class MixtureSource:
    """Rows of several sources in exact proportions, forever.

    `num_rows` are the rows of all sources together; reading as many is an epoch. The position is one number, the rows
    read so far. Shorter lengths view the same rows, in the same order.

    Args:
        components: the rows of each source.
        weights: one for each, above 0: shares of rows, so of tokens; only their ratios matter.
        seed: of the order of rows within each source.
        names: of the sources; left out, their numbers.

    Raises:
        DataError: as `MixedRows`.
    """

    begin: tuple[int, ...] = (0,)

    def __init__(
        self, components: Sequence[Rows], weights: Sequence[float], *, seed: int, names: Sequence[str] = ()
    ) -> None:
        self.rows = MixedRows(components, weights, names)
        self.num_rows = self.rows.num_rows
        self._order = self.rows.order(seed)

    def draw(self, position: tuple[int, ...], *, rows: int, length: int) -> Draw:
        """Return the `rows` rows from `position` on, viewed in rows of `length`, a divisor of the row length."""
        (place,) = position
        return Draw(length, ((self.rows, self._order.at(place, rows)),), (place + rows,))

    def epochs(self, position: tuple[int, ...]) -> float:
        """Return the rows read at `position` over the rows that all sources have together."""
        return position[0] / self.rows.num_rows

    def component_epochs(self, position: tuple[int, ...]) -> tuple[float, ...]:
        """Return how often each source has been read at `position`; above 1, its text was repeated."""
        taken = self.rows.proportions.taken(position[0])
        return tuple(count / rows.num_rows for count, rows in zip(taken, self.rows.components))


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    if not len(weights):
        raise DataError("A mixture has no sources; give at least one, each with a weight above 0.")
    for number, weight in enumerate(weights):
        if not (weight > 0 and math.isfinite(weight)):
            raise DataError(
                f"The weight of source {number} is {weight:g}; expected a finite number above 0. "
                "Leave a source out that shall not be read."
            )
    largest = max(weights)  # first, so that the sum of huge weights stays finite
    total = math.fsum(weight / largest for weight in weights)
    shares = tuple(weight / largest / total for weight in weights)
    for number, share in enumerate(shares):
        if share < SMALLEST_SHARE:
            raise DataError(
                f"The weight of source {number} is {weights[number]:g}, {share:.1g} of all: less than one row in "
                "10**12. Leave that source out, or give it a larger weight."
            )
    return shares

"""What is kept of each document of a corpus to tell which are copies: hash, signature, size, split.

Dimensions: P pieces of a batch, D documents, H hashes of a signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from hasten.data.corpus import Batch
from hasten.data.minhash import HASHES, minima, resemblance, signatures

_FIRST_ROWS = 1024
_PAIRS = 1 << 16  # compared at once


class Fingerprints:
    """A row for each document, in reading order; 149 bytes each. Batches come in by `add`, then `close`.

    Attributes:
        hashes_D: 64 bits of the text.
        sides_D: the index of its split.
        sizes_D: its bytes in the source.
        has_words_D: whether it has a signature at all.
        signatures_DH: one byte for each hash.
    """

    def __init__(self) -> None:
        self.hashes_D = np.empty(_FIRST_ROWS, np.uint64)
        self.sides_D = np.empty(_FIRST_ROWS, np.int32)
        self.sizes_D = np.empty(_FIRST_ROWS, np.int64)
        self.has_words_D = np.empty(_FIRST_ROWS, bool)
        self.signatures_DH = np.empty((_FIRST_ROWS, HASHES), np.uint8)
        self._length = 0
        self._open: tuple[Any, int, int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    def add(self, batch: Batch) -> None:
        """Take in the next pieces; the last document may go on in the batch after."""
        minima_PH = minima(batch.texts)
        starts = np.flatnonzero(batch.starts)
        goes_on = int(starts[0]) if len(starts) else len(batch.texts)
        if goes_on:
            digest, side, size, least_H = self._open
            digest.update("".join(batch.texts[:goes_on]).encode())
            least_H = np.minimum(least_H, minima_PH[:goes_on].min(axis=0))
            self._open = digest, side, size + int(batch.sizes[:goes_on].sum()), least_H
        if not len(starts):
            return
        self._finish_document()
        bounds = [*starts.tolist(), len(batch.texts)]
        texts = ("".join(batch.texts[start:stop]) for start, stop in pairwise(bounds))
        digests = [blake2b(text.encode(), digest_size=8) for text in texts]
        sides_D, sizes_D = batch.sides[starts], np.add.reduceat(batch.sizes, starts)
        minima_DH = np.minimum.reduceat(minima_PH, starts, axis=0)
        self._open = digests.pop(), int(sides_D[-1]), int(sizes_D[-1]), minima_DH[-1]
        self._append(digests, sides_D[:-1], sizes_D[:-1], minima_DH[:-1])

    def close(self) -> None:
        """End the last document; the arrays then have one row for each."""
        self._finish_document()
        for column in self._columns():
            column.resize((self._length, *column.shape[1:]), refcheck=False)

    def _finish_document(self) -> None:
        if self._open is not None:
            digest, side, size, least_H = self._open
            self._append([digest], np.array([side]), np.array([size]), least_H[None])
            self._open = None

    def _append(self, digests: list[Any], sides_D: np.ndarray, sizes_D: np.ndarray, minima_DH: np.ndarray) -> None:
        begin, self._length = self._length, self._length + len(digests)
        hashes_D = np.frombuffer(b"".join([digest.digest() for digest in digests]), np.uint64)
        signatures_DH, has_words_D = signatures(minima_DH)
        rows = (hashes_D, sides_D, sizes_D, has_words_D, signatures_DH)
        for column, new in zip(self._columns(), rows, strict=True):
            if self._length > len(column):
                # In place: a second copy would double what is held.
                column.resize((max(self._length, 2 * len(column)), *column.shape[1:]), refcheck=False)
            column[begin : self._length] = new

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.hashes_D, self.sides_D, self.sizes_D, self.has_words_D, self.signatures_DH


def exact_leaders(hashes_D: np.ndarray) -> np.ndarray:
    """Return for each document the first one with the same hash."""
    order = np.argsort(hashes_D, kind="stable")
    is_new_D = _changes(hashes_D[order])
    leaders_D = np.empty_like(order)
    leaders_D[order] = order[is_new_D][np.cumsum(is_new_D) - 1]
    return leaders_D


def near_leaders(prints: Fingerprints, exact_D: np.ndarray, threshold: float) -> np.ndarray:
    """Return for each document the first one of its cluster: what is linked by resemblances of `threshold` or more.

    Documents that agree in a whole band of their signatures are candidates: each is compared with the one before it
    and with the first of those that share the band, so one text in a million copies costs two million comparisons.

    Args:
        prints: of all documents.
        exact_D: `exact_leaders`; of equal documents one is compared.
        threshold: of the estimated Jaccard index.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    different_U = np.flatnonzero((exact_D == np.arange(len(exact_D))) & prints.has_words_D)
    cluster_U = np.arange(len(different_U))
    for band_D in prints.signatures_DH.view(np.uint64).T:
        some, others = _candidates(band_D[different_U])
        apart = cluster_U[some] != cluster_U[others]
        links = [
            _alike(prints.signatures_DH, different_U, some_P, others_P, threshold)
            for some_P, others_P in _in_parts(some[apart], others[apart])
        ]
        if not any(len(some_P) for some_P, _ in links):
            continue
        ends = [cluster_U[np.concatenate(side)] for side in zip(*links)]
        graph = coo_matrix((np.ones(len(ends[0]), bool), ends), (len(different_U), len(different_U)))
        cluster_U = connected_components(graph, directed=False)[1][cluster_U]
    leaders_D = exact_D.copy()
    first_of_cluster = np.full(len(different_U), len(exact_D))
    np.minimum.at(first_of_cluster, cluster_U, different_U)
    leaders_D[different_U] = first_of_cluster[cluster_U]
    return leaders_D[exact_D]


def _candidates(keys_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs with the same key: each with the one before it, and with the first of them."""
    order = np.argsort(keys_U, kind="stable")
    is_new_U = _changes(keys_U[order])
    later = np.flatnonzero(~is_new_U)
    firsts = np.maximum.accumulate(np.where(is_new_U, np.arange(len(order)), 0))[later]
    is_third = firsts != later - 1
    some = np.concatenate([order[later - 1], order[firsts[is_third]]])
    return some, np.concatenate([order[later], order[later[is_third]]])


def _in_parts(some: np.ndarray, others: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((some[begin : begin + _PAIRS], others[begin : begin + _PAIRS]) for begin in range(0, len(some), _PAIRS))


def _alike(
    signatures_DH: np.ndarray, documents_U: np.ndarray, some: np.ndarray, others: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    estimate = resemblance(signatures_DH[documents_U[some]], signatures_DH[documents_U[others]])
    return some[estimate >= threshold], others[estimate >= threshold]


def _changes(sorted_D: np.ndarray) -> np.ndarray:
    """Return where a value differs from the one before."""
    return np.append(np.ones(min(1, len(sorted_D)), bool), sorted_D[1:] != sorted_D[:-1])

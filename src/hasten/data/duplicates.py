"""Documents that a corpus holds more than once, word for word or nearly: how many, how much of it, and where.

Exact ones have the same 64-bit hash (of a billion different documents two agree by chance with 3 %); near ones have
MinHash signatures (Broder 1997) that agree in a band and, over all, say that at least `threshold` of their shingles are
the same, as Lee et al. do (arXiv:2107.06499, "Deduplicating Training Data Makes Language Models Better"). A part of a
document that stands in another, longer one is not found: that is containment, not resemblance.

Nothing is removed. What is held is about 250 bytes a document, whatever its length: 8 for the hash, 128 for the
signature, the rest for its size, its tokens and which others it is like.

Dimensions: D documents, U different ones.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.data.corpus import Corpus
from hasten.data.fingerprints import Fingerprints, exact_leaders, near_leaders
from hasten.data.minhash import BANDS, HASHES, SHINGLE_WORDS
from hasten.data.progress import OnProgress, Reporter
from hasten.data.shards import PreparedData
from hasten.errors import DataError, one_line, printable

FORMAT = "hasten-duplicates-1"
THRESHOLD = 0.8
_CLUSTERS, _MEMBERS, _CHARACTERS = 20, 5, 80
_SECONDS_BETWEEN_REPORTS = 0.1


@dataclass(frozen=True)
class Amount:
    """Some of the documents, with their tokens (document tokens included) and their bytes in the source."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Place:
    """A document: its split, its file and line or number, and its first characters, control characters escaped."""

    split: str
    document: str
    beginning: str


@dataclass(frozen=True)
class Cluster:
    """Documents that are copies of each other, exact or near: how many, how much they repeat, and the first of them."""

    documents: int
    exact: int
    repeats: Amount
    first: tuple[Place, ...]


@dataclass(frozen=True)
class Duplicates:
    """What a corpus holds more than once.

    Attributes:
        total: all of the corpus.
        held_out: all of its validation side.
        exact: what repeats an earlier document word for word.
        near: what resembles an earlier document and repeats none word for word.
        leaked_exact: held-out documents that are in the training text word for word.
        leaked_near: held-out documents that resemble one of the training text, and are not in it word for word.
        leaking: training documents that are in the held-out text, exact or near.
        clusters: those that repeat most, the most first.
        leaked_clusters: the same of those with documents of both sides.
        threshold: the least share of shingles that near duplicates have in common.
    """

    total: Amount
    held_out: Amount
    exact: Amount
    near: Amount
    leaked_exact: Amount
    leaked_near: Amount
    leaking: Amount
    clusters: tuple[Cluster, ...]
    leaked_clusters: tuple[Cluster, ...]
    threshold: float

    def sentences(self, clusters: int = 5) -> list[str]:
        """Return the report as lines to print, what is both trained on and held out first."""
        leaked = _sum(self.leaked_exact, self.leaked_near)
        lines = [
            f"in training and held-out text: {_of(leaked, self.held_out, 'held-out documents')}: "
            f"{self.leaked_exact.documents:,} word for word, {self.leaked_near.documents:,} nearly; "
            f"their copies are {self.leaking.documents:,} training documents"
            if leaked.documents
            else f"in training and held-out text: none of {self.held_out.documents:,} held-out documents",
            f"repeat an earlier one word for word: {_of(self.exact, self.total, 'documents')}",
            f"repeat an earlier one nearly ({self.threshold:.0%} of its shingles or more): "
            f"{_of(self.near, self.total, 'documents')}",
        ]
        shown = [*self.leaked_clusters[:clusters], *(c for c in self.clusters if c not in self.leaked_clusters)]
        for cluster in shown[:clusters]:
            kind = "word for word" if cluster.exact == cluster.documents else f"{cluster.exact:,} of them word for word"
            lines.append(f"{cluster.documents:,} times, {kind if cluster.exact else 'nearly'}:")
            for place in cluster.first:
                lines.append(f"  {place.split}  {place.document}  {place.beginning}")
        return [printable(line) for line in lines]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        how = {"hashes": HASHES, "bands": BANDS, "shingle_words": SHINGLE_WORDS}
        return {"format": FORMAT, "settings": how, **asdict(self)}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON.

        Raises:
            DataError: it cannot be written there.
        """
        try:
            Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")
        except OSError as error:
            raise DataError(
                f"the report on duplicates cannot be written to {printable(str(path))} ({error.strerror}); "
                "name another file."
            ) from error


def find_duplicates(
    corpus: Corpus, data: PreparedData, *, threshold: float = THRESHOLD, on_progress: OnProgress | None = None
) -> Duplicates:
    """Return which documents of a corpus are copies of each other, exact or near.

    Args:
        corpus: read once for the hashes, and again up to the last document that is shown.
        data: the same corpus prepared, which knows how many tokens a document has.
        threshold: estimated share of shingles (five words in a row) that two near duplicates have in common, from 0.5
            to 1. The estimate has a standard error of 0.035 at 0.8: with the default, pairs at 0.9 are found (400 of
            400), 97 % of those at 0.86, 69 % at 0.82, 2 % at 0.72, none at 0.6. Of pairs below 0.75 most share no
            band and are never compared.
        on_progress: called now and then with a PrepareProgress.

    Raises:
        DataError: `threshold` is out of range, `data` is of another corpus, or the text cannot be read.

    Example:
        >>> from hasten.data.corpus import CorpusSpec, open_corpus
        >>> from hasten.data.preparation import prepare
        >>> spec = CorpusSpec(("python",))  # doctest: +SKIP
        >>> find_duplicates(open_corpus(spec), prepare(spec)).exact.documents  # doctest: +SKIP
        0
    """
    if not 0.5 <= threshold <= 1:
        raise DataError(f"threshold is {threshold}; expected a share of shingles from 0.5 to 1, such as {THRESHOLD}.")
    if corpus.sha256 != data.corpus_sha256:
        raise DataError("the text is not what was prepared; prepare it again.")
    tell = Reporter(on_progress, _SECONDS_BETWEEN_REPORTS)
    tell.stage("looking for duplicates", corpus)
    prints = Fingerprints()
    for batch in corpus.batches():
        prints.add(batch)
        tell.read(batch)
    prints.close()
    exact_D = exact_leaders(prints.hashes_D)
    near_D = near_leaders(prints, exact_D, threshold)
    is_val_D = prints.sides_D == len(corpus.train_splits)
    measured = _Measured(_tokens(prints.sides_D, data), prints.sizes_D)
    is_repeat_D, is_exact_D = near_D != np.arange(len(near_D)), exact_D != np.arange(len(exact_D))
    is_leaked_exact_D, _ = _across(exact_D, is_val_D)
    is_leaked_D, is_leaking_D = _across(near_D, is_val_D)
    repeating, leaking = (
        _largest(near_D, prints.sizes_D, np.flatnonzero(is_repeat_D & is_there_D))
        for is_there_D in (np.ones(len(near_D), bool), (is_leaked_D | is_leaking_D)[near_D])
    )
    members = {leader: np.flatnonzero(near_D == leader) for leader in (*repeating, *leaking)}
    shown = {leader: _shown(documents, is_val_D) for leader, documents in members.items()}
    places = _places(corpus, {document for documents in shown.values() for document in documents})
    has_twin_D = np.bincount(exact_D, minlength=len(exact_D))[exact_D] > 1
    clusters = {
        leader: Cluster(
            documents=len(documents),
            exact=int(has_twin_D[documents].sum()),
            repeats=measured.amount(documents[1:]),
            first=tuple(places[document] for document in shown[leader]),
        )
        for leader, documents in members.items()
    }
    return Duplicates(
        total=measured.amount(np.arange(len(near_D))),
        held_out=measured.amount(np.flatnonzero(is_val_D)),
        exact=measured.amount(np.flatnonzero(is_exact_D)),
        near=measured.amount(np.flatnonzero(is_repeat_D & ~is_exact_D)),
        leaked_exact=measured.amount(np.flatnonzero(is_leaked_exact_D)),
        leaked_near=measured.amount(np.flatnonzero(is_leaked_D & ~is_leaked_exact_D)),
        leaking=measured.amount(np.flatnonzero(is_leaking_D)),
        clusters=tuple(clusters[leader] for leader in repeating),
        leaked_clusters=tuple(clusters[leader] for leader in leaking),
        threshold=threshold,
    )


def _of(some: Amount, whole: Amount, what: str) -> str:
    share = some.tokens / whole.tokens if whole.tokens else 0.0
    return f"{some.documents:,} of {whole.documents:,} {what} ({share:.2%} of their tokens, {some.bytes:,} bytes)"


@dataclass(frozen=True)
class _Measured:
    tokens_D: np.ndarray
    sizes_D: np.ndarray

    def amount(self, documents: np.ndarray) -> Amount:
        return Amount(len(documents), int(self.tokens_D[documents].sum()), int(self.sizes_D[documents].sum()))


def _tokens(sides_D: np.ndarray, data: PreparedData) -> np.ndarray:
    """Return how many tokens each document has, its document token included."""
    tokens_D = np.empty(len(sides_D), np.int64)
    for side, shards in enumerate((*data.trains, data.val)):
        is_here_D = sides_D == side
        if int(is_here_D.sum()) != shards.num_documents:
            raise DataError("the text is not what was prepared; prepare it again.")
        tokens_D[is_here_D] = np.diff(shards.starts(0, shards.num_documents))
    return tokens_D


def _across(leaders_D: np.ndarray, is_val_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which held-out documents have a copy in training, and which training ones have a held-out copy."""
    in_train, in_val = np.zeros((2, len(leaders_D)), bool)
    in_train[leaders_D[~is_val_D]] = True
    in_val[leaders_D[is_val_D]] = True
    return is_val_D & in_train[leaders_D], ~is_val_D & in_val[leaders_D]


def _largest(leaders_D: np.ndarray, sizes_D: np.ndarray, repeats: np.ndarray) -> list[int]:
    """Return the leaders of the clusters that repeat most bytes, the most first."""
    repeated_D = np.bincount(leaders_D[repeats], weights=sizes_D[repeats], minlength=len(leaders_D))
    largest = np.argsort(-repeated_D, kind="stable")[:_CLUSTERS]
    return largest[repeated_D[largest] > 0].tolist()


def _shown(documents: np.ndarray, is_val_D: np.ndarray) -> list[int]:
    """Return the first few documents of a cluster, of both sides if it has both."""
    firsts = [documents[is_val_D[documents] == side][:1] for side in (False, True)]
    return sorted({*np.concatenate(firsts).tolist(), *documents[: _MEMBERS - 1].tolist()})[:_MEMBERS]


def _places(corpus: Corpus, wanted: set[int]) -> dict[int, Place]:
    """Read on until the wanted documents, by their number in reading order, have been seen."""
    places: dict[int, Place] = {}
    before, splits = 0, corpus.splits
    batches = corpus.batches()
    while len(places) < len(wanted):
        batch = next(batches)
        starts = np.flatnonzero(batch.starts).tolist()
        for number in wanted.intersection(range(before, before + len(starts))):
            piece = starts[number - before]
            beginning = one_line(batch.texts[piece], _CHARACTERS)
            places[number] = Place(splits[batch.sides[piece]], one_line(batch.documents[piece], 500), beginning)
        before += len(starts)
    batches.close()
    return places


def _sum(*amounts: Amount) -> Amount:
    columns = zip(*((amount.documents, amount.tokens, amount.bytes) for amount in amounts))
    return Amount(*map(sum, columns))

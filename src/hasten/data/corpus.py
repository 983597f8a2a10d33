"""The text of a run: where it comes from, in which pieces, and which side of the split each piece is on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hasten.data.builtin import BUILTIN, builtin_files
from hasten.data.counts import Counts
from hasten.data.cutting import PIECE_CHARACTERS
from hasten.data.formats import check_records, is_one_document
from hasten.data.pieces import CONTINUES, STARTS, Run, runs
from hasten.data.sources import SourceFile, find_files
from hasten.errors import DataError, printable

Split = str  # "train" or "val"; of a corpus whose sources are kept apart "train-0", "train-1", ..., "val"

# Part of every corpus hash: raise it when the same files would give other pieces or another split.
FORMAT = "hasten-corpus-1"
BATCH_CHARACTERS = 1 << 18
_PLANNED_CHARACTERS = 1 << 12  # read ahead while looking for enough units
_FEWEST_BLOCKS, _SMALLEST_BLOCK = 64, 64


@dataclass(frozen=True)
class CorpusSpec:
    """Which text to read and how to set a validation part aside.

    Attributes:
        train: sources: a built-in name, a file, a folder, a glob or ``-`` for standard input.
        val: the same for validation; empty: a share of the documents of `train`.
        val_share: that share, between 0 and 1.
        text_key: field (or Parquet column) of records that holds the text.
        separator: in plain text files, what stands between documents; None: a file is a document.
        apart: keep the sources of `train` apart, as the components of a mixture: each becomes a split of its own
            (``train-0``, ``train-1``, ...) and gives its own share to validation.
    """

    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    val_share: float = 0.05
    text_key: str = "text"
    separator: str | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        for key in ("train", "val"):
            if isinstance(sources := getattr(self, key), str):
                object.__setattr__(self, key, (sources,))
        if not self.train:
            raise DataError("no training text is named; give a file, a folder or a built-in corpus.")
        if not self.val and not 0 < self.val_share < 1:
            raise DataError(f"val_share is {self.val_share}; expected a share between 0 and 1, such as 0.05.")
        if self.separator == "":
            raise DataError("the separator is empty; give the text that stands between documents, or leave it out.")


class Piece(NamedTuple):
    """Up to 64 Ki characters of one document.

    Attributes:
        text: valid Unicode without NUL; line ends as in the source.
        source_bytes: the bytes it had in the source (a replaced byte counts once; JSON is unescaped first).
        starts_document: whether a new document begins with it.
        document: a name to show.
    """

    text: str
    source_bytes: int
    starts_document: bool
    document: str


class Batch(NamedTuple):
    """Pieces in reading order, a column for each thing known of them.

    Attributes:
        sides: ``int32[P]``, for each piece the index of its split in `Corpus.splits`.
        starts: ``bool[P]``, whether a new document begins with it.
        sizes: ``int64[P]``, its bytes in the source.
        texts: as in `Piece`.
        documents: as in `Piece`.
    """

    sides: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    texts: list[str]
    documents: list[str]


class Corpus:
    """Files, opened and hashed, with a fixed split.

    Attributes:
        spec: what was asked for.
        name: the sources by name, a built-in one with its version.
        names: of each training split.
        files: every file in reading order, training files first.
        sha256: over names, sizes and contents of all files, and the split.
        counts: what the last complete pass over the text replaced or dropped, and what was skipped before.
    """

    def __init__(self, spec: CorpusSpec) -> None:
        self.spec = spec
        self._skipped = Counts()
        groups = [(source,) for source in spec.train] if spec.apart else [spec.train]
        found = [_find_all(group, self._skipped) for group in groups]
        self.names: tuple[str, ...] = tuple(name for name, _ in found)
        self.name = ", ".join(self.names)
        self._train_files = [files for _, files in found]
        self._val_files = _find_all(spec.val, self._skipped)[1] if spec.val else []
        self.files: list[SourceFile] = [*chain(*self._train_files), *self._val_files]
        _refuse_shared(self)
        self.counts = Counts()
        self._tally = self.counts
        self._splits = [
            _GIVEN if spec.val else _plan_split(spec, name, files) for name, files in zip(self.names, self._train_files)
        ]
        self.sha256 = _hash(self)

    @property
    def train_splits(self) -> tuple[Split, ...]:
        """``("train",)``, or one split for each source that is kept apart."""
        return tuple(f"train-{number}" for number in range(len(self.names))) if self.spec.apart else ("train",)

    @property
    def bytes_read(self) -> int:
        """Bytes on disk that the pass in progress has read so far."""
        return self._tally.bytes_read

    def pieces(self, split: Split) -> Iterator[Piece]:
        """Yield the pieces of one side in reading order, in bounded memory.

        Raises:
            DataError: a file cannot be read, or more than 1 % of the JSON records cannot be used.
        """
        return (piece for side, piece in self.sides() if side == split)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The training splits, then ``val``."""
        return (*self.train_splits, "val")

    def sides(self) -> Iterator[tuple[Split, Piece]]:
        """Yield (side, piece) for all of the text in one pass, then set `counts`."""
        splits = self.splits
        for batch in self.batches():
            columns = (column.tolist() for column in (batch.sides, batch.sizes, batch.starts))
            for side, size, starts, text, document in zip(*columns, batch.texts, batch.documents):
                yield splits[side], Piece(text, size, starts, document)

    def batches(self, characters: int = BATCH_CHARACTERS) -> Iterator[Batch]:
        """Yield the same pieces in batches of about as many `characters`, and at most 64 Ki more; then set `counts`."""
        tally = self._tally = Counts()
        tally.add_all(self._skipped)
        seen: set[int] = set()
        held: list[Batch] = []
        size = 0
        for batch in self._assigned(tally, characters):
            seen.update(np.flatnonzero(np.bincount(batch.sides)).tolist())
            held.append(batch)
            size += sum(map(len, batch.texts))
            if size >= characters:
                yield _joined(held)
                held, size = [], 0
        if held:
            yield _joined(held)
        check_records(tally)
        train = self.spec.train if self.spec.apart else (", ".join(self.spec.train),)
        val = ", ".join(self.spec.val or self.spec.train)
        for side, sources in enumerate((*train, val)):
            if side not in seen:
                raise DataError(f"{printable(sources)} holds no text; expected at least one line.")
        self.counts = tally

    def _assigned(self, tally: Counts, characters: int) -> Iterator[Batch]:
        val = len(self._train_files)
        for train, (files, plan) in enumerate(zip(self._train_files, self._splits)):
            previous = -1
            for run in _runs(self.spec, files, tally, plan.block_characters, characters):
                sides_P = np.where(plan.is_val(run.units, self.spec.val_share), val, train).astype(np.int32)
                kinds_P = np.array(run.kinds, np.int8)
                # Blocks of one document that fall on the same side one after another stay one document.
                changes_P = sides_P != np.append(np.int32(previous), sides_P[:-1])
                previous = sides_P[-1]
                starts_P = (kinds_P == STARTS) | ((kinds_P == CONTINUES) & changes_P)
                yield Batch(sides_P, starts_P, np.array(run.sizes, np.int64), run.texts, run.documents)
        for run in _runs(self.spec, self._val_files, tally, None, characters):
            sides_P = np.full(len(run.texts), val, np.int32)
            starts_P = np.array(run.kinds, np.int8) == STARTS
            yield Batch(sides_P, starts_P, np.array(run.sizes, np.int64), run.texts, run.documents)


def _runs(
    spec: CorpusSpec, files: list[SourceFile], tally: Counts, block: int | None, characters: int
) -> Iterator[Run]:
    how = {"text_key": spec.text_key, "separator": spec.separator, "tally": tally}
    return runs(files, **how, block=block, characters=characters)


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    arrays = (np.concatenate(columns) for columns in list(zip(*batches))[:3])
    return Batch(*arrays, *(list(chain(*columns)) for columns in list(zip(*batches))[3:]))


def open_corpus(spec: CorpusSpec) -> Corpus:
    """Find, check and hash the files of `spec`, and fix which documents are for validation.

    Documents go to validation by a hash of their name, in a share of `val_share`. A lone document (and, more
    generally, too few documents for that share) is cut at line ends into blocks of up to about 64 kB, smaller
    in a small corpus, which are split in the same way; a new document then starts wherever the side changes.
    Either side gets at least one.

    Raises:
        DataError: a source is missing, binary, empty or damaged, or there is too little text to split.
    """
    return Corpus(spec)


def _find_all(sources: tuple[str, ...], skipped: Counts) -> tuple[str, list[SourceFile]]:
    names, files = [], []
    for source in sources:
        if source in BUILTIN:
            name, found = builtin_files(source)
        else:
            name, found = ("standard input" if source == "-" else source.rstrip("/").split("/")[-1]), None
            found = find_files(source, BUILTIN, skipped)
        if all(file.bytes == 0 for file in found):
            raise DataError(f"{printable(source)} is empty; expected text.")
        names.append(name)
        files += found
    return ", ".join(names), files


def _refuse_shared(corpus: Corpus) -> None:
    """A file in two sources could be trained on in one and held out in the other."""
    owners: dict[Path, int] = {}
    for number, files in enumerate(corpus._train_files):
        for file in files:
            owner = owners.setdefault(file.path.resolve(), number)
            if owner != number:
                both = f"{printable(corpus.spec.train[owner])} and {printable(corpus.spec.train[number])}"
                raise DataError(
                    f"{printable(file.name)} is in two sources of the mixture, {both}; leave it in one of them."
                )


@dataclass(frozen=True)
class _SplitPlan:
    """Which units are for validation: those whose hash is below the share, and one forced unit if need be."""

    block_characters: int | None = None
    forced: str | None = None
    forced_side: Split = "val"
    all_train: bool = False

    def is_val(self, names: list[str], share: float) -> np.ndarray:
        """Return for each unit whether it is for validation, ``bool[U]``."""
        if self.all_train:
            return np.zeros(len(names), bool)
        is_val_U = _fractions(names) < share
        if self.forced in names:
            is_val_U[[name == self.forced for name in names]] = self.forced_side == "val"
        return is_val_U


_GIVEN = _SplitPlan(all_train=True)


def _fractions(names: list[str]) -> np.ndarray:
    """Return a number in [0, 1) for each name, from its hash."""
    hash_of = hashlib.sha256
    encoded = "\0".join(names).encode("utf-8", "surrogatepass").split(b"\0")  # no path holds a NUL
    digests = b"".join([hash_of(name).digest() for name in encoded])
    return np.frombuffer(digests, ">u8")[::4].astype(np.float64) / 2.0**64


def _plan_split(spec: CorpusSpec, name: str, files: list[SourceFile]) -> _SplitPlan:
    enough = 1 / spec.val_share
    plan, count = _plan_for(spec, name, files, None, enough)
    if plan is None or count < enough:
        total = sum(file.bytes for file in files)
        block = min(PIECE_CHARACTERS, max(_SMALLEST_BLOCK, total // _FEWEST_BLOCKS))
        plan, count = _plan_for(spec, name, files, block, 0)
    if plan is None:
        raise DataError(
            f"{printable(name)} holds too little text to set a validation part aside; "
            "give more text, or name a validation file with data.val=FILE."
        )
    return plan


def _plan_for(
    spec: CorpusSpec, corpus: str, files: list[SourceFile], block: int | None, enough: float
) -> tuple[_SplitPlan | None, int]:
    """Read on until both sides have a unit and there are `enough`; return the plan and how many were seen."""
    share = spec.val_share
    seen: dict[Split, bool] = {}
    lowest = highest = None
    count = 0
    tally = Counts()
    for name in _unit_names(spec, files, tally, block):
        count += 1
        fraction = float(_fractions([name])[0])
        seen["val" if fraction < share else "train"] = True
        lowest = min(lowest or (fraction, name), (fraction, name))
        highest = max(highest or (fraction, name), (fraction, name))
        if len(seen) == 2 and count >= enough:
            return _SplitPlan(block), count
    if count == 0:
        check_records(tally)
        raise DataError(f"{printable(corpus)} holds no text, only white space; expected at least one line.")
    if len(seen) == 2:
        return _SplitPlan(block), count
    if count < 2:
        return None, count
    forced, side = (lowest, "val") if "train" in seen else (highest, "train")
    return _SplitPlan(block, forced[1], side), count


def _unit_names(spec: CorpusSpec, files: list[SourceFile], tally: Counts, block: int | None) -> Iterator[str]:
    for file in files:
        # Of a file that is one document its first text is enough to know that it counts.
        only_first = block is None and is_one_document(file, spec.separator)
        found = _runs(spec, [file], tally, block, 1 if only_first else _PLANNED_CHARACTERS)
        if only_first:
            first = next(found, None)
            found.close()
            yield from first.units if first else ()
        else:
            yield from chain.from_iterable(run.units for run in found)


def _hash(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    spec = corpus.spec
    rule = {"text_key": spec.text_key, "separator": spec.separator, "format": FORMAT}
    plans = [asdict(plan) for plan in corpus._splits]
    rule |= {"apart": plans} if spec.apart else plans[0]
    rule |= {} if spec.val else {"val_share": spec.val_share}
    digest.update(repr(sorted(rule.items())).encode())
    for side, files in (*zip(corpus.train_splits, corpus._train_files), ("val", corpus._val_files)):
        for file in files:
            digest.update(f"{side}\0{file.name}\0{file.bytes}\0{file.sha256}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

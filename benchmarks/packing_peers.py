"""The packers that are measured: ours and every peer's, with what each needs made of lengths and a capacity."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from hasten.data.fitting import Packing, best_fit, chunk, pad


@dataclass(frozen=True)
class Outcome:
    """What a packer made: rows, tokens in them, and documents in several pieces although a row would hold them."""

    num_rows: int
    num_tokens: int
    cuts: int


@dataclass(frozen=True)
class Case:
    """Lengths and a capacity, and the forms that packers want them in, made once and outside of the timing."""

    lengths_N: np.ndarray
    capacity: int

    @cached_property
    def pieces(self) -> Packing:
        """Documents cut to the capacity, each piece by itself."""
        return pad(self.lengths_N, self.capacity)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens that tell which document they are of, from 1 on; 0 is for padding."""
        return np.repeat(np.arange(1, len(self.lengths_N) + 1, dtype=np.int32), self.lengths_N)

    @cached_property
    def token_arrays(self) -> list[np.ndarray]:
        """The tokens of each document."""
        return np.split(self.tokens, np.cumsum(self.lengths_N)[:-1])

    def outcome(self, tokens: np.ndarray, row_ends: np.ndarray) -> Outcome:
        """Return what rows that end at `row_ends` of a stream of all rows' tokens amount to."""
        begins = np.diff(tokens, prepend=-1) != 0
        begins[row_ends[:-1][row_ends[:-1] < len(tokens)]] = True
        pieces = np.bincount(tokens[begins], minlength=len(self.lengths_N) + 1)[1:]
        cuts = int(((pieces > 1) & (self.lengths_N <= self.capacity)).sum())
        return Outcome(len(row_ends), int(np.count_nonzero(tokens)), cuts)

    def outcome_of_pieces(self, rows: Iterable[Iterable[int]]) -> Outcome:
        """Return what rows of whole numbers of `pieces` amount to."""
        rows = [list(row) for row in rows]
        used = np.concatenate([np.array(row, np.int64) for row in rows])
        assert len(np.unique(used)) == len(used)
        return Outcome(len(rows), int(self.pieces.lengths_P[used].sum()), 0)


@dataclass(frozen=True)
class Packer:
    """A packer: `start` makes what is timed out of a case, `read` turns its result into an outcome.

    Args:
        package: what it is installed as; an empty text for ours.
        most: documents that it can take in reasonable time.
    """

    package: str
    start: Callable[[Case], Callable[[], Any]]
    read: Callable[[Case, Any], Outcome]
    most: int = 10_000_000


def _ours(pack: Callable[..., Packing]) -> Packer:
    def read(case: Case, packing: Packing) -> Outcome:
        return Outcome(packing.num_rows, packing.num_tokens, packing.cuts)

    return Packer("", lambda case: partial(pack, case.lengths_N, case.capacity), read)


def _trl(strategy: str, batch: int | None = None) -> Packer:
    def start(case: Case) -> Callable[[], Any]:
        import pyarrow as pa

        trl = importlib.import_module("trl.data_utils")
        ends = np.cumsum(case.lengths_N).astype(np.int32)
        column = pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), case.tokens)
        table = pa.table({"input_ids": column})
        pack = {
            "bfd": partial(trl._pack_bfd, on_seq_length_overflow="truncate"),
            "bfd_split": partial(trl._pack_bfd, on_seq_length_overflow="split"),
            "wrapped": trl._pack_wrapped,
        }[strategy]
        step = batch or len(table)
        parts = [table.slice(at, step) for at in range(0, len(table), step)]
        return lambda: [pack(part, seq_length=case.capacity) for part in parts]

    def read(case: Case, parts: list) -> Outcome:
        rows = [column for part in parts for column in part["input_ids"].chunks]
        tokens = np.concatenate([column.flatten().to_numpy() for column in rows])
        ends = np.cumsum(np.concatenate([np.diff(column.offsets.to_numpy()) for column in rows]))
        return case.outcome(tokens, ends)

    return Packer("trl", start, read)


def _olmo() -> Packer:
    def start(case: Case) -> Callable[[], Any]:
        packer = importlib.import_module("olmo_core.data.utils").InstancePacker
        ends = np.cumsum(case.pieces.lengths_P)
        indices = np.stack([ends - case.pieces.lengths_P, ends], axis=1).astype(np.uint64)
        return lambda: packer(case.capacity).pack_documents(indices)

    def read(case: Case, result: tuple) -> Outcome:
        instances, indices, num_tokens = result
        outcome = case.outcome_of_pieces(instances)
        assert outcome.num_tokens == num_tokens == int((indices[:, 1] - indices[:, 0]).sum())
        return outcome

    return Packer("ai2-olmo-core", start, read)


def _axolotl() -> Packer:
    def start(case: Case) -> Callable[[], Any]:
        pack = importlib.import_module("axolotl.utils.samplers.multipack").pack_parallel
        lengths = case.pieces.lengths_P
        # Its defaults but for the processes; 200 documents in a row at most.
        return lambda: pack(lengths, case.capacity, group_size=100_000, bin_size=200, num_processes=1)

    return Packer("axolotl", start, Case.outcome_of_pieces, most=100_000)


def _grain(kind: str, bins: int) -> Packer:
    def start(case: Case) -> Callable[[], Any]:
        grain, experimental = importlib.import_module("grain"), importlib.import_module("grain.experimental")
        pieces = case.pieces
        elements = [
            {"tokens": np.full(length, number + 1, np.int32)}
            for number, length in zip(pieces.documents_P, pieces.lengths_P)
        ]
        pack = getattr(experimental, f"{kind}PackIterDataset")
        source = grain.MapDataset.source(elements).to_iter_dataset(grain.ReadOptions(num_threads=0))
        return lambda: list(pack(source, length_struct={"tokens": case.capacity}, num_packing_bins=bins))

    def read(case: Case, rows: list) -> Outcome:
        tokens = [row["tokens"][0] if isinstance(row["tokens"], tuple) else row["tokens"] for row in rows]
        tokens = [row[row > 0] for row in tokens]
        return case.outcome(np.concatenate(tokens), np.cumsum([len(row) for row in tokens]))

    return Packer("grain", start, read, most=5_000)


def _torchtune() -> Packer:
    def start(case: Case) -> Callable[[], Any]:
        packed = importlib.import_module("torchtune.datasets").PackedDataset
        samples = [{"tokens": tokens.tolist(), "labels": tokens.tolist()} for tokens in case.token_arrays]
        return lambda: packed(samples, max_seq_len=case.capacity, split_across_pack=True)

    def read(case: Case, dataset: Any) -> Outcome:
        rows = [pack["tokens"].numpy() for pack in dataset.packs]
        rows = [row[row > 0] for row in rows]
        return case.outcome(np.concatenate(rows), np.cumsum([len(row) for row in rows]))

    return Packer("torchtune", start, read, most=5_000)


def _llamafactory() -> Packer:
    def start(case: Case) -> Callable[[], Any]:
        module = _module_at("llamafactory", "data/processor/processor_utils.py")
        lengths = case.pieces.lengths_P.tolist()
        return lambda: module.greedy_knapsack(list(lengths), case.capacity)

    def read(case: Case, rows: list) -> Outcome:
        return Outcome(len(rows), sum(map(sum, rows)), 0)

    return Packer("llamafactory", start, read, most=100_000)


def _module_at(package: str, place: str) -> Any:
    name = f"{package}_{Path(place).stem}"
    if name not in sys.modules:
        folder = Path(importlib.util.find_spec(package).origin).parent
        spec = importlib.util.spec_from_file_location(name, folder / place)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


OURS = "hasten best_fit"
PACKERS = {
    OURS: _ours(best_fit),
    "hasten chunk": _ours(chunk),
    "hasten pad": _ours(pad),
    "TRL bfd (its default)": _trl("bfd"),
    "TRL bfd_split": _trl("bfd_split"),
    "TRL bfd_split, 1,000 a batch": _trl("bfd_split", 1000),
    "TRL wrapped": _trl("wrapped"),
    "OLMo-core InstancePacker": _olmo(),
    "axolotl multipack": _axolotl(),
    "LLaMA-Factory greedy_knapsack": _llamafactory(),
    "Grain BestFit, 512 bins": _grain("BestFit", 512),
    "Grain FirstFit, 8 bins": _grain("FirstFit", 8),
    "torchtune PackedDataset, split": _torchtune(),
}

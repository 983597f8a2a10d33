"""Runs of a tiny model by one or several processes, as torchrun starts them; a script.

``training_ranks.py FOLDER CASE ...`` trains the cases one after the other, each into a folder of its name. Torch is
imported once: the ranks are forks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hasten

SECONDS = 120
STEPS = 50
# A word or two a document, of so many letters that rows of 64 hold several: lengths, masks and padding all play a part.
WORDS = "the rank of a matrix is the number of its rows that are free of the others and so on until none is left".split()
TEXT = "\n\n".join(" ".join(WORDS[n % 7 : 3 + (n * n) % 19]) + f" {n * 7919 % 1000}" for n in range(1500))
BASE: dict[str, Any] = {
    "data": {"tokenizer": "bytes", "separator": "\n\n"},
    "model": {"name": "nano", "num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 48},
    "lengths": {"seq_len": 64},
    "batch": {"tokens": 12 * 64, "micro_rows": 12},
    "budget": f"{STEPS}",
    "evaluate": {"every": "20", "tokens": 1024},
    "compile": "off",
    "threads": 1,
    "device": "cpu",
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 3e-3},
    "muon": {"name": "muon", "lr": 3e-3, "compute_dtype": "float32"},
    "soap": {"name": "soap", "lr": 3e-3, "precondition_frequency": 5},
    "prodigy": {"name": "prodigy", "lr": 1.0},
    "mars": {"name": "mars", "lr": 3e-3},
    "sophia": {"name": "sophia", "lr": 3e-3, "estimate_every": 7},
    "schedule_free_adamw": {"name": "schedule_free_adamw", "lr": 3e-3},
}
GROWING = {"lengths": {"name": "linear", "seq_len": 64, "start": 16}}


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        name: also of its folder.
        world: processes; 0: one, without torchrun.
        settings: of the recipe, beside `BASE`.
        dtype: of the weights.
    """

    name: str
    world: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def joined(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings, the second over the first."""
    found = dict(base)
    for key, value in more.items():
        found[key] = joined(found[key], value) if isinstance(value, Mapping) and key in found else value
    return found


def train(case: Case, folder: Path) -> None:
    """Train the case in this process."""
    torch.set_default_dtype(case.dtype)
    settings = joined(BASE, {**case.settings, "out": str(folder / case.name)})
    hasten.train(**joined(settings, {"data": {"train": str(folder / "text.txt")}}))


def run(case: Case, folder: Path) -> None:
    """Train the case in as many processes as it asks for, and wait for them."""
    if case.world == 0:
        return _train_apart([{}], case, folder)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    meeting = {"WORLD_SIZE": str(case.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return _train_apart([{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(case.world)], case, folder)


def _train_apart(environments: list[dict[str, str]], case: Case, folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(environment, case, folder)) for environment in environments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(SECONDS)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()
    if codes := [rank.exitcode for rank in ranks if rank.exitcode]:
        print(f"{case.name}: ended with {codes}", file=sys.stderr)


def _rank(environment: Mapping[str, str], case: Case, folder: Path) -> None:
    os.environ.update(environment)
    log = folder / f"{case.name}.{environment.get('RANK', 'alone')}.log"
    with open(log, "w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
        try:
            train(case, folder)
        except BaseException:
            traceback.print_exc()
            raise


if __name__ == "__main__":
    from training_cases import CASES

    root = Path(sys.argv[1])
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    for case in CASES:
        if case.name in sys.argv[2:]:
            run(case, root)

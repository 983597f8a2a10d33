"""Runs of a tiny model by one or several processes, as torchrun starts them; a script.

``training_ranks.py FOLDER CASE ...`` trains the cases one after the other, each into a folder of its name. Torch is
imported once: the ranks are forks.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp
import torch.nn.parallel
import torch.utils.checkpoint

import hasten
from hasten.loop import steps
from hasten.loop.state import State
from hasten.sharding import local

SECONDS = 120
STEPS = 50
# A word or two a document, of so many letters that rows of 64 hold several: lengths, masks and padding all play a part.
SENTENCE = "the rank of a matrix is the number of its rows that are free of the others and so on until none is left"
WORDS = re.split(" ", SENTENCE)
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
    "muon_64": {"name": "muon", "lr": 3e-3, "compute_dtype": "float64"},
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
        until: steps after which it pauses.
        after: the case whose folder it goes on from.
        harm: what happens in the middle of it: `no_number` in one process, or `signal` to one process.
    """

    name: str
    world: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    until: int | None = None
    after: str = ""
    harm: str = ""


def joined(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings, the second over the first."""
    found = dict(base)
    for key, value in more.items():
        found[key] = joined(found[key], value) if isinstance(value, Mapping) and key in found else value
    return found


def recipe_of(case: Case, folder: Path) -> dict[str, Any]:
    """Return all settings of the case."""
    settings = joined(BASE, {**case.settings, "out": str(folder / case.name)})
    return joined(settings, {"data": {"train": str(folder / "text.txt")}})


def train(case: Case, folder: Path) -> None:
    """Train the case in this process, and note how much of weights and optimizer it held."""
    torch.set_default_dtype(case.dtype)
    harm = HARMS[case.harm] if case.harm else contextlib.nullcontext
    with harm(), _held(folder / f"{case.name}.{os.environ.get('RANK', '0')}.bytes"):
        hasten.train(**recipe_of(case, folder), until=case.until)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Write the bytes of weights and optimizer state that this process holds after its last step."""
    last: list[State] = []
    take = steps.train_step

    def watched(state: State, *given: Any) -> Any:
        last[:] = [state]
        return take(state, *given)

    steps.train_step = watched
    try:
        yield
    finally:
        steps.train_step = take
    if last:
        optimizer = last[0].optimizer
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [value for held in optimizer.state.values() for value in held.values()]
        path.write_text(str(sum(local(tensor).nbytes for tensor in tensors)))


@contextlib.contextmanager
def _no_number() -> Iterator[None]:
    """Let the loss of the last process be no number in two steps."""
    total, count = steps.batch_loss, [0]

    def batch_loss(state: State, *given: Any) -> torch.Tensor:
        loss = total(state, *given)
        is_last = state.company.ranks.rank == state.company.ranks.size - 1
        return loss * float("nan") if is_last and state.step in (11, 30) and not state.guard.bad else loss

    steps.batch_loss = batch_loss
    try:
        yield
    finally:
        steps.batch_loss = total
        del count


@contextlib.contextmanager
def _signal() -> Iterator[None]:
    """Send SIGTERM to the last process, in the middle of a step."""
    passes = steps._backward

    def backward(state: State, *given: Any) -> torch.Tensor:
        if state.step == 17 and state.company.ranks.rank == state.company.ranks.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return passes(state, *given)

    steps._backward = backward
    try:
        yield
    finally:
        steps._backward = passes


HARMS = {"no_number": _no_number, "signal": _signal}


def run(case: Case, folder: Path) -> None:
    """Train the case in as many processes as it asks for, and wait for them."""
    if case.after:
        shutil.copytree(folder / case.after, folder / case.name)
    environments: list[dict[str, str]] = [{}]
    if case.world:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
        meeting = {"WORLD_SIZE": str(case.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environments = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(case.world)]
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
    (folder / f"{case.name}.codes").write_text(json.dumps([rank.exitcode for rank in ranks]))


def _rank(environment: Mapping[str, str], case: Case, folder: Path) -> None:
    os.environ.update(environment)
    log = folder / f"{case.name}.{environment.get('RANK', '0')}.log"
    with open(log, "w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
        try:
            train(case, folder)
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None


def all_cases() -> list[Case]:
    """Return every training there is; `tests/test_parallel.py` says what each must give."""
    cases = []
    for name, settings in OPTIMIZERS.items():
        own = joined(GROWING, {"optimizer": settings})
        dtype = torch.float64 if name == "muon_64" else torch.float32
        cases.append(Case(f"{name} alone", 0, own, dtype))
        for kind in ("ddp", "fsdp"):
            for world in (1, 2, 3):
                for passes in (1, 4):
                    shared = {
                        "parallel": {"name": kind},
                        "batch": {"micro_rows": max(1, 12 // max(world, 1) // passes)},
                    }
                    cases.append(Case(f"{name} {kind} {world} x{passes}", world, joined(own, shared), dtype))
    adamw = joined(GROWING, {"optimizer": OPTIMIZERS["adamw"]})
    fsdp = joined(adamw, {"parallel": {"name": "fsdp"}})
    hsdp = joined(adamw, {"parallel": {"name": "hsdp", "copies": 2}})
    cases += [Case("adamw hsdp 4 x1", 4, hsdp)]
    cases += [Case("saved by two", 2, fsdp, until=20)]
    cases += [Case(f"gone on by {world}", world, fsdp, after="saved by two") for world in (0, 1, 2, 3)]
    cases += [
        Case("broken numbers", 2, fsdp, harm="no_number"),
        Case("broken numbers alone", 0, adamw, harm="no_number"),
    ]
    cases += [Case("told to stop", 2, fsdp, harm="signal"), Case("gone on after a stop", 2, fsdp, after="told to stop")]
    for clip in ("value", "norm_and_value", "agc", "zclip"):
        cases += [Case(f"{clip} alone", 0, joined(adamw, {"clip": {"name": clip}}))]
        cases += [Case(f"{clip} fsdp 2 x1", 2, joined(fsdp, {"clip": {"name": clip}}))]
    for what in ("selective", "full"):
        cases += [Case(f"{what} recomputing", 0, joined(adamw, {"activation_checkpointing": what}))]
    for precision in ("bf16",):
        low = {"precision": {"name": precision}}
        cases += [Case(f"{precision} alone", 0, joined(adamw, low))]
        cases += [Case(f"{precision} ddp 2 x4", 2, joined(adamw, {**low, "batch": {"micro_rows": 2}}))]
        cases += [Case(f"{precision} fsdp 2 x1", 2, joined(fsdp, low))]
    return cases


if __name__ == "__main__":
    root = Path(sys.argv[1])
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    for case in all_cases():
        if case.name in sys.argv[2:]:
            run(case, root)

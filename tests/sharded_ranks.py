"""What the ranks of a sharded training measure; a script.

Run with a folder, it writes ``<number of ranks>.<rank>.jsonl`` there, a line for each measurement. Torch is imported
once: the ranks are forks of the process that trained alone, and know what came out of that.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_training import (
    CASES,
    COLUMN_SETTINGS,
    COUNTED_CASES,
    MOVED_CASES,
    SAVED_AT,
    SAVED_CASES,
    STEPS,
    WORLDS,
    After,
    Case,
    Outcome,
    compare,
    distance,
    run,
    same,
    set_gradients,
    snapshot,
    take_step,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hasten.errors import RecipeError
from hasten.optim import OPTIMIZERS, RuledOptimizer

LIMIT = timedelta(seconds=60)
SAVED = "saved"  # A file that says that all checkpoints are there.
Measure = Callable[[], dict[str, Any]]


def save_at(folder: Path) -> After:
    """Return what saves weights and optimizer after step `SAVED_AT`."""

    def after(step: int, model: nn.Module, opt: RuledOptimizer) -> None:
        if step == SAVED_AT:
            state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt)}
            dcp.save(state, checkpoint_id=str(folder))

    return after


def resume(case: Case, folder: Path, mesh: DeviceMesh) -> list[Tensor]:
    """Return the weights at the end of a run that goes on from `folder`, with other weights and no state before."""
    model, opt = case.build(mesh, seed=1)
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=str(folder))
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, opt, state["optim"])
    for step in range(SAVED_AT + 1, STEPS + 1):
        take_step(case, model, opt, step, mesh)
    return snapshot(model)


class Collectives(TorchDispatchMode):
    """Counts what is sent between processes, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count(case: Case, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return what one step sends and multiplies in this process, and the number of matrices."""
    model, opt = case.build(mesh)
    take_step(case, model, opt, 1, mesh)
    set_gradients(case, model, 2, mesh)
    matrices = [p for g in opt.param_groups if g["rule"] == case.rule for p in g["params"] if p.ndim == 2]
    with Collectives() as sent, FlopCounterMode(display=False) as work:
        opt.step()
    return {"sent": dict(sent.counts), "work": work.get_total_flops(), "matrices": len(matrices)}


def measured(singles: Mapping[str, Outcome], mesh: DeviceMesh, folder: Path) -> Iterator[tuple[str, Measure]]:
    """Yield every measurement of a rank by name, in the same order on all."""
    saves = mesh.size() == WORLDS[0]
    for case in [*SAVED_CASES, *(case for case in CASES if case not in SAVED_CASES)]:
        if case.parts not in (0, mesh.size()):
            continue
        is_saved = saves and case in SAVED_CASES
        kept: list[Outcome] = []
        yield case.name, functools.partial(train, case, singles, mesh, folder if is_saved else None, kept)
        if is_saved:
            yield f"resumed {case.name}", functools.partial(go_on, case, folder, mesh, kept)
        if saves and case is SAVED_CASES[-1]:
            (folder / SAVED).touch()
    for case in COUNTED_CASES:
        yield f"counted {case.name}", functools.partial(count, case, mesh)
    for rule, settings in COLUMN_SETTINGS.items():
        yield f"columns {rule}", functools.partial(shard_columns, rule, settings, mesh)
    for case in [] if saves else MOVED_CASES:
        yield f"resumed {case.name}", functools.partial(move_over, case, singles, folder, mesh)


def train(
    case: Case, singles: Mapping[str, Outcome], mesh: DeviceMesh, folder: Path | None, kept: list[Outcome]
) -> dict[str, Any]:
    """Compare a sharded run with the one of one process."""
    single = singles[case.name].part(mesh)
    kept.append(run(case, mesh, save_at(folder / case.name) if folder else None))
    return compare(kept[-1], single)


def go_on(case: Case, folder: Path, mesh: DeviceMesh, kept: list[Outcome]) -> dict[str, Any]:
    """Compare a resumed run with the one that was not interrupted."""
    return {"is_same": same(resume(case, folder / case.name, mesh), kept[-1].trained)}


def move_over(case: Case, singles: Mapping[str, Outcome], folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """Go on from what the other number of ranks saved, as soon as it has; compare with one process."""
    deadline = time.monotonic() + LIMIT.total_seconds()
    while not (folder / SAVED).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    part = singles[case.name].part(mesh)
    return {"distance": distance(resume(case, folder / case.name, mesh), part.trained, part.start)}


def shard_columns(rule: str, settings: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Return what an optimizer says about a weight whose columns are sharded."""
    layer = nn.Linear(306, 17, bias=False)
    fully_shard(layer, mesh=mesh, shard_placement_fn=lambda parameter: Shard(1))
    layer.weight.grad = torch.zeros_like(layer.weight)
    try:
        OPTIMIZERS[rule](layer.parameters(), **settings).step()
    except RecipeError as error:
        return {"refusal": str(error)}
    return {"refusal": ""}


def write_down(path: Path, measures: Iterable[tuple[str, Measure]]) -> None:
    """Measure and write a line for each, also where one fails."""
    with open(path, "w", encoding="utf-8") as file:
        for name, measure in measures:
            began = time.perf_counter()
            try:
                found = measure()
            except Exception:  # Whatever it is, it is the result of this case.
                found = {"error": traceback.format_exc()}
            print(json.dumps({"case": name, "seconds": time.perf_counter() - began, **found}), file=file, flush=True)


def rank_main(rank: int, world: int, folder: Path, singles: Mapping[str, Outcome]) -> None:
    """Make all measurements on one rank."""
    store = f"file://{folder}/{world}.store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=LIMIT)
    mesh = init_device_mesh("cpu", (world,))
    write_down(folder / f"{world}.{rank}.jsonl", measured(singles, mesh, folder))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Train in one process, then in forks."""
    torch.set_num_threads(1)
    singles: dict[str, Outcome] = {}

    def alone(case: Case) -> dict[str, Any]:
        singles[case.name] = run(case)
        return {}

    measures = [(case.name, functools.partial(alone, case)) for case in CASES]
    measures += [(f"counted {case.name}", functools.partial(count, case, None)) for case in COUNTED_CASES]
    write_down(folder / "1.0.jsonl", measures)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=rank_main, args=(rank, world, folder, singles), daemon=True)
        for world in WORLDS
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

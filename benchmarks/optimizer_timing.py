"""The clocks and byte counters of one family of optimizers, stepped side by side over one parameter list."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from optimizer_peers import FAMILIES, LISTS, Candidate, ListShape, Missing, Weights, fused_adamw
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SOAP_PERIOD = 10
SLOW_S = 10.0
STEPS_PER_BLOCK = {"tiny": 20, "small": 4, "gpt": 1}


@dataclass
class Entry:
    """A candidate under measurement.

    Args:
        candidate: what it is.
        weights: its own parameters and gradients.
        optimizers: stepped one after the other.
        row: the figures, as they go to the result.
        cpu: CPU-seconds of its blocks (seconds of the device on CUDA).
        wall: wall seconds of its blocks.
        fused_cpu: CPU-seconds of the fused AdamW block beside each.
        fused_wall: the same in wall seconds.
    """

    candidate: Candidate
    weights: Weights
    optimizers: list[torch.optim.Optimizer]
    row: dict[str, Any]
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    fused_cpu: list[float] = field(default_factory=list)
    fused_wall: list[float] = field(default_factory=list)

    def prepare(self) -> None:
        """Get ready for a block of steps, off the clock."""
        if period_of(self.candidate.family) > 1:
            self.weights.give_other_gradients()

    def step(self) -> None:
        """Step every optimizer once."""
        if self.candidate.drops_gradients:
            self.weights.give_gradients()
        for optimizer in self.optimizers:
            optimizer.step()


def clocked(step: Callable[[], None], count: int, device: str) -> tuple[float, float]:
    """Return the CPU-seconds (on CUDA, seconds between two events) and wall seconds of `count` steps, per step."""
    if device == "cuda":
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        wall = time.perf_counter()
        began.record()
        for _ in range(count):
            step()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3 / count, (time.perf_counter() - wall) / count
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def traced(step: Callable[[], None], device: str) -> tuple[int, int]:
    """Return the peak and the final bytes that `step` holds beyond those held before it.

    Every allocation and release that torch's CPU allocator reports to the profiler, summed in the order of time; what C
    code takes from the system directly is not seen. On CUDA the caching allocator's own counters.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            step()
    events = run.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = np.cumsum([0, *(size for _, size in changes)])
    return int(held.max()), int(held[-1])


def state_bytes(optimizers: list[torch.optim.Optimizer], weights: Weights) -> int:
    """Return the bytes of all tensors in the states and groups, each storage once, parameters and gradients not."""
    given = {t.untyped_storage().data_ptr() for t in (*weights.params, *weights.grads)}
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for optimizer in optimizers
        for tensor in tensors_in([*optimizer.state.values(), *optimizer.param_groups])
    }
    return sum(size for place, size in sizes.items() if place not in given)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield every plain tensor inside nested lists, dicts and tensor subclasses."""
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)


def ratio(ours: list[float], theirs: list[float], period: int = 1) -> dict[str, Any]:
    """Return the median of the paired ratios and its 95 % bootstrap interval; over sums of `period` steps each."""
    kept = len(ours) // period * period
    sums = [np.array(values[:kept]).reshape(-1, period).sum(axis=1) for values in (ours, theirs)]
    ratios = sums[0] / sums[1]
    picks = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "interval_95": [float(low), float(high)], "pairs": len(ratios)}


def period_of(family: str) -> int:
    """Return how many steps make a whole of equal work: SOAP refreshes its bases every tenth."""
    return SOAP_PERIOD if family in ("SOAP", "SOAPMuon") else 1


def rounds_of(family: str, steps: int) -> int:
    """Return how often each candidate of `family` is timed: matrix optimizers are slow, SOAP needs whole periods."""
    if period_of(family) > 1:
        return max(1, round(steps * 4 / 3 / SOAP_PERIOD)) * SOAP_PERIOD
    return max(4, steps // 3) if family in ("Muon", "NorMuon") else steps


def started(candidate: Candidate, shape: ListShape, device: str) -> Entry:
    """Return `candidate` after its first two steps (SOAP: a whole period), with first-step time and bytes in its row.

    The candidate's own exceptions end up in the row's ``status``; that of an unmeasurable one is not ``measured``.
    """
    row: dict[str, Any] = {"list": shape.name, "family": candidate.family, "label": candidate.label}
    row |= {"ours": candidate.is_ours, "peer": candidate.is_peer, "status": "measured"}
    entry = Entry(candidate, Weights(shape, device), [], row)
    total = sum(p.numel() for p in entry.weights.params)

    def first() -> None:
        began = time.perf_counter()
        entry.optimizers = candidate.make(entry.weights)
        if candidate.first_step:
            candidate.first_step(entry.optimizers, entry.weights)
        else:
            entry.step()
        if device == "cuda":
            torch.cuda.synchronize()
        row["first_step_s"] = time.perf_counter() - began

    def warm_up() -> None:
        for _ in range(period_of(candidate.family)):
            entry.prepare()
            entry.step()

    entry.prepare()  # what it shares with others is there before bytes are counted
    try:
        candidate.find()
        peak, held = traced(first, device)
        if row["first_step_s"] > SLOW_S and period_of(candidate.family) == 1 and not candidate.drops_gradients:
            peak -= held  # one step of it is enough to wait for
        else:
            peak, _ = traced(warm_up, device)
        states = state_bytes(entry.optimizers, entry.weights)
    except Missing as error:
        row["status"] = f"missing: {error}"
    except Exception as error:  # a peer may fail in any way; the others are measured all the same
        row["status"] = failure(error)
    else:
        row |= {"state_bytes_per_parameter": states / total, "temporary_bytes_per_parameter": peak / total}
        row["kept_outside_state_bytes_per_parameter"] = max(0, held - states) / total
    return entry


def failure(error: Exception) -> str:
    """Return a row's status for an exception: its type and the first line of its message."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def measured(
    candidates: list[Candidate], list_name: str, *, steps: int, limit_s: float, device: str
) -> tuple[list[dict], list[dict]]:
    """Return the rows of one family's candidates on one list, and each of ours against each of the others.

    In every round each candidate has its turn: a block of its steps and one of fused AdamW's next to each other, the
    order flipping from round to round, that of the candidates too. No new round starts after `limit_s` seconds, but
    two (for SOAP one period) are always run.
    """
    shape, family = LISTS[list_name], candidates[0].family
    period = period_of(family)
    block = STEPS_PER_BLOCK[list_name] if period == 1 else 1
    entries = [started(candidate, shape, device) for candidate in candidates]
    running = [entry for entry in entries if entry.row["status"] == "measured"]
    reference = Weights(shape, device)
    fused = fused_adamw(reference.params)
    for _ in range(3):
        fused.step()
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    for turn in range(rounds_of(family, steps)):
        if time.perf_counter() - began > limit_s and turn >= max(2, period) and turn % period == 0:
            break
        for entry in running if turn % 2 else running[::-1]:
            if entry.row["status"] != "measured":
                continue
            try:
                _one_turn(entry, fused, block, device, fused_first=turn % 2 == 0)
            except Exception as error:
                entry.row["status"] = failure(error)
    gc.enable()
    running = [entry for entry in running if entry.row["status"] == "measured"]
    for entry in running:
        _check_weights(entry, Weights(shape, device))
        _summarise(entry, period)
    against = [
        {"list": list_name, "family": family, "ours": ours.row["label"], "other": other.row["label"]}
        | {
            "peer": other.candidate.is_peer,
            "cpu_ratio": ratio(ours.cpu, other.cpu, period),
            "wall_ratio": ratio(ours.wall, other.wall, period),
        }
        for ours in running
        for other in running
        if ours.candidate.is_ours and not other.candidate.is_ours
    ]
    return [entry.row for entry in entries], against


def _one_turn(entry: Entry, fused: torch.optim.Optimizer, block: int, device: str, *, fused_first: bool) -> None:
    entry.prepare()
    if fused_first:
        beside = clocked(fused.step, block, device)
    cpu, wall = clocked(entry.step, block, device)
    if not fused_first:
        beside = clocked(fused.step, block, device)
    entry.cpu.append(cpu)
    entry.wall.append(wall)
    entry.fused_cpu.append(beside[0])
    entry.fused_wall.append(beside[1])


def _check_weights(entry: Entry, before: Weights) -> None:
    # A step that does nothing is fast.
    params = entry.weights.params
    if not all(bool(p.isfinite().all()) for p in params):
        entry.row["status"] = "failed: weights are not finite"
    elif any(torch.equal(p, start) for p, start in zip(params, before.params)):
        entry.row["status"] = "failed: some weights did not move"


def _summarise(entry: Entry, period: int) -> None:
    entry.row |= {
        "cpu_ratio": ratio(entry.cpu, entry.fused_cpu, period),
        "wall_ratio": ratio(entry.wall, entry.fused_wall, period),
        "cpu_ms": float(np.median(entry.cpu)) * 1e3,
        "wall_ms": float(np.median(entry.wall)) * 1e3,
        "mean_cpu_ms": float(np.mean(entry.cpu)) * 1e3,
        "fused_cpu_ms": float(np.median(entry.fused_cpu)) * 1e3,
    }
    if period > 1:
        entry.row["worst_step_over_mean"] = float(np.max(entry.cpu) / np.mean(entry.cpu))
        entry.row["cpu_ms_of_each_step"] = [round(seconds * 1e3, 3) for seconds in entry.cpu]


def singular_values(candidate: Candidate, device: str, num_matrices: int = 20) -> dict[str, Any]:
    """Return the singular values of the first updates for Gaussian 256x512 gradients: the orthogonalisation's quality.

    A first step without decay, scaled as ``original``, moves zero weights by lr times the orthogonalised gradient.
    """
    generator = torch.Generator().manual_seed(1)
    values = []
    for _ in range(num_matrices):
        weight = torch.nn.Parameter(torch.zeros(256, 512, device=device))
        weight.grad = torch.randn(256, 512, generator=generator).to(device)
        group: dict[str, Any] = {"params": [weight], "weight_decay": 0.0, "lr": 1.0}
        if candidate.is_ours:
            group["adjust_lr"] = "original"
        if candidate.module == "pytorch_optimizer":
            group["use_muon"] = True
        candidate.find()([group], **{**candidate.settings, "lr": 1.0}).step()
        values.append(torch.linalg.svdvals(weight.detach().double().cpu()))
    found = torch.stack(values)
    return {"label": candidate.label, "ours": candidate.is_ours, "matrices": num_matrices} | {
        "smallest": float(found.min()),
        "largest": float(found.max()),
        "inside_0.95_to_1.05": float(((found >= 0.95) & (found <= 1.05)).double().mean()),
    }


def families_of(names: str) -> list[str]:
    """Return the families named in a comma-separated list; all for an empty one.

    Raises:
        SystemExit: a name is of none.
    """
    wanted = [name for name in names.split(",") if name] or list(FAMILIES)
    unknown = [name for name in wanted if name not in FAMILIES]
    if unknown:
        raise SystemExit(f"--only names {', '.join(unknown)}; give some of {', '.join(FAMILIES)}.")
    return wanted

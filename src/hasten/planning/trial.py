"""A few real steps on a state that is thrown away: what `hasten.planning.measurement` runs in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten import checkpoint
from hasten.data.lengths import BatchSizes, LengthSchedule, WindowSchedule
from hasten.data.shards import PreparedData
from hasten.errors import HastenError
from hasten.loop import State, capture, start, train_step
from hasten.loop.between import validate
from hasten.loop.probing import probe
from hasten.loop.snapshots import hold, snapshot
from hasten.planning.measurement import Measured, Point
from hasten.recipe import Recipe, resolve
from hasten.recipe.settings import without_none

# Steps of every kind that are timed, after those that warm up. A run that is not planned yet has this many steps here.
STEPS, WARM_UP, HORIZON = 10, 2, 10**6
# Steps of each kind that have to fit the time, or smaller steps are timed.
FEWEST = 4
# Shares of the time: all steps, an evaluation, float32 steps beside those of a lower precision.
STEPS_SHARE, EVALUATION_SHARE, FLOAT32_SHARE = 0.7, 0.1, 0.15
# Bytes of a state above which a checkpoint is not tried.
LARGEST_CHECKPOINT, DISK_BYTES_PER_SECOND = 2 << 30, 200e6


@dataclass(frozen=True)
class Kind:
    """Steps of one kind: row length, micro-batches, window (None: no limit)."""

    length: int
    micro_batches: int
    window: int | None = None


def trial(recipe: Recipe, data: PreparedData, *, seconds: float, model: Callable[[], Any] | None = None) -> Measured:
    """Return what steps, evaluations and a checkpoint of `recipe` take in this process.

    Every row length is timed, in turns, so that whatever else the machine does hits all alike. Where steps of full
    size would take too long, steps of fewer micro-batches are timed instead, and a straight line leads on from there.

    Args:
        recipe: of the run.
        data: prepared.
        seconds: to aim at.
        model: builds the weights to start from; fresh ones by default.
    """
    import torch

    began = time.perf_counter()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    state = _started(recipe, data, model)
    if state.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(state.device)
    per_token = _evaluation(state, EVALUATION_SHARE * seconds)
    full = state.batch_sizes.rows // state.batch_sizes.micro_rows
    kinds, notes = _kinds(state, full, STEPS_SHARE * seconds)
    points = _timed(state, kinds, STEPS_SHARE * seconds)
    taken = snapshot(state)  # there while a checkpoint is written, and all the time if the guard goes back to it
    hold(state, taken)
    _step(state, kinds[0])
    del taken
    saving = _checkpoint(state)
    peak = _peak(state)
    is_narrow = recipe.precision.name != "float32" and state.device.type == "cpu"
    ratio = _beside_float32(state, data, model, kinds[0], FLOAT32_SHARE * seconds) if is_narrow else None
    return Measured(
        points=points,
        micro_batches=full,
        peak_bytes=peak,
        evaluation_seconds=per_token,
        checkpoint_seconds=saving,
        float32_ratio=ratio,
        threads=torch.get_num_threads(),
        spent=time.perf_counter() - began,
        notes=notes,
    )


def main() -> None:
    """Read a request on standard input, do the trial, print what it found as a line of JSON."""
    request = json.load(sys.stdin)
    recipe = resolve(request["recipe"]).recipe
    try:
        found = trial(recipe, PreparedData.open(request["data"]), seconds=request["seconds"])
    except (HastenError, RuntimeError, MemoryError) as error:
        # RuntimeError is what PyTorch says when memory runs out.
        sys.exit(" ".join(str(error).split())[:300] or type(error).__name__)
    print(json.dumps(dataclasses.asdict(found)))


def _started(recipe: Recipe, data: PreparedData, model: Callable[[], Any] | None) -> State:
    state = start(recipe, data, horizon=HORIZON, model=None if model is None else model())
    state.clock.start()
    return state


def _kinds(state: State, full: int, seconds: float) -> tuple[list[Kind], tuple[str, ...]]:
    """Return the kinds of steps to time, the longest rows first: full steps where they fit the time."""
    # What a run does before its first step: a pass at every length, the longest first. Memory then is as it will be.
    full_step = probe(state, passes=1)
    lengths = list(reversed(state.recipe.lengths.row_lengths))
    longest = lengths[0]
    kinds = [Kind(length, full) for length in lengths]
    window = state.recipe.lengths.build_window(**_run(state))
    if window(0.0) is not None:
        kinds.append(Kind(longest, full, window(0.0)))
    if full > 1 and full_step * len(kinds) * FEWEST > seconds:
        few = min(3, full - 1)
        small = [dataclasses.replace(kind, micro_batches=few) for kind in kinds]
        more = [Kind(longest, 1)] if few > 1 else [Kind(longest, full)]
        sizes = " and ".join(str(kind.micro_batches) for kind in [small[0], *more])
        return [*small, *more], (f"steps of {sizes} micro-batches were timed: one of {full} takes {full_step:.2g} s",)
    if state.recipe.batch.schedule is not None and full > 1:
        kinds.append(Kind(longest, 1))
    return kinds, ()


def _timed(state: State, kinds: list[Kind], seconds: float) -> tuple[Point, ...]:
    """Return the points of `kinds`, timed in turns until each has enough steps or the time is up."""
    period = max([state.optimizer.estimate_every, *(int(g.get(PERIOD, 1)) for g in state.optimizer.param_groups)])
    began, taken = time.perf_counter(), {kind: [] for kind in kinds}
    for _ in range(WARM_UP + max(STEPS, 2 * period)):
        for kind in kinds:
            is_enough = len(taken[kind]) >= 1 and time.perf_counter() - began > seconds
            if is_enough:
                continue
            taken[kind].append(_step(state, kind))
        if time.perf_counter() - began > seconds and all(len(steps) > 1 for steps in taken.values()):
            break
    extra = _extra(taken, period)
    points = [_point(kind, steps, extra) for kind, steps in taken.items()]
    if state.device.type != "cpu":
        return tuple(points)
    # Other work on the machine delays some steps and not others: CPU-seconds tell the kinds apart, the clock over all
    # steps tells how long a CPU-second takes. Where nothing else runs this changes nothing.
    walls, cpus = zip(*(step for steps in taken.values() for step in _kept(steps)))
    return tuple(dataclasses.replace(point, seconds=point.cpu_seconds * sum(walls) / sum(cpus)) for point in points)


# What an optimizer that works more in some steps than in others calls the steps from one of them to the next.
PERIOD = "precondition_frequency"


def _kept(steps: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return `steps` without those that warmed up; at least one is left."""
    return steps[min(WARM_UP, len(steps) // 2) :]


def _extra(taken: dict[Kind, list[tuple[float, float]]], period: int) -> tuple[float, float]:
    """Return what a step takes on average beyond the median of its kind; 0 where every update does the same."""
    if period == 1:
        return 0.0, 0.0
    beyond = []
    for steps in taken.values():
        kept = _kept(steps)
        middle = [statistics.median(column) for column in zip(*kept)]
        beyond += [(wall - middle[0], cpu - middle[1]) for wall, cpu in kept]
    return tuple(max(0.0, statistics.fmean(column)) for column in zip(*beyond))


def _point(kind: Kind, steps: list[tuple[float, float]], extra: tuple[float, float]) -> Point:
    kept = _kept(steps)
    wall, cpu = (statistics.median(column) + more for column, more in zip(zip(*kept), extra))
    return Point(kind.length, kind.micro_batches, kind.window, len(kept), wall, cpu)


def _step(state: State, kind: Kind) -> tuple[float, float]:
    """Return the seconds, on the clock and of the CPU, of one real step of a kind."""
    import torch

    micro_rows, seq_len = state.batch_sizes.micro_rows, state.recipe.lengths.seq_len
    state.batch_sizes = BatchSizes(kind.micro_batches * micro_rows, micro_rows)
    state.lengths = _always(kind.length, seq_len)
    if state.recipe.lengths.name == "window":
        limit = kind.window or seq_len
        state.window = WindowSchedule(seq_len, start=limit, share=1.0)
    began, busy = time.perf_counter(), time.process_time()
    report = train_step(state)
    float(report.loss)
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    return time.perf_counter() - began, time.process_time() - busy


def _always(length: int, seq_len: int) -> LengthSchedule:
    if length == seq_len:
        return LengthSchedule(seq_len)
    return LengthSchedule(seq_len, (length, seq_len), growth=_never, share=1.0)


def _never(progress: float) -> float:
    return 0.0


def _evaluation(state: State, seconds: float) -> float:
    """Return the seconds that evaluating a held-out token takes."""
    tokens, asked = state.config.seq_len, state.recipe.evaluate.tokens
    while True:
        began = time.perf_counter()
        found = validate(state, max_tokens=tokens)
        each = (time.perf_counter() - began) / found.tokens
        if tokens >= asked or found.tokens < tokens or 4 * tokens * each > seconds:
            return each
        tokens = min(asked, 4 * tokens)


def _checkpoint(state: State) -> float:
    """Return the seconds that a checkpoint takes, tried in a temporary folder."""
    tensors, plain = capture(state)
    size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    if size <= LARGEST_CHECKPOINT:
        with suppress(OSError), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            began = time.perf_counter()
            checkpoint.save(Path(folder), state.step, tensors, plain, keep=1)
            return time.perf_counter() - began
    return size / DISK_BYTES_PER_SECOND


def _beside_float32(
    state: State, data: PreparedData, model: Callable[[], Any] | None, kind: Kind, seconds: float
) -> float:
    """Return how much longer a step takes than in float32, both timed in turns."""
    table = state.recipe.to_dict()
    plain = resolve({**without_none(table), "precision": {"name": "float32"}}).recipe
    others = {"narrow": state, "plain": _started(plain, data, model)}
    small = dataclasses.replace(kind, micro_batches=1)
    _step(others["plain"], small)
    began, ratios = time.perf_counter(), []
    while len(ratios) < 3 and (not ratios or time.perf_counter() - began < seconds):
        taken = {name: _step(other, small)[1] for name, other in others.items()}
        ratios.append(taken["narrow"] / taken["plain"])
    return statistics.median(ratios)


def _run(state: State) -> dict[str, Any]:
    """Return what a schedule of lengths is built from; shares of the run are all that is asked for here."""
    budget = state.recipe.budget
    return {
        "total_steps": HORIZON,
        "tokens_per_step": state.tokens_per_step,
        "steps_per_epoch": state.steps_per_epoch,
        "seconds": budget.value if budget.unit == "seconds" else None,
    }


def _peak(state: State) -> int | None:
    """Return the most memory that this process has held, in bytes.

    Linux hands the peak of the process that started this one down to `getrusage`, but not to ``/proc``.
    """
    from hasten.loop.memory import peak_bytes

    if state.device.type == "cpu":
        with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    return peak_bytes(state.device)


if __name__ == "__main__":
    main()

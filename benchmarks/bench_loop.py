"""What hasten's loop costs over a hand-written one: same model, same batches, CPU-seconds, alternating blocks.

    python benchmarks/bench_loop.py [--blocks 40] [--steps 4] [--threads 1]

The hand-written loop is the least a person would write (forward, loss, backward, clip, AdamW, schedule, reading the
loss), calls the same model and is fed ready tensors; ours assembles its batches, counts, judges and logs every step to
disk. Blocks alternate, the order within a pair flips, and the figure is the median of the paired ratios with a
bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hasten.loop import Event, State, advance, prepare_for, start
from hasten.recipe import resolve
from hasten.record import Record, RunFolder


def hand_written(state: State, batches: list, total_steps: int, stop: int) -> None:
    """Train `state`'s model on `batches` up to `stop`, as plainly as can be."""
    model, optimizer = state.model, state.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    while state.step < stop:
        progress = state.step / total_steps
        scale = min(1.0, progress / 0.02) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        micro_batches = batches[state.step % len(batches)]
        num_targets = sum(batch.num_targets for batch in micro_batches)
        for batch in micro_batches:
            loss = model(batch.tokens_BT, batch.document_ids_BT, labels_BT=batch.labels_BT) / num_targets
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        state.step += 1


def main() -> None:
    """Run the blocks, print the figures, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    recipe = resolve(None, ["data=python", "budget=100000", "clip.max_norm=1.0", "batch.tokens=2048"]).recipe
    data = prepare_for(recipe)
    total = 100_000
    ours, peer = start(recipe, data), start(recipe, data)
    ready = [peer.batches.take((i * peer.batch_sizes.rows,), rows=peer.batch_sizes.rows)[0] for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        record = Record(RunFolder(Path(folder)), 1)

        def write(event: Event) -> None:
            record.metric(step=event.step, **event.values)

        runs = {
            "hasten": lambda: advance(ours, ours.step + options.steps, hooks=[write], pause=lambda _: False),
            "hand-written": lambda: hand_written(peer, ready, total, peer.step + options.steps),
        }
        ours.clock.start()
        for run in runs.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for block in range(options.blocks):
            for name in list(runs) if block % 2 else list(reversed(runs)):
                began = time.process_time()
                runs[name]()
                seconds[name].append((time.process_time() - began) / options.steps)
        record.close()
    ratios = np.array(seconds["hasten"]) / np.array(seconds["hand-written"])
    picks = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    result = {
        "median_ratio": float(np.median(ratios)),
        "interval_95": [float(low), float(high)],
        "cpu_seconds_per_step": {name: float(np.median(values)) for name, values in seconds.items()},
        "blocks": options.blocks,
        "steps_per_block": options.steps,
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

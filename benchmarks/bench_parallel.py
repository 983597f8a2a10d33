"""What DDP and FSDP cost with one process, over none of them: the same steps of one recipe, alternating blocks.

    python benchmarks/bench_parallel.py [--blocks 30] [--steps 4] [--threads 1] [--out FILE]

Three runs of the nano model in one process take turns: alone, and as one process of one under DDP and under FSDP2 over
gloo. The figure is the median of the paired ratios of CPU-seconds, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from hasten.loop import advance, prepare_for, start
from hasten.loop.company import Company, company
from hasten.parallel import Copies, Parts
from hasten.recipe import resolve

KINDS = ("alone", "ddp", "fsdp")


def main() -> None:
    """Run the blocks, print the figures, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    recipe = resolve(None, ["data=python", "budget=100000", "device=cpu"]).recipe
    data = prepare_for(recipe)
    with ExitStack() as held:
        together = held.enter_context(company(recipe))
        companies = {
            "alone": Company(),
            "ddp": Company(Copies(together.ranks)),
            "fsdp": Company(Parts(together.ranks, 1, "cpu")),
        }
        states = {kind: start(recipe, data, company=companies[kind]) for kind in KINDS}
        for state in states.values():
            state.forward = state.company.parallel.wrap(state.forward, state.precision.master)
            advance(state, options.steps)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for block in range(options.blocks):
            for kind in KINDS if block % 2 else reversed(KINDS):
                began = time.process_time()
                advance(states[kind], states[kind].step + options.steps)
                seconds[kind].append((time.process_time() - began) / options.steps)
    result = {
        "ratio_to_alone": {kind: _ratio(seconds[kind], seconds["alone"]) for kind in KINDS[1:]},
        "cpu_seconds_per_step": {kind: float(np.median(values)) for kind, values in seconds.items()},
        "blocks": options.blocks,
        "steps_per_block": options.steps,
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _ratio(ours: list[float], alone: list[float]) -> dict[str, float | list[float]]:
    ratios = np.array(ours) / np.array(alone)
    picks = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "interval_95": [float(low), float(high)]}


if __name__ == "__main__":
    sys.exit(main())

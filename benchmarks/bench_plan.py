"""How well `hasten plan` foresees a run: training time and memory, planned and then really done.

    python benchmarks/bench_plan.py --out benchmarks/results/<date>_plan [--only NAME ...] [--repeats 1]

Every plan and every run is a fresh process with one thread. A plan is made right before and right after each run, and
the run is held against the mean of both, because the machine may be shared: what it does in between is in neither.
Training time is the phases `train` and `data` of result.json, on the clock and in CPU-seconds; memory is what the run
records as `memory_bytes`, the peak of the process up to the end of training.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMMON = {"data": "python", "threads": 1, "seed": 0, "evaluate.every": "50%"}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"budget": 150},
    "growing rows": {"budget": 60, "seq_len": 1024, "batch_tokens": 4096, "lengths": "linear"},
    "muon, accumulated": {"budget": 24, "optimizer": "muon", "batch_tokens": 16384, "lr": 0.02},
    "soap, 512": {"budget": 60, "optimizer": "soap", "batch_tokens": 4096, "seq_len": 512},
    "8-bit, larger": {
        "budget": 40, "model": "micro", "optimizer.state_format": "8bit", "batch_tokens": 2048, "data.packing": "chunk",
    },
}  # fmt: skip


def plan_one(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what `hasten.plan` says of a recipe."""
    from hasten.planning.plans import plan

    arithmetic = plan(measure=False, **settings).memory.total
    found = plan(**settings)
    return {
        "training": found.times.training,
        "cpu": found.steps * sum(speed.share * speed.cpu_seconds_per_step for speed in found.speed),
        "memory": found.memory.total,
        "arithmetic": arithmetic,
    }


def run_one(settings: dict[str, Any]) -> dict[str, Any]:
    """Do the run and return what it took."""
    import hasten

    seen = {"last": 0.0, "training": 0.0}

    def note(event: Any) -> None:
        now = time.process_time()
        if event.kind == "step":
            seen["training"] += now - seen["last"]
        seen["last"] = now

    with tempfile.TemporaryDirectory() as folder:
        values = hasten.train(hooks=[note], out=f"{folder}/run", **settings).values
    phases = values["phases"]
    memory = values["memory_bytes"]
    return {"training": phases["train"] + phases["data"], "cpu": seen["training"], "memory": memory}


def in_process(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what ``--one WHAT SETTINGS`` prints in a fresh process of one thread."""
    command = [sys.executable, __file__, "--one", what, json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = os.getloadavg()[0]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return {**json.loads(done.stdout.splitlines()[-1]), "load": (before, os.getloadavg()[0])}


def held_against(plans: list[dict[str, Any]], run: dict[str, Any]) -> dict[str, float]:
    """Return the plans' mean over the run, for time on the clock, CPU-seconds, memory; 1 is a perfect plan."""
    return {
        name: sum(plan[part] for plan in plans) / len(plans) / run[of]
        for name, part, of in (
            ("training_time", "training", "training"),
            ("cpu_seconds", "cpu", "cpu"),
            ("memory", "memory", "memory"),
            ("memory_without_measuring", "arithmetic", "memory"),
        )
    }


def main() -> None:
    """Plan and run every recipe, print the figures, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, settings = options.one
        print(json.dumps((plan_one if what == "plan" else run_one)(json.loads(settings))))
        return
    import torch

    results = []
    for repeat in range(options.repeats):
        for name in options.only:
            settings = {**COMMON, **RECIPES[name]}
            before = in_process("plan", settings)
            run = in_process("run", settings)
            after = in_process("plan", settings)
            result = {"recipe": name, "repeat": repeat, "settings": settings, "plans": [before, after], "run": run}
            results.append({**result, "planned_over_real": held_against([before, after], run)})
            print(json.dumps({name: results[-1]["planned_over_real"], "run": run}), flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                machine = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
                machine["machine"] = platform.machine()
                text = json.dumps({"machine": machine, "results": results}, indent=2)
                (options.out / "result.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Does 8-bit optimizer state cost loss? The reference run in float32 and in 8 bits, beside the noise of the last bits.

    python benchmarks/bench_state_format.py --out benchmarks/results/<date>_state_format [--workers 2]

Three arms per optimizer, paired by seed (initial weights, order of the data): ``float32``; ``8bit``, which differs in
``optimizer.state_format`` only; and ``nudged``, float32 with the learning rate changed by one part in a million, which
nobody would call another setting: what it moves the final loss by is what the same run gives or takes through rounding
alone. Held-out loss over the same fixed tokens. Every run is appended to ``runs.jsonl`` and never done again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from pathlib import Path

from bench_optimizer_steps import run_one
from scipy import stats
from studies import Study

STEPS = 400
NUDGE = 1 + 1e-6
# Rates tuned in the study of steps; Lion's decay as its authors advise (larger by what the rate is smaller).
OPTIMIZERS = {
    "adamw": {"lr": 0.005, "more": ""},
    "lion": {"lr": 0.0007, "more": "+weight_decay=0.5"},
}
# Seeds that no earlier study of this repository has run.
SEEDS = {"adamw": range(10, 16), "lion": range(10, 13)}


def wanted(name: str, arm: str, seed: int) -> dict:
    """Return a run to ask for."""
    settings = OPTIMIZERS[name]
    lr = settings["lr"] * (NUDGE if arm == "nudged" else 1)
    full = name + settings["more"] + ("+state_format=8bit" if arm == "8bit" else "")
    return {"arm": full, "lr": lr, "seed": seed, "steps": STEPS}


def change(found: list[float], base: list[float]) -> dict:
    """Return the change in percent of the base's loss: each, mean, standard deviation, paired t interval."""
    each = [100 * (loss / other - 1) for loss, other in zip(found, base, strict=True)]
    mean, spread = statistics.mean(each), statistics.stdev(each)
    half = stats.t.ppf(0.975, len(each) - 1) * spread / math.sqrt(len(each))
    return {"each": each, "mean": mean, "standard_deviation": spread, "interval_95": [mean - half, mean + half]}


def main() -> None:
    """Run the study, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args()
    if options.one:
        run = json.loads(options.one)
        print(json.dumps(run_one(run["arm"], run["lr"], run["seed"], run["steps"], extra)))
        return
    study = Study(
        options.out,
        __file__,
        workers=options.workers,
        extra=extra,
        key=lambda run: (run["arm"], repr(run["lr"]), run["seed"], run["steps"]),
    )
    result: dict = {"steps": STEPS, "optimizers": {}}
    for name, seeds in SEEDS.items():
        arms = ("float32", "8bit", "nudged")
        runs = {arm: study.results([wanted(name, arm, seed) for seed in seeds]) for arm in arms}
        loss = {arm: [run["loss"] for run in runs[arm]] for arm in arms}
        entry = {"seeds": list(seeds), "loss": loss}
        entry |= {arm: change(loss[arm], loss["float32"]) for arm in ("8bit", "nudged")}
        result["optimizers"][name] = entry
        print(name, json.dumps(entry), flush=True)
    import torch

    result |= {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""How many processes pay on one machine: tokens per second of runs side by side against one run with all cores.

    python benchmarks/bench_pool.py [--rounds 5] [--seconds 15] [--most 3]

Every layout (processes x threads) trains the same recipe with different seeds through `hasten.pool`, for the same
time, as `hasten compare` and `hasten restart` do it. Its throughput is the sum over its processes of tokens trained
divided by the seconds spent training (start-up, evaluation and saving left out). Layouts alternate within a round,
every round begins with another one, and the figures are medians over rounds of the ratio to one process with all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sysconfig
import tempfile
from pathlib import Path

import torch

from hasten.pool import Job, num_cores, run_all, train_command
from hasten.recipe import resolve


def throughput(folder: Path, text: Path, processes: int, threads: int, seconds: float) -> float:
    """Return the tokens per second of `processes` runs side by side, with `threads` CPU threads each."""
    jobs, runs = [], []
    for seed in range(processes):
        run = folder / f"{processes}x{threads}-{seed}"
        settings = [f"data={text}", f"budget={seconds:g}s", f"threads={threads}", f"seed={seed}", f"out={run}"]
        settings += ["evaluate.tokens=2048", "device=cpu"]
        run.mkdir(parents=True)
        recipe = folder / f"{run.name}.toml"
        recipe.write_text(resolve(None, settings).recipe.to_toml(), encoding="utf-8")
        jobs.append(Job(run.name, train_command(recipe), folder / f"{run.name}.txt", threads))
        runs.append(run)
    for ended in run_all(jobs, workers=processes):
        if ended.code:
            raise SystemExit(ended.job.log.read_text(encoding="utf-8"))
    results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in runs]
    return sum(result["tokens"] / (result["phases"]["train"] + result["phases"]["data"]) for result in results)


def main() -> None:
    """Measure, print, and write result.json into the current folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--most", type=int, default=num_cores() + 1)
    asked = parser.parse_args()
    alone = (1, num_cores())
    layouts = [alone, *((processes, 1) for processes in range(1, asked.most + 1))]
    measured: dict[tuple[int, int], list[float]] = {layout: [] for layout in layouts}
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        library = Path(sysconfig.get_paths()["stdlib"])
        text.write_text("".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))[:60]))
        throughput(Path(folder) / "warm-up", text, 1, 1, 3.0)
        for number in range(asked.rounds):
            for place in range(len(layouts)):
                layout = layouts[(number + place) % len(layouts)]
                loads.append(round(os.getloadavg()[0], 2))
                measured[layout].append(throughput(Path(folder) / str(number), text, *layout, asked.seconds))
                print(number, layout, round(measured[layout][-1]), "tokens/s, load before", loads[-1], flush=True)
    found = {
        "layouts": {
            f"{processes} x {threads}": {
                "tokens_per_second": [round(value, 1) for value in measured[processes, threads]],
                "median": round(statistics.median(measured[processes, threads]), 1),
                "ratio_to_one_with_all_cores": round(
                    statistics.median(a / b for a, b in zip(measured[processes, threads], measured[alone])), 3
                ),
            }
            for processes, threads in layouts
        },
        "rounds": asked.rounds,
        "seconds": asked.seconds,
        "cores": num_cores(),
        "load_average_before_each": loads,
        "machine": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(found["layouts"], indent=1))
    Path("result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

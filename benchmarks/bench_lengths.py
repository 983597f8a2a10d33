"""Time to loss of the length schedule: rows that grow to full length against rows of full length throughout.

    python benchmarks/bench_lengths.py --out benchmarks/results/<date>_lengths [--workers 2] [--seeds 3]

The reference recipe with a width of 384, rows of 1024 tokens and 4096 tokens a step. Both arms have the same learning
rate, the same tokens in the same order, the same initial weights for one seed, and are evaluated over the same held-out
rows of full length, outside of the clock. The clock is CPU-seconds of training on one thread.

For every seed the baseline runs once at the full horizon. The length schedule runs at the full horizon and on shorter
ones, each with its own schedules finished, until the baseline's final loss of that seed lies between two of them, where
it is interpolated; what is reported is CPU-seconds there relative to the baseline's. Curves crossing before the end of
a schedule are not read as results. Every run is appended to ``runs.jsonl`` and never done again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

from studies import Study

ARMS: dict[str, list[str]] = {
    "fixed": [],
    "linear": ["lengths=linear", "lengths.start=64", "lengths.over=60%"],
    "steps": ["lengths=steps", "lengths.start=64", "lengths.over=60%"],
    "linear-replay": ["lengths=linear", "lengths.start=64", "lengths.over=60%", "lengths.replay=0.1"],
}
SETTINGS = [
    "model.width=384",
    "model.num_heads=6",
    "model.num_kv_heads=2",
    "model.head_dim=64",
    "model.mlp_width=1024",
    "seq_len=1024",
    "batch_tokens=4096",
    "threads=1",
]
EVALUATION_TOKENS = 131_072
LADDER = (0.6, 0.7, 0.8, 0.9, 1.0)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def run_one(arm: str, seed: int, steps: int, extra: list[str]) -> dict:
    """Train once and return the line to write."""
    import torch

    from hasten.evaluation import evaluate_shards
    from hasten.loop import advance, prepare_for, start
    from hasten.recipe import resolve

    torch.set_num_threads(1)
    settings = {}
    for text in [*SETTINGS, f"seed={seed}", f"budget={steps}", *extra, *ARMS[arm]]:
        settings[text.partition("=")[0]] = text
    recipe = resolve("reference", list(settings.values())).recipe
    data = prepare_for(recipe)
    state = start(recipe, data)
    spent = 0.0
    lengths: dict[int, int] = {}
    curve = []

    def note(event) -> None:
        lengths[event.values["seq_len"]] = lengths.get(event.values["seq_len"], 0) + 1

    for stop in sorted({round(steps * part / 5) for part in range(1, 6)}):
        began = time.process_time()
        advance(state, stop, hooks=[note])
        spent += time.process_time() - began
        found = evaluate_shards(
            state.model,
            data.val,
            seq_len=recipe.lengths.seq_len,
            document_token=data.document_token,
            max_tokens=EVALUATION_TOKENS if stop == steps else EVALUATION_TOKENS // 8,
        )
        curve.append([stop, round(spent, 2), found.loss])
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "loss": found.loss if state.status != "diverged" else math.inf,
        "bits_per_byte": found.bits_per_byte,
        "cpu_seconds": spent,
        "tokens": state.tokens,
        "steps_by_length": dict(sorted(lengths.items())),
        "curve_steps_cpu_loss": curve,
        "settings": list(settings.values()),
    }


def wanted(arm: str, seed: int, steps: int) -> dict:
    """Return a run to ask for."""
    return {"arm": arm, "seed": seed, "steps": steps}


def ratio_to(study: Study, arm: str, base: dict, seed: int, steps: int, first: float) -> float | None:
    """Return CPU-seconds of `arm` at the final loss of `base`, relative to the base's; None where it is not reached."""

    def run(place: int) -> dict:
        return study.results([wanted(arm, seed, round(steps * LADDER[place]))])[0]

    place = LADDER.index(first)
    while run(place)["loss"] > base["loss"]:
        place += 1
        if place == len(LADDER):
            return None
    while place > 0 and run(place - 1)["loss"] <= base["loss"]:
        place -= 1
    here = run(place)
    if place == 0:
        return here["cpu_seconds"] / base["cpu_seconds"]
    before = run(place - 1)
    share = (before["loss"] - base["loss"]) / (before["loss"] - here["loss"])
    return (before["cpu_seconds"] + share * (here["cpu_seconds"] - before["cpu_seconds"])) / base["cpu_seconds"]


def summary(values: list[float]) -> dict:
    """Return mean and 95 % interval (Student's t) of a few values."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean}
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "interval_95": [mean - half, mean + half]}


def main() -> None:
    """Run the study, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default="linear")
    parser.add_argument("--first", type=float, default=0.8, help="where the search on the ladder begins")
    parser.add_argument("--whole-only", action="store_true", help="full horizons only, no ladder")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args()
    if options.one:
        print(json.dumps(run_one(**json.loads(options.one), extra=extra)))
        return
    import torch

    study = Study(
        options.out,
        __file__,
        workers=options.workers,
        extra=extra,
        key=lambda run: (run["arm"], run["seed"], run["steps"]),
        shown=("arm", "seed", "steps", "loss", "cpu_seconds", "steps_by_length"),
    )
    arms, seeds, steps = options.arms.split(","), range(options.seeds), options.steps
    bases = study.results([wanted("fixed", seed, steps) for seed in seeds])
    study.results([wanted(arm, seed, steps) for arm in arms for seed in seeds])
    result: dict = {"settings": SETTINGS + extra, "steps": steps, "seeds": list(seeds), "arms": {}}
    for arm in arms:
        whole = study.results([wanted(arm, seed, steps) for seed in seeds])
        entry: dict = {
            "setting": ARMS[arm],
            "final_loss_minus_fixed": summary([run["loss"] - base["loss"] for run, base in zip(whole, bases)]),
            "cpu_of_whole_run": summary([run["cpu_seconds"] / base["cpu_seconds"] for run, base in zip(whole, bases)]),
        }
        if not options.whole_only:
            ratios = [ratio_to(study, arm, base, seed, steps, options.first) for seed, base in zip(seeds, bases)]
            entry["cpu_to_final_loss_of_fixed"] = {"each": ratios, **(summary(ratios) if all(ratios) else {})}
        result["arms"][arm] = entry
        print(arm, json.dumps(entry), flush=True)
    result |= {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

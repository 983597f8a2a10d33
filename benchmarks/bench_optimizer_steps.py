"""How many steps an optimizer needs for the loss that tuned AdamW ends with: the reference run, schedules finished.

    python benchmarks/bench_optimizer_steps.py --out benchmarks/results/<date>_optimizer_steps [--workers 2]

1. Every optimizer is tuned over its learning rate: a grid of the full run, one seed, the same number of tries each; the
   grid is extended while the best rate lies at its edge.
2. AdamW's tuned rate runs with every seed at the full horizon; what it ends with is what the others aim at.
3. The others run on a ladder of shorter horizons, each with its schedule finished: up or down until AdamW's
   loss of the same seed lies between two rungs, where it is interpolated linearly in log steps; not reached is said,
   not guessed.

Held-out loss over the same fixed tokens for all. Every run is appended to ``runs.jsonl`` and never done again, so that
a stopped study goes on. The seed decides initial weights and data order, so arms with one seed are paired.
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

ARMS = ("adamw", "ademamix", "muon", "soap")
START = {"adamw": 5e-3, "ademamix": 5e-3, "muon": 1e-2, "soap": 5e-3}
# The reference recipe writes the betas of AdamW out. Those of AdEMAMix are its defaults for a run of this length.
MORE = {
    "ademamix": ["optimizer.betas=[0.9,0.95,0.99]"],
    "soap": ["optimizer.betas=[0.95,0.95]"],
}
GRID = (0.5, 1.0, 2.0)
# Where the search on the ladder begins.
FIRST = {"ademamix": 0.87, "muon": 0.65, "soap": 0.75}
LADDER = (0.35, 0.5, 0.65, 0.75, 0.87, 1.0)
SEEDS = (0, 1, 2)
EVALUATION_TOKENS = 32_768


def run_one(arm: str, lr: float, seed: int, steps: int, extra: list[str]) -> dict:
    """Train once and return the line to write; `arm` is a name, or ``name+setting=value``."""
    import torch

    from hasten.evaluation import evaluate_shards
    from hasten.loop import advance, prepare_for, start
    from hasten.loop.state import weights_to_evaluate
    from hasten.recipe import resolve

    torch.set_num_threads(1)
    name, *more = arm.split("+")
    settings = [f"optimizer={name}", f"lr={lr}", f"seed={seed}", f"budget={steps}", *MORE.get(name, ())]
    settings += [*(f"optimizer.{setting}" for setting in more), *extra]
    recipe = resolve("reference", settings).recipe
    began, cpu = time.perf_counter(), time.process_time()
    data = prepare_for(recipe)
    state = start(recipe, data)
    advance(state, steps)
    with weights_to_evaluate(state):
        found = evaluate_shards(
            state.model,
            data.val,
            seq_len=recipe.lengths.seq_len,
            document_token=data.document_token,
            max_tokens=EVALUATION_TOKENS,
        )
    loss = found.loss if state.status != "diverged" else math.inf
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return {"arm": arm, "lr": lr, "seed": seed, "steps": steps, "loss": loss, **spent}


def losses(study: Study, wanted: list[dict]) -> list[float]:
    """Return the final loss of every run in `wanted`, after doing those that are missing."""
    return [run["loss"] for run in study.results(wanted)]


def tuned_rate(study: Study, arm: str, steps: int) -> float:
    """Return the best learning rate, the grid extended while it lies at the edge."""
    rates = [START[arm] * factor for factor in GRID]
    while True:
        found = losses(study, [{"arm": arm, "lr": lr, "seed": 0, "steps": steps} for lr in rates])
        best = found.index(min(found))
        if 0 < best < len(rates) - 1:
            return rates[best]
        rates = [rates[0] / 2, *rates] if best == 0 else [*rates, rates[-1] * 2]


def steps_to(study: Study, arm: str, lr: float, seed: int, steps: int, target: float) -> float | None:
    """Return the share of `steps` at which finished runs reach `target`; None where the full horizon does not."""

    def loss(place: int) -> float:
        return losses(study, [{"arm": arm, "lr": lr, "seed": seed, "steps": round(steps * LADDER[place])}])[0]

    place = LADDER.index(FIRST[arm])
    while loss(place) > target:
        place += 1
        if place == len(LADDER):
            return None
    while place > 0 and loss(place - 1) <= target:
        place -= 1
    if place == 0:
        return LADDER[0]
    few, many, high, low = LADDER[place - 1], LADDER[place], loss(place - 1), loss(place)
    return few * (many / few) ** ((high - target) / (high - low))


def main() -> None:
    """Run the study, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--tune-only", action="store_true")
    parser.add_argument("--seed-0", action="append", default=[], metavar="ARM:LR", help="run this once and stop")
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
        key=lambda run: (run["arm"], f"{run['lr']:.6g}", run["seed"], run["steps"]),
    )
    if options.seed_0:
        wanted = [(arm, float(lr)) for arm, _, lr in (text.rpartition(":") for text in options.seed_0)]
        losses(study, [{"arm": arm, "lr": lr, "seed": 0, "steps": options.steps} for arm, lr in wanted])
        return
    arms = options.arms.split(",")
    # All first tries at once, so that every worker has something to do.
    grid = [(arm, START[arm] * factor) for arm in arms for factor in GRID]
    losses(study, [{"arm": arm, "lr": lr, "seed": 0, "steps": options.steps} for arm, lr in grid])
    rates = {arm: tuned_rate(study, arm, options.steps) for arm in arms}
    print("tuned:", rates, flush=True)
    if options.tune_only:
        return
    result: dict = {"rates": rates, "steps": options.steps, "seeds": SEEDS, "arms": {}}
    aim = losses(study, [{"arm": "adamw", "lr": rates["adamw"], "seed": s, "steps": options.steps} for s in SEEDS])
    # All first guesses at once, so that every worker has something to do.
    others = [arm for arm in arms if arm != "adamw"]
    guess = {arm: round(options.steps * FIRST[arm]) for arm in others}
    losses(study, [{"arm": arm, "lr": rates[arm], "seed": s, "steps": guess[arm]} for arm in others for s in SEEDS])
    for arm in arms:
        entry: dict = {}
        if arm != "adamw":
            places = list(zip(SEEDS, aim, strict=True))
            ratios = [steps_to(study, arm, rates[arm], seed, options.steps, target) for seed, target in places]
            entry["steps_ratio"] = ratios
            if all(ratios):
                mean, spread = statistics.mean(ratios), statistics.stdev(ratios)
                half = 4.303 * spread / math.sqrt(len(ratios))  # t for 95 %, two degrees of freedom
                entry |= {"mean_ratio": mean, "interval_95": [mean - half, mean + half]}
        runs = [run for run in study.done.values() if run["arm"] == arm]
        tries = sorted((run["lr"], run["loss"]) for run in runs if (run["seed"], run["steps"]) == (0, options.steps))
        tuned = sorted((run["steps"], run["seed"], run["loss"]) for run in runs if run["lr"] == rates[arm])
        entry |= {"tuning": tries, "runs": tuned}
        result["arms"][arm] = entry
        print(arm, json.dumps(entry), flush=True)
    import torch

    result |= {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Does a pool of seeds pay? Seeds trained to the end, from whose held-out losses any policy can be computed.

    OMP_NUM_THREADS=1 python benchmarks/bench_restart.py --out benchmarks/results/<date>_restart

For every setting a number of seeds is trained for the horizon H and judged at 5, 10, 25, 50 and 100 % of it, on as many
held-out tokens as ``hasten restart`` judges on; the loss at the end is taken over 65,536 tokens. A policy (so many
seeds, rungs, how many are kept) has a cost of F times H steps. Its outcome is the mean over pools drawn from the
trained seeds without replacement. What it must beat is one run whose horizon is F times H: as many steps in all. Some
of the seeds are therefore trained for 1.65 H as well, with their schedule finished there, and the loss of one run of F
times H is interpolated (for 1.75, extrapolated) in the logarithm of the steps. The interval of the difference is a
bootstrap over seeds; a pool drawn from resampled seeds may hold one twice, which makes it a little worse.

Every run is appended to ``runs.jsonl`` and never done again; ``--report`` only computes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import time
from pathlib import Path

RUNGS = (0.05, 0.1, 0.25, 0.5, 1.0)
LONGER = 1.65
JUDGED_TOKENS, FINAL_TOKENS = 8192, 65_536
SMALL = [
    "data.tokenizer=bytes",
    "model.num_layers=2",
    "model.width=64",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.mlp_width=192",
    "seq_len=128",
    "batch_tokens=1024",
]
# Settings of the recipe, horizon H, seeds trained for H, seeds of those trained for 1.65 H.
SETTINGS: dict[str, tuple[list[str], int, int, int]] = {
    "small": (SMALL, 200, 24, 12),
    "small, 8 times the rate": ([*SMALL, "lr=0.04"], 200, 16, 8),
    "reference": ([], 100, 12, 6),
}
# Seeds, rungs and how many go on from each.
POLICIES = (
    (2, ((0.05, 1),)),
    (4, ((0.05, 1),)),
    (4, ((0.1, 1),)),
    (4, ((0.25, 1),)),
    (8, ((0.05, 1),)),
    (8, ((0.05, 2), (0.25, 1))),
    (8, ((0.05, 4), (0.1, 2), (0.25, 1))),
)
RESAMPLES, POOLS = 1000, 400


def run_one(setting: str, seed: int, steps: int) -> dict:
    """Train once and return the line to write."""
    import torch

    from hasten.evaluation import evaluate_shards
    from hasten.loop import advance, prepare_for, start
    from hasten.recipe import resolve

    torch.set_num_threads(1)
    given = [*SETTINGS[setting][0], f"seed={seed}", f"budget={steps}", "threads=1"]
    recipe = resolve("reference", given).recipe
    data = prepare_for(recipe)
    state = start(recipe, data)
    seq_len, spent, judged, final = recipe.lengths.seq_len, 0.0, {}, None

    def loss(tokens: int) -> float:
        return evaluate_shards(
            state.model, data.val, seq_len=seq_len, document_token=data.document_token, max_tokens=tokens
        ).loss

    for share in RUNGS:
        began = time.process_time()
        advance(state, math.ceil(share * steps))
        spent += time.process_time() - began
        if state.status == "diverged":
            break
        judged[str(share)] = loss(JUDGED_TOKENS)
    else:
        final = loss(FINAL_TOKENS)
    return {
        "setting": setting,
        "seed": seed,
        "steps": steps,
        "judged": judged,
        "loss": final,
        "cpu_seconds": spent,
        "settings": given,
    }


def cost(policy: tuple) -> float:
    """Return the steps of a policy in units of the horizon."""
    seeds, rungs = policy
    total, before, running = 0.0, 0.0, seeds
    for share, keep in rungs:
        total, before, running = total + running * (share - before), share, keep
    return total + running * (1.0 - before)


def survivor(runs: list[dict], policy: tuple) -> dict:
    """Return the run that a policy ends with, from a pool of runs; what diverged is last everywhere."""
    for share, keep in policy[1]:
        runs = sorted(runs, key=lambda run: (run["judged"].get(str(share), math.inf), run["seed"]))[:keep]
    return runs[0]


def outcome(runs: list[dict], policy: tuple, chance: random.Random, pools: int) -> float:
    """Return the mean final loss of a policy over pools drawn from `runs` without replacement."""
    return statistics.fmean(survivor(chance.sample(runs, policy[0]), policy)["loss"] for _ in range(pools))


def one_run(short: list[dict], long: dict[int, dict], factor: float) -> float:
    """Return the mean final loss of one run of `factor` times the horizon: that of H, and how much longer runs gain."""
    gains = [run["loss"] - long[run["seed"]]["loss"] for run in short if run["seed"] in long]
    return statistics.fmean(run["loss"] for run in short) - statistics.fmean(gains) * math.log(factor) / math.log(
        LONGER
    )


def findings(short: list[dict], long: list[dict]) -> dict:
    """Return what the runs of one setting say."""
    from scipy.stats import spearmanr

    chance = random.Random(0)
    diverged = [run["seed"] for run in short if run["loss"] is None]
    alive = [run for run in short if run["loss"] is not None]
    longer = {run["seed"]: run for run in long if run["loss"] is not None}
    n = len(alive)
    final = [run["loss"] for run in alive]
    found: dict = {
        "seeds": n,
        "diverged": diverged,
        "mean": statistics.fmean(final),
        "spread": statistics.stdev(final),
        "gain_of_1.65_times_the_steps": statistics.fmean(
            run["loss"] - longer[run["seed"]]["loss"] for run in alive if run["seed"] in longer
        ),
        "cpu_seconds": sum(run["cpu_seconds"] for run in (*short, *long)),
        "rungs": {},
        "policies": [],
    }
    for share in map(str, RUNGS):
        at = [run["judged"][share] for run in alive]
        rank = float(spearmanr(at, final).statistic)
        # Fisher's z with the variance of Bonett and Wright (2000) for Spearman.
        half = 1.96 * math.sqrt((1 + rank**2 / 2) / (n - 3))
        z = math.atanh(max(-0.999999, min(0.999999, rank)))
        found["rungs"][share] = {
            "spread": statistics.stdev(at),
            "spearman_with_final": rank,
            "interval_95": [math.tanh(z - half), math.tanh(z + half)],
        }
    for policy in POLICIES:
        factor = cost(policy)
        got, plain = outcome(alive, policy, chance, 20_000), one_run(alive, longer, factor)
        differences = []
        for _ in range(RESAMPLES):
            drawn = [dict(run, seed=run["seed"], draw=i) for i, run in enumerate(chance.choices(alive, k=n))]
            if not any(run["seed"] in longer for run in drawn):
                continue
            differences.append(outcome(drawn, policy, chance, POOLS) - one_run(drawn, longer, factor))
        differences.sort()
        found["policies"].append(
            {
                "seeds": policy[0],
                "rungs": policy[1],
                "cost": factor,
                "survivor": got,
                "chosen_better_than_any_by": found["mean"] - got,
                "best_of_the_pool": statistics.fmean(
                    min(run["loss"] for run in chance.sample(alive, policy[0])) for _ in range(20_000)
                ),
                "one_run_of_equal_cost": plain,
                "survivor_minus_one_run": got - plain,
                "interval_95": [
                    differences[int(0.025 * len(differences))],
                    differences[int(0.975 * len(differences)) - 1],
                ],
            }
        )
    return found


def table(name: str, found: dict) -> str:
    """Return one setting's findings as Markdown."""
    lines = [
        f"# {name}: {found['seeds']} seeds ended at {found['mean']:.4f} (spread {found['spread']:.4f}), "
        f"{len(found['diverged'])} diverged; 1.65 times the steps: {-found['gain_of_1.65_times_the_steps']:+.4f}",
        "",
        "| judged at | spread of the seeds | rank correlation with the end (95 %) |",
        "|---|---|---|",
    ]
    for share, rung in found["rungs"].items():
        low, high = rung["interval_95"]
        rank = rung["spearman_with_final"]
        lines.append(f"| {float(share):.0%} | {rung['spread']:.4f} | {rank:.2f} ({low:.2f} to {high:.2f}) |")
    lines += [
        "",
        "| seeds | rungs (kept) | cost in H | survivor | against any seed | best of the pool, if it were known | "
        "one run of that cost | survivor minus one run (95 %) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy in found["policies"]:
        rungs = ", ".join(f"{share:.0%} ({keep})" for share, keep in policy["rungs"])
        low, high = policy["interval_95"]
        lines.append(
            f"| {policy['seeds']} | {rungs} | {policy['cost']:.2f} | {policy['survivor']:.4f} | "
            f"{-policy['chosen_better_than_any_by']:+.4f} | {policy['best_of_the_pool']:.4f} | "
            f"{policy['one_run_of_equal_cost']:.4f} | "
            f"{policy['survivor_minus_one_run']:+.4f} ({low:+.4f} to {high:+.4f}) |"
        )
    return "\n".join(lines) + "\n"


def results(file: Path, wanted: list[tuple[str, int, int]], *, only_done: bool) -> list[dict]:
    """Return the runs that are wanted, after training those that are missing, or only those that are there."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = {(run["setting"], run["seed"], run["steps"]): run for run in map(json.loads, lines)}
    for key in wanted:
        if key in done or only_done:
            continue
        done[key] = run_one(*key)
        with file.open("a", encoding="utf-8") as lines_file:
            lines_file.write(json.dumps(done[key]) + "\n")
        print(*key, done[key]["loss"], f"{done[key]['cpu_seconds']:.1f} CPU-seconds", flush=True)
    return [done[key] for key in wanted if key in done]


def main() -> None:
    """Do what runs are missing, print the tables, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--report", action="store_true", help="compute from the runs that are there, train nothing")
    options = parser.parse_args()
    import torch

    options.out.mkdir(parents=True, exist_ok=True)
    result: dict = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    tables = []
    for name in options.settings:
        _, steps, seeds, longer = SETTINGS[name]
        horizons = [(seeds, steps), (longer, round(LONGER * steps))]
        short, long = (
            results(
                options.out / "runs.jsonl",
                [(name, seed, horizon) for seed in range(number)],
                only_done=options.report,
            )
            for number, horizon in horizons
        )
        if len(short) < 8 or len(long) < 2:
            continue
        result[name] = findings(short, long)
        tables.append(table(name, result[name]))
        print(tables[-1], flush=True)
    (options.out / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What packing costs and wastes: ours against the packers of other trainers, on the same lengths.

    pip install --no-deps --target PEERS -r benchmarks/requirements-packing.txt
    python benchmarks/bench_packing.py [--peers PEERS] [--rounds 5] [--out FOLDER]

Lengths: functions of this Python's standard library in bytes, and a log-normal with the median (403) and the mean (690)
of documents from the web. Every round runs every packer once on the same lengths, in an order that turns, after a
warm-up; figures are medians over rounds in CPU-seconds of the whole process, ratios medians of the rounds' own ratios.
A slow packer gets the first documents only, and its ratio is to ours on just these.

Long documents: TRL and torchtune do with them what they do. The others get documents already cut to the capacity,
which costs them no time here (by themselves OLMo-core cuts while it reads files, axolotl drops and Grain raises).
TRL, torchtune and Grain copy tokens while they pack, the others do not: their figures include that work.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import platform
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from packing_peers import OURS, PACKERS, Case, Outcome

from hasten.data.fitting import best_fit, bucketed, pad

CAPACITIES = (512, 2048, 8192)
WIDTHS = (64, 128, 256, 512, 1024, 2048)


@dataclass
class Measured:
    """Seconds of each round, ours on the same documents beside it, and what came out."""

    documents: int
    outcome: Outcome
    seconds: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)


def log_normal(count: int) -> np.ndarray:
    """Return lengths with the median and the mean of documents from the web."""
    sigma = np.sqrt(2 * np.log(690 / 403))
    return np.maximum(1, np.random.default_rng(0).lognormal(np.log(403), sigma, count)).astype(np.int64)


def functions() -> np.ndarray:
    """Return how many bytes each function of the standard library has, in the order of the files."""
    lengths = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_bytes()
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        places = np.cumsum([0, *(len(line) for line in text.splitlines(keepends=True))])
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                end = places[node.end_lineno - 1] + node.end_col_offset
                lengths.append(end - places[node.lineno - 1] - node.col_offset)
    return np.array(lengths, np.int64)


def seconds(run: Callable[[], Any]) -> float:
    """Return the CPU-seconds of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(lengths_N: np.ndarray, capacity: int, rounds: int, names: list[str]) -> dict[str, dict]:
    """Return, for each packer that is installed, what it wastes and what it costs."""
    cases = {most: Case(lengths_N[:most], capacity) for most in {min(PACKERS[n].most, len(lengths_N)) for n in names}}
    runs, measured = {}, {}
    for name in names:
        packer = PACKERS[name]
        case = cases[min(packer.most, len(lengths_N))]
        runs[name] = packer.start(case)
        measured[name] = Measured(len(case.lengths_N), packer.read(case, runs[name]()))  # and the warm-up
    ours = {most: PACKERS[OURS].start(case) for most, case in cases.items()}
    for turn in range(rounds):
        own = {most: seconds(run) for most, run in ours.items()}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            measured[name].seconds.append(seconds(runs[name]))
            measured[name].ours.append(own[measured[name].documents])
    total = {most: int(case.lengths_N.sum()) for most, case in cases.items()}
    return {name: _row(found, total[found.documents], capacity) for name, found in measured.items()}


def _row(found: Measured, num_tokens: int, capacity: int) -> dict:
    speeds = [found.documents / spent for spent in found.seconds]
    return {
        "documents": found.documents,
        "utilisation": round(found.outcome.num_tokens / (found.outcome.num_rows * capacity), 6),
        "tokens_lost": round(1 - found.outcome.num_tokens / num_tokens, 6),
        "avoidable_cuts": round(found.outcome.cuts / found.documents, 6),
        "documents_per_cpu_second": round(statistics.median(speeds)),
        "lowest": round(min(speeds)),
        "highest": round(max(speeds)),
        "ours_times_faster": round(statistics.median(a / b for a, b in zip(found.seconds, found.ours)), 2),
    }


def scaling(rounds: int) -> dict[str, dict]:
    """Return our speed by number of documents and capacity, on the log-normal."""
    table = {}
    for count in (16_384, 65_536, 100_000, 1_000_000, 10_000_000):
        lengths_N = log_normal(count)
        for capacity in CAPACITIES:
            best_fit(lengths_N, capacity)
            spent = [seconds(partial(best_fit, lengths_N, capacity)) for _ in range(rounds)]
            packing = best_fit(lengths_N, capacity)
            table[f"{count} documents, rows of {capacity}"] = row = {
                "documents_per_cpu_second": round(count / statistics.median(spent)),
                "lowest": round(count / max(spent)),
                "highest": round(count / min(spent)),
                "utilisation": round(packing.utilisation, 6),
                "rows_above_the_bound": packing.num_rows - -(-packing.num_tokens // capacity),
            }
            print(f"{count:>10,} documents, rows of {capacity}: {row['documents_per_cpu_second'] / 1e6:5.2f} M/CPU-s")
    return table


def buckets(lengths_N: np.ndarray, rounds: int) -> dict[str, Any]:
    """Return how full the rows of each class are, how much of all tokens each has, and what it costs."""
    packings = bucketed(lengths_N, WIDTHS)
    spent = statistics.median(seconds(partial(bucketed, lengths_N, WIDTHS)) for _ in range(rounds))
    num_tokens = sum(packing.num_tokens for packing in packings)
    opening = np.bincount(np.searchsorted(WIDTHS, pad(lengths_N, WIDTHS[-1]).lengths_P), minlength=len(WIDTHS))
    classes = {
        str(packing.capacity): {
            "utilisation": round(packing.utilisation, 4),
            "share_of_tokens": round(packing.num_tokens / num_tokens, 4),
            "rows": packing.num_rows,
            "pieces_of_its_own_class": int(own),
        }
        for packing, own in zip(packings, opening)
    }
    room = sum(packing.num_rows * packing.capacity for packing in packings)
    print("  classes: " + ", ".join(f"{w} {row['utilisation']:.2%}" for w, row in classes.items()))
    return {
        "classes": classes,
        "utilisation": round(num_tokens / room, 5),
        "documents_per_cpu_second": round(len(lengths_N) / spent),
    }


def main() -> None:
    """Run everything, print the figures, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder that the peers were installed into")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(str(options.peers.resolve()))  # last, so that numpy and torch stay the environment's own
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    names, versions = [], {name: metadata.version(name) for name in ("numpy", "torch")}
    for name, packer in PACKERS.items():
        try:
            packer.start(Case(np.array([3, 1]), 8))()
            if packer.package:
                versions[packer.package] = metadata.version(packer.package)
            names.append(name)
        except (ImportError, AttributeError) as error:  # not installed, or not with this version of what it needs
            print(f"not measured: {name}: {error}")
    corpora = {"functions": functions(), "log-normal": log_normal(100_000)}
    result: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": versions,
        "rounds": options.rounds,
        "packers": {},
        "buckets": {},
    }
    for corpus, lengths_N in corpora.items():
        print(f"{corpus}: {len(lengths_N):,} documents, {lengths_N.sum():,} tokens")
        for capacity in CAPACITIES:
            table = compare(lengths_N, capacity, options.rounds, names)
            result["packers"][f"{corpus}, rows of {capacity}"] = table
            print(f"  rows of {capacity}{'documents':>29} {'filled':>9} {'lost':>7} {'cut':>7} {'docs/CPU-s':>12} ours")
            for name, row in table.items():
                print(
                    f"  {name:32s} {row['documents']:>9,} {row['utilisation']:>9.3%} {row['tokens_lost']:>7.2%} "
                    f"{row['avoidable_cuts']:>7.2%} {row['documents_per_cpu_second']:>12,} "
                    f"x{row['ours_times_faster']:.3g}"
                )
        result["buckets"][corpus] = buckets(lengths_N, options.rounds)
    result["scaling"] = scaling(options.rounds)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

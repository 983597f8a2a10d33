"""What the intervals and verdicts of `hasten.statistics` are worth on simulated studies whose truth is known.

    python benchmarks/bench_statistics.py --out FOLDER [--studies 10000] [--other-studies 4000]

A study is a base and 1, 3 or 5 arms over paired seeds. The log of a run's loss is the seed's own part (normal, 2 %,
the same in every arm of the seed), the run's noise (sd 0.5 %) and, in the first arm, the effect: 0, -0.5 % or -2 %; the
other arms have none. Everything that judges is the package's own: `estimate`, `holm`, `judge`, `spent`,
`level_of_look`, with a margin of 1 % and alpha 0.05. All noise is centred: the effect is the mean of the differences.

- `normal`, in `--studies` studies a cell; all others in `--other-studies`;
- `lognormal` and `t3` (Student's t with 3 degrees of freedom) in every run: differences have heavy tails;
- `skewed`: lognormal with sigma 0.5 in the arms, normal in the base: differences have a skewness of 0.6;
- `very-skewed`: lognormal with sigma 1 at twice the sd in the arms, next to no noise in the base: skewness 6, what an
  arm is like that is a little better as a rule and much worse in one run of fifty.

Parts:

- fixed: 3, 5 or 10 seeds, one look.
- sequential: `every`: a look at 3 seeds, then one after each further seed up to 20; `sparse`: at 3, 5, 8, 13 and 20.
  Arms that have a verdict stop. In the family that Holm corrects, arms that pay or cost are None, arms that stopped
  with `none` are 1.0.
- looks: one arm, no stopping: how often the intervals of all 18 looks cover at once; beside it the same studies with
  plain 95 % intervals at every look.
- bootstrap: BCa through `estimate` at 10, 20, 40 seeds; percentile and BCa by scipy itself at 5, BCa by scipy too.
- judged-by-bootstrap: 10 and 20 seeds, one look, as `hasten compare --interval bootstrap` judges; and 12 seeds at the
  level of a second look, at which a study that was extended is judged. About 30 ms an interval.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from hasten.statistics import Estimate, estimate, holm, judge, level_of_look, spent

SEED_SPREAD, RUN_SPREAD, MARGIN = 0.02, 0.005, 0.01
EFFECTS = {"0": 0.0, "-0.5 %": math.log(0.995), "-2 %": math.log(0.98)}
NOISES = ("normal", "lognormal", "t3", "skewed", "very-skewed")
ARMS, SEEDS, BOOTSTRAP_SEEDS = (1, 3, 5), (3, 5, 10), (10, 20, 40)
# Effect, arms, seeds and look.
JUDGED_BY_BOOTSTRAP = (("0", 1, 10, 1), ("0", 3, 10, 1), ("0", 1, 20, 1), ("0", 1, 12, 2), ("-0.5 %", 1, 10, 1))
LOOKS = {"every": tuple(range(3, 21)), "sparse": (3, 5, 8, 13, 20)}  # seeds at each look
NOT_DECIDED = "unknown"
PARTS = ("fixed", "sequential", "looks", "bootstrap", "judged-by-bootstrap")

Study = list[list[float]]  # of each arm, the difference at each seed


def noise_of(kind: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return noise with mean 0 and standard deviation 1."""
    if kind == "normal":
        return generator.standard_normal(shape)
    if kind == "t3":
        return generator.standard_t(3, shape) / math.sqrt(3.0)
    variance = 0.25 if kind == "skewed" else 1.0
    noise = generator.lognormal(0.0, math.sqrt(variance), shape) - math.exp(variance / 2)
    return noise / math.sqrt(math.expm1(variance) * math.exp(variance))


def studies_of(kind: str, effect: float, arms: int, seeds: int, count: int) -> Iterator[Study]:
    """Yield `count` studies: log ratios of the arms to the base, seed by seed; of the same settings always the same."""
    generator = np.random.default_rng([NOISES.index(kind), round(-effect * 1e6), arms, seeds])
    effects = np.array([effect] + [0.0] * (arms - 1))[:, None]
    base_kind = "normal" if kind.endswith("skewed") else kind
    base_scale, arm_scale = (0.1, 2.0) if kind == "very-skewed" else (1.0, 1.0)
    for _ in range(count):
        common = generator.normal(0.0, SEED_SPREAD, seeds)
        base = common + base_scale * RUN_SPREAD * noise_of(base_kind, (seeds,), generator)
        runs = common + effects + arm_scale * RUN_SPREAD * noise_of(kind, (arms, seeds), generator)
        yield (runs - base).tolist()


def share(events: int, trials: int) -> float:
    """Return events per trial to four places."""
    return round(events / trials, 4)


class Tally:
    """Counts over the studies of one cell."""

    def __init__(self, effect: float, arms: int) -> None:
        self.truths = [effect] + [0.0] * (arms - 1)
        self.studies = self.covered = self.seeds = 0
        self.verdicts: list[dict[str, int]] = [{} for _ in self.truths]
        self.any_false_pays = self.any_false = 0

    def add(self, found: list[Estimate], verdicts: list[str]) -> None:
        """Count a study: the last estimate and the verdict of each arm."""
        self.studies += 1
        false = []
        for index, (truth, each, verdict) in enumerate(zip(self.truths, found, verdicts, strict=True)):
            self.covered += each.low <= truth <= each.high
            self.seeds += each.n
            self.verdicts[index][verdict] = self.verdicts[index].get(verdict, 0) + 1
            if verdict == "costs" or (verdict == "pays" and truth == 0):
                false.append(verdict)
        self.any_false_pays += "pays" in false
        self.any_false += bool(false)

    def result(self) -> dict:
        """Return the figures; shares are of arms (coverage) or of studies."""
        first = {name: share(count, self.studies) for name, count in sorted(self.verdicts[0].items())}
        small = abs(self.truths[0]) <= MARGIN
        return {
            "coverage": share(self.covered, self.studies * len(self.truths)),
            "false_pays": share(self.any_false_pays, self.studies),
            "false_pays_or_costs": share(self.any_false, self.studies),
            "power": first.get("pays", 0.0) if self.truths[0] else None,
            "false_none": None if small else first.get("none", 0.0),
            "first_arm": first,
            "mean_seeds": round(self.seeds / (self.studies * len(self.truths)), 2),
        }


def judge_once(study: Study, *, method: str = "t", look: int = 1) -> tuple[list[Estimate], list[str]]:
    """Return the estimates and verdicts of a study with a fixed number of seeds, or at a later look after that."""
    level = level_of_look(look, sequential=look > 1)
    found = [estimate(values, level=level, method=method) for values in study]
    corrected = holm([each.p for each in found])
    judged = zip(found, corrected, strict=True)
    return found, [judge(each, p=p, margin=MARGIN, alpha=1 - level) for each, p in judged]


def judge_sequentially(study: Study, looks: tuple[int, ...]) -> tuple[list[Estimate], list[str]]:
    """Return each arm's estimate and verdict at the look at which it stopped."""
    found: list[Estimate] = [estimate(values[:1]) for values in study]
    verdicts = [NOT_DECIDED] * len(study)
    for look, seeds in enumerate(looks, 1):
        going_on = [index for index, verdict in enumerate(verdicts) if verdict == NOT_DECIDED]
        family = [None if verdict in ("pays", "costs") else 1.0 for verdict in verdicts]
        for index in going_on:
            found[index] = estimate(study[index][:seeds], level=level_of_look(look))
            family[index] = found[index].p
        corrected = holm(family)
        for index in going_on:
            verdicts[index] = judge(found[index], p=corrected[index], margin=MARGIN, alpha=spent(look))
        if NOT_DECIDED not in verdicts:
            break
    return found, verdicts


def cell(judged: Callable, kind: str, effect: str, arms: int, seeds: int, count: int) -> dict:
    """Return the figures of one kind of study."""
    tally = Tally(EFFECTS[effect], arms)
    for study in studies_of(kind, EFFECTS[effect], arms, seeds, count):
        tally.add(*judged(study))
    settings = {"noise": kind, "effect": effect, "arms": arms, "seeds": seeds, "studies": count}
    return settings | tally.result()


def looks_cell(kind: str, count: int) -> dict:
    """Return what looking 18 times at one arm without an effect does, with spending and with plain 95 % intervals."""
    covered = plain_covered = false = plain_false = 0
    for (values,) in studies_of(kind, 0.0, 1, LOOKS["every"][-1], count):
        looks = [(look, values[:seeds]) for look, seeds in enumerate(LOOKS["every"], 1)]
        found = [(estimate(seen, level=level_of_look(look)), spent(look)) for look, seen in looks]
        plain = [estimate(seen) for _, seen in looks]
        covered += all(each.low <= 0 <= each.high for each, _ in found)
        false += any(judge(each, p=each.p, margin=0.0, alpha=alpha) == "pays" for each, alpha in found)
        plain_covered += all(each.low <= 0 <= each.high for each in plain)
        plain_false += any(judge(each, p=each.p, margin=0.0) == "pays" for each in plain)
    return {
        "noise": kind,
        "studies": count,
        "all_looks_cover": share(covered, count),
        "false_pays": share(false, count),
        "plain_all_looks_cover": share(plain_covered, count),
        "plain_false_pays": share(plain_false, count),
    }


def bootstrap_cell(kind: str, seeds: int, count: int) -> dict:
    """Return the coverage of 95 % intervals of one arm without an effect: BCa, t, and at few seeds the percentiles."""
    covered = {"bootstrap": 0, "t": 0, "plain_bca": 0}
    if seeds < min(BOOTSTRAP_SEEDS):
        covered["percentile"] = 0
    for (values,) in studies_of(kind, 0.0, 1, seeds, count):
        for method in covered:
            low, high = interval_of(values, method)
            covered[method] += low <= 0 <= high
    shares = {name: share(events, count) for name, events in covered.items()}
    return {"noise": kind, "seeds": seeds, "studies": count} | shares


def interval_of(values: list[float], method: str) -> tuple[float, float]:
    """Return a 95 % interval by the package; by scipy where the package refuses."""
    if method == "t" or (method == "bootstrap" and len(values) >= min(BOOTSTRAP_SEEDS)):
        found = estimate(values, method=method)
        return found.low, found.high
    name = {"bootstrap": "BCa", "plain_bca": "BCa", "percentile": "percentile"}[method]
    found = scipy.stats.bootstrap((values,), np.mean, method=name, random_state=np.random.default_rng(0))
    return found.confidence_interval


def cells(kind: str, count: int, others: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yield every cell of one noise: its part, and what gives its figures."""
    for effect in EFFECTS:
        for arms in ARMS:
            for seeds in SEEDS:
                yield "fixed", partial(cell, judge_once, kind, effect, arms, seeds, count)
            for name, looks in LOOKS.items():
                judged = partial(judge_sequentially, looks=looks)
                yield "sequential", partial(sequential_cell, name, judged, kind, effect, arms, looks[-1], count)
    yield "looks", partial(looks_cell, kind, count)
    for seeds in (5, *BOOTSTRAP_SEEDS):
        yield "bootstrap", partial(bootstrap_cell, kind, seeds, others)
    for effect, arms, seeds, look in JUDGED_BY_BOOTSTRAP:
        judged = partial(judge_once, method="bootstrap", look=look)
        yield "judged-by-bootstrap", partial(at_look_cell, look, judged, kind, effect, arms, seeds, others)


def sequential_cell(looks: str, *settings: Any) -> dict:
    """Return the figures of one kind of sequential study."""
    return {"looks": looks} | cell(*settings)


def at_look_cell(look: int, *settings: Any) -> dict:
    """Return the figures of one kind of study at its first look, or at a later one."""
    return {"look": look} | cell(*settings)


def main() -> None:
    """Simulate every cell, print it, and write all where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--other-studies", type=int, default=4_000, help="of other noise, and of the bootstrap")
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=NOISES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.process_time()
    results: dict[str, list[dict]] = {name: [] for name in PARTS}

    def keep(part: str, found: dict) -> None:
        results[part].append(found)
        print(part, json.dumps(found), flush=True)

    for kind in options.noises:
        count = options.studies if kind == "normal" else options.other_studies
        for part, found in cells(kind, count, options.other_studies):
            if part in options.parts:
                keep(part, found())
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        about = {
            "cpu_seconds": round(time.process_time() - began, 1),
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("numpy", "scipy")},
            "seed_spread": SEED_SPREAD,
            "run_spread": RUN_SPREAD,
            "margin": MARGIN,
        }
        text = json.dumps(about | results, indent=2)
        (options.out / "result.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

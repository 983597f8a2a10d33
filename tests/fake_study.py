"""A study folder that looks like one that `hasten compare` wrote: verdicts.json and the run folders it names."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hasten.record import Record, RunFolder, write_result

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}


@dataclass(frozen=True)
class FakeArm:
    """An arm with a planted effect on bits per byte (-0.05 is 5 % less) and the verdict to write for it."""

    name: str
    verdict: str
    effect: float = 0.0
    changes: Mapping[str, Any] = field(default_factory=lambda: {"optimizer": "muon", "lr": 0.02})
    against: str = "base"
    further_seeds: int | None = None
    diverged: int = 0
    censored: int = 0
    reason: str = "As planted."


ARMS = (
    FakeArm("muon", "pays", -0.055, reason="Its interval lies below zero after the correction."),
    FakeArm("muon, no warmup", "pays", -0.031, {"optimizer": "muon", "schedule.warmup": "0%"}),
    FakeArm("lr x 0.3", "costs", 0.042, {"lr": 0.0009}, censored=2),
    FakeArm("z-loss", "none", 0.001, {"z_loss": 1e-4}),
    FakeArm("soap", "unknown", -0.012, {"optimizer": "soap"}, further_seeds=4),
    FakeArm("no-op", "identical", 0.0, {"clip.max_norm": 1000.0}),
    FakeArm("sgd", "diverged", 0.0, {"optimizer": "sgd", "lr": 30.0}, diverged=2),
)


def make_study(
    folder: Path,
    arms: Sequence[FakeArm] = ARMS,
    *,
    seeds: int = 3,
    steps: int = 1000,
    evaluations: int = 20,
    lines: int = 20,
    with_runs: bool = True,
    is_placed: bool = True,
    **study: Any,
) -> Path:
    """Write a study: the base and `arms`, each with `seeds` runs of `evaluations` evaluations.

    Args:
        lines: lines of metrics.jsonl in every run.
        is_placed: whether evaluations say how much had been trained by then.
        study: replaces parts of the study's own entry in verdicts.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    luck = random.normal(0, 0.006, seeds)  # of a seed, shared by every arm: what pairs cancel
    base = _arm_runs(FakeArm("base", "base"), luck, random, steps)
    found = [(arm, _arm_runs(arm, luck, random, steps)) for arm in arms]
    if with_runs:
        for runs in (base, *(runs for _, runs in found)):
            for run in runs:
                _write_run(folder / "runs" / run["run"], run, evaluations, lines, is_placed)
    told = {
        "name": "lr-and-muon", "mode": "add-one", "budget": "60s", "seeds": list(range(seeds)), "looks": 1,
        "sequential": False, "level": 0.95, "margin": 0.01, "method": "paired t on log ratios",
        "correction": f"Holm, {len(arms)} comparisons", "primary": "bits_per_byte", "ladder": [0.5, 0.65, 0.8],
        "workers": 2, "threads": 1, "tuning": None, "cost_seconds": 812.0 * len(arms), "complete": True,
        "runs_missing": 0, "answer": "Use muon: 5.5 % fewer bits per byte in the same time, and no arm does better.",
    }  # fmt: skip
    verdicts = {
        "format": 1,
        "study": told | study,
        "base": {"name": "base", "changes": {}, "runs": base, **_ends(base)},
        "arms": [_verdict(arm, runs, base) for arm, runs in found],
    }
    (folder / "verdicts.json").write_text(json.dumps(verdicts, indent=1), encoding="utf-8")
    return folder


def _arm_runs(arm: FakeArm, luck: np.ndarray, random: np.random.Generator, steps: int) -> list[dict[str, Any]]:
    runs = []
    for seed, own in enumerate(luck):
        noise = 0.0 if arm.verdict in ("base", "identical") else random.normal(0, 0.002)
        bits = 1.69 * math.exp(own + math.log1p(arm.effect) + noise)
        broke = seed < arm.diverged
        done = int(steps * random.uniform(0.9, 1.0))
        runs.append(
            {
                "seed": seed, "run": f"{arm.name}-s{seed}-{zlib.crc32(f'{arm.name} {seed}'.encode()):08x}",
                "status": "diverged" if broke else "finished", "val_bpb": None if broke else bits,
                "val_loss": None if broke else bits * 2.8, "steps": done, "tokens": done * 2048,
                "train_seconds": 55.0 + random.normal(0, 0.2), "seconds": 60.2, "memory_bytes": 812_000_000 + done,
                "lr": 0.003,
            }
        )  # fmt: skip
    return runs


def _ends(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [run["val_bpb"] for run in runs if run["val_bpb"] is not None]
    return {
        "mean_bits_per_byte": float(np.mean(known)) if known else None,
        "sd_bits_per_byte": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def _verdict(arm: FakeArm, runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pairs = [(run, other) for run, other in zip(runs, base, strict=True) if run["val_bpb"] is not None]
    each = [math.log(run["val_bpb"] / other["val_bpb"]) for run, other in pairs]
    spread = 3 if arm.verdict == "unknown" else 1
    bits = _effect(each, spread) if arm.verdict != "diverged" else None
    to_loss = None if bits is None else _effect([5 * value for value in each], spread, arm.censored)
    shares = (0.5, 0.65, 0.8)
    ladder = [
        {
            "seed": run["seed"], "share": share, "run": f"{run['run'][:-9]}-{share}-00000000",
            "val_loss": (run["val_loss"] or 9) * (1.12 - 0.14 * share),
            "reached": share >= 0.65 and not (arm.censored > run["seed"]),
        }
        for run in runs for share in shares
    ]  # fmt: skip
    return {
        "name": arm.name, "against": arm.against, "changes": dict(arm.changes), "verdict": arm.verdict,
        "reason": arm.reason, "further_seeds": arm.further_seeds, "n": len(each), "p": 0.021, "p_raw": 0.0105,
        "effects": {
            "bits_per_byte": bits, "train_seconds": _effect([0.001, 0.002, -0.001][: len(each)]),
            "seconds_to_loss": to_loss, "steps_to_loss": to_loss, "tokens_to_loss": to_loss,
            "memory": _effect([0.031, 0.03, 0.032][: len(each)]),
        },
        "ladder": ladder, "runs": list(runs), **_ends(runs),
    }  # fmt: skip


def _effect(each: Sequence[float], spread: float = 1.0, censored: int = 0) -> dict[str, Any] | None:
    known = {"n": len(each), "p": None, "each": [math.expm1(value) for value in each], "censored": censored}
    if not each:
        return None
    if censored:
        known["each"] = [None] * censored + known["each"][censored:]
        return known | {"mean": None, "low": None, "high": None, "method": "t"}
    mean = math.expm1(float(np.mean(each)))
    if not any(each):
        return known | {"mean": 0.0, "low": None, "high": None, "method": "identical"}
    if len(each) < 2:
        return known | {"mean": mean, "low": None, "high": None, "method": "too few"}
    half = spread * T_95.get(len(each), 2.0) * float(np.std(each, ddof=1)) / math.sqrt(len(each))
    middle = float(np.mean(each))
    return known | {
        "mean": mean, "low": math.expm1(middle - half), "high": math.expm1(middle + half), "p": 0.01, "method": "t",
    }  # fmt: skip


def _write_run(folder: Path, run: Mapping[str, Any], evaluations: int, lines: int, is_placed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    where = RunFolder(folder)
    where.recipe_path.write_text(f'seed = {run["seed"]}\nbudget = "60s"\n', encoding="utf-8")
    record = Record(where, 1)
    record.event("start", step=0, params=2_557_824, environment={"torch": "2.13.0"})
    steps, final = run["steps"], run["val_bpb"] or 6.0
    for index in range(1, evaluations + 1):
        share = index / evaluations
        placed = {"trained_tokens": int(run["tokens"] * share), "train_seconds": run["train_seconds"] * share}
        record.event(
            "evaluation", step=round(steps * share), val_bpb=final * (1 + 0.9 * (1 - share) ** 2.2), val_loss=5.0,
            tokens=65_536, whole=index == evaluations, seconds=0.3, **(placed if is_placed else {}),
        )  # fmt: skip
    record.event("finish", step=steps, status=run["status"])
    record.close()
    line = {"loss": 3.0, "lr": 0.003, "grad_norm": 0.5, "clipped": False, "skipped": False, "loss_scale": 1.0,
            "seq_len": 256, "progress": 0.5, "tokens": 2048, "seconds": 0.1, "tokens_per_second": 27_000.0}  # fmt: skip
    text = "".join(json.dumps({"step": step, "attempt": 1, **line}) + "\n" for step in range(1, lines + 1))
    where.metrics_path.write_text(text, encoding="utf-8")
    write_result(where, {key: run[key] for key in ("status", "val_bpb", "steps", "tokens", "seconds")})

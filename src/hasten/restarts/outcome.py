"""What came out of a pool of seeds, in numbers and in words: the content of ``result.json``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.record import RunFolder, read_result
from hasten.restarts.judging import agreement, ranking
from hasten.restarts.lead import Lead
from hasten.restarts.plan import Plan, Pool, Stage

FORMAT = 1
# What the runs of a pool are counted in; a run that was never started counts nothing.
COUNTED = ("steps", "tokens", "seconds")


@dataclass(frozen=True)
class Rung:
    """A judgement: the held-out loss of every seed that arrived, which of them go on, and the lead of the first."""

    stage: Stage
    losses: Mapping[int, float]
    kept: tuple[int, ...]
    lead: Lead | None


def outcome(
    plan: Plan,
    pool: Pool,
    rungs: Sequence[Rung],
    runs: Mapping[int, RunFolder],
    given_up: Mapping[int, str],
    survivor: int | None,
) -> dict[str, Any]:
    """Return what ``result.json`` is to hold.

    Args:
        plan, pool: what was planned and asked for.
        rungs: that were judged.
        runs: the folder of every seed that was started.
        given_up: why, by seed.
        survivor: the seed that finished its horizon; None: there is none.

    Raises:
        RunError: the result of a run is damaged.
    """
    results = {seed: read_result(folder) or {} for seed, folder in runs.items()}
    final = results[survivor] if survivor is not None else {}
    reason = "" if survivor is not None else failure(given_up, pool)
    return {
        "format": FORMAT,
        "status": "failed" if survivor is None else "finished",
        "reason": reason,
        "survivor": survivor,
        "run": None if survivor is None else f"runs/seed-{survivor}",
        "val_loss": final.get("val_loss"),
        "val_bpb": final.get("val_bpb"),
        "rungs": [_rung(rung) for rung in rungs],
        "agreement": agreements(rungs),
        "given_up": {str(seed): why for seed, why in given_up.items()},
        "cost": {
            "total": _cost(results.values()),
            "survivor": _cost([final] if final else []),
            "others": _cost([values for seed, values in results.items() if seed != survivor]),
            "given_up": _cost([results[seed] for seed in given_up]),
        },
        "plan": {"steps": plan.steps, **plan.to_json()},
        "says": [sentence for rung in rungs if (sentence := lead_in_words(rung))],
    }


def agreements(rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    """Return how well the order at each rung told the order at the next, among the seeds that went on."""
    found = []
    for before, after in itertools.pairwise(rungs):
        n, rank = agreement(before.losses, after.losses)
        found.append({"from": before.stage.rung, "to": after.stage.rung, "n": n, "spearman": rank})
    return found


def lead_in_words(rung: Rung) -> str:
    """Return one or two sentences on whether the first of a rung led by more than noise; empty with a single seed."""
    lead, n = rung.lead, len(rung.losses)
    if lead is None:
        return ""
    said = f"At {rung.stage.rung} seed {lead.first} led seed {lead.second} by {lead.lead:.4f} nats per token."
    if lead.spread is not None:
        said += (
            f" The {n} seeds spread by {lead.spread:.4f} (standard deviation), of which the best of {n} leads by "
            f"{lead.by_chance:.4f} on average."
        )
    if lead.low is None or lead.high is None:
        return f"{said} Too few rows of held-out text were judged to say how sure the lead is."
    half = (lead.high - lead.low) / 2
    said += f" Other held-out text would move the lead by up to {half:.4f} (95 %, from {lead.rows} rows)."
    if lead.larger:
        return f"{said} The lead is larger than that noise."
    why = "other text could turn it round" if lead.low <= 0 else "so many seeds lead by as much by chance"
    return f"{said} The lead is not larger than the noise: {why}."


def failure(given_up: Mapping[int, str], pool: Pool) -> str:
    """Return why no seed was left, in words."""
    last_seed, last = list(given_up.items())[-1]
    tried = f"{len(given_up)} seed{'s' if len(given_up) > 1 else ''}"
    return f"no seed was left after {tried} of at most {pool.tries or pool.seeds}; the last, seed {last_seed}: {last}"


def _rung(rung: Rung) -> dict[str, Any]:
    order = ranking(rung.losses)
    return {
        "at": rung.stage.rung,
        "step": rung.stage.end,
        "seeds": [
            {"seed": seed, "loss": rung.losses[seed], "rank": rank, "goes_on": seed in rung.kept}
            for rank, seed in enumerate(order, 1)
        ],
        "noise": None if rung.lead is None else rung.lead.to_json(),
    }


def _cost(results: Any) -> dict[str, float]:
    results = list(results)
    return {name: sum(values.get(name) or 0 for values in results) for name in COUNTED}

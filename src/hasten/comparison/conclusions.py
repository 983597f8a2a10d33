"""What ``verdicts.json`` holds: everything that a study knows, from the runs up to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.comparison.effects import Rung, interval_of, to_loss_effects, whole_effects
from hasten.comparison.ledger import Ledger
from hasten.comparison.lineup import Pair
from hasten.comparison.runs import ENDED, same_text
from hasten.comparison.study import Study
from hasten.comparison.verdicts import ALPHA, Judged, Question, answer, judge_all, mean_and_spread
from hasten.statistics import spent

FORMAT = 1
EFFECTS = ("bits_per_byte", "train_seconds", "seconds_to_loss", "steps_to_loss", "tokens_to_loss", "memory")

METHODS = {"t": "paired t on log ratios", "bootstrap": "paired BCa bootstrap on log ratios"}

Shown = Mapping[str, Sequence[Mapping[str, Any]]]


def conclude(
    ledger: Ledger, seeds: int, looks: Sequence[int], *,
    judged_by: Sequence[Sequence[str]], tuning: Mapping[str, Any] | None, pool_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Return what is known after `seeds` seeds.

    Args:
        ledger: the runs.
        seeds: of each variant.
        looks: numbers of seeds after which verdicts were given, this one last if it is one.
        judged_by: for each of these, the intervals that verdicts were given by: one, or one after the other.
        tuning: of the learning rates; None where there was none.
        pool_seconds: that processes have run for this study, those that came to nothing too.

    Raises:
        RunError: runs were judged on different text.
    """
    study, pairs = ledger.study, ledger.who.pairs
    level = level_of(study, looks)
    method, _ = interval_of(study.interval, seeds, level=level)
    shown = {variant.name: ledger.runs_of(variant.name, seeds) for variant in ledger.who.variants}
    same_text({v.name: [ledger.result(ledger.run(v.name, i)) for i in range(seeds)] for v in ledger.who.variants})
    rungs = {pair.name: [ledger.rungs(pair, index) for index in range(seeds)] for pair in pairs}
    ways = {"level": level, "method": method, "has_ladder": bool(study.ladder)}
    questions = [_question(pair, shown, rungs[pair.name], **ways) for pair in pairs]
    by_time = study.base.budget.unit == "seconds"
    judged = judge_all(questions, by_time=by_time, margin=study.margin, alpha=1 - level)
    first = ledger.who.variants[0]
    said = "Not finished: learning rates are being tried."
    if seeds:
        said = answer(questions, judged, base=first.name, budget=budget_words(study), seeds=seeds, mode=study.mode)
    missing = sum(run["status"] not in ENDED for runs in shown.values() for run in runs)
    about = _about(ledger, seeds, looks, judged_by, by_time=by_time)
    tuned = tuning["cost_seconds"] if tuning else 0.0
    about |= {
        "tuning": tuning,
        "cost_seconds": tuned + ledger.seconds(seeds),
        "pool_seconds": pool_seconds,
        "complete": not missing and bool(seeds),
        "runs_missing": missing,
        "answer": said,
    }
    return {
        "format": FORMAT,
        "study": about,
        "base": _entry(ledger, first.name, shown),
        "arms": [
            _judged_entry(ledger, pair, question, verdict, shown, rungs[pair.name])
            for pair, question, verdict in zip(pairs, questions, judged, strict=True)
        ],
    }


def level_of(study: Study, looks: Sequence[int]) -> float:
    """Return the level of the intervals at the newest look: a study that was to have a single one spends all there."""
    return 1 - _alpha_of(study, max(len(looks), 1))


def _alpha_of(study: Study, look: int) -> float:
    return ALPHA if look == 1 and study.half_width is None else spent(look, ALPHA)


def method_words(study: Study, seeds: int, level: float) -> str:
    """Return how the intervals were found, and why not as it was asked for."""
    method, why = interval_of(study.interval, seeds, level=level)
    return METHODS[method] + (f" ({why}: the t interval is given)" if why else "")


def _more_error(study: Study, judged_by: Sequence[Sequence[str]]) -> str:
    """Say what it cost that a study was looked at more than was to be: extended, or judged by both intervals."""
    reasons = []
    if study.half_width is None and len(judged_by) > 1:
        reasons.append("extended after a look")
    if any(len(methods) > 1 for methods in judged_by):
        reasons.append("judged by t and by bootstrap at the same look")
    if not reasons:
        return ""
    total = sum(len(methods) * _alpha_of(study, look) for look, methods in enumerate(judged_by, 1))
    return f"; {' and '.join(reasons)}, so that the error of all looks is at most {100 * total:.2g} %"


def budget_words(study: Study) -> str:
    """Return the budget of a study, with its unit."""
    budget = study.base.budget
    return f"{budget} {'step' if budget.value == 1 else 'steps'}" if budget.unit == "steps" else str(budget)


def _question(
    pair: Pair, shown: Shown, rungs: Sequence[Sequence[Rung]], *, level: float, method: str, has_ladder: bool
) -> Question:
    arm, against = shown[pair.arm], shown[pair.against]
    missing = sum(run["status"] not in ENDED for run in (*arm, *against))
    diverged = sum("diverged" in (mine["status"], other["status"]) for mine, other in zip(arm, against, strict=True))
    effects: dict[str, Any] = {}
    if arm and not missing and not diverged:
        effects = dict(whole_effects(arm, against, level=level, method=method))
        if has_ladder and effects["bits_per_byte"] is not None and any(effects["bits_per_byte"].logs):
            effects |= to_loss_effects(arm, against, rungs, level=level, method=method)
    return Question(pair.name, pair.against, effects, diverged=0 if missing else diverged, missing=missing)


def _entry(ledger: Ledger, name: str, shown: Shown) -> dict[str, Any]:
    mean, deviation = mean_and_spread(shown[name])
    return {
        "name": name,
        "changes": dict(ledger.who.variant(name).changes),
        "runs": shown[name],
        "mean_bits_per_byte": mean,
        "sd_bits_per_byte": deviation,
    }


def _judged_entry(
    ledger: Ledger, pair: Pair, question: Question, judged: Judged, shown: Shown, rungs: Sequence[Sequence[Rung]]
) -> dict[str, Any]:
    effects = {name: question.effects.get(name) for name in EFFECTS}
    return {
        **_entry(ledger, pair.arm, shown),
        "name": pair.name,
        "arm": pair.arm,
        "against": pair.against,
        "verdict": judged.verdict,
        "reason": judged.reason,
        "further_seeds": judged.further_seeds,
        "n": len(shown[pair.arm]),
        "p": judged.p,
        "p_raw": judged.p_raw,
        "effects": {name: None if effect is None else effect.to_json() for name, effect in effects.items()},
        "ladder": [
            {
                "seed": rung.seed,
                "share": rung.share,
                "run": rung.run["run"],
                "val_loss": rung.run["val_loss"],
                "val_bpb": rung.run["val_bpb"],
                "reached": rung.reached,
            }
            for ladder in rungs
            for rung in ladder
        ],
    }


def _about(
    ledger: Ledger, seeds: int, looks: Sequence[int], judged_by: Sequence[Sequence[str]], *, by_time: bool
) -> dict[str, Any]:
    study, count = ledger.study, len(ledger.who.pairs) * (1 if by_time else 2)
    first, level = study.base.seed, level_of(study, looks)
    return {
        "name": ledger.folder.resolve().name,
        "mode": study.mode,
        "budget": str(study.base.budget),
        "seeds": list(range(first, first + seeds)),
        "looks": len(looks),
        "looked_at": list(looks),
        "sequential": study.half_width is not None or len(looks) > 1,
        "level": level,
        "margin": study.margin,
        "interval": study.interval,
        "judged_by": [list(methods) for methods in judged_by],
        "method": method_words(study, seeds, level),
        "correction": f"Holm, {count} {'comparison' if count == 1 else 'comparisons'}{_more_error(study, judged_by)}",
        "primary": "bits_per_byte" if by_time else "bits_per_byte and train_seconds",
        "ladder": list(study.ladder),
        "workers": ledger.room.workers,
        "threads": ledger.room.threads,
    }

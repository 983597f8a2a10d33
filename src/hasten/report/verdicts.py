"""What the report of a study says in words: verdicts, changes with their intervals, costs, what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.report.study import Arm, Effect, Rung, Study
from hasten.report.trajectories import Trajectories
from hasten.report.wording import SPACE, UNKNOWN, byte_size, fixed, is_finite, number, seconds, short

MINUS = "\N{MINUS SIGN}"
EFFECTS = {
    "bits_per_byte": "Held-out bits per byte",
    "seconds_to_loss": "Training time to the loss of its reference",
    "steps_to_loss": "Steps to the loss of its reference",
    "tokens_to_loss": "Tokens to the loss of its reference",
    "train_seconds": "Training time per run",
    "memory": "Peak memory",
}
TO_LOSS = ("seconds_to_loss", "tokens_to_loss", "steps_to_loss")
MODES = {
    "add-one": "each arm adds one change to the base",
    "leave-one-out": "each arm takes one change away",
    "grid": "every combination of the values",
    "head-to-head": "recipes against each other",
}


# What "pays" and "costs" mean to a reader where an arm is not simply something to use or to leave.
MEANINGS = {
    "leave-one-out": ("better without it", "worse without it: keep it"),
    "head-to-head": ("the better of the two", "the worse of the two"),
}


@dataclass(frozen=True)
class Verdict:
    """A verdict for a reader: its word and its plain meaning."""

    word: str
    meaning: str


def verdict(arm: Arm, study: Study) -> Verdict:
    """Return the verdict on an arm in plain words."""
    if arm.verdict == "none":
        margin = f" larger than {plain_percent(study.margin)}" if study.margin else ""
        return Verdict("none", f"no difference{margin}")
    if arm.verdict == "diverged":
        return Verdict("diverged", f"in {arm.count('diverged')} of {counted(len(arm.runs), 'seed')}")
    if arm.verdict == "unknown":
        more = arm.further_seeds
        return Verdict("unknown", "cannot tell yet" + (f": about {counted(more, 'more seed')}" if more else ""))
    pays, costs = MEANINGS.get(study.mode, ("use it", "leave it"))
    meanings = {
        "base": "the reference",
        "pays": pays,
        "costs": costs,
        "identical": "changed nothing at all: the setting had no effect",
    }
    return Verdict(arm.verdict, meanings[arm.verdict])


def beside(arm: Arm, study: Study) -> str:
    """Return what an arm is compared with, where neither its name nor the rest of the page says so."""
    is_said = arm.against in ("", study.base.variant) or arm.name.endswith(f" vs {arm.against}")
    return "" if is_said else f" against {arm.against}"


def plain_percent(share: float) -> str:
    """Return a share that somebody chose, in as few digits as it was given in: 0.01 is ``1 %``."""
    return f"{100 * share:.4g}{SPACE}%"


def counted(amount: int, word: str) -> str:
    """Return an amount with its word, in the plural where it needs one.

    Example:
        >>> counted(1, "seed"), counted(1200, "seed")
        ('1 seed', '1,200 seeds')
    """
    return f"{amount:,} {word}{'' if amount == 1 else 's'}"


def places(*shares: float | None) -> int:
    """Return how many digits after the point tell these shares, as percentages, apart."""
    spread = max((abs(share) for share in shares if share is not None), default=0.0)
    return 0 if spread >= 1 else 1 if spread >= 0.005 else 2 if spread >= 0.0005 else 3


def signed(share: float, digits: int | None = None) -> str:
    """Return a relative change as a percentage with its sign.

    Example:
        >>> [signed(share).replace(SPACE, " ") for share in (-0.0521, 0.3, 2.5, 0.0)]
        ['−5.2 %', '+30.0 %', '+250 %', '0.000 %']
    """
    return f"{_bare(share, places(share) if digits is None else digits)}{SPACE}%"


def _bare(share: float, digits: int) -> str:
    text = f"{abs(100 * share):.{digits}f}"
    return text if not float(text) else f"{MINUS if share < 0 else '+'}{text}"


def interval(effect: Effect) -> str:
    """Return the interval of an effect in percent, or why it has none."""
    if effect.low is None or effect.high is None:
        few = "one seed, no interval" if effect.n < 2 else "" if effect.at_most else "no interval"
        return {"identical": "equal in every digit", "too few": few}.get(effect.method, "")
    digits = places(effect.mean, (effect.high - effect.low) / 2)
    return f"[{_bare(effect.low, digits)}, {_bare(effect.high, digits)}]"


def change(effect: Effect | None) -> str:
    """Return an effect in percent with its interval, or in words why there is none."""
    if effect is None:
        return UNKNOWN
    if effect.censored:
        return f"not reached in {effect.censored} of {counted(effect.n or effect.censored, 'seed')}"
    if effect.method == "identical":
        return "equal in every digit"
    if effect.mean is None:
        return UNKNOWN
    half = None if effect.low is None or effect.high is None else (effect.high - effect.low) / 2
    said = interval(effect)
    digits = places(effect.mean) if half is None else places(effect.mean, half)
    bound = "at most " if effect.at_most else ""
    return (
        f"{bound}{signed(effect.mean, digits)} {said if said.startswith('[') else f'({said})' if said else ''}".strip()
    )


def setting(value: Any) -> str:
    """Return a value of a recipe on one line."""
    if type(value) is dict:
        return ", ".join(f"{key} {setting(item)}" for key, item in value.items()) or "none"
    if type(value) is list:
        return ", ".join(map(setting, value)) or "none"
    return number(value)


def changes(arm: Arm) -> str:
    """Return what an arm changes in the base, on one line."""
    return ", ".join(f"{key}={setting(value)}" for key, value in arm.changes.items()) or "nothing changed"


def budget(study: Study) -> str:
    """Return the budget of a run, with its unit; empty where it was not noted."""
    if study.budget.isdecimal():
        return f"{study.budget} step" if study.budget == "1" else f"{study.budget} steps"
    return study.budget


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def answer_rows(study: Study) -> list[dict[str, str]]:
    """Return the table that answers what to use: the base, then what pays (the most first), what costs at the end."""
    rows = []
    for arm in [study.base, *sorted(study.arms, key=_rank)]:
        said = verdict(arm, study)
        is_base = arm is study.base
        finished = [run for run in arm.runs if run.status == "finished"]
        memory = mean([run.memory_bytes for run in finished])
        changed = arm.effects.get("memory")
        rows.append(
            {
                "name": arm.name,
                "against": beside(arm, study),
                "verdict": arm.verdict,
                "word": said.word,
                "meaning": said.meaning,
                "bits": _base_bits(arm) if is_base else change(arm.effects.get("bits_per_byte")),
                "to_loss": UNKNOWN if is_base else change(arm.effects.get("seconds_to_loss")),
                "time": seconds(mean([run.train_seconds for run in finished])),
                "time_change": change(arm.effects["train_seconds"]) if _is_judged_on_time(arm, study) else "",
                "memory": UNKNOWN if memory is None else byte_size(memory),
                "memory_change": f" ({signed(changed.mean)})" if changed and changed.mean else "",
                "seeds": number(arm.n),
            }
        )
    return rows


def _is_judged_on_time(arm: Arm, study: Study) -> bool:
    return "train_seconds" in study.primaries and "train_seconds" in arm.effects


def _rank(arm: Arm) -> tuple[int, float]:
    effect = arm.effects.get("bits_per_byte")
    gain = effect.mean if effect is not None and effect.mean is not None else 0.0
    return ("pays", "unknown", "none", "identical", "costs", "diverged").index(arm.verdict), gain


def _base_bits(base: Arm) -> str:
    spread = "" if base.sd_bits_per_byte is None else f" ± {fixed(base.sd_bits_per_byte)}"
    return f"{fixed(base.mean_bits_per_byte)}{spread}"


def effect_rows(arm: Arm) -> list[dict[str, str]]:
    """Return every effect that was measured on an arm; of those that were not, nothing."""
    named = [*EFFECTS, *(key for key in arm.effects if key not in EFFECTS)]
    return [
        {
            "name": EFFECTS.get(key, key),
            "change": change(effect),
            "n": number(effect.n),
            "p": p_value(effect.p),
            "method": effect.method or UNKNOWN,
            "censored": number(effect.censored),
        }
        for key in named
        if (effect := arm.effects.get(key)) is not None
    ]


def p_value(value: float | None) -> str:
    """Return a p value as papers write it."""
    return UNKNOWN if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def run_rows(arm: Arm) -> list[dict[str, str]]:
    """Return every run of an arm, those that failed included."""
    return [
        {
            "seed": str(run.seed),
            "bits": fixed(run.val_bpb, 4),
            "steps": number(run.steps),
            "tokens": short(run.tokens),
            "time": seconds(run.train_seconds),
            "memory": UNKNOWN if run.memory_bytes is None else byte_size(run.memory_bytes),
            "lr": number(run.lr),
            "status": run.status,
            "run": run.run,
        }
        for run in arm.runs
    ]


def ladder_table(arm: Arm, study: Study) -> tuple[list[str], list[tuple[str, list[str], str]]]:
    """Return the shorter horizons as heads, and per seed what each came to and which was the shortest to be enough."""
    shares = sorted({rung.share for rung in arm.ladder})
    goals = {run.seed: run.val_bpb for run in study.reference(arm).runs}
    rows = []
    for run in arm.runs if study.ladder and arm is not study.base else []:
        own = {rung.share: rung for rung in arm.ladder if rung.seed == run.seed}
        cells = [_rung_words(own[share]) if share in own else UNKNOWN for share in shares]
        first = next((share for share in shares if share in own and own[share].reached), None)
        goal = goals.get(run.seed)
        whole = goal is not None and run.val_bpb is not None and run.val_bpb <= goal
        rows.append((str(run.seed), cells, _enough(first, whole_is=whole, is_known=run.val_bpb is not None)))
    return [plain_percent(share) for share in shares], rows


def _enough(first: float | None, *, whole_is: bool, is_known: bool) -> str:
    if first is not None:
        return f"{plain_percent(first)} of the budget"
    if whole_is:
        return "the whole budget"
    return "never: censored, so this seed has no figure" if is_known else UNKNOWN


def _rung_words(rung: Rung) -> str:
    value = f"loss {fixed(rung.val_loss)}" if rung.val_bpb is None else fixed(rung.val_bpb)
    return f"{value}, {'reached' if rung.reached else 'not reached'}"


def tuning_rows(study: Study) -> list[tuple[str, str, str]]:
    """Return per arm the learning rates that were tried with their losses, and the one that was taken."""
    searched: Mapping[str, Any] = study.tuning.arms if study.tuning else {}
    return [
        (
            name,
            ", ".join(f"{rate}: {fixed(loss)}" for rate, loss in search.tried) or UNKNOWN,
            number(search.taken) + (" (at the edge of what was tried: the best may lie outside)" * search.at_edge),
        )
        for name, search in searched.items()
    ]


def method_facts(study: Study) -> list[tuple[str, str]]:
    """Return how the study was measured and what it cost."""
    tuning = study.tuning
    looks = f"{study.looks or 1}, which share the error" if study.sequential else "1, the number of seeds was fixed"
    rows = [
        ("Arms", f"{len(study.arms)} and the base; {MODES.get(study.mode, study.mode) or 'mode not noted'}"),
        ("Seeds", f"{', '.join(map(str, study.seeds))} (the same for every arm)" if study.seeds else UNKNOWN),
        ("Budget of a run", budget(study) or UNKNOWN),
        ("Judged on", " and ".join(EFFECTS.get(key, key) for key in study.primaries)),
        ("Method", study.method or UNKNOWN),
        ("Level of the intervals", plain_percent(study.level)),
        ("Correction", study.correction or "none"),
        ("Looks at the results", looks),
        ("Margin", f"{plain_percent(study.margin)}: a smaller difference counts as none"),
        ("Shorter horizons", f"{_shares(study)} of the budget" if study.ladder else "none, so no time to a loss"),
        ("Runs at a time", f"{number(study.workers)}, each with {counted(study.threads or 1, 'thread')}"),
        ("Cost", seconds(study.cost_seconds)),
    ]
    if tuning:
        rows.append(
            ("Learning-rate search", f"{number(tuning.tries)} tries for every arm, {seconds(tuning.cost_seconds)} more")
        )
    return rows


def _shares(study: Study) -> str:
    return ", ".join(plain_percent(share) if is_finite(share) else setting(share) for share in study.ladder)


def notices(study: Study, trajectories: Trajectories) -> list[str]:
    """Return what a reader must know before believing the page: the study is not whole, curves are missing."""
    said = []
    if study.runs_missing:
        said.append(
            f"{counted(study.runs_missing, 'run')} of this study {'is' if study.runs_missing == 1 else 'are'} missing, "
            "so verdicts may still change; the command of the study goes on with what is left."
        )
    elif not study.complete:
        said.append("This study is not complete, so verdicts may still change; its command goes on with it.")
    failed = sum(arm.count("failed") for arm in study.everyone)
    if failed:
        said.append(f"{counted(failed, 'run')} failed; the logs folder of the study says why.")
    if trajectories.unread:
        said.append(
            f"The records of {counted(trajectories.unread, 'finished run')} are gone or damaged; their curves are left "
            "out, their results are not."
        )
    return said

"""What the effects of a study mean: one verdict for every comparison, corrected for their number, and one answer."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hasten.comparison.effects import Effect, Run
from hasten.statistics import further_seeds, holm, judge, relative, telling_half_width

ALPHA = 0.05
WORDS = {"bits_per_byte": "bits per byte", "train_seconds": "training time", "seconds_to_loss": "time to its loss"}


@dataclass(frozen=True)
class Judged:
    """A comparison with its verdict, why, and its p value before and after the correction for their number."""

    verdict: str
    reason: str
    p: float | None = None
    p_raw: float | None = None
    further_seeds: int | None = None


@dataclass(frozen=True)
class Question:
    """A comparison to be judged.

    Args:
        name: of it.
        against: whom the arm is compared with.
        effects: by name; None for what was not measured.
        diverged: seeds in which a run of it diverged.
        missing: runs of it still to come.
    """

    name: str
    against: str
    effects: Mapping[str, Effect | None]
    diverged: int = 0
    missing: int = 0


def judge_all(questions: Sequence[Question], *, by_time: bool, margin: float, alpha: float = ALPHA) -> list[Judged]:
    """Return a verdict for each comparison; where nothing differs, any *pays* or *costs* comes at most `alpha` often.

    Where all runs had the same time (`by_time`), the held-out bits per byte decide. Where all had the same tokens or
    steps, two things can change, bits per byte and the time it took: an arm pays if one is better and the other not
    worse. Where they point different ways, the time to the other's loss decides, if it was measured; which of two real
    differences wins is then a further test, at `alpha` by the number of comparisons.

    Args:
        questions: all comparisons of the study at this look.
        by_time: whether the budget was a time.
        margin: relative difference in bits per byte that makes no difference.
        alpha: error that this look may spend.
    """
    endpoints = ("bits_per_byte",) if by_time else ("bits_per_byte", "train_seconds")
    places = [(number, name) for number in range(len(questions)) for name in endpoints]
    raw = [_p(questions[number].effects.get(name)) for number, name in places]
    # One that has diverged still counts: the number of comparisons must not shrink because of what was seen.
    counted = [1.0 if p is None and questions[number].diverged else p for (number, _), p in zip(places, raw)]
    corrected = dict(zip(places, zip(holm(counted), raw, strict=True), strict=True))
    judged = []
    for number, question in enumerate(questions):
        p_values = {name: corrected[number, name] for name in endpoints}
        judged.append(_judge(question, p_values, margin=margin, alpha=alpha, family=len(questions)))
    return judged


def _p(effect: Effect | None) -> float | None:
    return effect.found.p if effect is not None and effect.found is not None else None


def _judge(
    question: Question,
    p_values: Mapping[str, tuple[float | None, float | None]],
    *,
    margin: float,
    alpha: float,
    family: int,
) -> Judged:
    bits = question.effects.get("bits_per_byte")
    if question.diverged:
        return Judged("diverged", f"{_seeds(question.diverged)} diverged.")
    if question.missing or bits is None or bits.found is None:
        return Judged("unknown", f"{question.missing or 'Some'} of its runs are still to come.")
    p, p_raw = p_values["bits_per_byte"]
    verdict = judge(bits.found, p=p, margin=margin, alpha=alpha)
    time = question.effects.get("train_seconds") if "train_seconds" in p_values else None
    if time is None or time.found is None:
        return _worded(question, verdict, p, p_raw, margin, bits)
    p_time, raw_time = p_values["train_seconds"]
    timed = judge(time.found, p=p_time, margin=margin, alpha=alpha)
    if timed not in ("pays", "costs"):
        said = _worded(question, verdict, p, p_raw, margin, bits)
        return said if timed in ("none", "identical") else _with(said, _took(question, time, timed))
    if verdict in ("none", "identical"):
        share = _share(time.found.mean)
        words = "trains" + (f" in {share} less time" if timed == "pays" else f" {share} longer")
        alike = "the same losses" if verdict == "identical" else f"losses that differ by less than {margin:.2g}"
        return Judged(timed, f"It {words}, with {alike}.", p_time, raw_time)
    if {verdict, timed} == {"pays", "costs"}:
        return _mixed(question, verdict, p, p_raw, alpha / family)
    said = _worded(question, verdict, p, p_raw, margin, bits)
    return _with(said, _took(question, time, timed))


def _with(judged: Judged, sentence: str) -> Judged:
    return replace(judged, reason=f"{judged.reason} {sentence}")


def _took(question: Question, time: Effect, verdict: str) -> str:
    if verdict in ("pays", "costs"):
        return f"It took {_change(time.found.mean, 'time')}."
    on_average = f"{_change(time.found.mean, 'time')} on average"
    return f"Its training time cannot be told from that of {question.against} ({on_average})."


def _mixed(question: Question, verdict: str, p: float | None, p_raw: float | None, alpha: float) -> Judged:
    """Judge an arm whose loss is better and whose time is worse, or the other way round; `alpha` is one arm's part."""
    to_loss = question.effects.get("seconds_to_loss")
    if to_loss is not None and to_loss.found is not None and to_loss.found.p is not None and to_loss.found.p <= alpha:
        better = to_loss.found.mean < 0
        return Judged(
            "pays" if better else "costs",
            f"It gets to the loss of {question.against} in {_change(to_loss.found.mean, 'time')}.",
            to_loss.found.p,
            to_loss.found.p,
        )
    which = "a lower loss but more time" if verdict == "pays" else "less time but a higher loss"
    return Judged("unknown", f"It has {which} for the same tokens: give a budget of time to see which wins.", p, p_raw)


def _worded(
    question: Question, verdict: str, p: float | None, p_raw: float | None, margin: float, bits: Effect
) -> Judged:
    found = bits.found
    if verdict == "identical":
        return Judged(verdict, "Every run ended with exactly the same loss: this setting changed nothing here.")
    if verdict in ("pays", "costs"):
        return Judged(verdict, f"{_change(found.mean, 'bits per byte').capitalize()}.", p, p_raw)
    if verdict == "none":
        largest = max(abs(relative(found.low)), abs(relative(found.high)))
        return Judged(
            verdict, f"If there is a difference in bits per byte, it is below {100 * largest:.2g} %.", p, p_raw
        )
    if found.method == "too few":
        return Judged("unknown", "One seed shows no noise: give at least 2, better 3.", further_seeds=2)
    # Enough to tell the difference seen from none, or to show that it is below the margin: whichever is easier.
    wanted = telling_half_width(found.mean, margin=math.log1p(margin))
    more = further_seeds(bits.logs, half_width=wanted, level=found.level)
    how = f"about {more} more seeds" if more else "one more seed" if more == 0 else "far more seeds"
    how = "one more seed" if more == 1 else how
    # The interval is that of this comparison alone, and the verdict is corrected for all of them.
    is_apart = p is not None and found.low * found.high > 0
    corrected = f" (p {p:.2g} once all comparisons are corrected for, which is not enough)" if is_apart else ""
    return Judged(
        "unknown",
        f"Between {_signed(found.low)} and {_signed(found.high)} bits per byte{corrected}: {how} would tell.",
        p,
        p_raw,
        1 if more == 0 else more,
    )


def _seeds(count: int) -> str:
    return "One seed" if count == 1 else f"{count} seeds"


def _share(log_ratio: float) -> str:
    return f"{100 * abs(relative(log_ratio)):.3g} %"


def _change(log_ratio: float, what: str) -> str:
    fewer = "fewer" if what.startswith("bits") else "less"
    return f"{_share(log_ratio)} {fewer if log_ratio < 0 else 'more'} {what}"


def _signed(log_ratio: float) -> str:
    return f"{100 * relative(log_ratio):+.2g} %"


def answer(
    questions: Sequence[Question], judged: Sequence[Judged], *, base: str, budget: str, seeds: int, mode: str
) -> str:
    """Return in a sentence or two what to use."""
    if any(question.missing for question in questions):
        missing = sum(question.missing for question in questions)
        return f"Not finished: {missing} {'run is' if missing == 1 else 'runs are'} still to come."
    pairs = list(zip(questions, judged, strict=True))
    paying = [(q, j) for q, j in pairs if j.verdict == "pays"]
    unknown = [q.name for q, j in pairs if j.verdict == "unknown"]
    with_seeds = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    rest = f" About {_listed(unknown)} nothing can be said with {with_seeds}." if unknown else ""
    if mode == "leave-one-out":
        return _answer_leaving_out(pairs) + rest
    if not paying:
        if mode == "head-to-head":
            return f"No arm beats another here, each with {budget}.{rest}"
        nothing = "nothing pays" if not unknown else "nothing is shown to pay"
        return f"Keep {base}: {nothing} here with {budget}.{rest}"
    best, why = min(paying, key=lambda pair: _rank(pair[0]))
    found = best.effects["bits_per_byte"].found
    within = ""
    if found is not None and found.low is not None and found.mean < 0:
        low, high = sorted((-100 * relative(found.low), -100 * relative(found.high)))
        within = f" ({100 * found.level:.3g} % interval {low:.2g} to {high:.2g} %)"
    name = best.name if mode != "head-to-head" else f"{best.name.partition(' vs ')[0]} rather than {best.against}"
    others = [q.name for q, _ in paying if q is not best]
    more = f" {_listed(others)} also {'pays' if len(others) == 1 else 'pay'}." if others else ""
    said, _, after = why.reason.partition(". ")
    said = f"{said[0].lower()}{said[1:]}".rstrip(".")
    after = f" {after}" if after else ""
    return f"Use {name}: {said}{within} than {best.against}, each with {budget}.{after}{more}{rest}"


def _rank(question: Question) -> float:
    for name in ("seconds_to_loss", "bits_per_byte"):
        effect = question.effects.get(name)
        if name == "bits_per_byte" and effect is not None and effect.found is not None:
            return effect.found.mean
    return 0.0


def _answer_leaving_out(pairs: Sequence[tuple[Question, Judged]]) -> str:
    needed = [q.name.removeprefix("without ") for q, j in pairs if j.verdict in ("costs", "diverged")]
    harmful = [q.name.removeprefix("without ") for q, j in pairs if j.verdict == "pays"]
    idle = [q.name.removeprefix("without ") for q, j in pairs if j.verdict in ("none", "identical")]
    said = []
    if needed:
        said.append(f"Keep {_listed(needed)}: without {'it' if len(needed) == 1 else 'any of them'} it is worse.")
    if harmful:
        said.append(f"Drop {_listed(harmful)}: it is better without.")
    if idle:
        said.append(f"{_listed(idle)} {'makes' if len(idle) == 1 else 'make'} no difference.")
    return " ".join(said) or "No part of it is shown to help or to hurt."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def mean_and_spread(runs: Sequence[Run]) -> tuple[float | None, float | None]:
    """Return mean and standard deviation of the bits per byte of finished runs; None where there are too few."""
    values = [run["val_bpb"] for run in runs if run.get("status") == "finished" and run.get("val_bpb") is not None]
    mean = plain.mean(values) if values else None
    return mean, plain.stdev(values) if len(values) > 1 else None

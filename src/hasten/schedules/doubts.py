"""What is doubtful about a schedule in a run of a certain length: pieces that would do nothing, rates of zero."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.schedules.pieces import Cycles, Decay, InverseSqrt, Part, Schedule, Stages, Warmup

# Steps that are looked at; between two of them, a rate of zero that lasted less than that is not found.
MOST_LOOKED_AT = 10_000
SAME = 1e-9


def findings(schedule: Schedule, total_steps: int, *, what: str = "learning rate") -> tuple[str, ...]:
    """Return one sentence for everything in `schedule` that does nothing or harm in a run of `total_steps`.

    Found are warm-ups, decays, holds and cycles of less than a step, warm-ups that begin at the peak, decays that do
    not fall, stages that are never reached, and steps at a factor of zero.

    Args:
        schedule: of factors.
        total_steps: optimizer steps of the run, at least 1.
        what: is scheduled, for the sentences; a factor of zero is said of the ``learning rate`` alone, where it wastes
            the step.

    Example:
        >>> from hasten.schedules import linear, warmup
        >>> findings(warmup(0.1) | linear(floor=1), 100)
        ('linear(floor=1.0) begins and ends at 1, so it never decays: give a lower floor, or hold().',)
    """
    found = [sentence for part in schedule.parts for sentence in _of_part(part, total_steps)]
    if what == "learning rate":
        found += _zeros(schedule, total_steps)
    return tuple(found)


def _of_part(part: Part, total_steps: int) -> Iterator[str]:
    piece, steps = part.piece, (part.end - part.begin) * total_steps
    if steps < 1 - SAME:
        yield f"{piece!r} is less than one of {total_steps} steps, so it does nothing: make it longer, or leave it out."
        return
    first, last = part(part.begin), part(part.end)
    if isinstance(piece, Warmup) and abs(first - last) < SAME:
        yield f"{piece!r} begins at the peak, so it does nothing: give a lower start, or leave it out."
    elif isinstance(piece, (Decay, InverseSqrt)) and abs(first - last) < SAME:
        yield f"{piece!r} begins and ends at {last:g}, so it never decays: give a lower floor, or hold()."
    elif isinstance(piece, (Decay, InverseSqrt)) and last > first:
        yield f"{piece!r} rises from {first:g} to {last:g}: give a floor below {first:g}."
    elif isinstance(piece, Stages):
        yield from _of_stages(piece, part, total_steps)
    elif isinstance(piece, Cycles):
        shortest = min(end - begin for begin, end in zip((0.0, *piece.ends), piece.ends)) * steps
        if shortest < 2 - SAME:
            yield f"{piece!r} has cycles of {shortest:.2g} steps, too short for a decay: give fewer."
        elif piece.rewarm and piece.count > 1 and piece.rewarm * shortest < 1 - SAME:
            yield (
                f"{piece!r} rises again in {piece.rewarm * shortest:.2g} steps, which is less than one: give a larger "
                "rewarm, fewer cycles, or rewarm=0."
            )


def _of_stages(piece: Stages, part: Part, total_steps: int) -> Iterator[str]:
    before = part.level
    for number, (place, factor) in enumerate(piece.stages):
        following = piece.stages[number + 1][0] if number + 1 < len(piece.stages) else part.end
        if min(following, part.end) - max(place, part.begin) < (1 - SAME) / total_steps:
            yield f"The stage at {place:g} of {piece!r} lasts less than one of {total_steps} steps: move or remove it."
        elif abs(factor - before) < SAME:
            yield f"The stage at {place:g} of {piece!r} changes nothing, as it is {factor:g} before: remove it."
        before = factor


def _zeros(schedule: Schedule, total_steps: int) -> Iterator[str]:
    stride = max(1, total_steps // MOST_LOOKED_AT)
    looked_at = range(0, total_steps, stride)
    zeros = [step for step in looked_at if schedule(step / total_steps) <= 0.0]
    if not zeros:
        return
    if zeros == [0]:
        yield f"The first step of {schedule!r} is at a factor of zero and teaches nothing: let it start above zero."
        return
    yield (
        f"{schedule!r} is zero at about {len(zeros) / len(looked_at):.0%} of the steps, from step {zeros[0]} of "
        f"{total_steps} on: those teach nothing; raise the floor, or let the decay last to the end."
    )

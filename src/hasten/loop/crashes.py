"""Attempts at a run that die at one and the same step, again and again: waited for first, then refused."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.data.documents import DocumentPart
from hasten.errors import RunError, printable
from hasten.loop.identity import CRASH_LOOP, Allowed, Change
from hasten.loop.leaving import stretch_at
from hasten.loop.state import State
from hasten.loop.telling import Teller
from hasten.record import RunFolder, read_events

# Deaths in a row at one step from which on the next attempt waits, and from which on there is none.
WAIT_FROM = 4
REFUSE_FROM = 10
# Seconds of the longest wait.
LONGEST_WAIT = 60.0
_NAMED_DOCUMENTS = 4
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run.

    Args:
        began: steps that were done when it began.
        died_at: the last step that it logged, `began` if it logged none; None where that was not recorded.
        ended: whether it stopped or finished by itself.
        changed: whether it began with something changed, so that what came before says nothing about it.
    """

    began: int
    died_at: int | None
    ended: bool
    changed: bool = False


def read_attempts(folder: RunFolder) -> list[Attempt]:
    """Return every attempt at a run so far, from its events; of the last one from what it logged."""
    attempts: list[Attempt] = []
    began: Mapping[str, Any] | None = None
    ended = False
    for event in read_events(folder):
        if event.get("kind") in ("stop", "finish"):
            ended = True
        elif event.get("kind") in ("start", "resume"):
            if began is not None:
                attempts.append(_attempt(began, event.get("died_at"), bool(event.get("ended", ended))))
            began, ended = event, False
    if began is not None:
        last = _attempt(began, None, ended)
        attempts.append(dataclasses.replace(last, died_at=max(_last_step(folder), last.began)))
    return attempts


def _attempt(began: Mapping[str, Any], died_at: Any, ended: bool) -> Attempt:
    step = began.get("step")
    known = died_at if type(died_at) is int else None
    return Attempt(step if type(step) is int else 0, known, ended, bool(began.get("allowed")))


def _last_step(folder: RunFolder) -> int:
    """Return the last step in the metrics, 0 where there is none: the end of the file is enough."""
    try:
        with open(folder.metrics_path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
        if type(step) is int:
            return step
    return 0


def deaths_in_a_row(attempts: Sequence[Attempt]) -> int:
    """Return how many of the last attempts died at one and the same step, without a stop and without progress.

    A death before the first step of an attempt is another one than a death at that step number later on.

    Example:
        >>> deaths_in_a_row([Attempt(0, 7, False), Attempt(4, 9, False), Attempt(4, 9, False)])
        2
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.ended or attempt.died_at is None or _place(attempt) != _place(attempts[-1]):
            break
        count += 1
        if attempt.changed:
            break
    return count


def _place(attempt: Attempt) -> tuple[int | None, bool]:
    return attempt.died_at, attempt.died_at == attempt.began


def wait_before(deaths: int, longest: float = LONGEST_WAIT) -> float:
    """Return the seconds to wait before an attempt after so many deaths at one step.

    Example:
        >>> [wait_before(deaths) for deaths in range(3, 11)]
        [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    """
    return min(longest, 2.0 ** min(deaths - WAIT_FROM, 60)) if deaths >= WAIT_FROM else 0.0


def hold_back(
    state: State,
    folder: RunFolder,
    attempts: Sequence[Attempt],
    allowed: Allowed,
    tell: Teller,
    *,
    longest_wait: float = LONGEST_WAIT,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Change, ...]:
    """Let a run that keeps dying at one step wait before its next attempt, and refuse one attempt too many.

    Ctrl-C ends the wait and the run; nothing was written yet.

    Args:
        state: at the checkpoint that the next attempt begins at.
        folder: of the run.
        attempts: at it so far.
        allowed: ``crash-loop`` goes on at once.
        tell: says that it waits.
        longest_wait: seconds.
        sleep: waits.

    Returns:
        the crash loop, if it goes on because that was allowed: a change like any other that was.

    Raises:
        RunError: the last ten attempts died at the same step; names it and what it reads.
    """
    deaths = deaths_in_a_row(attempts)
    if deaths < WAIT_FROM:
        return ()
    if allowed.covers(CRASH_LOOP):
        return (Change(CRASH_LOOP, f"{deaths} deaths in a row", "tried again", "refused"),)
    step, is_before_first = _place(attempts[-1])
    where = f"before the first step after step {step:,} was logged" if is_before_first else f"right after step {step:,}"
    if deaths >= REFUSE_FROM:
        raise RunError(
            f"The last {deaths} attempts at {printable(str(folder.path))} all died {where}; {_reads(state, step)}. "
            f"Change what may cause it, or give --allow {CRASH_LOOP} to try once more."
        )
    seconds = wait_before(deaths, longest_wait)
    tell(
        "warning",
        message=f"The last {deaths} attempts all died {where}; waiting {seconds:g} s before the next. Ctrl-C leaves.",
    )
    sleep(seconds)
    return ()


def _reads(state: State, step: int) -> str:
    """Say what the steps after `step` read, one of which a run died in: a step is logged when the next one is done."""
    if state.progress is None:
        return f"step {step + 1:,} comes next"
    position, said = state.position, []
    for number in range(state.step, step + 2):
        while found := stretch_at(state, position):
            position = found.end
        progress = state.progress(number)
        rows, length = state.batch_sizes(progress), state.lengths(progress, number)
        if number >= step:
            parts = state.batches.documents(position, rows=rows, length=length)
            place = ", ".join(map(str, position))
            said.append(f"the batch of step {number + 1:,} begins at position {place} ({_named(parts)})")
        position = state.batches.skip(position, rows=rows, length=length).position
    return " and ".join(said)


def _named(parts: Sequence[DocumentPart]) -> str:
    """Return the documents of a batch for a message, the first few of many."""
    names = list(dict.fromkeys(f"{printable(part.source)} {part.document:,}".strip() for part in parts))
    more = ", ..." if len(names) > _NAMED_DOCUMENTS else ""
    return f"document{'s' * (len(names) > 1)} {', '.join(names[:_NAMED_DOCUMENTS])}{more}"


def told_of_last(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return what the event of a new attempt says of the one before it; empty for the first."""
    return {"died_at": attempts[-1].died_at, "ended": attempts[-1].ended} if attempts else {}

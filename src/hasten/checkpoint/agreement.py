"""What all ranks do at once, and all take to have failed as soon as it failed on one of them.

A rank that fails and leaves would let the others wait for it for ever. So whatever becomes of an action, every rank
comes to the exchange behind it and says so, and then all raise the same sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hasten.distributed import Ranks
from hasten.errors import CheckpointError, HastenError, RunError, one_line

Result = TypeVar("Result")
_ERRORS: dict[str, type[HastenError]] = {"CheckpointError": CheckpointError, "RunError": RunError}


def agree(
    ranks: Ranks, what: str, action: Callable[[], Result], told: Callable[[BaseException], HastenError | None]
) -> list[Result]:
    """Take `action` on every rank and return what it returned on each, by rank.

    Args:
        ranks: all of which make this call.
        what: is done, "save of step 7"; ranks that do different things are told so.
        action: of this rank; returns a small plain value.
        told: returns what the user is told of an error, None for a fault of ours. That is raised as it is where it
            happened; elsewhere it is a RunError that names the rank.

    Raises:
        RunError: the one of the first rank that failed, the same on all; or a process has gone, or the ranks do
            different things.
        CheckpointError: likewise, where `told` makes it one.

    Example:
        >>> from hasten.distributed import ALONE
        >>> agree(ALONE, "sum", lambda: 1 + 1, lambda error: None)
        [2]
    """
    value, failure, error = None, None, None
    try:
        try:
            value = action()
        except BaseException as caught:  # Ctrl-C too: the others are told before it goes on its way
            failure, error = caught, told(caught)
        fault = None if failure is None else _as_words(ranks, what, failure, error)
        said = _share(ranks, what, (what, value, fault), error or failure)
        if failure is not None and error is None:
            raise failure
        _refuse_different_places([place for place, _, _ in said])
        first = next((rank for rank, (_, _, fault) in enumerate(said) if fault), None)
        if first is not None and first != ranks.rank:
            kind, text = said[first][2]
            raise _ERRORS.get(kind, RunError)(text)
        if error is not None and error is not failure:
            raise error from failure
        if error is not None:
            raise error
    finally:
        failure = error = None  # their frames hold this one and the tensors: a cycle that would outlive the error
    return [result for _, result, _ in said]


def _as_words(ranks: Ranks, what: str, failure: BaseException, error: HastenError | None) -> tuple[str, str]:
    if error is not None:
        return type(error).__name__, str(error)
    text = one_line(f"{type(failure).__name__}: {failure}", 300)
    return "RunError", f"Rank {ranks.rank} failed in the {what} ({text}); look at what it said, and report it."


def _share(ranks: Ranks, what: str, said: Any, failure: BaseException | None) -> list[Any]:
    try:
        return ranks.share(said)
    except RuntimeError as broken:
        raise failure or RunError(
            f"Rank {ranks.rank} lost touch with the other ranks in the {what} ({one_line(str(broken), 200)}); "
            "look at what each of them said last, and start them again."
        ) from broken


def _refuse_different_places(places: list[str]) -> None:
    if len(set(places)) > 1:
        text = "; ".join(f"rank {rank}: {place}" for rank, place in enumerate(places))
        raise RunError(f"The ranks are not in step ({one_line(text, 300)}); start them again.")

"""What a run tells about itself: events, and the hooks that look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hasten.loop.state import State


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: its kind, the step it happened at, and what there is to know of it."""

    kind: str
    step: int
    values: Mapping[str, Any]


# A hook looks at events. It may never change training, so the order of hooks never matters.
Hook = Callable[[Event], None]


class Teller:
    """Tells every hook what happened: ``tell("evaluation", val_loss=...)``."""

    def __init__(self, hooks: Iterable[Hook], state: State | None = None) -> None:
        self._hooks = tuple(hooks)
        self._state = state

    def __call__(self, kind: str, **values: Any) -> None:
        event = Event(kind, self._state.step if self._state else 0, values)
        for hook in self._hooks:
            hook(event)

"""Signals that ask a run to stop: the step in hand is finished and the state saved; a second signal leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Signals that ask for a stop; not every system has all.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass
class StopRequest:
    """The name of the signal that asked for a stop, or an empty string."""

    name: str = ""


@contextmanager
def stop_on_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Yield `request`, which SIGINT, SIGTERM and SIGHUP fill in; the handlers before are put back at the end.

    The second signal meets the handlers of before, which end the process at once; a save is atomic, so that is safe.
    SIGHUP comes more than once when a terminal is closed, from the system and from the shell: it is one request, and
    none where it was ignored before, as by ``nohup``. Outside the main thread, where Python takes no handlers, nothing
    is installed.
    """
    request = request or StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    hang_up = signal.Signals.__members__.get("SIGHUP")  # Windows has none
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
        before[hang_up] = signal.getsignal(hang_up)

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        put_back()
        if hang_up in before:
            signal.signal(hang_up, signal.SIG_IGN)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        put_back()

"""Notices within seconds that another process of a run is gone, or asked to stop and cannot, and says which it is.

Every process says once a second that it is there, in the store through which torchrun's processes meet. One that waits
for the others looks at what they say. A process that is killed is noticed by torchrun itself; one that is stopped, or
whose machine is gone, is silent, and every collective would wait for it for as long as it may.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from hasten.distributed import World

BEAT_SECONDS = 1.0
# A process that waits looks around after `LOOK_AFTER`; one that said nothing for `SILENCE` is gone.
LOOK_AFTER, SILENCE = 2.0, 6.0
LOST = 75  # exit code of a process that leaves because another one is gone


@dataclass
class Watchdog:
    """Where this process is, for the thread that watches: what it waits for since when, and the step that it is in."""

    step: int = 0
    waits_since: float | None = None

    def waits(self, step: int) -> None:
        """Note that from here on the process waits for the others."""
        self.step, self.waits_since = step, time.monotonic()

    def goes_on(self, step: int) -> None:
        """Note that all are there."""
        self.step, self.waits_since = step, None


@contextmanager
def watch(world: World) -> Iterator[Watchdog]:
    """Yield a watchdog whose thread says that this process is there and looks after the others."""
    watchdog, ended = Watchdog(), threading.Event()
    thread = threading.Thread(target=_watch, args=(watchdog, world, ended), name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        thread.join(2 * BEAT_SECONDS)


def _watch(watchdog: Watchdog, world: World, ended: threading.Event) -> None:
    try:
        store = _store()
    except (RuntimeError, OSError, ValueError):
        return  # no store of its own: torchrun and the time-outs of the collectives are what is left
    name = f"{socket.gethostname()}, process {os.getpid()}"
    seen: dict[int, tuple[bytes, float]] = {}
    beat = 0
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        try:
            store.set(str(world.rank), f"{beat} {watchdog.step} {name}")
            waits = watchdog.waits_since
            if waits is None or time.monotonic() - waits < LOOK_AFTER:
                seen.clear()
                continue
            _look(store, world, watchdog, seen)
        except (RuntimeError, OSError):
            return  # the store is gone: so is whoever held it, and torchrun knows


def _look(store: Any, world: World, watchdog: Watchdog, seen: dict[int, tuple[bytes, float]]) -> None:
    """Leave, with a line that names it, where another process has been silent for too long."""
    others = [rank for rank in range(world.size) if rank != world.rank and store.check([str(rank)])]
    now = time.monotonic()
    for rank, said in zip(others, store.multi_get([str(rank) for rank in others])):
        if rank not in seen or seen[rank][0] != said:
            seen[rank] = (said, now)
        elif now - seen[rank][1] >= SILENCE - LOOK_AFTER:
            _, step, name = said.decode("utf-8", "replace").split(" ", 2)
            if store.add("gone", 1) == 1:  # one line, of whoever sees it first
                print(
                    f"hasten: rank {rank} ({name}) has been silent for {SILENCE:.0f} s, at step {int(step) + 1}: this "
                    "attempt ends. torchrun begins the next one (--max-restarts), from the newest checkpoint.",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(LOST)


def _store() -> Any:
    """Return a connection of this thread's own to the store through which the processes met."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return dist.PrefixStore(f"hasten/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

"""Notices within seconds that another process of a run is gone, or asked to stop and cannot, and says which it is.

Every process says once a second that it is there, in the store through which torchrun's processes meet, and looks
whether the next one does. A process that is killed is noticed by torchrun itself; one that is stopped, or whose machine
is gone, is silent, and every collective would wait for it for as long as it may.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from hasten.distributed import World

BEAT_SECONDS = 1.0
# A process that said nothing for so long is gone: between its steps; and before the first and after the last one, where
# work is not shared and may keep a process from saying so for longer.
SILENCE, SILENCE_APART = 6.0, 60.0
# How long a process that was told to stop may wait for others that do not come.
PATIENCE = 5.0
NOT_TRAINING = -1  # in the place of a step
ENDED = "ended"  # in the place of who says it
LOST = 75  # exit code of a process that leaves because another one is gone


@dataclass
class Watchdog:
    """Where this process is, for the thread that watches: the step it is in, and since when it waits for the others."""

    step: int = NOT_TRAINING
    waits_since: float | None = field(default_factory=time.monotonic)  # they have not met yet

    def waits(self, step: int) -> None:
        """Note that from here on the process waits for the others."""
        self.step, self.waits_since = step, time.monotonic()

    def goes_on(self, step: int) -> None:
        """Note that all are there."""
        self.step, self.waits_since = step, None

    def ends(self) -> None:
        """Note that the steps are done."""
        self.step, self.waits_since = NOT_TRAINING, None


@contextmanager
def watch(world: World) -> Iterator[Watchdog]:
    """Yield a watchdog whose thread says that this process is there and looks after the others."""
    watchdog, ended = Watchdog(), threading.Event()
    with _signals_seen() as read_end:
        threads = [
            threading.Thread(target=_watch, args=(watchdog, world, ended), name="watchdog", daemon=True),
            threading.Thread(target=_leave_when_told, args=(watchdog, read_end, ended), name="leaving", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield watchdog
        finally:
            ended.set()
            threads[0].join(2 * BEAT_SECONDS)


@contextmanager
def _signals_seen() -> Iterator[int | None]:
    """Yield a pipe that the number of every signal comes through at once, whatever the main thread is waiting in."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield read_end
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_end)  # the thread that reads sees the end, and closes the other one


def _leave_when_told(watchdog: Watchdog, read_end: int | None, ended: threading.Event) -> None:
    """End the process soon after a signal where it waits for others that are gone: its main thread would never hear."""
    if read_end is None:
        return
    with open(read_end, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            told = time.monotonic()
            while not ended.wait(0.2):
                waits = watchdog.waits_since
                if waits is None:
                    told = time.monotonic()
                elif time.monotonic() - max(waits, told) > PATIENCE:
                    os._exit(128 + number[0])


def _watch(watchdog: Watchdog, world: World, ended: threading.Event) -> None:
    # With no store of its own, torchrun and the time-outs of the collectives are what is left; without one any more,
    # whoever held it is gone, and torchrun knows.
    with suppress(RuntimeError, OSError, ValueError):
        store = _own_store()
        name = f"{socket.gethostname()}, process {os.getpid()}"
        next_rank = (world.rank + 1) % world.size
        said, since, beat = b"", time.monotonic(), 0
        while not ended.wait(BEAT_SECONDS):
            beat += 1
            store.set(str(world.rank), f"{beat} {name}")
            if world.size == 1 or not store.check([str(next_rank)]):
                continue
            if (says := store.get(str(next_rank))) != said:
                said, since = says, time.monotonic()
            who = said.decode("utf-8", "replace").partition(" ")[2]
            if who == ENDED:
                continue
            # Where this process is says where all are: every step begins with a meeting, and so does the end of them.
            step = watchdog.step
            patience = SILENCE if step >= 0 else SILENCE_APART
            if time.monotonic() - since > patience and not ended.is_set():
                _leave(next_rank, who, f" at step {step + 1}" if step >= 0 else "", patience)
        store.set(str(world.rank), f"0 {ENDED}")


def _leave(rank: int, who: str, where: str, patience: float) -> None:
    """End the process with a line that names the one that is silent."""
    print(
        f"hasten: rank {rank} ({who}) has been silent for {patience:.0f} s{where}: this attempt ends. "
        "torchrun begins the next one (--max-restarts), from the newest checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def meeting(world: World) -> Any:
    """Return the store that the processes of this attempt meet in; those of an earlier one met elsewhere in it."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size))
    return dist.PrefixStore(_attempt(), store)


def _own_store() -> Any:
    """Return a connection of this thread's own to that store."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return dist.PrefixStore(f"{_attempt()}/there", store)


def _attempt() -> str:
    return f"hasten/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

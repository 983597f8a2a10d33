"""The processes of a run: brought together, asked to agree before every step, and watched for one that is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from hasten.distributed import ALONE, Ranks, current, is_launched
from hasten.errors import DamagedData, HastenError, RunError, SaidElsewhere
from hasten.loop.interrupt import SIGNALS, StopRequest
from hasten.loop.watchdog import Watchdog, meeting, watch
from hasten.parallel import Alone, Copies, Parallel, Parts
from hasten.recipe import Recipe

# An exchange that waits for longer has lost somebody for good. Saving and evaluating are shorter.
MOST_WAIT = timedelta(hours=1)
GONE = (
    "Another process of this run is gone; torchrun says which. Begun again, the run goes on from its newest checkpoint "
    "(torchrun --max-restarts does so by itself)."
)
# How gloo, NCCL and the store say that the other end of a connection is no longer there.
_LOST = ("onnection closed", "onnection reset", "roken pipe", "onnection refused", "NCCL", "timed out", "Timed out")


@dataclass
class Company:
    """The processes that train together, of which this is one.

    Args:
        parallel: how they share the model.
        saving: the same processes, for the thread that writes checkpoints.
        request: what a signal asked this process for.
        watchdog: notices a process that is gone.
    """

    parallel: Parallel = field(default_factory=Alone)
    saving: Ranks = ALONE
    request: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog = field(default_factory=Watchdog)
    _stop: str = ""

    @property
    def ranks(self) -> Ranks:
        """All processes."""
        return self.parallel.ranks

    @property
    def stop(self) -> str:
        """The signal that one of them was sent and all of them stop for; empty for none."""
        return self.request.name if self.ranks.size == 1 else self._stop

    def agree(self, clock: Any, targets: int, damage: DamagedData | None, step: int) -> int:
        """Return the targets of a step over all processes, once all of them have come to it.

        The clock of the first process becomes everyone's, so that whatever is due by it is due for all at once; so does
        a signal that one of them was sent.

        Raises:
            DamagedData: what one of them was to read for this step is damaged: all of them raise it.
        """
        if self.ranks.size == 1:
            if damage is not None:
                raise damage
            return targets
        self.watchdog.waits(step)
        asked = [float(self.request.name == name) for name in SIGNALS]
        seconds = clock.own_seconds if self.ranks.is_main else 0.0
        total, damaged, seconds, *asked = self.ranks.sums([float(targets), float(damage is not None), seconds, *asked])
        self.watchdog.goes_on(step)
        clock.agreed = seconds
        self._stop = next((name for name, count in zip(SIGNALS, asked) if count), "")
        if damaged:
            found = next(one for one in self.ranks.share(damage and (str(damage), damage.file, damage.block)) if one)
            raise damage or DamagedData(*found)
        return round(total)

    def tick(self, clock: Any) -> None:
        """Let the clock of the first process be everyone's, between two steps."""
        if self.ranks.size > 1:
            self.watchdog.ends()  # of these steps; the next one says so again
            clock.agreed = self.ranks.from_main(clock.own_seconds)


@contextmanager
def all_or_none(ranks: Ranks) -> Iterator[None]:
    """Let every process leave the block, or let all raise: what is wrong in one of them stops all.

    No process may talk to the others inside the block.
    """
    if ranks.size == 1:
        yield
        return
    error: HastenError | None = None
    try:
        yield
    except HastenError as raised:
        error = raised
    errors = ranks.share(error and str(error))
    if error is not None and ranks.is_main:
        raise error
    if any(errors):
        rank = next(rank for rank, text in enumerate(errors) if text)
        text = f"Rank {rank}: {errors[rank]}"
        raise RunError(text) if ranks.is_main else SaidElsewhere(text)


def pick_device(name: str) -> torch.device:
    """Return the device that a recipe's ``device`` names; of several GPUs, that of this process's place on its machine.

    ``auto`` is CUDA where there is one, else the CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and is_launched():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)


@contextmanager
def company(recipe: Recipe) -> Iterator[Company]:
    """Yield the processes of a run: those that torchrun started, else this one alone.

    Raises:
        RunError: the environment names a rank that does not exist, or the others do not come.
    """
    if not is_launched():
        yield Company()
        return
    import torch.distributed as dist

    world, device = current(), pick_device(recipe.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with watch(world) as watchdog:
        try:
            store = meeting(world)
            dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=MOST_WAIT, store=store)
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"The {world.size} processes of this run cannot meet ({str(error).splitlines()[0][:200]}): start all "
                "of them with torchrun, and let them reach MASTER_ADDR."
            ) from None
        try:
            ranks = Ranks(world, dist.new_group(backend="gloo"))
            saving = Ranks(world, dist.new_group(backend="gloo"))
            copies = recipe.parallel.copies
            with all_or_none(ranks):  # what can be wrong is seen before they talk
                parallel = Copies(ranks) if copies is None else Parts(ranks, copies, device.type)
            yield Company(parallel, saving, watchdog=watchdog)
        except RuntimeError as error:
            if not any(word in str(error) for word in _LOST):
                raise
            raise RunError(GONE) from None
        finally:
            dist.destroy_process_group()

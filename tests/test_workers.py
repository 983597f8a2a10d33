"""Workers of a loader that are killed, stopped or slow: noticed and named, and no item is lost or comes twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
from sizes import size

from hasten.data import PackedBatches
from hasten.data.workers import LOOK_SECONDS
from hasten.errors import DataError, RunError

STEPS = 40
generator = np.random.default_rng(0)
TEXTS = [generator.integers(1, 50, length) for length in generator.integers(1, 60, 400)]
NOTICED_SECONDS = 10  # what is promised, not how fast this machine is


def dataset() -> PackedBatches:
    return PackedBatches(TEXTS, document_token=0, seq_len=16, batch_tokens=64, total_steps=STEPS)


def tokens_of(items) -> list[list[int]]:
    return [item["input_ids"].flatten().tolist() for item in items]


def struck(sig: signal.Signals, num_workers: int, after: int, which: int, waits: bool):
    """Read until a worker is sent a signal after some items; return what was read, the error and its worker's pid."""
    data, read, pid, sent = dataset(), [], None, 0.0
    others = {worker.pid for worker in multiprocessing.active_children()}
    try:
        for item in data.loader(num_workers=num_workers, prefetch_factor=1):
            read += tokens_of([item])
            if len(read) == after:
                pids = sorted(worker.pid for worker in multiprocessing.active_children() if worker.pid not in others)
                pid, sent = pids[which], time.monotonic()
                os.kill(pid, sig)
                if waits:
                    time.sleep(0.2)  # the training step that the worker dies in
    except (RunError, RuntimeError) as error:
        assert time.monotonic() - sent < NOTICED_SECONDS
        return data, read, error, pid
    raise AssertionError("nobody noticed")


@pytest.mark.torture
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="stopped processes are recognised on Linux")
def test_a_worker_killed_or_stopped_is_named_and_a_new_loader_goes_on_in_order():
    expected, chance = tokens_of(dataset()), random.Random(0)
    for case in range(size(3, 30)):
        sig = (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL)[case % 3]
        num_workers = 1 + case % 2
        data, read, error, pid = struck(
            sig, num_workers, chance.randint(1, 20), chance.randrange(num_workers), waits=case % 3 == 2
        )
        assert f"{pid}" in str(error), (case, error)
        going_on = dataset()
        going_on.load_state_dict(data.state_dict())
        read += tokens_of(going_on.loader(num_workers=1))
        assert read == expected, case


class Slow(PackedBatches):
    """A dataset whose third item takes longer than workers are waited for before they are looked at."""

    def _items(self, first, stride):
        for number, item in enumerate(super()._items(first, stride)):
            if number == 2:
                time.sleep(LOOK_SECONDS + 1.5)
            yield item


def test_a_slow_worker_is_waited_for():
    data = Slow(TEXTS, document_token=0, seq_len=16, batch_tokens=64, total_steps=4)
    assert tokens_of(data.loader(num_workers=1)) == tokens_of(dataset())[:4]


def test_the_error_says_which_worker_was_lost_and_what_to_do():
    data = Slow(TEXTS, document_token=0, seq_len=16, batch_tokens=64, total_steps=4)
    items = iter(data.loader(num_workers=1))
    next(items), next(items)
    (worker,) = multiprocessing.active_children()
    threading.Timer(0.5, worker.kill).start()
    with pytest.raises(RunError, match=rf"Worker 0 of the loader \(process {worker.pid}\) was killed by SIGKILL: make"):
        next(items)
    assert data.state_dict()["step"] == 2


class Broken(PackedBatches):
    """A dataset with an error of its own in a worker."""

    def _items(self, first, stride):
        raise self.error


@pytest.mark.parametrize("error", [DataError("no such text"), ValueError("a mistake"), RuntimeError("another")])
def test_an_error_of_the_dataset_is_what_it_is(error):
    data = Broken(TEXTS, document_token=0, seq_len=16, batch_tokens=64, total_steps=4)
    data.error = error
    with pytest.raises(type(error), match=str(error)):
        list(data.loader(num_workers=1))

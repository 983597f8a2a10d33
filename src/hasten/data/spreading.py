"""Batches of text encoded side by side and handed back in their order, by threads or on a Ray cluster.

On Ray the batches of text travel to the workers and their ids travel back, so no storage has to be shared. They are
plain tasks and not a Ray Data pipeline: Ray Data begins with a source that its own tasks read, and here the order and
the names of documents, and what is wrong with them, come out of one pass over the files by the caller. That pass
reads 80 MB/s of long documents and is the limit of what a cluster gains: 8 workers with a fast encoder, 40 without.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from hasten.data.corpus import Batch
from hasten.data.encoders import Encoded
from hasten.data.encoding import TextEncoder, encode_shipped, shipment
from hasten.errors import DataError, HastenError, one_line

# A thread holds about 23 MB with kitoken and 12 MB with tokenizers, and eight of the former wait for the one reader.
_MOST_WORKERS, _MOST_FAST_WORKERS = 16, 8
_MOST_RAY_WORKERS = 64  # bounds what is held: about 5 MB each, twice
_MOST_RETRIES = 20
_CONNECT_SECONDS = 10.0
# What Ray reads: whether it reports to its makers, and whether it warns of what it will do with GPUs one day. What it
# sets itself. All are put back.
_VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_SET_BY_RAY = ("RAY_AUTH_MODE", "PYTHONBREAKPOINT")

Results = Iterator[tuple[Batch, "Encoded | None"]]


def check_engine(engine: str) -> None:
    """Refuse an unknown engine, and one whose package is missing.

    Raises:
        DataError: says what to do.
    """
    if engine not in ENGINES:
        raise DataError(f"the engine is {engine!r}; expected {' or '.join(map(repr, ENGINES))}.")
    if engine == "ray":
        _ray()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise DataError("the engine 'ray' needs one more package: `pip install 'hasten[ray]'`.") from error
    return ray


def on_threads(batches: Iterator[Batch], encode: TextEncoder, workers: int | None) -> Results:
    """Yield each batch with its ids, in order; a batch per worker and two more are held."""
    workers = workers or min(_cores(), _MOST_FAST_WORKERS if encode.is_fast else _MOST_WORKERS)
    if workers == 1:
        for batch in batches:
            yield batch, encode(batch.texts)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="hasten-encode")
    waiting: deque[tuple[Batch, Future]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encode, batch.texts)))
            if len(waiting) > workers + 1:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_ray(batches: Iterator[Batch], encode: TextEncoder, workers: int | None) -> Results:
    """Yield each batch with its ids, in order, encoded by tasks on a Ray cluster.

    A worker that dies costs the batches it had in hand: Ray runs them again elsewhere. Two batches per worker, and
    two more, are under way at a time.

    Args:
        batches: read here, as far ahead as that.
        encode: made again on each worker.
        workers: tasks at a time; None: one for each core of the cluster, up to 64.

    Raises:
        DataError: the cluster cannot be used, or a task fails for another reason than the loss of its worker.
    """
    ray = _ray()
    with _cluster(ray):
        run = ray.remote(num_cpus=1, max_retries=_MOST_RETRIES)(encode_shipped)
        shipped = ray.put(shipment(encode))
        workers = workers or max(1, min(int(ray.cluster_resources().get("CPU", 1)), _MOST_RAY_WORKERS))
        waiting: deque[tuple[Batch, Any]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, run.remote(shipped, batch.texts)))
                if len(waiting) > 2 * workers + 1:
                    yield _fetched(ray, *waiting.popleft())
            while waiting:
                yield _fetched(ray, *waiting.popleft())
        finally:
            for _, task in waiting:
                ray.cancel(task)


def _fetched(ray: Any, batch: Batch, task: Any) -> tuple[Batch, Encoded | None]:
    try:
        return batch, ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HastenError):
            raise error.cause from None
        raise DataError(
            f"a Ray worker cannot encode text ({one_line(f'{type(error.cause).__name__}: {error.cause}', 200)}); "
            "install hasten with the same version on every machine of the cluster."
        ) from error
    except ray.exceptions.RayError as error:
        raise DataError(
            f"the Ray cluster cannot encode text ({one_line(f'{type(error).__name__}: {error}', 200)}); "
            "see `ray status`, or prepare with the engine 'local'."
        ) from error


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Use the cluster this process is connected to, else the one that runs, else one of this machine for this time."""
    if ray.is_initialized():
        yield
        return
    before = {name: os.environ.get(name) for name in (*_VARIABLES, *_SET_BY_RAY)}
    os.environ.update({name: value for name, value in _VARIABLES.items() if before[name] is None})
    try:
        with _silent(ray):
            _join(ray)
            try:
                yield
            finally:
                ray.shutdown()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _join(ray: Any) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _refuse_dead(os.environ.get("RAY_ADDRESS", ""))
        # Without an address: RAY_ADDRESS, else what `ray start` started here, else a new one.
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise DataError(
            f"no Ray cluster can be reached or started ({one_line(str(error), 200)}); set RAY_ADDRESS to the address "
            "of one that runs, or to `local` for one of this machine."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _silent(ray: Any) -> Iterator[None]:
    """Keep what Ray says of its own affairs, such as a task that it runs again, off the terminal."""
    from ray._private import worker  # it has no public switch for what its nodes report

    logger, names = logging.getLogger("ray"), vars(worker)
    level, said = logger.level, names.get("print_to_stdstream")
    logger.setLevel(logging.ERROR)
    names["print_to_stdstream"] = lambda data, ignore_prefix: None
    try:
        yield
    finally:
        logger.setLevel(level)
        names["print_to_stdstream"] = said


def _refuse_dead(address: str) -> None:
    """Raise OSError when nobody answers at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise OSError(f"nobody answers at {address}: {error.strerror or error}") from error


# By name: what spreads the work, and how many times as large its batches are. A task on Ray costs about a millisecond,
# and encoding four batches a hundred.
ENGINES: dict[str, tuple[Callable[..., Results], int]] = {"local": (on_threads, 1), "ray": (on_ray, 4)}

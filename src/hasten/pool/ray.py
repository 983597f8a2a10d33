"""Runs side by side on a Ray cluster: every job is the same command, started by a Ray task on some node.

The trainer knows nothing of Ray. What is needed is storage that all nodes see at the same path, for the run folders,
the recipes and the text, and hasten installed on every node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hasten.errors import HastenError, RecipeError, RunError, one_line, printable
from hasten.pool.job import PATIENCE_SECONDS, Engine, Job, Outcome, Places, refuse_none, wait_until_free
from hasten.pool.local import POLL_SECONDS, Process

# How often a job is started whose worker, node or process was killed.
STARTS = 3
CONNECT_SECONDS = 10.0
# Killed from outside: by the kernel for its memory, or by whoever takes a node back (143: it saved first).
KILLED = (-signal.SIGTERM, -9, 128 + signal.SIGTERM)
# What Ray reads, and what it sets itself when it starts a cluster: put back when we leave.
_VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0"}
_SET_BY_RAY = ("RAY_AUTH_MODE",)


@dataclass(frozen=True)
class _Report:
    """What a task hands back: how its process ended, or why there was none."""

    code: int = 0
    seconds: float = 0.0
    refusal: str = ""


@contextlib.contextmanager
def opened() -> Iterator[Engine]:
    """Yield the engine of a Ray cluster: the one in use, that of RAY_ADDRESS, that of ``ray start``, else a new one.

    A new one is of this machine alone and ends with the context.

    Raises:
        RunError: Ray is not installed, or its cluster does not answer.
    """
    ray = _imported()
    if ray.is_initialized():
        yield _engine(ray)
        return
    before = {name: os.environ.get(name) for name in (*_VARIABLES, *_SET_BY_RAY)}
    os.environ.update({name: value for name, value in _VARIABLES.items() if before[name] is None})
    try:
        with _silent(ray):
            try:
                _join(ray)
            except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise RunError(
                    f"No Ray cluster can be used ({one_line(str(error), 200)}): check RAY_ADDRESS and `ray status`, or "
                    "unset RAY_ADDRESS and stop what `ray start` left, and one is started on this machine."
                ) from error
            try:
                yield _engine(ray)
            finally:
                ray.shutdown()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RunError("engine=ray needs Ray, which is not installed: pip install 'hasten[ray]'.") from error
    return ray


def _join(ray: Any) -> None:
    _refuse_dead(os.environ.get("RAY_ADDRESS") or _started_here())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and handlers[signal.SIGINT] == signal.SIG_IGN:
        # Of a command in the background: workers would inherit it, and Ray asks them to stop by this signal.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    finally:
        if is_main:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _started_here() -> str | None:
    """Return the address that ``ray start`` left on this machine, which Ray would join."""
    from ray._private.utils import read_ray_address

    return read_ray_address()


def _refuse_dead(address: str | None) -> None:
    """Refuse an address that nobody answers at: Ray itself tries for two minutes.

    Raises:
        ConnectionError: nobody does.
        RunError: it is the address of a client outside the cluster.
    """
    if address is not None and "://" in address:
        raise RunError(
            f"{one_line(address)} is the way in from outside a Ray cluster, which does not see its files: give the "
            "command on a node of the cluster, with RAY_ADDRESS=auto."
        )
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers at {address}: {error}") from error


def _engine(ray: Any) -> Engine:
    return Engine(partial(_places, ray), partial(_run_all, ray))


@contextlib.contextmanager
def _silent(ray: Any) -> Iterator[None]:
    """Keep what Ray says of its own affairs off the terminal; what happens to a job we say ourselves."""
    from ray._private import worker  # it has no public switch for what its nodes report

    logger = logging.getLogger("ray")
    level, names = logger.level, vars(worker)
    said = names.get("print_to_stdstream")
    logger.setLevel(logging.ERROR)
    names["print_to_stdstream"] = lambda data, ignore_prefix: None
    try:
        yield
    finally:
        logger.setLevel(level)
        names["print_to_stdstream"] = said


def _places(ray: Any, device: str = "auto", workers: int | None = None, threads: int | None = None) -> Places:
    """Return how many runs the cluster has room for now: one for each GPU, or for every `threads` cores.

    Raises:
        RecipeError: a number below one, a device that Ray hands out to nobody, or no node that is large enough.
    """
    refuse_none(workers, threads)
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"device={device} is one of a machine, and Ray says which a run has: give auto, cpu or cuda.")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" and not with_gpu:
        raise RecipeError("device=cuda, but no node of the Ray cluster has a GPU: give device=cpu or auto.")
    gpus = 1 if with_gpu and device != "cpu" else 0
    able = with_gpu if gpus else nodes
    if threads is None:
        threads = max(1, min(int(node.get("CPU", 0) // node["GPU"]) for node in able)) if gpus else 1
    largest = max((int(node.get("CPU", 0)) for node in able), default=0)
    if threads > largest:
        raise RecipeError(f"threads={threads}, but the largest node of the Ray cluster has {largest} CPUs: give fewer.")
    if workers is None:
        free = ray.available_resources()
        rooms = [free.get("CPU", 0) // threads, *([free.get("GPU", 0)] if gpus else [])]
        workers = max(1, int(min(rooms)))
    memory = 0 if gpus else int(sum(node.get("memory", 0) for node in nodes))
    return Places(workers, threads, gpus, memory)


def _run_all(
    ray: Any,
    jobs: Iterable[Job],
    *,
    workers: int,
    on_start: Callable[[Job], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Outcome]:
    """Run jobs as `hasten.pool.run_all` does, on the nodes of the cluster; a job whose worker died is started again.

    Raises:
        RunError: a node does not see the job's files, a program cannot be started, or a job was killed again and again.
    """
    task = ray.remote(max_retries=0)(_work)
    home = Path.cwd()
    ours = {name: value for name, value in os.environ.items() if name.startswith("HASTEN_")}

    def start(job: Job) -> Any:
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{printable(job.name)} cannot be started: {printable(str(error))}.") from error
        job = dataclasses.replace(
            job,
            log=job.log.absolute(),
            needs=tuple(path.absolute() for path in job.needs),
            folder=None if job.folder is None else job.folder.absolute(),
        )
        needed = task.options(name=job.name, num_cpus=job.threads, num_gpus=job.gpus)
        return needed.remote(job, home, ours, sys.executable)

    waiting, running = iter(jobs), {}
    try:
        while True:
            while len(running) < workers and (job := next(waiting, None)) is not None:
                running[start(job)] = (job, 1)
                if on_start is not None:
                    on_start(job)
            if not running:
                return
            ended, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for one in ended:
                job, starts = running.pop(one)
                report, loss = _handed_back(ray, one, job)
                if loss and starts < STARTS:
                    if tell is not None:
                        tell(f"{job.name}: {loss}; it is started again, from its newest checkpoint if it has one.")
                    running[start(job)] = (job, starts + 1)
                    continue
                if report is None:
                    raise RunError(f"{job.name} was started {STARTS} times and never ended: {loss}.")
                _show_what_is_new(job)
                yield Outcome(job, report.code, report.seconds)
    finally:
        _stop(ray, list(running))


def _handed_back(ray: Any, reference: Any, job: Job) -> tuple[_Report | None, str]:
    """Return what a task handed back, None if it was lost, and how the job was lost, if it was."""
    errors = ray.exceptions
    try:
        report = ray.get(reference)
    except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.LocalRayletDiedError):
        return None, "the Ray worker that ran it is gone"
    except errors.OutOfMemoryError:
        return None, "Ray ended its worker, because its node was out of memory"
    except errors.RayError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"{job.name} cannot run on the Ray cluster ({one_line(said[-1], 300)}): every node needs hasten and Ray in "
            "the versions that are here."
        ) from error
    if report.refusal:
        raise RunError(report.refusal)
    return report, f"its process was killed (exit code {report.code})" if report.code in KILLED else ""


def _show_what_is_new(job: Job) -> None:
    """Look into the job's folder: a network file system shows what another node wrote once the folder is opened."""
    if job.folder is not None:
        with contextlib.suppress(OSError):
            os.listdir(job.folder)


def _stop(ray: Any, running: list[Any]) -> None:
    """Ask jobs to save and stop, and wait for them; those that do not are ended."""
    if not running:
        return
    with contextlib.suppress(ray.exceptions.RayError):
        for one in running:
            ray.cancel(one)
        _, left = ray.wait(running, num_returns=len(running), timeout=PATIENCE_SECONDS + 10)
        for one in left:
            ray.cancel(one, force=True)


# --- on the node ----------------------------------------------------------------------------------------------------


def _work(job: Job, home: Path, variables: Mapping[str, str], python: str) -> _Report:
    """Run a job in this worker, until it ends or the task is cancelled."""
    process = None
    try:
        for path in (home, job.log.parent, *job.needs):
            if not path.exists():
                return _Report(refusal=_unseen(path))
        if job.folder is not None:
            wait_until_free(job.folder)
        command = [sys.executable if word == python else word for word in job.command]  # Python lies elsewhere there
        guarded = (sys.executable, "-m", "hasten.pool.guard", *command)
        process = Process(dataclasses.replace(job, command=guarded), home=home, variables=variables)
        while process.process.poll() is None:
            time.sleep(POLL_SECONDS)
    except HastenError as error:
        return _Report(refusal=f"On the node {platform.node()}: {error}")
    except KeyboardInterrupt:  # the task was cancelled
        if process is None:
            return _Report(code=-signal.SIGINT)
        process.ask_to_stop()
        process.wait()
    outcome = process.outcome()
    return _Report(outcome.code, outcome.seconds)


def _unseen(path: Path) -> str:
    return (
        f"The node {platform.node()} does not see {path}: keep the folder that the command is given in, the recipes, "
        "the text and the run folders on storage that every node of the Ray cluster mounts at the same path."
    )

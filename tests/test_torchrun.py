"""torchrun: one voice, a killed or stopped process named, and the run going on as if it never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch.distributed
from safetensors.torch import load_file
from sizes import size
from small_runs import small_settings

from hasten.record import RunFolder, read_metrics

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torchrun's processes, /proc and gloo",
)

STEPS = 300
KILLS = size(2, 20)
SECONDS = 240
SILENT = "has been silent"


@contextmanager
def launched(settings: list[str], log: Path, *, restarts: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Yield torchrun with two processes of a small run; none of them is left at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    with log.open("ab") as output:
        run = subprocess.Popen(
            [*command, "-m", "hasten", "train", "--no-report", *settings],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        yield run
    finally:
        for process in [*psutil.Process(run.pid).children(recursive=True), run] if run.poll() is None else []:
            process.kill()
        run.wait()


def ranks_of(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the two processes that train, by rank; none where they are not there."""
    try:
        found = [child for child in psutil.Process(run.pid).children() if "RANK" in child.environ()]
        return sorted(found, key=lambda child: int(child.environ()["RANK"]))
    except (psutil.Error, KeyError):
        return []


def settings_of(folder: Path, text: str, out: str, kind: str) -> list[str]:
    """Return the settings of a run that saves every ten steps."""
    changed = [f"out={folder / out}", f"parallel={kind}", f"budget={STEPS}", "checkpoint.every=10"]
    own = [s for s in small_settings(folder, text) if not s.startswith(("budget", "checkpoint.every", "evaluate"))]
    return [*own, *changed, "evaluate.every=50%", "evaluate.tokens=256"]


def steps_done(out: Path) -> int:
    """Return how many steps a run has logged."""
    try:
        return max((line["step"] for line in read_metrics(RunFolder(out))), default=0)
    except OSError:
        return 0


def wait_for_steps(run: subprocess.Popen[bytes], out: Path, beyond: int) -> None:
    """Wait until a run has logged more than `beyond` steps, or has ended."""
    end = time.monotonic() + 90
    while run.poll() is None and steps_done(out) <= beyond and time.monotonic() < end:
        time.sleep(0.02)


def test_a_run_whose_processes_are_killed_ends_with_the_weights_of_one_left_alone(
    own_folder: Path, library_text: str
) -> None:
    log = own_folder / "log"
    with launched(settings_of(own_folder, library_text, "undisturbed", "fsdp"), log) as run:
        assert run.wait(SECONDS) == 0, log.read_text()[-3000:]
    choose, out = random.Random(7), own_folder / "disturbed"
    with launched(settings_of(own_folder, library_text, "disturbed", "fsdp"), log, restarts=KILLS) as run:
        reached = 0
        for kill in range(KILLS):
            wait_for_steps(run, out, reached + choose.randrange(STEPS // (KILLS + 1)))
            reached = steps_done(out)
            ranks = ranks_of(run)
            assert len(ranks) == 2, f"ended before kill {kill}: {log.read_text()[-3000:]}"
            choose.choice(ranks).send_signal(signal.SIGKILL)
            wait_for_steps(run, out, reached)
        assert run.wait(SECONDS) == 0, log.read_text()[-3000:]
    ours, theirs = (load_file(own_folder / name / "final/model.safetensors") for name in ("disturbed", "undisturbed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_process_that_is_stopped_is_named_within_ten_seconds_and_the_run_goes_on(
    own_folder: Path, library_text: str
) -> None:
    log, out = own_folder / "log", own_folder / "run"
    settings = [s for s in settings_of(own_folder, library_text, "run", "ddp") if not s.startswith("budget")]
    with launched([*settings, f"budget={3 * STEPS}"], log, restarts=1) as run:
        wait_for_steps(run, out, 20)
        stopped = ranks_of(run)[1]
        stopped.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        while SILENT not in log.read_text() and time.monotonic() - began < 60:
            time.sleep(0.05)
        named_after = time.monotonic() - began
        (line,) = [line for line in log.read_text().splitlines() if SILENT in line]
        assert "rank 1" in line
        assert f"process {stopped.pid}" in line
        assert named_after < 12, named_after  # ten, and what a busy machine adds
        assert run.wait(SECONDS) == 0, log.read_text()[-3000:]
    assert steps_done(out) == 3 * STEPS


def test_the_first_process_alone_speaks(own_folder: Path, library_text: str) -> None:
    log = own_folder / "log"
    settings = [s for s in settings_of(own_folder, library_text, "run", "ddp") if not s.startswith("budget")]
    with launched([*settings, "budget=20"], log) as run:
        assert run.wait(SECONDS) == 0, log.read_text()
    said = log.read_text()
    assert said.count("held-out bits per byte") == 1
    assert "2 processes (ddp)" in " ".join(said.split())
    assert "Traceback" not in said
    assert "Warning" not in said


WRONG = {
    "parallel.copies=3": "parallel.copies=3 does not divide the 2 processes",
    "precision=fp16": "precision=fp16 has no loss scale that the parts of parallel=hsdp agree on",
}


@pytest.mark.parametrize("wrong", [pytest.param("precision=fp16", marks=pytest.mark.heavy), "parallel.copies=3"])
def test_what_is_wrong_is_said_once(own_folder: Path, library_text: str, wrong: str) -> None:
    log = own_folder / "log"
    settings = [*settings_of(own_folder, library_text, "run", "hsdp"), wrong]
    with launched(settings, log) as run:
        assert run.wait(SECONDS) != 0
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("hasten:")]
    assert WRONG[wrong] in line
    assert not (own_folder / "run").exists()

"""Runs that are killed or signalled at any moment lose little and end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sizes import size
from small_runs import (
    SAVED_EVERY,
    STEPS,
    differences,
    exit_code,
    forked,
    forked_in_terminal,
    hasten,
    small_settings,
    what_is_left,
)

from hasten import checkpoint
from hasten.loop import Event, train
from hasten.recipe import resolve
from hasten.record import RunFolder, read_metrics, read_result

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="uses fork and signals"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def settings(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small_settings(tmp_path_factory.mktemp("text"), library_text)


@pytest.fixture(scope="module")
def uninterrupted(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that nothing happened to. It also warms this process up for the children to come."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert hasten("train", "--no-report", *settings, f"out={out}") == 0
    return what_is_left(out)


def last_step(out: Path) -> int:
    lines = read_metrics(RunFolder(out))
    return lines[-1]["step"] if lines else 0


# Kills.


def train_and_announce(settings: list[str], announce: int) -> int:
    def pass_on(event: Event) -> None:
        os.write(announce, b".")

    # Kills at one step in a row are chance here, so there is no waiting as for a run that keeps dying by itself.
    train(resolve(None, settings).recipe, hooks=[pass_on], longest_wait=0.0)
    return 0


def train_until_killed(settings: list[str], chance: random.Random) -> bool:
    """Kill a child after a random number of events and a random pause; return False where it ended before.

    Counting events spreads the kills over the whole of a run, however fast the machine is just now.
    """
    reader, writer = os.pipe()
    child = forked(lambda: train_and_announce(settings, writer))
    os.close(writer)
    for _ in range(chance.randrange(14)):
        if not os.read(reader, 1):
            break
    time.sleep(chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.close(reader)
    code = exit_code(child)
    assert code in (0, -signal.SIGKILL), "a run that went on failed; what it printed is above"
    return code != 0


def where_it_stopped(out: Path) -> str:
    """Say from the folder alone what a run was doing when it was killed."""
    saved, _ = checkpoint.newest(out / "checkpoints")
    if any(path.suffix == ".tmp" for path in (out / "checkpoints").glob("step-*")):
        return "in a save"
    if saved is not None and saved.state["status"] == "finished":
        return "in the finish"
    resumed = saved.step if saved is not None else 0
    return "in a step" if last_step(out) > resumed else "before a step"


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_runs_killed_at_random_moments_end_bit_identical(
    settings: list[str], uninterrupted: dict[str, Any], own_folder: Path
) -> None:
    chance, wanted = random.Random(0), size(200, 2000)
    places: Counter[str] = Counter()
    lost: Counter[int] = Counter()
    runs = 0
    while places.total() < wanted:
        out = own_folder / f"run{runs}"
        while places.total() < wanted and train_until_killed([*settings, f"out={out}"], chance):
            saved, notes = checkpoint.newest(out / "checkpoints")
            assert notes == []  # nothing that was killed is ever unreadable
            lost[last_step(out) - (saved.step if saved is not None else 0)] += 1
            places[where_it_stopped(out)] += 1
        if not (out / "result.json").exists():  # the last one is let through
            train(resolve(None, [*settings, f"out={out}"]).recipe)
        assert differences(out, uninterrupted) == []
        runs += 1
    print(f"\n{places.total()} kills of {runs} runs: {dict(places)}; steps lost: {sorted(lost.items())}")
    # Two runs may come through their finish without being hit there.
    assert all(places[place] for place in ("before a step", "in a step", "in a save", "in the finish")[: size(3, 4)])
    # A save that was not through yet is lost too, and no second one begins before it.
    assert max(lost) <= 2 * SAVED_EVERY


# Signals.


class Signalled:
    """A run in a child, and what is seen of it from outside."""

    def __init__(self, out: Path, work: Callable[[], int]) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        self._metrics = out / "metrics.jsonl"
        self.child = forked(work, log=self.log)

    def lines(self) -> int:
        return self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0

    def is_alive(self) -> bool:
        return os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait_for_lines(self, number: int) -> None:
        """Wait until the run did `number` steps of its own, or ended."""
        resumed_at = -1
        while self.is_alive():
            lines = self.lines()
            resumed_at = lines if resumed_at < 0 or lines < resumed_at else resumed_at  # what a kill lost is cut off
            if lines >= resumed_at + number:
                return
            time.sleep(0.002)

    def send(self, name: str) -> None:
        if self.is_alive():
            os.kill(self.child, getattr(signal, name))


CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
# The last is what a closing terminal sends, once by the system and once by the shell: one request, not two.
CASES = (["SIGINT"], ["SIGTERM"], ["SIGHUP"], ["SIGINT"] * 2, ["SIGTERM"] * 2, ["SIGHUP"] * 2)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_signals_at_random_moments_save_and_the_same_command_ends_bit_identical(
    settings: list[str], uninterrupted: dict[str, Any], own_folder: Path
) -> None:
    chance, wanted, cases, runs = random.Random(0), size(50, 500), Counter(), 0
    while cases.total() < wanted:
        out = own_folder / f"run{runs}"
        runs += 1
        while True:
            run = Signalled(out, partial(hasten, "train", "--no-report", *settings, f"out={out}"))
            first, *second = chance.choice(CASES)
            run.wait_for_lines(chance.randrange(1, 16))
            time.sleep(chance.uniform(0, 0.01))
            asked = time.monotonic()
            run.send(first)
            for name in second:
                time.sleep(chance.uniform(0, 0.01))
                run.send(name)
            code = exit_code(run.child)
            if code == 0:
                break
            assert code == CODES[first], (first, second, code, run.log.read_text())
            assert time.monotonic() - asked < 5
            saved, notes = checkpoint.newest(out / "checkpoints")
            assert notes == []
            lost = last_step(out) - (saved.step if saved is not None else 0)
            if second and first != "SIGHUP":
                assert lost <= 2 * SAVED_EVERY
            elif last_step(out) < STEPS:  # after the last step a signal leaves at once, whatever is being done
                assert lost == 0, (first, second)
            cases[" ".join((first, *second))] += 1
        assert differences(out, uninterrupted) == []
    print(f"\n{cases.total()} signals to {runs} runs: {dict(cases)}")


def test_a_run_that_is_to_outlive_its_terminal_does(
    settings: list[str], uninterrupted: dict[str, Any], own_folder: Path
) -> None:
    def work() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
        return hasten("train", "--no-report", *settings, f"out={own_folder / 'run'}")

    run = Signalled(own_folder / "run", work)
    for number in (1, 10, 30):
        run.wait_for_lines(number)
        run.send("SIGHUP")
    assert exit_code(run.child) == 0, run.log.read_text()
    assert differences(own_folder / "run", uninterrupted) == []


def test_terminated_in_a_process_of_its_own_it_says_how_to_go_on(settings: list[str], own_folder: Path) -> None:
    out = own_folder / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "hasten", "train", *longer(settings), f"out={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: last_step(out) > 2 * SAVED_EVERY)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "the same command goes on" in output
    saved, _ = checkpoint.newest(out / "checkpoints")
    assert (read_result(RunFolder(out))["status"], saved.step) == ("stopped", last_step(out))


@pytest.mark.parametrize("ending", ["Ctrl-C", "Ctrl-C twice", "closed"])
def test_a_terminal_stops_a_run_and_nothing_is_damaged(
    ending: str, settings: list[str], uninterrupted: dict[str, Any], own_folder: Path
) -> None:
    """With a terminal of its own, so that the keys and the hang-up come from the system, as they do for a person."""
    out = own_folder / "run"
    child, terminal = forked_in_terminal(lambda: hasten("train", *longer(settings), f"out={out}"))
    printed = b""

    def read_on() -> bool:
        nonlocal printed
        printed += os.read(terminal, 1 << 16)
        return last_step(out) > 2 * SAVED_EVERY

    wait_until(read_on)
    if ending == "closed":
        os.close(terminal)
    else:
        os.write(terminal, b"\x03" if ending == "Ctrl-C" else b"\x03\x03")
    code = exit_code(child)
    assert code == (129 if ending == "closed" else 130), printed[-2000:]
    saved, notes = checkpoint.newest(out / "checkpoints")
    assert notes == []
    assert last_step(out) - saved.step <= (2 * SAVED_EVERY if ending == "Ctrl-C twice" else 0)


def longer(settings: list[str]) -> list[str]:
    return [word for word in settings if not word.startswith("budget=")] + ["budget=100000"]


def wait_until(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)

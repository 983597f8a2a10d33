"""Runs side by side: in order, so many at a time, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hasten
from hasten.pool import Job, Places, num_cores, places, run_all, train_command

# Ends when its standard input closes, as a run with an owner does, and says that it was asked.
WAITING = "import sys; print('began', flush=True); sys.stdin.read(); print('asked', flush=True)"


def job(name: str, code: str, **more) -> Job:
    return Job(name, (sys.executable, "-c", code), Path(f"{name}.txt"), **more)


def test_every_job_runs_once_and_its_exit_code_is_told():
    outcomes = {o.job.name: o.code for o in run_all([job(f"j{i}", f"exit({i})") for i in range(5)], workers=2)}
    assert outcomes == {f"j{i}": i for i in range(5)}


def test_killed_job_has_the_number_of_its_signal():
    (outcome,) = run_all([job("killed", "import os; os.kill(os.getpid(), 9)")], workers=1)
    assert outcome.code == -9


def test_output_is_kept_and_added_to():
    for word in ("one", "two"):
        list(run_all([job("said", f"print('{word}')")], workers=1))
    assert Path("said.txt").read_text(encoding="utf-8").split() == ["one", "two"]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_workers_at_a_time(workers):
    note = "import os, time; open(f'{os.getpid()}.on', 'w'); time.sleep(0.3); os.remove(f'{os.getpid()}.on')"
    seen = []

    def jobs():
        for i in range(2 * workers + 1):
            seen.append(len(list(Path().glob("*.on"))))
            yield job(f"j{i}", note)

    list(run_all(jobs(), workers=workers))
    assert len(seen) == 2 * workers + 1
    assert max(seen) < workers


def test_jobs_are_taken_only_when_there_is_room():
    taken = []

    def jobs():
        for i in range(4):
            taken.append(i)
            yield job(f"j{i}", "")

    outcomes = run_all(jobs(), workers=1)
    next(outcomes)
    assert taken == [0]
    outcomes.close()


def test_jobs_have_the_threads_they_were_given():
    list(run_all([job("threads", "import os; print(os.environ['OMP_NUM_THREADS'])", threads=3)], workers=1))
    assert Path("threads.txt").read_text(encoding="utf-8").strip() == "3"


def test_leaving_early_asks_the_jobs_to_stop_and_waits_for_them():
    outcomes = run_all([job("short", ""), job("long", WAITING)], workers=2)
    next(outcomes)
    until(lambda: "began" in Path("long.txt").read_text(encoding="utf-8"))
    outcomes.close()
    assert Path("long.txt").read_text(encoding="utf-8").split() == ["began", "asked"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_job_outlives_its_owner(number, tmp_path):
    code = f"""
import signal, sys
from pathlib import Path
from hasten.pool import Job, run_all
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in the background
list(run_all([Job("long", (sys.executable, "-c", {WAITING!r}), Path("long.txt"))], workers=1))
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    log = tmp_path / "long.txt"
    until(lambda: log.exists() and "began" in log.read_text(encoding="utf-8"))
    os.kill(owner.pid, number)
    owner.wait()
    until(lambda: log.read_text(encoding="utf-8").split() == ["began", "asked"])


def test_program_that_is_not_there_is_one_sentence():
    with pytest.raises(hasten.RunError, match=r"nowhere cannot be started"):
        list(run_all([Job("nowhere", ("/nowhere/at/all",), Path("log.txt"))], workers=1))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (num_cores(), 1)),
        ({"workers": 1}, (1, num_cores())),
        ({"threads": num_cores()}, (1, num_cores())),
        ({"threads": 10**6}, (1, 10**6)),
        ({"workers": 5, "threads": 2}, (5, 2)),
    ],
)
def test_places_on_a_cpu(given, expected):
    assert places("cpu", **given) == Places(*expected)


def test_a_gpu_takes_one_run_at_a_time():
    assert places("cuda", None, None).workers == 1


@pytest.mark.parametrize("given", [{"workers": 0}, {"threads": -1}])
def test_no_place_at_all_is_refused(given):
    with pytest.raises(hasten.RecipeError, match="at least 1"):
        places("cpu", **given)


def test_command_pauses_where_it_is_told():
    assert train_command(Path("r.toml"), until="25%")[-3:] == ("--no-report", "--until", "25%")
    assert "--until" not in train_command(Path("r.toml"))


def until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)

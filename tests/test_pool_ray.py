"""Pools on a Ray cluster: the same jobs, the same numbers, and nothing lost but a dead worker's unsaved work."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from small_runs import small_settings, without_times

import hasten
from hasten.pool import open_engine
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

# Ray stays out of the process of the tests, which forks elsewhere: a cluster, and a process for every owner of jobs.
HEAD = """
import logging, sys, ray
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
# Ends when its standard input closes, as a run with an owner does, and says that it was asked.
WAITING = "import os, sys; print('began', os.getpid(), flush=True); sys.stdin.read(); print('asked', flush=True)"
BEGIN = """
import os, signal, sys, time
from pathlib import Path
from hasten.pool import Job, open_engine
def job(name, code, **more):
    return Job(name, (sys.executable, "-c", code), Path("logs") / f"{name}.txt", **more)
def until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray cluster of three cores on this machine, as the environment of who joins it."""
    folder = Path("/tmp") / f"hasten-ray-{os.getpid()}"  # a socket's path may have no more than 107 bytes
    environment = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    folder.mkdir()
    head = subprocess.Popen(
        # Ray asks workers to stop by SIGINT, which those of a test run in the background would inherit as ignored.
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{HEAD}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={key: value for key, value in environment.items() if key != "RAY_ADDRESS"},
        text=True,
        start_new_session=True,
    )
    try:
        yield {**environment, "RAY_ADDRESS": head.stdout.readline().strip()}
    finally:
        head.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        head.stdout.close()
        subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture
def owner(cluster: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start Python on `code`, a process that has jobs on the cluster."""
    started = []

    def start(code: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, *(["-c", BEGIN + textwrap.dedent(code)] if code else ["-m", "hasten", *arguments])]
        one = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**cluster, "OMP_NUM_THREADS": "1", "COLUMNS": "140"},
            start_new_session=True,
        )
        started.append(one)
        return one

    yield start
    for one in started:
        with suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        one.communicate()


def said(process: subprocess.Popen, code: int = 0) -> str:
    """Return all that a process printed, once it has ended with `code`."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def test_jobs_end_as_they_do_on_this_machine(owner):
    process = owner("""
        with open_engine("ray") as engine:
            print(engine.places("cpu", None, None).workers, engine.places("cpu", None, 2).workers)
            code = "import os; print(os.environ['OMP_NUM_THREADS']); exit({})"
            jobs = [job(f"j{i}", code.format(i), threads=2) for i in range(2)]
            print(sorted((o.job.name, o.code) for o in engine.run_all(jobs, workers=3)))
    """)
    assert said(process).splitlines() == ["3 1", "[('j0', 0), ('j1', 1)]"]  # and not a word of Ray's
    assert Path("logs/j1.txt").read_text(encoding="utf-8").split() == ["2"]


def test_leaving_early_asks_the_jobs_to_stop_and_waits_for_them(owner):
    process = owner(f"""
        with open_engine("ray") as engine:
            outcomes = engine.run_all([job("long", {WAITING!r}), job("short", "")], workers=2)
            next(outcomes)
            until(lambda: "began" in Path("logs/long.txt").read_text())
            outcomes.close()
            print(Path("logs/long.txt").read_text().split()[::2])
    """)
    assert said(process).strip() == "['began', 'asked']"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_job_outlives_its_owner(owner, number):
    process = owner(f"""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open_engine("ray") as engine:
            list(engine.run_all([job("long", {WAITING!r})], workers=1))
    """)
    log = Path("logs/long.txt")
    until(lambda: log.exists() and "began" in log.read_text(encoding="utf-8"))
    os.killpg(process.pid, number)
    process.wait(60)
    until(lambda: log.read_text(encoding="utf-8").split()[::2] == ["began", "asked"])


def test_job_that_was_killed_is_started_again_and_not_for_ever(owner):
    process = owner("""
        with open_engine("ray") as engine:
            kill = "import os; os.kill(os.getpid(), 9)"
            once = f"from pathlib import Path; there = Path('a'); there.exists() or (there.touch(), exec({kill!r}))"
            jobs = [job("once", once), job("ever", kill)]
            print(sorted((o.job.name, o.code) for o in engine.run_all(jobs, workers=1, tell=print)))
    """)
    *told, ended = said(process).splitlines()
    assert ended == "[('ever', -9), ('once', 0)]"
    assert [line.partition(":")[0] for line in told] == ["once", "ever", "ever"]
    assert all("started again" in line for line in told)


def test_node_that_does_not_see_a_file_says_so(owner):
    process = owner("""
        with open_engine("ray") as engine:
            try:
                list(engine.run_all([job("blind", "", needs=(Path("nowhere/recipe.toml"),))], workers=1))
            except Exception as error:
                print(type(error).__name__, error)
    """)
    assert f"{Path.cwd()}/nowhere/recipe.toml" in said(process)
    assert not Path("logs/blind.txt").exists()


def test_what_the_cluster_cannot_give_is_refused(owner):
    process = owner("""
        with open_engine("ray") as engine:
            for asked in (("cpu", None, 4), ("cuda", None, None), ("cuda:1", None, None), ("cpu", 0, None)):
                try:
                    engine.places(*asked)
                except Exception as error:
                    print(type(error).__name__, error)
    """)
    lines = said(process).splitlines()
    for line, word in zip(lines, ["largest node", "no node", "device=cuda:1", "at least 1"], strict=True):
        assert line.startswith("RecipeError")
        assert word in line


def test_cluster_that_does_not_answer_is_one_sentence(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code = "from hasten.pool import open_engine\nwith open_engine('ray'): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "hasten.errors.RunError: No Ray cluster can be used (nobody answers at 127.0.0.1:1" in done.stderr


def test_engine_that_does_not_exist_is_refused():
    with pytest.raises(hasten.RecipeError, match="did you mean 'ray'"):
        open_engine("rya")


# --- studies and pools of seeds ------------------------------------------------------------------------------------


SAVED_EVERY = 20
QUIET = ("--seeds", "2", "--ladder", "none", "--no-report")


def settings_of(text: str, steps: int) -> list[str]:
    small = small_settings(Path.cwd(), text)
    ours = ("budget=", "checkpoint.every=")
    return [
        *(word for word in small if not word.startswith(ours)),
        f"budget={steps}",
        f"checkpoint.every={SAVED_EVERY}",
    ]


def numbers_of(study: Path) -> dict[str, tuple]:
    return {run.name: left(run) for run in (study / "runs").iterdir()}


def resumes(run: Path) -> int:
    return sum(event["kind"] == "resume" for event in read_events(RunFolder(run)))


def alone(study: Path, name: str) -> tuple:
    """Train the recipe of a run of a study in this process, and return what must be the same in that run."""
    out = Path("alone") / name
    hasten.train(study / "recipes" / f"{name}.toml", out=str(out))
    return left(out)


def left(run: Path) -> tuple:
    values = without_times(json.loads((run / "result.json").read_text(encoding="utf-8")))
    same = ("status", "val_bpb", "val_loss", "steps", "tokens", "params")
    return (run / "final" / "model.safetensors").read_bytes(), {name: values[name] for name in same if name in values}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_in_the_middle(owner: subprocess.Popen, folder: Path, *, worker: bool) -> None:
    """Kill a train process under `folder` with SIGKILL, or the Ray worker that it belongs to, once it has saved."""

    def victim() -> int | None:
        for state in folder.glob("runs/*/checkpoints/step-????????"):
            run = state.parent.parent
            if (run / "result.json").exists():
                continue
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    words = process.read_bytes().split(b"\0")
                    if words[1:4] == [b"-m", b"hasten", b"train"] and any(run.name.encode() in word for word in words):
                        return int(process.parent.name)
        return None

    end = time.monotonic() + 120
    while (pid := victim()) is None:
        assert time.monotonic() < end, "no run could be killed"
        assert owner.poll() is None, said(owner)
        time.sleep(0.02)
    os.kill(parent(parent(pid)) if worker else pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the processes of a run are found under /proc")
def test_run_whose_worker_is_killed_goes_on_from_its_checkpoint_and_ends_as_alone(owner, library_text):
    recipe = Path("st/recipes/one.toml")
    recipe.parent.mkdir(parents=True)
    recipe.write_text(resolve(None, [*settings_of(library_text, 240), "out=st/runs/one"]).recipe.to_toml())
    process = owner("""
        from hasten.pool import train_command
        recipe, run = Path("st/recipes/one.toml"), Path("st/runs/one")
        one = Job("one", train_command(recipe), Path("st/log.txt"), 1, 0, (recipe,), run)
        with open_engine("ray") as engine:
            print([o.code for o in engine.run_all([one], workers=1, tell=print)])
    """)
    kill_in_the_middle(process, Path("st"), worker=True)
    assert [line.partition(";")[0] for line in said(process).splitlines()] == [
        "one: the Ray worker that ran it is gone",
        "[0]",
    ]
    assert resumes(Path("st/runs/one")) == 1
    assert left(Path("st/runs/one")) == alone(Path("st"), "one")


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="the processes of a run are found under /proc")
@pytest.mark.parametrize("worker", [True, False], ids=["worker", "train process"])
def test_study_that_loses_a_worker_ends_with_the_numbers_of_runs_alone(owner, library_text, worker):
    settings = settings_of(library_text, 240)
    process = owner("", "compare", *settings, "--arm", "muon:optimizer=muon", "--engine", "ray", *QUIET, "--out", "st")
    kill_in_the_middle(process, Path("st"), worker=worker)
    assert said(process).count("started again") == 1
    runs = sorted(Path("st/runs").iterdir())
    assert len(runs) == 4
    assert [left(run) for run in runs] == [alone(Path("st"), run.name) for run in runs]
    assert [resumes(run) for run in runs].count(1) == 1


@pytest.mark.heavy
def test_study_of_four_arms_has_the_same_numbers_on_either_engine(owner, library_text):
    arms = [word for arm in ("muon:optimizer=muon", "calm:lr=0.001", "twin") for word in ("--arm", arm)]
    for engine in ("local", "ray"):
        said(owner("", "compare", *settings_of(library_text, 40), *arms, "--engine", engine, *QUIET, "--out", engine))
    numbers = {engine: numbers_of(Path(engine)) for engine in ("local", "ray")}
    assert len(numbers["local"]) == 6
    assert numbers["local"] == numbers["ray"]


@pytest.mark.heavy
@pytest.mark.parametrize(("first", "second"), [("local", "ray"), ("ray", "local")])
def test_study_begun_on_one_engine_goes_on_under_the_other(owner, library_text, first, second):
    command = ("compare", *settings_of(library_text, 40), "--arm", "calm:lr=0.001", *QUIET, "--out", "st")
    said(owner("", *command, "--engine", first))
    before = numbers_of(Path("st"))
    assert "every run of st is done already" in said(owner("", *command, "--engine", second))
    said(owner("", "compare", "--out", "st", "--seeds", "3", "--no-report", "--engine", second))
    after = numbers_of(Path("st"))
    assert (len(before), len(after)) == (4, 6)
    assert {name: after[name] for name in before} == before


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="the processes of a run are found under /proc")
@pytest.mark.parametrize("worker", [True, False], ids=["worker", "train process"])
def test_pool_of_seeds_that_loses_a_worker_ends_as_on_this_machine(owner, library_text, worker):
    command = ("restart", *settings_of(library_text, 360), "--seeds", "2", "--rungs", "40%")
    process = owner("", *command, "--engine", "ray", "--out", "on-ray")
    kill_in_the_middle(process, Path("on-ray"), worker=worker)
    assert said(process).count("started again") == 1
    said(owner("", *command, "--out", "here"))
    there, here = (json.loads(Path(name, "result.json").read_text(encoding="utf-8")) for name in ("on-ray", "here"))
    assert (there["survivor"], there["val_bpb"], there["val_loss"]) == (
        here["survivor"],
        here["val_bpb"],
        here["val_loss"],
    )
    run = Path("runs") / f"seed-{there['survivor']}"
    assert left(Path("on-ray") / run) == left(Path("here") / run)


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)

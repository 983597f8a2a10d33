"""Attempts that die at one step again and again wait, and end; those of a preempted machine do neither."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from sizes import size

from hasten.errors import RunError
from hasten.loop import Event, Result, prepare_for, start, train
from hasten.loop.crashes import (
    REFUSE_FROM,
    WAIT_FROM,
    Attempt,
    deaths_in_a_row,
    hold_back,
    read_attempts,
    wait_before,
)
from hasten.loop.identity import read_allow
from hasten.loop.telling import Teller
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events
from hasten.record.environment import code_sha256

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
DIES_AT, SAVES_EVERY = 7, 4


@pytest.fixture(scope="module")
def settings(text_file: Path, validation_file: Path, tiny: tuple[str, ...]) -> list[str]:
    code_sha256()  # before the forks: who edits the code meanwhile is then not refused
    return [
        f"data={text_file}",
        f"val={validation_file}",
        *tiny,
        "budget=12",
        f"checkpoint.every={SAVES_EVERY}",
        "evaluate.every=100%",
    ]


def attempt(settings: list[str], out: Path, *hooks: Callable[[Event], None], allow: tuple[str, ...] = ()) -> Result:
    recipe = resolve(None, [*settings, f"out={out}"]).recipe
    return train(recipe, hooks=hooks, allow=allow, longest_wait=0.01)


def dies_at(step: int, log: Path) -> Callable[[Event], None]:
    """Return a hook that ends the process after a step, and writes down what it was told before."""

    def hook(event: Event) -> None:
        if event.kind == "warning":
            with log.open("a") as file:
                file.write(event.values["message"] + "\n")
        if event.kind == "step" and event.step == step:
            os._exit(9)

    return hook


def in_a_process(work: Callable[[], object]) -> int:
    """Do `work` in a forked process and return its exit code; 1 if it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except RunError as error:
            print(error)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.torture
def test_restarts_of_a_run_that_dies_at_one_step_wait_and_then_are_refused(settings: list[str], tmp_path: Path) -> None:
    out, log, refusals = tmp_path / "run", tmp_path / "log.txt", []
    for number in range(size(16, 50)):
        if number < REFUSE_FROM + 1:
            code = in_a_process(lambda: attempt(settings, out, dies_at(DIES_AT, log)))
            assert code == (9 if number < REFUSE_FROM else 1), number
            continue
        with pytest.raises(RunError) as error:
            attempt(settings, out)
        refusals.append(str(error.value))
    assert len(set(refusals)) == 1
    assert f"The last {REFUSE_FROM} attempts" in refusals[0]
    assert f"right after step {DIES_AT}" in refusals[0]
    assert f"the batch of step {DIES_AT + 1} begins at position {8 * DIES_AT} (document 0)" in refusals[0]
    assert refusals[0].endswith("give --allow crash-loop to try once more.")
    waits = [line for line in log.read_text().splitlines() if "waiting" in line]
    assert len(waits) == REFUSE_FROM - WAIT_FROM
    assert all(f"right after step {DIES_AT}" in line and "Ctrl-C" in line for line in waits)
    begun = [event for event in read_events(RunFolder(out)) if event["kind"] in ("start", "resume")]
    assert [event.get("died_at") for event in begun] == [None, *[DIES_AT] * (REFUSE_FROM - 1)]
    assert [event.get("ended") for event in begun] == [None, *[False] * (REFUSE_FROM - 1)]
    assert attempt(settings, out, allow=("crash-loop",)).status == "finished"
    last = [event for event in read_events(RunFolder(out)) if event["kind"] == "resume"][-1]
    assert [change["name"] for change in last["allowed"]] == ["crash-loop"]


def test_all_waits_together_are_bounded() -> None:
    waits = [wait_before(deaths) for deaths in range(REFUSE_FROM)]
    assert waits[:WAIT_FROM] == [0.0] * WAIT_FROM
    assert waits[WAIT_FROM:] == sorted(waits[WAIT_FROM:])
    assert sum(waits) == 63
    assert max(wait_before(deaths) for deaths in range(10_000)) == 60


def test_a_machine_that_kills_at_random_moments_is_never_refused() -> None:
    rng, most = random.Random(0), 0
    for _ in range(size(2_000, 100_000)):
        done, attempts = 0, []
        while done < 200:  # a checkpoint every 20 steps, a kill within the next 30
            died = done + rng.randrange(30)
            attempts.append(Attempt(done, died, False))
            most = max(most, deaths_in_a_row(attempts))
            done = max(done, died // 20 * 20)
    assert most < REFUSE_FROM


@pytest.mark.parametrize(
    ("attempts", "deaths"),
    [
        ([], 0),
        ([Attempt(0, 7, True)], 0),
        ([Attempt(0, 7, False)] * 5, 5),
        ([*[Attempt(0, 7, False)] * 5, Attempt(4, 7, True)], 0),
        ([*[Attempt(0, 7, False)] * 5, Attempt(4, 7, True), Attempt(4, 7, False)], 1),
        ([*[Attempt(4, 7, False)] * 5, Attempt(4, 8, False)], 1),
        ([Attempt(0, 8, False), Attempt(8, 8, False), Attempt(8, 8, False)], 2),
        ([*[Attempt(4, 7, False)] * 5, Attempt(4, 7, False, changed=True), Attempt(4, 7, False)], 2),
        ([Attempt(4, None, False), Attempt(4, 7, False)], 1),
    ],
)
def test_only_deaths_in_a_row_at_one_step_count(attempts: list[Attempt], deaths: int) -> None:
    assert deaths_in_a_row(attempts) == deaths


def test_ctrl_c_leaves_a_wait_at_once_with_nothing_written(settings: list[str], tmp_path: Path) -> None:
    recipe = resolve(None, settings).recipe
    state = start(recipe, prepare_for(recipe))
    waited: list[float] = []

    def interrupted(seconds: float) -> None:
        waited.append(seconds)
        raise KeyboardInterrupt

    deaths = [Attempt(0, 0, False)] * (WAIT_FROM + 1)
    with pytest.raises(KeyboardInterrupt):
        hold_back(state, RunFolder(tmp_path), deaths, read_allow(()), Teller(()), sleep=interrupted)
    assert waited == [2.0]
    assert list(tmp_path.iterdir()) == []


class Broken(Exception):
    """Stands for the end of a process."""


def test_a_run_that_stops_by_itself_or_dies_before_its_first_step_is_told_apart(
    settings: list[str], tmp_path: Path
) -> None:
    def breaks(event: Event) -> None:
        if event.kind == "untrained":
            raise Broken

    out = tmp_path / "run"
    folder = RunFolder(out)
    for _ in range(2):
        with pytest.raises(Broken):
            attempt(settings, out, breaks)
    assert read_attempts(folder) == [Attempt(0, 0, False)] * 2
    recipe = resolve(None, [*settings, f"out={out}"]).recipe
    assert train(recipe, until=6).status == "paused"
    assert attempt(settings, out).status == "finished"
    assert read_attempts(folder) == [*[Attempt(0, 0, False)] * 2, Attempt(0, 6, True), Attempt(6, 12, True)]


def test_a_loop_before_the_first_plan_of_a_time_budget_is_refused_too(settings: list[str], tmp_path: Path) -> None:
    recipe = resolve(None, [*[s for s in settings if not s.startswith("budget")], "budget=60s"]).recipe
    state = start(recipe, prepare_for(recipe))
    deaths = [Attempt(0, 0, False)] * REFUSE_FROM
    with pytest.raises(RunError, match="before the first step after step 0 was logged; step 1 comes next"):
        hold_back(state, RunFolder(tmp_path), deaths, read_allow(()), Teller(()))

"""A run that is asked to pause, and one whose owner is gone: nothing of the training changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hasten
from hasten.duration import Duration
from hasten.loop import train
from hasten.loop.pausing import pause_step
from hasten.recipe import resolve


def settings(tiny, text_file, validation_file, out, budget="20"):
    return [*tiny, f"data={text_file}", f"val={validation_file}", f"budget={budget}", f"out={out}"]


def recipe(*given, **more):
    return resolve(None, settings(*given, **more)).recipe


def weights(folder):
    return (Path(folder) / "final" / "model.safetensors").read_bytes()


def test_paused_run_ends_with_the_weights_of_one_that_never_paused(tiny, text_file, validation_file):
    whole = train(recipe(tiny, text_file, validation_file, "whole"))
    parts = recipe(tiny, text_file, validation_file, "parts")
    first = train(parts, until="25%")
    assert (first.status, first.values["steps"], first.values["total_steps"]) == ("paused", 5, 20)
    second = train(parts, until=12)
    assert (second.status, second.values["steps"]) == ("paused", 12)
    last = train(parts)
    assert last.status == "finished"
    assert last.values["val_loss"] == whole.values["val_loss"]
    assert weights("parts") == weights("whole")


def test_pausing_where_the_run_already_is_changes_nothing(tiny, text_file, validation_file):
    given = recipe(tiny, text_file, validation_file, "run")
    first = train(given, until=8)
    events = (Path("run") / "events.jsonl").read_bytes()
    again = train(given, until=8)
    assert again.already_finished
    assert again.values == first.values
    assert (Path("run") / "events.jsonl").read_bytes() == events


def test_pause_is_judged_on_held_out_text(tiny, text_file, validation_file):
    result = train(recipe(tiny, text_file, validation_file, "run"), until=4)
    assert result.values["val_loss"] < result.values["untrained_val_loss"]
    assert result.values["memory_bytes"] > 50e6


@pytest.mark.parametrize(("point", "steps"), [("1", 1), ("1%", 1), ("50%", 5), ("51%", 6), ("10", 10), ("11", 10)])
def test_pause_step_is_within_the_run(point, steps):
    assert pause_step(Duration.parse(point), 10) == steps


@pytest.mark.parametrize(
    ("until", "budget", "word"), [("30s", "20", "share"), ("5", "60s", "move"), ("0", "20", "zero")]
)
def test_pause_that_has_no_step_is_refused(tiny, text_file, until, budget, word):
    with pytest.raises(hasten.RecipeError, match=word):
        train(data=str(text_file), budget=budget, until=until, out="run")
    assert not Path("run").exists()


def test_run_whose_owner_is_killed_saves_and_stops(tiny, text_file, validation_file):
    words = settings(tiny, text_file, validation_file, "run", budget="100000")
    command = [sys.executable, "-m", "hasten", "train", *words, "--attached", "--no-report"]
    owner = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, time; p = subprocess.Popen({command!r}, stdin=subprocess.PIPE); "
         "print(p.pid, flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    trainer = int(owner.stdout.readline())
    metrics = Path("run/metrics.jsonl")
    until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    until(lambda: Path("run/result.json").exists() and not alive(trainer))
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert (result["status"], result["reason"]) == ("stopped", "SIGTERM")
    assert result["steps"] > 0


def until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"

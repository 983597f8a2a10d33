"""One trainer in a folder: of two the second is refused, and what a dead one left behind is taken over."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import small_settings

from hasten.errors import RunError
from hasten.loop import Event, train
from hasten.recipe import resolve
from hasten.record import RunFolder
from hasten.record.lock import take, take_by_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its trainers")

# How a trainer that holds a folder can end.
ENDS: dict[str, Callable[[int], None]] = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "killed while it is stopped": lambda pid: (os.kill(pid, signal.SIGSTOP), os.kill(pid, signal.SIGKILL)),
    "left by its terminal": lambda pid: os.kill(pid, signal.SIGHUP),
    "told to go": lambda pid: os.kill(pid, signal.SIGUSR1),
}


def trainer(folder: Path) -> int:
    """Fork a process that holds the folder until it is ended; return its id."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        told: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        try:
            with RunFolder(folder).lock():
                os.write(writer, b"x")
                while not told:
                    time.sleep(0.01)
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("end", ENDS)
def test_of_two_trainers_the_second_is_refused_until_the_first_has_ended(tmp_path: Path, end: str, number: int) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "file").write_text("kept")
    pid = trainer(folder)
    for _ in range(3):
        with pytest.raises(RunError, match=rf"being written by process {pid}, which started at \d{{4}}-.*; wait"):
            take(folder / ".lock")
    ENDS[end](pid)
    os.waitpid(pid, 0)
    with RunFolder(folder).lock():
        owner = json.loads((folder / ".lock").read_text())
        assert owner["pid"] == os.getpid()
    assert (folder / "file").read_text() == "kept"
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("started", ["2001-01-01 00:00:00", "", "\x1b[31m", "x" * 5000])
def test_the_file_of_a_dead_process_is_taken_over_where_the_kernel_has_no_locks(tmp_path: Path, started: str) -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    (tmp_path / ".lock").write_text(json.dumps({"pid": pid, "started": started})[:1000])
    os.utime(tmp_path / ".lock", (1, 1))
    take_by_file(tmp_path / ".lock").release()
    (tmp_path / ".lock").write_text(json.dumps({"pid": os.getpid(), "started": started[:100]}))
    with pytest.raises(RunError, match=f"process {os.getpid()}") as caught:
        take_by_file(tmp_path / ".lock")
    assert "\x1b" not in str(caught.value)


def test_a_second_training_in_the_folder_is_refused_and_the_first_does_not_notice(
    library_text: str, tmp_path: Path
) -> None:
    settings = [
        word for word in small_settings(tmp_path, library_text) if not word.startswith(("budget", "checkpoint"))
    ]
    recipe = resolve(None, [*settings, "budget=8", "checkpoint.every=2", f"out={tmp_path / 'run'}"]).recipe
    refused: list[str] = []

    def begin_another(event: Event) -> None:
        if event.kind == "step":
            with pytest.raises(RunError) as caught:
                train(recipe)
            refused.append(str(caught.value))

    assert train(recipe, hooks=[begin_another]).status == "finished"
    assert len(refused) == 8
    assert all(f"process {os.getpid()}" in said for said in refused)
    assert train(recipe).already_finished

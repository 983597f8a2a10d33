"""Checkpoints written beside training: in order, one at a time, and a disk that refuses does not stop the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from hasten import checkpoint
from hasten.checkpoint import Writer
from hasten.errors import RunError
from hasten.loop import Event, Result, train
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events, read_metrics

SETTINGS = (*TINY, "budget=40", "lr=3e-3", "evaluate.every=1000", "checkpoint.every=5")


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((50_000,), value)}}


def test_checkpoints_are_written_in_order_and_read_back(tmp_path: Path) -> None:
    with Writer(tmp_path, keep=3) as writer:
        for step in range(1, 6):
            writer.write(step, tensors(step), {"value": step})
        written = writer.wait()
    assert [one.step for one in written] == [1, 2, 3, 4, 5]
    assert all(one.error is None and one.seconds > 0 for one in written)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in (3, 4, 5)]
    loaded, _ = checkpoint.newest(tmp_path)
    assert (loaded.step, float(loaded.tensors["model"]["w"][0])) == (5, 5.0)


def test_a_checkpoint_waits_for_the_one_before(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep=2)
    may_go_on = threading.Event()

    class Slow(dict[str, Any]):  # a tensor that takes its time to be read
        def items(self) -> Any:
            may_go_on.wait(20)
            return super().items()

    writer.write(1, Slow(tensors(1)), {})
    second = threading.Thread(target=writer.write, args=(2, tensors(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # the first is not written yet
    assert writer.done() == []
    may_go_on.set()
    second.join(20)
    assert [one.step for one in writer.wait()] == [1, 2]


def test_what_cannot_be_written_is_reported_and_the_next_is_tried(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.touch()
    writer = Writer(root, keep=2)
    writer.write(1, tensors(1), {})
    (failed,) = writer.wait()
    assert failed.path is None
    assert "Could not save step 1" in str(failed.error)
    root.unlink()
    writer.write(2, tensors(2), {})
    assert [one.error for one in writer.wait()] == [None]


def test_a_fault_in_the_thread_is_raised_where_the_run_sees_it(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep=2)
    writer.write(1, {"model": {"w": "no tensor"}}, {})  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        writer.wait()
    writer.write(2, tensors(2), {})
    assert [one.step for one in writer.wait()] == [2]


def test_an_error_of_the_run_still_leaves_the_checkpoint_on_its_way(tmp_path: Path) -> None:
    with suppress(RunError), Writer(tmp_path, keep=2) as writer:
        writer.write(7, tensors(7), {})
        raise RunError("something else")
    assert checkpoint.newest(tmp_path)[0].step == 7


def run(text_file: Path, out: Path, *hooks: Any) -> Result:
    return train(resolve(None, [*SETTINGS, f"data={text_file}", f"out={out}"]).recipe, hooks=hooks)


def test_on_a_disk_that_fills_up_training_goes_on_and_nothing_is_missing_once_there_is_room(
    text_file: Path, disk_of: Callable[[str], Path], tmp_path: Path
) -> None:
    small_disk = disk_of("3m")
    filler, waits = small_disk / "filler", list[str]()

    def fill_and_free(event: Event) -> None:
        if event.kind == "warning":
            waits.append(event.values["message"])
        if event.kind == "step" and event.step == 12:
            with suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))
        if event.kind == "step" and event.step == 33:
            filler.unlink()
            newest = sorted((small_disk / "run/checkpoints").glob("step-????????"))
            assert [path.name for path in newest] == ["step-00000005", "step-00000010"]  # untouched
            assert all(checkpoint.load(path).step for path in newest)

    result = run(text_file, small_disk / "run", fill_and_free)
    clean = run(text_file, tmp_path / "clean")
    assert result.status == "finished"
    folder = RunFolder(small_disk / "run")
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 41))
    told = [event["message"] for event in read_events(folder) if event["kind"] == "warning"]
    assert sum("Could not save step" in message and "Training goes on" in message for message in told) >= 3
    assert 1 <= sum("its lines wait in memory" in message for message in waits) <= 2
    first, second = ((path / "final/model.safetensors").read_bytes() for path in (folder.path, clean.folder))
    assert first == second


def test_a_checkpoint_is_told_with_its_name_and_never_without_its_lines(text_file: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def look(event: Event) -> None:
        if event.kind in ("saving", "checkpoint"):
            seen.append((event.kind, event.step))
            if event.kind == "saving":
                assert len(read_metrics(RunFolder(tmp_path / "run"))) == event.step

    run(text_file, tmp_path / "run", look)
    assert [kind for kind, _ in seen].count("saving") == [kind for kind, _ in seen].count("checkpoint") == 8

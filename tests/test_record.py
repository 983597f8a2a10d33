"""The record of a run survives crashes and odd values; its folder has one writer at a time."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.errors import RunError
from hasten.record import (
    Record,
    RunFolder,
    cut_back,
    environment,
    read_events,
    read_metrics,
    read_result,
    write_result,
)
from hasten.record.lock import take_by_file

# From Python 3.12 on, a fork is warned about when threads exist; the children here only run Python.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def record_steps(folder: RunFolder, steps: range, attempt: int = 1) -> None:
    record = Record(folder, attempt)
    for step in steps:
        record.metric(step=step, loss=step / 2)
    record.close()


def test_lines_come_back_in_order_with_attempt_and_time(folder: RunFolder) -> None:
    before = time.time()
    record = Record(folder, 3)
    record.metric(step=1, loss=0.5, clipped=True)
    record.event("note", step=1, message="hello", path=Path("a/b"))
    record.close()
    (metric,), (event,) = read_metrics(folder), read_events(folder)
    assert before - 1 <= metric.pop("time") <= time.time() + 1
    assert metric == {"step": 1, "attempt": 3, "loss": 0.5, "clipped": True}
    assert event.pop("time") > 0
    assert event == {"kind": "note", "step": 1, "attempt": 3, "message": "hello", "path": str(Path("a/b"))}


def test_a_line_can_be_read_before_the_record_is_closed(folder: RunFolder) -> None:
    record = Record(folder, 1)
    record.metric(step=1, loss=1.0)
    assert [line["step"] for line in read_metrics(folder)] == [1]
    record.close()


def test_nothing_recorded_reads_as_nothing(folder: RunFolder) -> None:
    assert (read_metrics(folder), read_events(folder), read_result(folder)) == ([], [], None)


def test_non_finite_numbers_are_strict_json_on_disk_and_numbers_again_when_read(folder: RunFolder) -> None:
    record = Record(folder, 1)
    record.metric(step=1, loss=math.nan, grad_norm=math.inf, low=-math.inf)
    record.event("plan", step=1, knots=[[0, -math.inf]], inner={"x": math.nan})
    record.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in (folder.metrics_path, folder.events_path):
        json.loads(path.read_text(), parse_constant=refuse)
    metric, event = read_metrics(folder)[0], read_events(folder)[0]
    assert math.isnan(metric["loss"])
    assert (metric["grad_norm"], metric["low"]) == (math.inf, -math.inf)
    assert event["knots"] == [[0, -math.inf]]
    assert math.isnan(event["inner"]["x"])


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_a_sample_that_says_nan_stays_text(folder: RunFolder, word: str) -> None:
    record = Record(folder, 1)
    record.event("sample", step=1, prompt=word, text=word)
    record.close()
    assert read_events(folder)[0]["text"] == word


def test_control_characters_and_separators_never_break_a_line_or_reach_a_terminal(folder: RunFolder) -> None:
    text = "\x1b[31m\r\n\x00\x85\u2028\u202e\ud800 é 漢"
    record = Record(folder, 1)
    record.event("sample", step=1, text=text)
    record.close()
    raw = folder.events_path.read_bytes()
    assert raw.count(b"\n") == 1
    assert all(0x20 <= byte < 0x7F for byte in raw.rstrip(b"\n"))
    assert read_events(folder)[0]["text"] == text


def test_a_value_that_is_not_plain_data_is_refused_and_leaves_no_half_line(folder: RunFolder) -> None:
    record = Record(folder, 1)
    with pytest.raises(TypeError, match="object in a record"):
        record.metric(step=1, loss=object())
    record.metric(step=2, loss=1.0)
    record.close()
    assert [line["step"] for line in read_metrics(folder)] == [2]


def test_every_torn_last_line_is_left_out_and_mended_by_the_next_attempt(folder: RunFolder) -> None:
    record_steps(folder, range(1, 4))
    whole = folder.metrics_path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(whole)):
        folder.metrics_path.write_bytes(whole[:end])
        is_whole = end == len(whole) - 1  # only the newline is missing
        expected = [1, 2, 3] if is_whole else [1, 2]
        assert [line["step"] for line in read_metrics(folder)] == expected
        record_steps(folder, range(7, 8), attempt=2)
        assert [line["step"] for line in read_metrics(folder)] == [*expected, 7]


@pytest.mark.parametrize("torn", [b'{"step": 3', b"\x00" * 4096, b"x" * 200_000, b"\xff\xfe"])
@pytest.mark.parametrize("before", [b"", b'{"step": 1}\n'])
def test_garbage_of_any_length_at_the_end_is_cut_off(folder: RunFolder, before: bytes, torn: bytes) -> None:
    folder.metrics_path.write_bytes(before + torn)
    assert len(read_metrics(folder)) == len(before.splitlines())
    Record(folder, 2).close()
    assert folder.metrics_path.read_bytes() == before


@pytest.mark.parametrize("line", [b"{broken", b"[1]", b"", b"[" * 100_000, b"\xff"])
def test_a_broken_line_in_the_middle_is_named(folder: RunFolder, line: bytes) -> None:
    folder.metrics_path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2, is not a JSON object"):
        read_metrics(folder)


@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (1, [1]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_cut_back_keeps_the_lines_up_to_and_with_the_step(folder: RunFolder, step: int, kept: list[int]) -> None:
    record_steps(folder, range(1, 6))
    cut_back(folder, step)
    assert [line["step"] for line in read_metrics(folder)] == kept


def test_cut_back_keeps_kept_lines_byte_for_byte_non_finite_ones_too(folder: RunFolder) -> None:
    record = Record(folder, 1)
    record.metric(step=1, loss=math.nan, lr=1e-300)
    record.metric(step=2, loss=0.1 + 0.2)
    record.metric(step=3, loss=1.0)
    record.close()
    lines = folder.metrics_path.read_bytes().splitlines(keepends=True)
    cut_back(folder, 2)
    assert folder.metrics_path.read_bytes() == b"".join(lines[:2])


def test_cut_back_without_metrics_changes_nothing(folder: RunFolder) -> None:
    cut_back(folder, 5)
    assert list(folder.path.iterdir()) == []


def test_a_resumed_run_with_cut_back_leaves_the_lines_of_an_uninterrupted_one(folder: RunFolder) -> None:
    record_steps(folder, range(1, 8))
    cut_back(folder, 5)
    record_steps(folder, range(6, 11), attempt=2)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["attempt"] for line in lines] == [1] * 5 + [2] * 5


def test_a_result_comes_back_and_is_replaced_whole(folder: RunFolder) -> None:
    write_result(folder, {"status": "stopped", "val_loss": None})
    write_result(folder, {"status": "finished", "val_loss": math.nan, "path": Path("x")})
    result = read_result(folder)
    assert math.isnan(result.pop("val_loss"))
    assert result == {"status": "finished", "path": "x"}
    assert [path.name for path in folder.path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x80", b"[" * 100_000])
def test_a_damaged_result_is_an_error_that_names_it(folder: RunFolder, content: bytes) -> None:
    folder.result_path.write_bytes(content)
    with pytest.raises(RunError, match=r"result\.json is damaged"):
        read_result(folder)


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(folder: RunFolder) -> None:
    record = Record(folder, 1)
    record.metric(step=1, loss=1.0)
    size = folder.metrics_path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(RunError, match=r"Could not write .*metrics\.jsonl: File too large; free"):
            record.metric(step=2, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record.metric(step=3, loss=1.0)
    record.close()
    assert [line["step"] for line in read_metrics(folder)] == [1, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_lines_wait_while_the_disk_is_full_which_is_said_once(folder: RunFolder) -> None:
    folder.metrics_path.symlink_to("/dev/full")
    told: list[str] = []
    record = Record(folder, 1, on_trouble=told.append)
    for step in (1, 2, 3):
        record.metric(step=step, loss=1.0)
    assert len(told) == 1
    assert "No space left on device" in told[0]
    with pytest.raises(RunError, match="No space left on device"):
        record.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_lines_that_waited_are_written_once_there_is_room(folder: RunFolder) -> None:
    record = Record(folder, 1)
    record.metric(step=1, loss=1.0)
    whole = record._metrics._file
    with open("/dev/full", "ab", buffering=0) as full:
        record._metrics._file = full
        record.metric(step=2, loss=1.0)
    record._metrics._file = whole
    record.metric(step=3, loss=1.0)
    record.close()
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]


def test_the_environment_names_versions_but_no_host_user_or_path() -> None:
    text = json.dumps(environment())
    assert all(word in text for word in ("python", "torch", "cpu", "threads", "platform"))
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child and return its exit code: 7 for a RunError, 0 without."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            action()
            code = 0
        except RunError as error:
            code = 7 if f"process {os.getppid()}," in str(error) else 8
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def take(folder: RunFolder) -> None:
    with folder.lock():
        pass


def test_a_second_trainer_is_refused_with_the_process_named(folder: RunFolder) -> None:
    with folder.lock():
        assert in_child(lambda: take(folder)) == 7
        with pytest.raises(RunError, match=f"being written by process {os.getpid()}, which started at"):
            take(folder)
    assert in_child(lambda: take(folder)) == 0


def test_a_refused_trainer_takes_nothing_from_the_one_that_holds_the_lock(folder: RunFolder) -> None:
    with folder.lock():
        for _ in range(3):
            assert in_child(lambda: take(folder)) == 7


def test_an_unused_new_folder_goes_with_the_lock_a_used_or_older_one_stays(tmp_path: Path) -> None:
    take(RunFolder(tmp_path / "unused"))
    with RunFolder(tmp_path / "used").lock():
        (tmp_path / "used" / "file").touch()
    (tmp_path / "older").mkdir()
    take(RunFolder(tmp_path / "older"))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["older", "used", "used/file"]


def test_the_lock_is_given_back_when_the_run_fails(folder: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), folder.lock():
        raise ZeroDivisionError
    assert in_child(lambda: take(folder)) == 0


def holder(folder: RunFolder, then: Callable[[], None]) -> int:
    """Fork a child that takes the lock, says so and does `then`; return its process id."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with folder.lock():
                then()
                os.write(writer, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


def test_a_killed_trainer_leaves_no_lock_behind(folder: RunFolder) -> None:
    pid = holder(folder, lambda: None)
    with pytest.raises(RunError, match=f"process {pid},"):
        take(folder)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (folder.path / ".lock").exists()
    take(folder)


def test_workers_that_outlive_a_killed_trainer_do_not_hold_its_lock(folder: RunFolder) -> None:
    def start_worker() -> None:
        worker = os.fork()
        if not worker:
            time.sleep(60)
            os._exit(0)
        (folder.path / "worker").write_text(str(worker))

    pid = holder(folder, start_worker)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    take(folder)
    os.kill(int((folder.path / "worker").read_text()), signal.SIGKILL)


def test_without_kernel_locks_a_living_owner_is_respected_and_a_dead_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    held = take_by_file(path)
    with pytest.raises(RunError, match=f"process {os.getpid()},"):
        take_by_file(path)
    held.release()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.write_text(json.dumps({"pid": dead.pid, "started": "today"}))
    take_by_file(path).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("age", "is_free"), [(0, False), (60, True)])
@pytest.mark.parametrize("content", ["", "[]", '{"pid": "x"}', '{"pid": -1}', "\x00"])
def test_without_kernel_locks_an_unsigned_lock_is_waited_for_until_it_is_old(
    tmp_path: Path, content: str, age: int, is_free: bool
) -> None:
    path = tmp_path / ".lock"
    path.write_text(content)
    os.utime(path, (time.time() - age, time.time() - age))
    if is_free:
        take_by_file(path).release()
    else:
        with pytest.raises(RunError, match="process"):
            take_by_file(path)


def test_a_lock_that_is_a_link_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(RunError, match="cannot be written"):
        take(RunFolder(tmp_path))
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot be written"):
        take(RunFolder(tmp_path / "run"))


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=r"cannot be written .* give another out="):
        take(RunFolder(tmp_path / "run"))

"""Several ranks write one checkpoint and any number of them reads it; what fails on one of them fails on all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_files as hostile
import pytest
import safetensors
import safetensors.torch
import torch

import hasten
from hasten import checkpoint
from hasten.errors import CheckpointError

if os.name == "nt" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs fork and gloo", allow_module_level=True)

import checkpoint_ranks as script

SECONDS = 150
Records = dict[str, dict[str, list[dict[str, Any]]]]


def run_script(folder: Path, *cases: str) -> Records:
    """Run cases of the script; return what each rank said, in order, by case and by what it was about."""
    paths = [str(Path(__file__).parent), str(Path(hasten.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ranks = subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", script.__file__, str(folder), *cases],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = ranks.communicate(timeout=SECONDS)
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
    print(output)
    records: Records = {}
    lines = map(json.loads, (folder / "records.jsonl").read_text(encoding="utf-8").splitlines())
    for line in sorted(lines, key=lambda line: line["rank"]):
        records.setdefault(line["case"], {}).setdefault(line.get("what", "fault"), []).append(line)
    faults = [line["fault"] for case in records.values() for line in case.get("fault", [])]
    assert not faults, faults[0]
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def records(folder: Path, own_cache: Path) -> Records:
    return run_script(folder)


def said_by_all(records: Records, case: str, what: str) -> dict[str, Any]:
    """Return what the ranks of a case said of something, once all have said the same."""
    lines = [{key: value for key, value in line.items() if key != "rank"} for line in records[case][what]]
    assert len(lines) == int(case.split()[-1])
    assert all(line == lines[0] for line in lines), lines
    return lines[0]


every_size = pytest.mark.parametrize("size", [1, 2, 3], ids=lambda size: f"{size} ranks")
several = pytest.mark.parametrize("size", [2, 3], ids=lambda size: f"{size} ranks")


@every_size
@pytest.mark.parametrize("saved", [1, 2, 3], ids=lambda saved: f"saved by {saved}")
def test_what_some_ranks_saved_any_number_reads_bit_for_bit(records: Records, folder: Path, saved: int, size: int):
    path = str(folder / f"saved-{saved}" / "step-00000007")
    assert said_by_all(records, f"saving on {saved}", "save")["value"] == path
    value = said_by_all(records, f"loading on {size}", f"from {saved}")["value"]
    assert value == {"step": 7, "notes": [], "is_same": True, "path": path}


def test_every_rank_writes_a_file_of_each_group_it_has_and_nothing_else(records: Records, folder: Path):
    names = {path.name for path in (folder / "saved-3" / "step-00000007").iterdir()}
    parts = {name for name in names if name.endswith(".safetensors")}
    assert names - parts == {"manifest.json", "state.json"}
    assert {name for name in parts if name.startswith("model.")} == {
        f"model.0000{rank}.safetensors" for rank in range(3)
    }
    # One tensor is on one rank, an empty group on the first.
    assert len([name for name in parts if name.startswith("random.")]) == 1
    assert [name for name in parts if name.startswith("guard.")] == ["guard.00000.safetensors"]


def test_one_rank_writes_what_one_process_does(records: Records, folder: Path, tmp_path: Path):
    path = checkpoint.save(tmp_path, 7, script.all_tensors(7), {**script.STATE, "step": 7}, keep=1)
    theirs = folder / "saved-1" / path.name
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in theirs.iterdir()}


@several
def test_the_safetensors_package_reads_the_parts(records: Records, folder: Path, size: int):
    read: dict[str, dict[str, torch.Tensor]] = {}
    for path in (folder / f"saved-{size}" / "step-00000007").glob("*.safetensors"):
        read.setdefault(path.name.partition(".")[0], {}).update(safetensors.torch.load_file(path))
    assert script.same_groups(read, script.all_tensors(7))


@every_size
def test_rows_of_a_stored_tensor_are_those_of_the_tensor(records: Records, folder: Path, size: int):
    stored = checkpoint.open_stored(folder / f"saved-{size}" / "step-00000007")
    assert (stored.step, stored.state["step"]) == (7, 7)
    for group, named in script.all_tensors(7).items():
        assert stored.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            found = stored.tensors[group][name]
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
            rows = range(len(tensor) + 1) if tensor.ndim else ()
            for first, stop in [(None, None), *((a, b) for a in rows for b in rows if a <= b)]:
                expected = tensor if first is None else tensor[first:stop]
                assert script.same_bits(found.read(first, stop), expected), (name, first, stop)


def test_reading_rows_reads_nothing_else_of_the_file(tmp_path: Path):
    tensors = {"model": {"a": torch.zeros(1000), "b": torch.arange(3000.0).reshape(1000, 3)}}
    path = checkpoint.save(tmp_path, 1, tensors, {}, keep=1)
    stored = checkpoint.open_stored(path).tensors["model"]["b"]
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    rows = data.index(torch.arange(1500.0, 1506.0).numpy().tobytes())
    data[:rows] = bytes(rows)
    data[rows + 24 :] = bytes(len(data) - rows - 24)
    file.write_bytes(data)
    assert stored.read(500, 502).tolist() == [[1500.0, 1501.0, 1502.0], [1503.0, 1504.0, 1505.0]]


def test_what_is_read_has_memory_of_its_own(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(4)}}, {}, keep=1)
    stored = checkpoint.open_stored(path).tensors["model"]["w"]
    stored.read().add_(1)
    assert stored.read().sum() == 0


@pytest.mark.parametrize(("shape", "rows"), [((3, 2), (0, 4)), ((3, 2), (-1, 2)), ((3, 2), (2, 1)), ((), (0, 1))])
def test_rows_that_do_not_exist_are_refused(tmp_path: Path, shape: tuple[int, ...], rows: tuple[int, int]):
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(shape)}}, {}, keep=1)
    with pytest.raises(CheckpointError, match="do not exist"):
        checkpoint.open_stored(path).tensors["model"]["w"].read(*rows)


@pytest.mark.parametrize("change", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])])
def test_a_file_that_changed_since_it_was_opened_is_damaged(tmp_path: Path, change: Callable[[Path], object]):
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(4)}}, {}, keep=1)
    stored = checkpoint.open_stored(path).tensors["model"]["w"]
    change(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged .*; use an older checkpoint"):
        stored.read(0, 1)


def test_ranks_replace_a_step_and_delete_older_ones_as_one_process_does(records: Records):
    line = said_by_all(records, "replacing on 2", "replaced")
    assert line["value"]["is_same"]
    assert line["names"] == ["latest", "step-00000002", "step-00000003"]


# Damage.


@several
def test_every_damage_of_every_file_is_found_and_the_older_step_used_on_all_ranks(records: Records, size: int):
    case = f"damaging on {size}"
    damages = [what for what in records[case] if what not in ("all damaged", "none")]
    assert len(damages) >= 5 * (2 * size + 4)  # model and optimizer of each rank, and four more
    for what in damages:
        line = said_by_all(records, case, what)
        (note,) = line["value"]["notes"]
        assert (line["value"]["step"], line["value"]["is_same"]) == (1, True), what
        assert note.startswith("Checkpoint step-00000002 is damaged ("), note
        assert note.endswith("renamed step-00000002.bad.")
        # A swap is found in one of two files.
        assert what.split()[0] in note or what.endswith("swapped"), (what, note)


@several
def test_without_a_good_one_it_is_the_same_error_on_all_ranks(records: Records, size: int):
    line = said_by_all(records, f"damaging on {size}", "all damaged")
    assert line["error"] == "CheckpointError"
    assert "step-00000002" in line["text"]
    assert "step-00000001" in line["text"]
    assert line["text"].endswith("Restore one from a copy, or delete that folder to start afresh.")


@several
def test_no_checkpoint_at_all_is_none_on_all_ranks(records: Records, size: int):
    assert said_by_all(records, f"damaging on {size}", "none")["value"] == {"step": None, "notes": []}


def test_a_rank_that_cannot_read_is_no_damage_and_the_same_error_on_all(records: Records):
    line = said_by_all(records, "unreadable on 2", "too many open files")
    assert line["error"] == "RunError"
    assert line["text"].startswith("Rank 1: Could not read ")
    line = said_by_all(records, "unreadable on 2", "elsewhere")
    assert line["error"] == "RunError"
    assert "Rank 1 does not see step-00000001; give all ranks the same folder" in line["text"]
    assert said_by_all(records, "unreadable on 2", "after")["value"]["notes"] == []


# Saves that fail.


REFUSALS = {
    "tensor on 1": "rank 1: Tensor 'w' (torch.float32, torch.sparse_coo, cpu) cannot be saved; ",
    "name on 1": "rank 1: '../model' cannot name a group of tensors; ",
    "shared name": "both model.0",
    "no memory on 1": "rank 1: there is no memory left; ",
    "no memory to gather on 1": "rank 1: there is no memory left; ",
    "state on 0": "rank 0: The state cannot be written as JSON ",
    "keep on 1": "rank 1: keep=0, step=2: give keep of at least 1 ",
    "two at once": "rank 0: '' cannot name a group of tensors; ",
    "other step on 1": "The ranks are not in step (rank 0: preparation of step 2; rank 1: preparation of step 3",
    "other folder on 1": "is not there; every rank has to see the same folder of checkpoints",
    "a file on the way": "rank 0: Not a directory; free or repair the disk (older checkpoints are untouched).",
}


@several
@pytest.mark.parametrize("what", REFUSALS)
def test_what_one_rank_cannot_save_is_the_same_error_on_all_and_leaves_nothing(records: Records, size: int, what: str):
    line = said_by_all(records, f"refusing on {size}", what)
    assert line["error"] == "RunError"
    assert REFUSALS[what].lower() in line["text"].lower(), line["text"]
    assert line["text"].isprintable()
    assert line["names"] == ["latest", "step-00000001"]


FAULTS = {
    "fault on 1": (1, "TypeError", r"TypeError: a\nfault"),
    "fault on 0": (0, "ZeroDivisionError", ""),
    "interrupt on 1": (1, "KeyboardInterrupt", ""),
}


@several
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_stays_what_it_is_where_it_happened_and_ends_the_save_of_the_others(
    records: Records, size: int, what: str
):
    rank, error, text = FAULTS[what]
    lines = records[f"refusing on {size}"][what]
    assert [line["error"] for line in lines] == [error if n == rank else "RunError" for n in range(size)]
    for line in lines[:rank] + lines[rank + 1 :]:
        assert f"Rank {rank} failed in the writing of step 2 ({error}" in line["text"]
        assert text in line["text"]
        assert line["names"] == ["latest", "step-00000001"]


@several
def test_after_failed_saves_the_next_one_works(records: Records, size: int):
    line = said_by_all(records, f"refusing on {size}", "after")
    assert line["value"] == "step-00000002"
    assert (line["found"]["value"]["step"], line["found"]["value"]["is_same"]) == (2, True)


@several
def test_writers_of_all_ranks_report_the_same_and_go_on_after_a_failure(records: Records, size: int):
    first, second, failed, last = said_by_all(records, f"writing on {size}", "written")["value"]
    assert [first, second, last] == [[step, f"step-0000000{step}", "None"] for step in (1, 2, 4)]
    assert failed[:2] == [3, None]
    assert "rank 1: Tensor 'w'" in failed[2]
    found = said_by_all(records, f"writing on {size}", "found")["value"]
    assert (found["step"], found["is_same"]) == (4, True)


def test_a_disk_that_is_full_for_one_rank_is_the_same_error_on_all(disk_of: Callable[[str], Path], tmp_path: Path):
    disk_of("2m")
    records = run_script(tmp_path, "filling")
    for what in ("full 2", "full 3"):
        line = said_by_all(records, "filling on 2", what)
        assert line["error"] == "RunError"
        assert "rank 1: No space left on device; free or repair the disk (older" in line["text"]
        assert line["names"] == ["latest", "step-00000001"]
    value = said_by_all(records, "filling on 2", "after")["value"]
    assert (value["step"], value["is_same"], value["notes"]) == (1, True, [])


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_killed_while_it_writes_leaves_the_older_checkpoint(records: Records, folder: Path, victim: int):
    lines = records[f"killing {victim} on 3"]["killed"]
    assert [line["rank"] for line in lines] == [rank for rank in range(3) if rank != victim]
    for line in lines:
        is_cleared = (
            "is missing); check the disk" in line["text"]
        )  # by the first rank, which lost touch before this one
        assert (
            is_cleared
            or f"Rank {line['rank']} lost touch with the other ranks in the writing of step 2" in line["text"]
        )
    loaded, notes = checkpoint.newest(folder / f"killed-{victim}")
    assert (loaded.step, notes) == (1, [])
    assert script.same_groups(loaded.tensors, script.all_tensors(1))


def test_a_kill_at_any_moment_leaves_the_last_finished_save_or_the_one_in_hand(records: Records):
    assert len(records["kills"]) == 6
    for (line,) in records["kills"].values():
        assert line["value"]["is_same"]
        assert line["value"]["notes"] == []
        assert line["value"]["step"] - line["saved"] in (0, 1), line
        assert sorted(line["codes"]) == [-signal.SIGKILL, 0]  # the other one did not wait for ever


# Hostile checkpoints: every size and sha256 is right.


def forge(folder: Path, files: dict[str, bytes], order: list[str] | None = None) -> Path:
    """Write a checkpoint folder with a manifest that fits, which names the files in `order`."""
    folder.mkdir(parents=True)
    entries = {}
    for name in order or sorted(files):
        (folder / name).write_bytes(files[name])
        entries[name] = {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    body = {"format": 1, "step": 1, "files": entries}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": digest}, indent=1) + "\n")
    return folder


def part(name: str) -> bytes:
    return safetensors.torch.save({name: torch.ones(2)})


A, B, C = (f"model.0000{rank}.safetensors" for rank in range(3))
STATE = {"state.json": b"{}"}
FORGED: dict[str, tuple[dict[str, bytes], list[str] | None, str]] = {
    "a tensor twice": ({A: part("a"), B: part("a"), **STATE}, None, "has the tensor 'a', which another part has too"),
    "parts out of order": (
        {A: part("a"), B: part("b"), **STATE},
        [B, A, "state.json"],
        "the parts of model out of order",
    ),
    "a file beside parts": ({A: part("a"), "model.safetensors": part("b"), **STATE}, None, "as one file and in parts"),
    "parts beside a file": (
        {A: part("a"), "model.safetensors": part("b"), **STATE},
        ["model.safetensors", A, "state.json"],
        "as one file and in parts",
    ),
    "a short number": ({"model.0001.safetensors": part("a"), **STATE}, None, "names the file"),
    "a long number": ({"model.000001.safetensors": part("a"), **STATE}, None, "names the file"),
    "another digit": ({"model.0000١.safetensors": part("a"), **STATE}, None, "names the file"),
    "no number": ({"model.0000x.safetensors": part("a"), **STATE}, None, "names the file"),
    "two numbers": ({"model.00000.00001.safetensors": part("a"), **STATE}, None, "names the file"),
    "no group": ({".00000.safetensors": part("a"), **STATE}, None, "names the file"),
    "a broken header": ({A: part("a"), B: part("b")[:-1], **STATE}, None, "model.00001.safetensors holds"),
    "a pickle": ({A: pickle.dumps(Path("x")), **STATE}, None, "model.00000.safetensors claims a header"),
}  # fmt: skip


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.open_stored])
@pytest.mark.parametrize("what", FORGED)
def test_a_hostile_manifest_of_parts_is_damage(tmp_path: Path, what: str, read: Callable[[Path], object]):
    files, order, text = FORGED[what]
    with hostile.watched() as seen, pytest.raises(CheckpointError, match=f"is damaged .*{text}") as refusal:
        read(forge(tmp_path / "c", files, order))
    assert str(refusal.value).isprintable()
    assert seen == []


def test_parts_with_gaps_are_read_and_no_pickle_with_them(tmp_path: Path):
    path = forge(tmp_path / "c", {A: part("a"), C: part("c"), **STATE})
    with hostile.watched() as seen:
        loaded, stored = checkpoint.load(path), checkpoint.open_stored(path)
        assert loaded.tensors["model"].keys() == stored.tensors["model"].keys() == {"a", "c"}
        assert stored.tensors["model"]["c"].read(1).tolist() == [1.0]
    assert seen == []


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left(folder: Path) -> Iterator[None]:
    yield
    shutil.rmtree(folder, ignore_errors=True)

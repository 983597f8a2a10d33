"""Stored tokens that are damaged while a run reads them: found before they are used, named, left out on demand."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sizes import size
from test_shards import flip, some_documents, write

from hasten.data import PackedBatches
from hasten.data.batches import Batches, RowSource
from hasten.data.mapped import LOOK_SECONDS
from hasten.data.prefetch import Prefetched
from hasten.data.rows import ChunkedRows
from hasten.data.shards import PreparedData
from hasten.data.windows import Pack, Windows
from hasten.errors import DamagedData, DataError

SEQ_LEN, ROWS = 1024, 64
BLOCK = 1 << 20


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards: one of a block and a bit, one of less than a block."""
    documents = some_documents([3000, 1, 0, 400, 250_000, 90_000, 7] * 2)
    return write(tmp_path_factory.mktemp("good") / "data", documents, shard_tokens=600_000)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "data")


def batches_of(folder: Path, packing: str = "stream") -> Batches:
    train = PreparedData.open(folder).train
    rows = ChunkedRows(train, SEQ_LEN) if packing == "stream" else Windows(train, Pack(packing, (SEQ_LEN,))).rows()
    return Batches(RowSource(rows, seed=0), seq_len=SEQ_LEN, micro_rows=ROWS)


def epoch(batches: Batches, position: tuple[int, ...] = (0,)) -> list[torch.Tensor]:
    """Return the tokens of every step of an epoch."""
    steps = []
    while position[0] < batches.source.num_rows:
        (batch,), position = batches.take(position, rows=ROWS)
        steps.append(batch.tokens_BT)
    return steps


def damage(kind: str, path: Path, generator: np.random.Generator) -> int | None:
    """Damage a file in one way; return the block that is damaged, None where it is the whole file."""
    content = path.read_bytes()
    time.sleep(LOOK_SECONDS)  # less than any step of training takes
    if kind == "truncated":
        os.truncate(path, int(generator.integers(len(content))))
    elif kind == "removed":
        path.unlink()
    elif kind == "replaced":
        (path.parent / "other").write_bytes(generator.bytes(len(content)))
        os.replace(path.parent / "other", path)
    else:
        before, place = path.stat(), int(generator.integers(len(content)))
        with open(path, "r+b") as file:  # in place, as a failing disk or a stray write would
            file.seek(place)
            file.write(bytes([content[place] ^ 1 << int(generator.integers(8))]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return place // BLOCK
    return None


@pytest.mark.torture
def test_every_damage_after_the_start_is_found_and_named(good, tmp_path):
    generator = np.random.default_rng(0)
    for case in range(size(200, 2000)):
        folder = shutil.copytree(good, tmp_path / "data")
        batches = batches_of(folder, ("stream", "best_fit")[case % 2])
        if generator.random() < 0.8:
            epoch(batches)  # everything has been read and found whole
        path = folder / f"train-0000{generator.integers(2)}.bin"
        kind = ("truncated", "flipped", "replaced", "removed")[case // 2 % 4]
        block = damage(kind, path, generator)
        with pytest.raises(DamagedData, match=f"{path.name} is damaged") as caught:
            epoch(batches)
        assert caught.value.file == path.name, (case, kind)
        assert block is None or caught.value.block == block, (case, kind)
        assert "\n" not in str(caught.value)
        shutil.rmtree(folder)


def test_a_damaged_index_stops_whatever_becomes_of_damaged_tokens(folder):
    for kind in ("truncated", "flipped", "replaced", "removed"):
        batches = batches_of(folder, "best_fit")
        kept = (folder / "train-00001.idx").read_bytes()
        damage(kind, folder / "train-00001.idx", np.random.default_rng(1))
        with pytest.raises(DataError, match=r"train-00001\.idx is damaged") as caught:
            epoch(batches)
        assert not isinstance(caught.value, DamagedData)
        (folder / "train-00001.idx").write_bytes(kept)


def test_a_shard_cut_short_is_an_error_and_not_the_end_of_the_process(folder):
    # A process of its own: what is tested for is its sudden death.
    code = """
        import os, sys
        from test_damaged_data import batches_of, epoch
        from pathlib import Path
        batches = batches_of(Path(sys.argv[1]))
        epoch(batches)
        os.truncate(Path(sys.argv[1]) / "train-00000.bin", 4096)
        try:
            epoch(batches)
        except Exception as error:
            print(type(error).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "DamagedData\n"), done.stderr


def test_what_leaves_the_tokens_as_they_were_is_no_damage(folder):
    batches, path = batches_of(folder), folder / "train-00000.bin"
    before = epoch(batches)
    os.utime(path)
    os.link(path, folder / "another name")
    after_touch = epoch(batches)
    shutil.copy(path, folder / "copy")
    os.replace(folder / "copy", path)
    time.sleep(LOOK_SECONDS)
    assert all(torch.equal(a, b) for a, b in zip(before, after_touch))
    assert all(torch.equal(a, b) for a, b in zip(before, epoch(batches)))


def test_data_put_right_is_read_again(folder):
    batches, path = batches_of(folder), folder / "train-00000.bin"
    before = epoch(batches)
    time.sleep(LOOK_SECONDS)
    path.rename(folder / "aside")
    with pytest.raises(DamagedData, match="is missing"):
        epoch(batches)
    (folder / "aside").rename(path)
    assert all(torch.equal(a, b) for a, b in zip(before, epoch(batches)))


def test_files_read_stay_open_once_and_are_closed_with_their_data(folder):
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    batches = batches_of(folder, "best_fit")
    epoch(batches)
    held = open_files()
    for _ in range(20):
        os.utime(folder / "train-00000.bin")
        time.sleep(LOOK_SECONDS)
        epoch(batches)
    assert open_files() <= held <= before + 8  # fewer, where another test's files were closed meanwhile
    del batches
    assert open_files() == before


# --- leaving damaged steps out ------------------------------------------------------------------------------------


STEP = 4  # rows of a step, so few that most steps read nothing of a small block


def trained(batches: Batches, steps: int, position: tuple[int, ...] = (0,)) -> tuple[list, list, tuple[int, ...]]:
    """Read steps as a run under ``on_damage=skip`` does; return them, what was left out, and the position after."""
    taken, left_out = [], []
    while len(taken) < steps:
        try:
            (batch,), position = batches.take(position, rows=STEP)
            taken.append(batch.tokens_BT)
        except DamagedData as error:
            skipped = batches.skip(position, rows=STEP)
            left_out.append((error.file, error.block, skipped.tokens))
            position = skipped.position
    return taken, left_out, position


@pytest.mark.parametrize("packing", ["stream", "best_fit", "pad"])
def test_steps_that_read_a_damaged_block_are_left_out_and_the_others_are_as_they_were(packing, folder):
    batches, whole, position = batches_of(folder, packing), [], (0,)
    for _ in range(30):
        (batch,), position = batches.take(position, rows=STEP)
        whole.append(batch.tokens_BT)
    flip(folder / "train-00000.bin", BLOCK + 100, 3)
    taken, left_out, position = trained(batches_of(folder, packing), 8)
    assert left_out
    assert set(left_out) == {("train-00000.bin", 1, STEP * SEQ_LEN)}
    assert position == (STEP * (len(taken) + len(left_out)),)
    steps = iter(whole)  # in order, with gaps
    assert all(any(torch.equal(step, other) for other in steps) for step in taken)


def test_going_on_from_a_position_leaves_out_the_same_steps(folder):
    flip(folder / "train-00001.bin", 4000, 0)
    whole, left_out, end = trained(batches_of(folder), 12)
    first, before, position = trained(batches_of(folder), 5)
    second, after, same_end = trained(batches_of(folder), 7, position)
    assert left_out == before + after
    assert end == same_end
    assert all(torch.equal(a, b) for a, b in zip(whole, first + second))


def test_the_step_prepared_ahead_says_that_its_data_is_damaged_where_it_is_asked_for(folder):
    flip(folder / "train-00001.bin", 4000, 0)
    expected = trained(batches_of(folder), 8)
    batches, position, taken = batches_of(folder), (0,), []
    with Prefetched(batches) as prefetched:
        while len(taken) < 8:
            try:
                (batch,), position = prefetched.take(position, rows=STEP)
                taken.append(batch.tokens_BT.clone())
            except DamagedData:
                position = batches.skip(position, rows=STEP).position
    assert position == expected[2]
    assert all(torch.equal(a, b) for a, b in zip(taken, expected[0]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_goes_on_behind_a_damaged_step(num_workers, folder):
    flip(folder / "train-00001.bin", 4000, 0)
    found = set()
    data = PackedBatches(PreparedData.open(folder).train, seq_len=SEQ_LEN, batch_tokens=STEP * SEQ_LEN, packing="pad")
    seen = 0
    while seen < 4:
        try:
            for _ in data.loader(num_workers=num_workers):
                seen += 1
                if seen == 4:
                    break
        except DamagedData as error:
            found.add((error.file, error.block))
            data.skip()
    assert found == {("train-00001.bin", 0)}
    assert data.skipped["steps"] >= 1
    assert not multiprocessing.active_children()

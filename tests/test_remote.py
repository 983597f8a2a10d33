"""Prepared data on object storage: the same batches as from the folder, whatever the storage does on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from object_storage import Faults, object_storage
from sizes import size
from test_shards import some_documents, write

import hasten
from hasten.data import PackedBatches, transfer
from hasten.data.batches import Batches
from hasten.data.buckets import BucketSource
from hasten.data.range_cache import RangeCache
from hasten.data.reading import read
from hasten.data.remote import open_remote, upload
from hasten.data.shards import PreparedData, ShardWriter, write_manifest
from hasten.data.windows import Pack, Windows
from hasten.errors import DamagedData, DataError, HastenError

pytest.importorskip("s3fs", reason="s3fs is not installed")
pytest.importorskip("moto", reason="moto is not installed")

MIB = 1 << 20
URL = "s3://bucket/prepared"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 33 MiB of tokens in 4 shards, and 2 MiB held out."""
    folder, random = tmp_path_factory.mktemp("prepared") / "data", np.random.default_rng(1)
    folder.mkdir()
    splits = {}
    for split, count in (("train", size(3_800, 40_000)), ("val", 240)):
        with ShardWriter(folder, split, vocab_size=301, document_token=300, shard_tokens=5_000_000) as writer:
            for length in random.integers(50, 9_000, count).tolist():
                writer.start_document()
                writer.append(random.integers(0, 300, length, np.uint16), source_bytes=length)
            splits[split] = writer.close()
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    hashes = {"corpus": "test", "corpus_sha256": "c" * 64, "tokenizer_sha256": "t" * 64}
    write_manifest(folder, splits=splits, **hashes, vocab_size=301, document_token=300)
    return folder


@pytest.fixture(scope="module")
def storage() -> Iterator[tuple[Faults, pytest.MonkeyPatch]]:
    faults = Faults()
    with pytest.MonkeyPatch.context() as patch, object_storage(faults) as endpoint:
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "known-key"),
            ("AWS_SECRET_ACCESS_KEY", "known-secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_CONFIG_FILE", "/nonexistent"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(name, value)
        yield faults, patch


@pytest.fixture(scope="module")
def uploaded(storage, prepared: Path) -> str:
    return upload(prepared, URL)


@pytest.fixture
def faults(storage, uploaded) -> Iterator[Faults]:
    """The storage without faults; those of a test end with it."""
    found = storage[0]
    found.asked, found.spoiled = [], 0
    yield found
    found.share, found.latency, found.kinds = 0.0, 0.0, ("busy", "reset", "cut")


@pytest.fixture
def fast(monkeypatch) -> None:
    """Tries that follow each other at once."""
    monkeypatch.setattr(transfer, "WAITS", (0.0,) * 7)


def cache(folder: Path, mib: int = 64) -> RangeCache:
    return RangeCache(folder / "stream", mib * MIB)


def batches(data: PreparedData, *, rank: int = 0, world_size: int = 1, **settings) -> Batches:
    source = read(data, seq_len=1024, seed=3, **settings)
    return Batches(source, seq_len=1024, micro_rows=8, rank=rank, world_size=world_size)


def steps(found: Batches, count: int, rows: int = 16) -> Iterator[tuple[torch.Tensor, ...]]:
    position = found.source.begin
    for _ in range(count):
        step, position = found.take(position, rows=rows)
        yield tuple(tensor for batch in step for tensor in (batch.tokens_BT, batch.labels_BT, batch.document_ids_BT))


def assert_same_steps(one: Batches, other: Batches, count: int, rows: int = 16) -> None:
    for left, right in zip(steps(one, count, rows), steps(other, count, rows), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def held(folder: Path) -> int:
    kept = cache(folder)
    with kept._locked():  # nobody writes or deletes meanwhile
        return sum(path.stat().st_size for path in kept.folder.iterdir() if path.name != "lock")


@pytest.mark.parametrize("packing", ["best_fit", "chunk"])
def test_batches_through_a_small_cache_and_failing_storage_are_those_of_the_folder(prepared, faults, tmp_path, packing):
    faults.share, faults.latency = 0.05, size(10, 100) / 1000
    far, near = open_remote(URL, cache=cache(tmp_path, 20)), PreparedData.open(prepared)
    assert far.train.fingerprint == near.train.fingerprint
    ours, theirs = (batches(data, packing=packing, shuffle_tokens=1 << 22) for data in (far, near))
    rows, most = 64, 0
    count = int(ours.source.num_rows) // rows  # an epoch
    assert count >= 250
    for left, right in zip(steps(ours, count, rows), steps(theirs, count, rows), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
        most = max(most, held(tmp_path))
    assert faults.spoiled > 0
    assert 10 * MIB < most <= 20 * MIB < near.train.num_tokens * 2
    # Windows of a MiB begin anywhere in the blocks of a MiB, so that most of these are needed twice in an epoch.
    assert len(faults.ranges) < 4 * near.train.num_tokens * 2 / MIB


def test_each_rank_reads_its_share_of_the_rows(prepared, faults, tmp_path):
    for rank in range(3):
        far = batches(open_remote(URL, cache=cache(tmp_path)), rank=rank, world_size=3)
        near = batches(PreparedData.open(prepared), rank=rank, world_size=3)
        assert_same_steps(far, near, 20)


def test_blocks_of_later_steps_are_asked_for_before_their_turn(faults, tmp_path):
    far = batches(open_remote(URL, cache=cache(tmp_path)))
    needed = far.source.draw((0,), rows=4, length=1024)
    ((rows, numbers),) = needed.parts
    blocks = rows.blocks(numbers)
    faults.asked = []
    _, position = far.take((0,), rows=4)
    for _ in range(20):
        _, position = far.take(position, rows=4)
    assert len({span for _, span in faults.ranges}) >= len(blocks)
    # What comes ahead goes on until the place for it is full, though nobody reads on.
    deadline = 200
    while len(faults.ranges) <= len(blocks) + 2 and deadline:
        transfer.time.sleep(0.02)
        deadline -= 1
    assert len(faults.ranges) > len(blocks) + 2


def test_buckets_and_mixtures_read_the_same_from_storage(storage, faults, tmp_path):
    folder, random = tmp_path / "mixed", np.random.default_rng(2)
    folder.mkdir()
    splits = {}
    for split in ("train-0", "train-1", "val"):
        with ShardWriter(folder, split, vocab_size=301, document_token=300, shard_tokens=700_000) as writer:
            for length in random.integers(1, 3_000, 900).tolist():
                writer.start_document()
                writer.append(random.integers(0, 300, length, np.uint16), source_bytes=length)
            splits[split] = writer.close()
    hashes = {"corpus": "test", "corpus_sha256": "c" * 64, "tokenizer_sha256": "t" * 64}
    write_manifest(folder, splits=splits, **hashes, vocab_size=301, document_token=300, train_names=["a", "b"])
    far, near = open_remote(upload(folder, "s3://bucket/mixed"), cache=cache(tmp_path, 8)), PreparedData.open(folder)
    ours, theirs = (batches(data, weights=[3, 1], shuffle_tokens=1 << 22) for data in (far, near))
    assert_same_steps(ours, theirs, 30)
    ours, theirs = (
        Batches(BucketSource([Windows(shards, Pack("bucketed", (256, 1024))).rows(n) for n in (0, 1)], seed=0),
                seq_len=1024, micro_rows=4)
        for shards in (far.trains[1], near.trains[1])
    )  # fmt: skip
    assert_same_steps(ours, theirs, 30)


def test_workers_of_a_loader_open_the_storage_for_themselves(prepared, faults, tmp_path):
    def items(data: PreparedData, workers: int) -> list[torch.Tensor]:
        packed = PackedBatches(data.train, seq_len=128, batch_tokens=1024, total_steps=12, seed=5)
        return [item["input_ids"].clone() for item in packed.loader(num_workers=workers)]

    far = open_remote(URL, cache=cache(tmp_path))
    far.train.read(0, 100)  # its threads and its loop run here before the fork
    ours, theirs = items(far, 2), items(PreparedData.open(prepared), 0)
    assert len(ours) == 12
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_held_out_text_and_the_documents_are_the_same(prepared, faults, tmp_path):
    far, near = open_remote(URL, cache=cache(tmp_path, 6)), PreparedData.open(prepared)
    np.testing.assert_array_equal(far.val.read(0, far.val.num_tokens), near.val.read(0, near.val.num_tokens))
    np.testing.assert_array_equal(far.train.document_starts, near.train.document_starts)
    starts = np.random.default_rng(0).integers(0, near.train.num_tokens - 3_000, 50)
    np.testing.assert_array_equal(far.train.gather(starts, 3_000), near.train.gather(starts, 3_000))
    far.verify()


def test_a_bad_transfer_is_fetched_again(prepared, faults, fast, tmp_path):
    faults.kinds, faults.share = ("flip",), 0.3
    assert_same_steps(batches(open_remote(URL, cache=cache(tmp_path))), batches(PreparedData.open(prepared)), 10)
    assert faults.spoiled


def test_what_is_bad_each_time_names_the_object_and_its_bytes(faults, fast, tmp_path):
    data = open_remote(URL, cache=cache(tmp_path))
    data.train.starts(0, 1)  # the index comes whole
    faults.kinds, faults.share = ("flip",), 1.0
    with pytest.raises(
        DamagedData, match=r"train-00000\.bin, bytes 1,048,576 to 2,097,152.* is damaged.*8 tries"
    ) as told:
        data.train.read(600_000, 600_010)
    assert (told.value.file, told.value.block) == ("train-00000.bin", 1)
    assert held(tmp_path) < MIB  # the index, and nothing that is wrong


def test_storage_that_never_answers_is_told_of_and_then_given_up(faults, fast, tmp_path):
    told: list[str] = []
    data = open_remote(URL, cache=cache(tmp_path), tell=told.append)
    data.train.starts(0, 1)
    faults.share, faults.kinds = 1.0, ("busy",)
    with pytest.raises(DataError, match=r"could not be read or written in 8 tries.*give the same command to go on"):
        data.train.read(0, 10)
    assert len(told) == 1
    assert "failed 4 times" in told[0]


def test_what_may_not_be_read_is_said_at_once_without_the_secret(faults, tmp_path):
    data = open_remote(URL, cache=cache(tmp_path))
    data.train.starts(0, 1)
    faults.share, faults.kinds, faults.asked = 1.0, ("denied",), []
    with pytest.raises(DataError, match=r"may not be accessed .*AWS_PROFILE") as told:
        data.train.read(0, 10)
    assert "known-" not in str(told.value)
    assert len([span for _, span in faults.ranges if "bytes=0-" in span]) == 1


def test_without_credentials_it_says_where_they_come_from(storage, faults, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(DataError, match=r"may not be accessed .*AWS_PROFILE, AWS_ACCESS_KEY_ID"):
        open_remote(URL, cache=cache(tmp_path))


def test_what_is_not_there_is_said_at_once(faults, tmp_path):
    with pytest.raises(DataError, match=r"s3://bucket/elsewhere holds no manifest\.json"):
        open_remote("s3://bucket/elsewhere", cache=cache(tmp_path))
    with pytest.raises(DataError, match="s3://nobucket/x"):
        open_remote("s3://nobucket/x", cache=cache(tmp_path))


def test_uploading_again_changes_nothing_and_other_data_is_not_overwritten(prepared, faults, tmp_path):
    assert upload(prepared, URL) == URL
    with pytest.raises(DataError, match="holds other prepared data"):
        upload(write(tmp_path / "other", some_documents([30, 40])), URL)


def test_a_run_begun_from_the_folder_goes_on_from_storage_bit_for_bit(faults, text_file, tiny, tmp_path):
    from hasten.loop import prepare_for
    from hasten.recipe import resolve

    settings = {**_typed(tiny), "budget": 8, "seed": 1}
    recipe = resolve(None, {**settings, "data": {**settings["data"], "train": str(text_file)}}).recipe
    url = upload(prepare_for(recipe).folder, "s3://bucket/tiny")
    text, far = ({**settings, "data": {**settings["data"], "train": train}} for train in (str(text_file), url))
    whole = hasten.train(**text, out=str(tmp_path / "whole"))
    hasten.train(**text, out=str(tmp_path / "parts"), until=4)
    with pytest.raises(HastenError, match=r"data\.train"):
        hasten.train(**far, out=str(tmp_path / "parts"))
    parts = hasten.train(**far, out=str(tmp_path / "parts"), allow=["data.train"])
    assert parts.values["val_loss"] == whole.values["val_loss"]
    ours, theirs = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("parts", "whole"))
    assert ours == theirs
    assert any("tiny" in path for path, _ in faults.ranges)


def _typed(tiny) -> dict:
    """Settings of the command line as Python values."""
    values = {}
    for setting in tiny:
        key, _, value = setting.partition("=")
        table, _, leaf = key.partition(".")
        value = int(value) if value.isdigit() else value
        if leaf:
            values.setdefault(table, {})[leaf] = value
        else:
            values[key] = value
    return values

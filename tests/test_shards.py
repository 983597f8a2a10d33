"""Token shards: what is written is what is read, and nothing damaged is ever read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.data import shard_files
from hasten.data.shards import PreparedData, ShardWriter, TokenShards, write_manifest
from hasten.errors import DataError

DOCUMENT = 300


def write(folder: Path, documents: list[np.ndarray], *, vocab_size: int = 301, shard_tokens: int = 1 << 20) -> Path:
    """Write `documents` as both splits of prepared data."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split in ("train", "val"):
        with ShardWriter(
            folder, split, vocab_size=vocab_size, document_token=DOCUMENT, shard_tokens=shard_tokens
        ) as writer:
            for document in documents:
                writer.start_document()
                writer.append(document, source_bytes=len(document))
            splits[split] = writer.close()
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    write_manifest(
        folder,
        splits=splits,
        corpus="test",
        corpus_sha256="c" * 64,
        tokenizer_sha256="t" * 64,
        vocab_size=vocab_size,
        document_token=DOCUMENT,
        counts={"empty documents": 1},
    )
    return folder


def stream(documents: list[np.ndarray]) -> np.ndarray:
    """Return what the stored stream must be."""
    return np.concatenate([np.append(DOCUMENT, document) for document in documents])


def some_documents(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, size) for size in sizes]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of two blocks and a bit each, in both splits."""
    documents = some_documents([700_000, 1, 0, 900_000])
    return write(tmp_path_factory.mktemp("big") / "data", documents, shard_tokens=1_200_000)


@pytest.fixture
def copied(big: Path, tmp_path: Path) -> Path:
    return shutil.copytree(big, tmp_path / "copy")


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), shard_tokens=st.integers(1, 60))
def test_the_stream_read_is_the_stream_written(tmp_path_factory, sizes, shard_tokens):
    documents = some_documents(sizes)
    data = PreparedData.open(write(tmp_path_factory.mktemp("data"), documents, shard_tokens=shard_tokens))
    expected = stream(documents)
    assert data.train.num_tokens == len(expected)
    assert data.train.num_documents == len(documents)
    assert data.train.source_bytes == sum(sizes)
    np.testing.assert_array_equal(data.train.read(0, len(expected)), expected)
    np.testing.assert_array_equal(data.train.document_starts, np.flatnonzero(expected == DOCUMENT))


@pytest.fixture(scope="module", params=[1, 7, 30, 1000])
def short(request, tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """A stream of 72 tokens, in shards of one length or another."""
    folder = tmp_path_factory.mktemp("short")
    return PreparedData.open(write(folder, some_documents([25, 0, 13, 30]), shard_tokens=request.param)).train


@settings(max_examples=40, deadline=None)
@given(data=st.data(), length=st.integers(1, 40))
def test_gathered_spans_equal_spans_read_one_by_one(short, data, length):
    documents, shards = some_documents([25, 0, 13, 30]), short
    last = shards.num_tokens - length
    starts = np.array(data.draw(st.lists(st.integers(0, last), max_size=8)), np.int64)
    expected = [stream(documents)[start : start + length] for start in starts]
    np.testing.assert_array_equal(shards.gather(starts, length), np.reshape(expected, (len(starts), length)))


def test_documents_cross_blocks_and_shards(big):
    expected = stream(some_documents([700_000, 1, 0, 900_000]))
    train = PreparedData.open(big).train
    np.testing.assert_array_equal(train.read(0, len(expected)), expected)
    starts = np.array([1_199_000, 0, 524_287, 1_400_000])
    np.testing.assert_array_equal(train.gather(starts, 2000), [expected[s : s + 2000] for s in starts])
    starts = np.array([3, 1_199_000 - 600_000])
    np.testing.assert_array_equal(train.gather(starts, 600_000), [expected[s : s + 600_000] for s in starts])
    np.testing.assert_array_equal(train.document_starts, np.flatnonzero(expected == DOCUMENT))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_stored_in_the_narrowest_type(tmp_path, vocab_size, dtype):
    documents = [np.array([0, vocab_size - 1])]
    train = PreparedData.open(write(tmp_path, documents, vocab_size=vocab_size)).train
    assert train.read(0, 3).dtype == dtype
    assert train.read(0, 3).tolist() == [DOCUMENT, 0, vocab_size - 1]


def test_what_was_read_stays_as_it_was(big):
    train = PreparedData.open(big).train
    first = train.read(0, 100)
    before = first.copy()
    first += 1
    np.testing.assert_array_equal(train.read(0, 100), before)
    assert train.gather(np.array([0]), 100).flags.writeable


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 1_600_006), (1_600_000, 1_600_006)])
def test_a_span_outside_the_stream_is_refused(big, start, stop):
    train = PreparedData.open(big).train
    assert train.num_tokens == 1_600_005
    with pytest.raises(IndexError):
        train.read(start, stop)
    if start < stop:
        with pytest.raises(IndexError):
            train.gather(np.array([0, start]), stop - start)


@pytest.mark.parametrize("bad", [-1, 301])
def test_an_id_outside_the_vocabulary_is_not_written(tmp_path, bad):
    with ShardWriter(tmp_path, "train", vocab_size=301, document_token=DOCUMENT) as writer:
        writer.start_document()
        with pytest.raises(DataError, match=f"id {bad}, outside its vocabulary of 301"):
            writer.append(np.array([5, bad]), source_bytes=2)


def test_an_id_outside_the_vocabulary_is_not_read(tmp_path):
    folder = write(tmp_path, [np.array([5, 299])])
    manifest = json.loads((folder / "manifest.json").read_text())
    smaller = TokenShards(folder, {**manifest, "vocab_size": 299}, "train")
    with pytest.raises(DataError, match=r"train-00000\.bin.*id 300, outside a vocabulary of 299"):
        smaller.read(0, 1)
    assert TokenShards(folder, manifest, "train").read(0, 1).tolist() == [300]


# --- damage ---------------------------------------------------------------------------------------------------------


def use(folder: Path) -> None:
    """Open prepared data and read all of it, through every way of reading."""
    data = PreparedData.open(folder)
    for shards in (data.train, data.val):
        shards.gather(np.arange(0, shards.num_tokens - 1000, 1000), 1000)
        shards.read(0, shards.num_tokens)
        _ = shards.document_starts


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_undamaged_data_is_used_and_verified(copied):
    use(copied)
    PreparedData.open(copied).verify()


def test_every_flipped_bit_is_detected_and_named(copied):
    generator = np.random.default_rng(1)
    names = [path.name for path in copied.iterdir() if path.suffix in (".bin", ".idx")]
    for _ in range(40):
        path = copied / generator.choice(names)
        position, bit = int(generator.integers(path.stat().st_size)), int(generator.integers(8))
        flip(path, position, bit)
        with pytest.raises(DataError, match=path.name):
            use(copied)
        with pytest.raises(DataError, match=path.name):
            PreparedData.open(copied).verify()
        flip(path, position, bit)
    use(copied)


def test_every_flipped_bit_of_a_manifest_is_detected(tmp_path):
    folder = write(tmp_path, some_documents([30]))
    path = folder / "manifest.json"
    before = json.loads(path.read_text())
    generator = np.random.default_rng(2)
    for _ in range(200):
        position, bit = int(generator.integers(path.stat().st_size)), int(generator.integers(8))
        flip(path, position, bit)
        try:
            same = json.loads(path.read_bytes()) == before
        except ValueError:
            same = False
        if not same:  # a blank turned into another blank changes nothing
            with pytest.raises(DataError, match=r"manifest\.json"):
                PreparedData.open(folder)
        flip(path, position, bit)


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00001.idx", "tokenizer.json"])
def test_a_file_of_another_size_or_none_is_detected_at_open(copied, name):
    path = copied / name
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"0", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name} is damaged: it has"):
            PreparedData.open(copied)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is damaged: it is missing"):
        PreparedData.open(copied)


@pytest.mark.parametrize("suffixes", [(".bin",), (".idx",), (".bin", ".idx")])
def test_swapped_files_are_detected_at_first_touch(tmp_path, suffixes):
    documents = [np.full(99, 7), np.full(99, 8)]
    folder = write(tmp_path, documents, shard_tokens=100)
    for suffix in suffixes:
        first, second = folder / f"train-00000{suffix}", folder / f"train-00001{suffix}"
        first.rename(folder / "aside")
        second.rename(first)
        (folder / "aside").rename(second)
    train = PreparedData.open(folder).train
    with pytest.raises(DataError, match="train-00000"):
        train.read(0, 1)
    with pytest.raises(DataError, match="train-00000"):
        PreparedData.open(folder).verify()


def test_a_shard_cut_short_after_opening_is_an_error_and_not_a_crash(copied):
    train = PreparedData.open(copied).train
    train.read(0, 10)
    with open(copied / "train-00000.bin", "r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(DataError, match=r"train-00000\.bin is damaged: it has"):
        train.read(600_000, 600_010)


def test_only_blocks_that_are_touched_are_checked(copied):
    flip(copied / "train-00000.bin", shard_files.BLOCK_BYTES + 5, 0)
    train = PreparedData.open(copied).train
    block = shard_files.BLOCK_BYTES // 2
    train.read(0, block)
    with pytest.raises(DataError, match="byte 1048576"):
        train.read(0, block + 1)
    with pytest.raises(DataError, match="byte 1048576"):
        train.gather(np.array([0, block - 1]), 2)


def test_verify_covers_the_tokenizer(copied):
    (copied / "tokenizer.json").write_text('{"made": "UP"}')
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        PreparedData.open(copied).verify()


def test_a_folder_that_is_not_prepared_data_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"holds no manifest\.json; give a folder"):
        PreparedData.open(tmp_path)
    for content, message in (("[]", "does not describe"), ("{", "cannot be read"), ('{"format": "x"}', "not describe")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=message):
            PreparedData.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "hasten tokens", "version": 99}')
    with pytest.raises(DataError, match=r"version 99.*prepare the data again"):
        PreparedData.open(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    folder = write(tmp_path / "data", some_documents([3]))
    (tmp_path / "secret").write_text("x")
    more = {"file": "../secret", "bytes": 1, "sha256": ""}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["tokens"] = more
    given = {key: manifest[key] for key in ("corpus", "corpus_sha256", "tokenizer_sha256", "vocab_size")}
    write_manifest(folder, splits=manifest["splits"], document_token=DOCUMENT, **given)
    with pytest.raises(DataError, match="outside its folder"):
        PreparedData.open(folder)


def test_the_manifest_keeps_what_it_is_told(tmp_path):
    data = PreparedData.open(write(tmp_path, some_documents([3])))
    assert (data.vocab_size, data.document_token, data.manifest["corpus"]) == (301, DOCUMENT, "test")
    assert (data.corpus_sha256, data.tokenizer_sha256) == ("c" * 64, "t" * 64)
    assert data.manifest["counts"] == {"empty documents": 1}
    assert not (tmp_path / "manifest.json.tmp").exists()


def test_a_split_without_documents_is_an_empty_stream(tmp_path):
    train = PreparedData.open(write(tmp_path, [])).train
    assert (train.num_tokens, train.num_documents, train.document_starts.tolist()) == (0, 0, [])
    assert train.read(0, 0).tolist() == []
    assert train.gather(np.empty(0, np.int64), 5).shape == (0, 5)

"""What is fetched is kept within a bound, for all processes together, and never believed; URLs are not either."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_shards import some_documents, write

from hasten.data import range_cache, transfer
from hasten.data.corpus import CorpusSpec
from hasten.data.manifest import MANIFEST, _own_hash
from hasten.data.places import open_prepared, prepared_place
from hasten.data.range_cache import BOUND, RangeCache, cache_bound
from hasten.data.remote import open_remote, upload
from hasten.data.shards import PreparedData
from hasten.data.transfer import Remote
from hasten.errors import DataError, HastenError, RecipeError

MIB = 1 << 20


def fine(content: bytes) -> str:
    return ""


def held(cache: RangeCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir() if path.name != "lock")


@pytest.fixture
def kept(tmp_path) -> RangeCache:
    return RangeCache(tmp_path / "stream", 10_000)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Six blocks of a MiB in three shards."""
    documents = some_documents([700_000, 1, 0, 900_000, 1_500_000])
    return write(tmp_path_factory.mktemp("prepared") / "data", documents, shard_tokens=1_200_000)


def at(folder: Path) -> str:
    return f"file://{folder}"


def test_what_was_put_is_read_in_parts_and_what_was_not_is_absent(kept):
    assert kept.read("a", 0, 1, fine) is None
    assert kept.put("a", b"0123456789")
    assert (kept.read("a", 2, 5, fine), kept.has("a"), kept.has("b")) == (b"234", True, False)


def test_the_range_used_longest_ago_goes_and_the_bound_holds_after_every_write(kept, monkeypatch):
    monkeypatch.setattr(range_cache, "_TOUCH_SECONDS", 0.0)
    for number in range(10):
        kept.put(str(number), bytes(1000))
    assert held(kept) == 10_000
    kept.read("0", 0, 1, fine)
    kept.put("new", bytes(500))
    assert held(kept) <= 10_000
    assert (kept.has("0"), kept.has("1"), kept.has("new")) == (True, False, True)


def test_what_is_larger_than_the_bound_is_not_kept(kept):
    assert not kept.put("a", bytes(10_001))
    assert not kept.has("a")


def test_ranges_that_another_process_left_count(kept):
    kept.put("a", bytes(9_000))
    (kept.folder / "lock").unlink()
    (kept.folder / "torn.tmp").write_bytes(bytes(5_000))  # of a process that was killed
    other = RangeCache(kept.folder, 10_000)
    other.put("b", bytes(3_000))
    assert held(kept) <= 10_000
    assert not (kept.folder / "torn.tmp").exists()


def test_a_range_is_checked_again_when_its_file_is_another(kept):
    kept.put("a", b"right")
    (kept.folder / "a").write_bytes(b"wrong")
    assert kept.read("a", 0, 5, lambda content: "wrong" * (content != b"right")) is None
    assert not kept.has("a")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_a_pipe_or_a_folder_in_the_place_of_a_range_is_no_range(kept):
    kept.put("a", b"right")
    os.mkfifo(kept.folder / "pipe")
    (kept.folder / "folder").mkdir()
    assert kept.read("pipe", 0, 1, fine) is None
    assert kept.read("folder", 0, 1, fine) is None


def _fill(folder: Path, name: str) -> None:
    cache = RangeCache(folder, 100_000)
    for number in range(200):
        cache.put(f"{name}-{number}", bytes(1_000))
        with cache._locked():  # nobody writes or deletes meanwhile
            assert sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name != "lock") <= 100_000


def test_processes_keep_to_one_bound_together(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(tmp_path, name)) for name in "abc"]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    assert held(RangeCache(tmp_path, 100_000)) <= 100_000


@pytest.mark.parametrize(
    ("given", "size"), [("20GB", 20 * 10**9), ("8MiB", 8 * MIB), ("1.5gib", 3 << 29), ("9000000", 9_000_000)]
)
def test_the_bound_is_read_from_the_environment(monkeypatch, given, size):
    monkeypatch.setenv(BOUND, given)
    assert cache_bound() == size


@pytest.mark.parametrize("given", ["much", "4", "-8GB", "1e9", "8 GB free", "1MB", "9" * 40])
def test_a_bound_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv(BOUND, given)
    with pytest.raises(DataError, match=f"{BOUND}=.*no size of at least 4MiB"):
        cache_bound()


def test_damage_on_the_cache_s_disk_is_fetched_anew(prepared, tmp_path):
    cache = RangeCache(tmp_path / "stream", 64 * MIB)
    near = PreparedData.open(prepared).train
    expected = near.read(0, near.num_tokens)
    np.testing.assert_array_equal(open_remote(at(prepared), cache=cache).train.read(0, len(expected)), expected)
    for path in (tmp_path / "stream").iterdir():
        if path.name != "lock":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    again = open_remote(at(prepared), cache=RangeCache(tmp_path / "stream", 64 * MIB)).train
    np.testing.assert_array_equal(again.read(0, len(expected)), expected)
    np.testing.assert_array_equal(again.document_starts, near.document_starts)


def test_a_cache_emptied_under_a_reader_or_without_room_changes_nothing(prepared, tmp_path, monkeypatch):
    cache = RangeCache(tmp_path / "stream", 64 * MIB)
    far, near = open_remote(at(prepared), cache=cache).train, PreparedData.open(prepared).train
    starts = np.arange(0, near.num_tokens - 300, 40_001)
    np.testing.assert_array_equal(far.gather(starts, 300), near.gather(starts, 300))
    shutil.rmtree(tmp_path / "stream")
    np.testing.assert_array_equal(far.gather(starts, 300), near.gather(starts, 300))
    shutil.rmtree(tmp_path / "stream")
    (tmp_path / "stream").write_text("no folder")
    told: list[str] = []
    full = open_remote(at(prepared), cache=cache, tell=told.append).train
    np.testing.assert_array_equal(full.gather(starts, 300), near.gather(starts, 300))
    assert len([line for line in told if "no room on its disk" in line]) == 1


def test_a_copy_in_another_process_reads_the_same(prepared, tmp_path):
    far = open_remote(at(prepared), cache=RangeCache(tmp_path / "stream", 64 * MIB))
    copy = pickle.loads(pickle.dumps(far.train))
    np.testing.assert_array_equal(copy.read(5, 900_000), far.train.read(5, 900_000))


def spoil(folder: Path, **changes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.update(changes)
    manifest["manifest_sha256"] = _own_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", MANIFEST])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, own_cache, name):
    folder = write(tmp_path / "data", some_documents([30, 40]))
    spoil(folder, files=[{"file": name, "bytes": 10, "sha256": "0" * 64}])
    with pytest.raises(DataError, match=r"manifest\.json is damaged|is missing|has .* bytes instead"):
        open_remote(at(folder), cache=RangeCache(tmp_path / "stream", 8 * MIB))
    assert not (own_cache / "remote" / "outside").exists()


def test_a_small_file_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path):
    folder = write(tmp_path / "data", some_documents([30, 40]))
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    spoil(folder, files=[{"file": "tokenizer.json", "bytes": 1 << 40, "sha256": "0" * 64}])
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_remote(at(folder), cache=RangeCache(tmp_path / "stream", 8 * MIB))


def test_an_object_of_another_size_or_none_is_named_when_it_is_opened(tmp_path):
    folder = write(tmp_path / "data", some_documents([30, 40]))
    cache = RangeCache(tmp_path / "stream", 8 * MIB)
    (folder / "val-00000.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"val-00000\.bin is damaged: it has 5 bytes"):
        open_remote(at(folder), cache=cache)
    (folder / "val-00000.bin").unlink()
    with pytest.raises(DataError, match=r"val-00000\.bin is missing"):
        open_remote(at(folder), cache=cache)


def test_an_upload_that_was_broken_off_is_finished_by_the_next(prepared, tmp_path):
    target = tmp_path / "there"
    url = upload(prepared, at(target))
    (target / MANIFEST).unlink()
    (target / "train-00001.bin").unlink()
    assert upload(prepared, url) == url
    open_remote(url, cache=RangeCache(tmp_path / "stream", 64 * MIB)).verify()


def test_data_in_memory_is_opened_too(prepared, tmp_path):
    url = upload(prepared, "memory://bucket/data")
    far = open_remote(url, cache=RangeCache(tmp_path / "stream", 64 * MIB))
    np.testing.assert_array_equal(far.val.read(0, 5_000), PreparedData.open(prepared).val.read(0, 5_000))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://AKIA:very-secret@bucket/data", "holds credentials"),
        ("s3://bucket/data?token=very-secret", "holds credentials or a query"),
        ("s5://bucket/data", "no URL of a folder"),
        ("github://org:very-secret@repo/data", "holds credentials"),
        ("simplecache::s3://bucket/data", "no URL of a folder"),
        ("s3://", "no URL of a folder"),
    ],
)
def test_urls_with_secrets_or_of_unknown_kinds_are_refused_without_showing_them(url, said):
    with pytest.raises(DataError, match=said) as told:
        Remote(url)
    assert "very-secret" not in str(told.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    import fsspec.core

    def no_package(*arguments, **options):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_package)
    with pytest.raises(DataError, match=r"gs://bucket/data needs a package that is not installed: pip install gcsfs"):
        Remote("gs://bucket/data")


def test_secrets_in_what_a_library_says_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setattr(transfer, "WAITS", (0.0,))
    remote = Remote("memory://bucket/data")

    def fails(name: str, begin: int, end: int) -> bytes:
        raise OSError("GET https://host/x?X-Amz-Signature=abc123 with very-secret, token=abc123 failed")

    monkeypatch.setattr(remote, "_content", fails)
    with pytest.raises(DataError) as told:
        remote.read("a", 0, 1)
    assert "very-secret" not in str(told.value)
    assert "abc123" not in str(told.value)


def test_prepared_folders_and_urls_are_told_from_text(prepared, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / MANIFEST).write_text('{"format": "of a browser extension"}')
    assert prepared_place(CorpusSpec((str(prepared),))) == str(prepared)
    assert prepared_place(CorpusSpec((str(tmp_path / "text"),))) is None
    assert prepared_place(CorpusSpec(("python", str(prepared)))) is None
    with pytest.raises(RecipeError, match="give it alone"):
        prepared_place(CorpusSpec(("s3://bucket/a", "python")))


@pytest.mark.parametrize(
    ("spec", "settings", "said"),
    [
        ({"val_share": 0.2}, {}, r"data\.val_share has no effect"),
        ({"separator": "x"}, {}, r"data\.separator has no effect"),
        ({}, {"vocab_size": 300}, "vocabulary of 301, and data.vocab_size is 300"),
        ({}, {"tokenizer": "bytes"}, "another tokenizer than bytes"),
    ],
)
def test_settings_that_prepared_data_cannot_follow_are_refused(prepared, spec, settings, said):
    with pytest.raises(HastenError, match=said):
        open_prepared(str(prepared), CorpusSpec((str(prepared),), **spec), **settings)


def test_a_cache_too_small_for_the_order_is_told_of(prepared, monkeypatch):
    monkeypatch.setenv(BOUND, "4MiB")
    notes: list[str] = []
    open_prepared(at(prepared), CorpusSpec((at(prepared),)), on_progress=lambda progress: notes.extend(progress.notes))
    assert any("fetched many times over" in note for note in notes)

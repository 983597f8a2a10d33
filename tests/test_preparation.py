"""Prepared data is the corpus, token for token; it is made once, whole or not at all."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hasten.cache import cache_root
from hasten.data import encoders, preparation
from hasten.data.corpus import CorpusSpec, open_corpus
from hasten.data.preparation import prepare
from hasten.data.sampling import sample
from hasten.data.shards import PreparedData
from hasten.data.tokenizer import DOCUMENT_TEXT, byte_tokenizer, train_bpe
from hasten.errors import DataError


@pytest.fixture(scope="module")
def text(library_text):
    return library_text[:120_000]


@pytest.fixture
def spec(text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    return CorpusSpec((str(tmp_path / "text.txt"),))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def everything_in(cache):
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*"))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_stored_stream_is_the_documents_of_the_corpus(tokenizer, spec, tmp_path):
    data = prepare(spec, tokenizer=tokenizer, vocab_size=500, cache=tmp_path / "cache")
    for split, shards in (("train", data.train), ("val", data.val)):
        expected = []
        for piece in open_corpus(spec).pieces(split):
            expected += [[data.document_token]] * piece.starts_document + [data.tokenizer.encode(piece.text)]
        assert np.array_equal(shards.read(0, shards.num_tokens), np.concatenate(expected))
        assert shards.source_bytes == sum(piece.source_bytes for piece in open_corpus(spec).pieces(split))
    data.verify()


def test_train_and_val_bytes_together_are_the_file(spec, text, tmp_path):
    data = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    assert data.train.source_bytes + data.val.source_bytes == len(text.encode())
    assert data.manifest["sources"][0]["name"] == "text.txt"
    assert str(tmp_path) not in (data.folder / "manifest.json").read_text()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_shards_are_the_same_whatever_the_number_of_workers(tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 1000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text.split("\n\n")))
    spec = CorpusSpec((str(tmp_path / "a.jsonl"),))
    made = [
        content(prepare(spec, tokenizer=tokenizer, vocab_size=400, cache=tmp_path / str(n), workers=n).folder)
        for n in (1, 2, 7)
    ]
    assert made[0] == made[1] == made[2]


def test_second_preparation_reuses_the_first_and_says_so(spec, tmp_path):
    seen = []
    first = prepare(spec, vocab_size=400, cache=tmp_path / "cache", on_progress=seen.append)
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ["reading", "learning the tokenizer", "encoding", "done"]
    seen.clear()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    again = prepare(spec, vocab_size=400, cache=tmp_path / "cache", on_progress=seen.append)
    assert [progress.stage for progress in seen] == ["reading", "reused"]
    assert "reused the prepared data of text.txt" in seen[-1].notes
    assert again.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_changed_text_with_old_times_is_prepared_anew(spec, text, tmp_path):
    first = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    path = Path(spec.train[0])
    times = path.stat()
    path.write_text(text.replace("e", "o", 1))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    assert second.folder != first.folder
    assert second.corpus_sha256 != first.corpus_sha256


def test_every_choice_has_its_own_place(spec, tmp_path):
    cache = tmp_path / "cache"
    train_bpe(["some text"], 300).save(tmp_path)
    folders = {
        prepare(spec, tokenizer="bytes", cache=cache).folder,
        prepare(spec, vocab_size=300, cache=cache).folder,
        prepare(spec, vocab_size=301, cache=cache).folder,
        prepare(spec, tokenizer=str(tmp_path), cache=cache).folder,
        prepare(CorpusSpec(spec.train, val_share=0.2), tokenizer="bytes", cache=cache).folder,
    }
    assert len(folders) == 5


def test_learned_tokenizer_is_reused_and_a_damaged_one_learned_again(spec, tmp_path):
    first = content(prepare(spec, vocab_size=400, cache=tmp_path).folder)
    (stored,) = (tmp_path / "tokenizers").iterdir()
    for damage in (lambda old: old, lambda old: old[:-9], lambda old: old.replace("a", "b", 1), lambda old: "[]"):
        folder = next((tmp_path / "prepared").iterdir())
        for path in folder.iterdir():
            path.unlink()
        stored.write_text(damage(stored.read_text()))
        assert content(prepare(spec, vocab_size=400, cache=tmp_path).folder) == first


@pytest.mark.parametrize("damage", ["missing file", "short file", "manifest"])
def test_damaged_prepared_data_is_made_again(damage, spec, tmp_path):
    folder = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache").folder
    whole = content(folder)
    if damage == "missing file":
        (folder / "val-00000.bin").unlink()
    elif damage == "short file":
        (folder / "train-00000.bin").write_bytes(b"")
    else:
        (folder / "manifest.json").write_text("{}")
    assert content(prepare(spec, tokenizer="bytes", cache=tmp_path / "cache").folder) == whole
    assert not list((tmp_path / "cache").rglob("*.tmp"))


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop, SystemExit])
@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_preparation_leaves_nothing(error, workers, spec, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(preparation, "_SECONDS_BETWEEN_REPORTS", 0)
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.stage == "encoding" and progress.done_bytes:
            assert list((tmp_path / "cache").rglob("*.tmp"))
            raise error

    with pytest.raises(error):
        prepare(spec, tokenizer="bytes", cache=tmp_path / "cache", workers=workers, on_progress=stop)
    assert everything_in(tmp_path / "cache") == ["prepared"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hasten-encode")]
    assert seen[-1].megabytes_per_second > 0
    assert seen[-1].seconds_left >= 0


def test_bad_text_leaves_nothing_behind(tmp_path):
    records = [json.dumps({"text": f"text {i}"}) for i in range(900)]
    (tmp_path / "a.jsonl").write_text("\n".join([*records, *["{"] * 20]))
    for tokenizer in ("bytes", "bpe"):
        with pytest.raises(DataError, match="cannot be used"):
            prepare(CorpusSpec((str(tmp_path / "a.jsonl"),)), tokenizer=tokenizer, cache=tmp_path / "cache")
        assert not [name for name in everything_in(tmp_path / "cache") if "/" in name]


def test_replacements_are_in_the_manifest_with_their_places(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff\0")
    data = prepare(CorpusSpec((str(tmp_path / "a.txt"),)), tokenizer="bytes", cache=tmp_path / "cache")
    assert set(data.manifest["counts"].values()) == {1}
    assert len(data.manifest["counts"]) == 2
    assert "a.txt byte" in data.manifest["notes"][0]


def test_abandoned_folder_of_yesterday_is_removed_and_a_fresh_one_is_not(spec, tmp_path):
    for name, age in (("old.tmp", 90_000), ("fresh.tmp", 0)):
        folder = tmp_path / "prepared" / name
        folder.mkdir(parents=True)
        (folder / "train-00000.bin").touch()
        for path in (folder / "train-00000.bin", folder):
            os.utime(path, (time.time() - age, time.time() - age))
    prepare(spec, tokenizer="bytes", cache=tmp_path)
    assert [path.name for path in (tmp_path / "prepared").glob("*.tmp")] == ["fresh.tmp"]


def test_preparations_of_the_same_text_at_once_agree(spec, tmp_path):
    results, errors = [], []

    def run():
        try:
            results.append(prepare(spec, vocab_size=400, cache=tmp_path / "cache"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({data.folder for data in results}) == 1
    results[0].verify()
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_preparation_works_from_a_script_without_a_main_guard(tmp_path):
    script = """
        from hasten.data.corpus import CorpusSpec
        from hasten.data.preparation import prepare
        open("a.txt", "w").write("".join(f"line {i} of a text\\n" for i in range(20_000)))
        data = prepare(CorpusSpec(("a.txt",)), tokenizer="bytes", workers=2)
        print(data.train.source_bytes + data.val.source_bytes)
        import sys
        print("torch" in sys.modules)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    environment = {**os.environ, "HASTEN_CACHE": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, env=environment, check=False)
    assert (run.stderr, run.stdout.split()) == ("", [str((tmp_path / "a.txt").stat().st_size), "False"])


def test_killed_preparation_is_done_again(spec, tmp_path):
    script = f"""
        import os
        from hasten.data.corpus import CorpusSpec
        from hasten.data import preparation
        write = preparation.write_manifest
        preparation.write_manifest = lambda *args, **kinds: os._exit(9)
        preparation.prepare(CorpusSpec({spec.train!r}), tokenizer="bytes")
    """
    environment = {**os.environ, "HASTEN_CACHE": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=False)
    assert run.returncode == 9
    data = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    data.verify()


@pytest.mark.parametrize("workers", [0, -1])
def test_number_of_workers_is_checked(workers, spec):
    with pytest.raises(DataError, match="at least 1"):
        prepare(spec, workers=workers)


def test_cache_that_cannot_be_written_is_named(spec, tmp_path):
    (tmp_path / "file").touch()
    for tokenizer in ("bytes", "bpe"):
        with pytest.raises(DataError, match=r"cannot be written.*HASTEN_CACHE"):
            prepare(spec, tokenizer=tokenizer, cache=tmp_path / "file")


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("HASTEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x" / "hasten"


# --- fast encoders -------------------------------------------------------------------------------------------


def foreign(kind):
    """A learned vocabulary, as other tools write it."""
    contractions = "it's isn't they're I'll we've I'm he'd " * 9
    tokenizer = train_bpe([Path(encoders.__file__).read_text(encoding="utf-8")] * 3 + [contractions], 600)
    description = json.loads(tokenizer.document)
    if kind == "split":
        pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    if kind == "normalized":
        description["normalizer"] = {"type": "NFC"}
    return type(tokenizer)(json.dumps(description))


@pytest.mark.parametrize("kind", ["own", "split", "normalized"])
def test_chosen_encoder_gives_the_ids_of_the_tokenizer(kind, text):
    tokenizer = foreign(kind)
    name, encode = encoders.fastest(tokenizer)
    rng = np.random.default_rng(0)
    points = np.setdiff1d(np.arange(0x3000), np.arange(0xD800, 0xE000))
    fuzz = ["".join(map(chr, rng.choice(points, rng.integers(0, 30)))) for _ in range(2000)]
    assert not encoders.disagrees(encode, tokenizer, [*fuzz, text, *encoders.AWKWARD])
    assert name in encoders.ENCODERS


TRICKY = " |  |\n|\t|\r|\xa0|\u3000|\x1c|\x85|'|'s|re|ll|ve|d|m|t|S|a|Bc|_|1|23|0|²"
TRICKY += "|\u0660|.|(|-|\u2019|e\u0301|é|ß|你|한|\u200d|\ufeff"
TRICKY = [*TRICKY.split("|"), "\0", "\U0001f600", DOCUMENT_TEXT]


@pytest.mark.parametrize("kind", ["own", "split"])
@pytest.mark.parametrize("name", ["kitoken", "tiktoken"])
def test_fast_encoder_gives_the_same_ids_on_ten_thousand_tricky_texts(name, kind, text):
    pytest.importorskip(name)
    tokenizer = foreign(kind)
    encode, rng = encoders.ENCODERS[name](tokenizer), random.Random(0)
    texts = ["".join(rng.choices(TRICKY, k=rng.randrange(1, 9))) for _ in range(10_000)]
    differ = [text for text in [*texts, text, *encoders.AWKWARD] if encoders.disagrees(encode, tokenizer, [text])]
    assert differ == []


def test_encoder_with_other_ids_is_not_chosen(monkeypatch):
    tokenizer = foreign("own")
    wrong = {"wrong": lambda tokenizer: lambda text: tokenizer.encode(text)[::-1], "tokenizers": encoders.plain}
    monkeypatch.setattr(encoders, "ENCODERS", wrong)
    assert encoders.fastest(tokenizer)[0] == "tokenizers"


def test_text_on_which_a_fast_encoder_fails_is_encoded_by_the_tokenizer(monkeypatch):
    tokenizer = foreign("own")

    def fails_on_long(text):
        if len(text) > 5000:
            raise ValueError("regular expression too deep")
        return tokenizer.encode(text)

    monkeypatch.setattr(encoders, "ENCODERS", {"brittle": lambda tokenizer: fails_on_long})
    name, encode = encoders.fastest(tokenizer)
    assert name == "brittle"
    assert np.array_equal(encode("ab" * 3000), tokenizer.encode("ab" * 3000))


def test_difference_found_along_the_text_falls_back_to_the_tokenizer(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 1000)
    plain = content(prepare(spec, vocab_size=400, cache=tmp_path / "plain").folder)

    def sly(tokenizer):
        return lambda text: tokenizer.encode(text)[: None if "argparse" not in text else -1]

    monkeypatch.setattr(encoders, "ENCODERS", {"sly": sly})
    seen = []
    data = prepare(spec, vocab_size=400, cache=tmp_path / "sly", on_progress=seen.append, workers=2)
    assert content(data.folder) == plain
    assert any(note.startswith("sly gave other ids") for note in seen[-1].notes)


def test_bytes_need_no_encoder():
    assert encoders.fastest(byte_tokenizer())[0] == "bytes"


# --- the sample a vocabulary is learned from -----------------------------------------------------------------


def test_small_text_is_its_own_sample():
    assert sample(["a b", "c", ""]) == ["a b", "c", ""]


def test_sample_is_bounded_even_and_in_order():
    texts = [f"{i:06d} " + "word " * 18 for i in range(10_000)]
    chosen = sample(iter(texts), most_bytes=100_000)
    numbers = [int(text[:6]) for text in chosen]
    assert 40_000 < sum(map(len, chosen)) <= 100_000
    assert numbers == sorted(numbers)
    assert max(np.diff([0, *numbers, 10_000])) < 60
    assert chosen == sample(texts, most_bytes=100_000)


@pytest.mark.parametrize("joint", ["", " "])
def test_sample_bounds_what_does_not_repeat(joint):
    rng = np.random.default_rng(0)
    texts = [joint.join(map(str, rng.integers(10**9, 10**10, 100))) for _ in range(1000)]
    assert sum(map(len, sample(texts, most_different=200_000))) < 230_000
    assert sample(["the same words "] * 5000, most_different=1000) == ["the same words "] * 5000


def test_prepared_data_opens_by_its_folder(spec, tmp_path):
    data = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    opened = PreparedData.open(data.folder)
    assert (opened.tokenizer_sha256, opened.vocab_size) == (byte_tokenizer().sha256, 257)

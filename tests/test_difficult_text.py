"""Text that is damaged, odd, huge or tiny, through preparation: kept to the byte, or replaced and counted."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from sizes import size

from hasten.cli import main
from hasten.data import counts
from hasten.data.corpus import CorpusSpec
from hasten.data.preparation import prepare
from hasten.data.shards import PreparedData
from hasten.errors import DataError

# Bytes that no text holds, the start of the file left out, where a byte order mark goes without a trace in the text.
ODD = [
    b"\xff", b"\xfe", b"\x80", b"\xbf", b"\xc0\xaf", b"\xc1\xbf", b"\xc3", b"\xc3(", b"\xe2\x82", b"\xe2(\xa1",
    b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x9f\x98", b"\xf0(\x8c\xbc", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80",
    b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80", b"\x00", b"\x00\x00\x00", b"a\x00b", b"\r\n", b"\r", b"\n\r",
    b"\r\r\n", b"\x0b", b"\x0c", b"\x1b[31m", b"\x07", b"\x08", b"\x1a", b"\x7f", "\x85".encode(), "\u2028".encode(),
    "\u2029".encode(), "\ufeff".encode(), "\ufffd".encode(), "\ufffe".encode(), "\uffff".encode(),
    "\U0010ffff".encode(),
    "e\u0301".encode(), "\u202e".encode(), "\u200d".encode(), "\U0001f469\u200d\U0001f680".encode(), "\ufb01".encode(),
    "\u00df".encode(), "\u0130".encode(), b"<|endoftext|>", b"\xef\xbb", b"\xef\xbb\xbf\xef\xbb\xbf",
]  # fmt: skip
FILLER = "".join(f"a line of plain text, number {number}\n" for number in range(60))


def prepared(path: Path, cache: Path, **more) -> PreparedData:
    return prepare(CorpusSpec((str(path),), **more), tokenizer="bytes", cache=cache)


def texts_of(data: PreparedData) -> list[str]:
    """Return every document that was stored."""
    texts = []
    for shards in (data.train, data.val):
        bounds = shards.starts(0, shards.num_documents).tolist()
        tokens = shards.read(0, shards.num_tokens).tolist()
        texts += [data.tokenizer.decode(tokens[begin + 1 : end]) for begin, end in pairwise(bounds)]
    return texts


def amounts(data: PreparedData) -> dict[str, int]:
    """Return what was counted, after a check that the report has a line with a place for each."""
    stored = data.manifest["counts"]
    assert [note.split(" (")[0] for note in data.manifest["notes"]] == [f"{n} {kind}" for kind, n in stored.items()]
    assert all(note.isprintable() for note in data.manifest["notes"])
    return stored


def expected_of(content: bytes) -> tuple[str, dict[str, int]]:
    """Return what is kept of bytes, and what is counted, by another way than the code's: bytes.decode."""
    text = content.decode("utf-8", "surrogateescape")
    bad, nul = len(re.findall("[\udc80-\udcff]", text)), text.count("\0")
    kept = re.sub("[\0\udc80-\udcff]", "\ufffd", text)
    return kept, {kind: n for kind, n in ((counts.BAD_BYTES, bad), (counts.NUL_BYTES, nul)) if n}


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_odd_bytes_are_kept_or_replaced_and_counted(odd, tmp_path):
    content = FILLER.encode() + b"before " + odd + b" behind\n" + odd
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text(FILLER)
    text, counted = expected_of(content)
    data = prepared(tmp_path / "a.txt", tmp_path / "cache", val=(str(tmp_path / "b.txt"),), val_share=0.0)
    assert texts_of(data) == [text, FILLER]
    assert amounts(data) == counted
    assert data.train.source_bytes == len(content)


def fuzzed(chance: random.Random) -> bytes:
    """Return a string of characters, bytes and odd parts, now and then a long one."""
    parts = []
    for _ in range(chance.choice((1, 2, 5, 20, 60))):
        kind = chance.random()
        if kind < 0.3:
            parts.append(chance.choice(ODD))
        elif kind < 0.5:
            parts.append(chance.randbytes(chance.randint(1, 4)))
        elif kind < 0.7:
            parts.append(chr(chance.choice((chance.randrange(0xD800), chance.randrange(0xE000, 0x110000)))).encode())
        else:
            parts.append(b" plain words")
    return b"x" + b"".join(parts)


@pytest.mark.torture
def test_ten_thousand_fuzzed_records_are_kept_or_replaced_and_counted(tmp_path):
    chance, records, expected = random.Random(0), [], []
    counted = dict.fromkeys((counts.BAD_BYTES, counts.LONE_SURROGATES, counts.NUL_BYTES), 0)
    for number in range(size(10_000, 200_000)):
        text = fuzzed(chance).decode("utf-8", "surrogateescape")
        escaped = number % 3 == 0  # as \udcff in the JSON; else as the bytes themselves
        if escaped and number % 2:
            text += chr(chance.randrange(0xD800, 0xDC00)) + "|"  # half of a pair, which no bytes can hold
        records.append(json.dumps({"text": text}, ensure_ascii=escaped).encode("utf-8", "surrogateescape"))
        text = json.loads(records[-1].decode("utf-8", "surrogateescape"))["text"]
        for kind, pattern in (
            (counts.BAD_BYTES, "[\udc80-\udcff]"),
            (counts.LONE_SURROGATES, "[\ud800-\udc7f\udd00-\udfff]"),
            (counts.NUL_BYTES, "\0"),
        ):
            counted[kind] += len(re.findall(pattern, text))
        expected.append(re.sub("[\0\ud800-\udfff]", "\ufffd", text))
    # Much is bad on purpose, but no file may be mostly bad.
    records += [json.dumps({"text": FILLER}).encode()] * (len(records) // 20)
    expected += [FILLER] * (len(records) - len(expected))
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(records))
    data = prepared(tmp_path / "a.jsonl", tmp_path / "cache")
    assert sorted(texts_of(data)) == sorted(expected)
    assert amounts(data) == counted


# --- too little ---------------------------------------------------------------------------------------------------

LITTLE = {
    "no byte": (b"", "is empty; expected text"),
    "blanks": (b" \t\r\n" * 500, "holds no text, only white space; expected at least one line"),
    "a byte order mark": (b"\xef\xbb\xbf", "holds no text"),
    "NUL bytes": (bytes(5000), "is not text: it looks like binary data"),
    "a letter": (b"a", "holds too little text to set a validation part aside; give more text, or name"),
    "shorter than a row": (b"some words\n" * 9, r"has \d+ tokens, and one row takes 257.*: give more text"),
    "records without text": (b'{"text": ""}\n' * 50, "holds no text"),
    "no record": (b"\n\n", "holds no text"),
    "an empty folder": (None, "holds no text file; name a folder with text in it"),
    "a folder of empty files": (None, "is empty; expected text"),
}


@pytest.mark.parametrize("case", LITTLE)
def test_too_little_text_is_one_sentence_and_exit_code_2(case, tmp_path, capsys):
    content, says = LITTLE[case]
    path = tmp_path / ("a.jsonl" if "record" in case else "a.txt")
    if content is None:
        path.mkdir()
        for name in ("b.txt", "c.txt") if "files" in case else ():
            (path / name).touch()
    else:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["train", f"data={path}", "data.tokenizer=bytes", "seq_len=256", "budget=1", "batch_tokens=256"])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(says, " ".join(error.split())), error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("*.safetensors"))


# --- records ------------------------------------------------------------------------------------------------------


def bad_record(kind: str, chance: random.Random) -> str:
    word = "".join(chance.choices("abcxyz é\u2028", k=chance.randint(1, 9)))
    return {
        "broken": json.dumps({"text": word})[: -chance.randint(1, 9)],
        "no key": json.dumps({"title": word, "body": word}),
        "wrong type": json.dumps({"text": chance.choice((None, True, 1.5, [word], {"text": word}))}),
        "no object": json.dumps(chance.choice((None, 3, [word], False))),
        "twice": json.dumps({"text": word, "n": {"text": 1}})[:-1] + ', "text": "another"}',
        "deep": '{"text": ' + "[" * 10_000 + "]" * 10_000 + "}",
    }[kind]


@pytest.mark.torture
def test_bad_records_are_counted_with_their_lines_and_more_than_a_hundredth_stops(tmp_path):
    chance = random.Random(0)
    kinds = ("broken", "no key", "wrong type", "no object", "twice", "deep")
    for case in range(size(100, 1000)):
        bad = chance.randint(1, 4)
        lines = [json.dumps({"text": f"document {number}"}) for number in range(200)]
        places = sorted(chance.sample(range(200), bad))
        for place in places:
            lines[place] = bad_record(kinds[case % 6], chance)
        (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
        named = [f"a.jsonl line {place + 1}: " for place in places]
        if bad <= 2:  # of 200
            data = prepared(tmp_path / "a.jsonl", tmp_path / str(case))
            assert data.manifest["counts"] == {counts.BAD_RECORD: bad}
            said = data.manifest["notes"][0]
        else:
            with pytest.raises(DataError, match=f"{bad} of 200 JSON records cannot be used, more than 1%") as caught:
                prepared(tmp_path / "a.jsonl", tmp_path / str(case))
            said = str(caught.value)
        assert all(name in said for name in named), (case, said)
        assert said.isprintable()


def test_a_key_that_comes_again_elsewhere_is_not_given_twice(tmp_path):
    records = [{"text": f'the "text" {n}', "kind": "text", "more": [{"text": 1}, {"text": 2}]} for n in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = prepared(tmp_path / "a.jsonl", tmp_path / "cache")
    assert sorted(texts_of(data)) == sorted(record["text"] for record in records)
    assert amounts(data) == {}


# --- memory -------------------------------------------------------------------------------------------------------

_PREPARE = """
import sys
from pathlib import Path
from hasten.data.corpus import CorpusSpec
from hasten.data.preparation import prepare
data = prepare(CorpusSpec((sys.argv[1],)), tokenizer=sys.argv[2], cache=Path(sys.argv[3]), workers=2)
print(data.train_size.source_bytes + data.val.source_bytes, data.train.num_documents + data.val.num_documents)
# Not getrusage, whose peak is the parent's where that was larger when it started this process.
status = Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) // 1000)
"""


def memory_of(path: Path, tokenizer: str, cache: Path) -> tuple[int, int]:
    """Prepare a file in a process of its own; return its documents and the most megabytes it held."""
    command = [sys.executable, "-c", _PREPARE, str(path), tokenizer, str(cache)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, documents, megabytes = map(int, run.stdout.split())
    return documents, megabytes


ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")


@ON_LINUX
@pytest.mark.torture
@pytest.mark.parametrize(("what", "tokenizer"), [("words", "bytes"), ("a word", "bytes"), ("100,000 letters", "bpe")])
def test_one_huge_line_takes_less_than_500_megabytes(what, tokenizer, tmp_path):
    megabytes = size(64, 1000) if tokenizer == "bytes" else 1
    part = {"words": "many words and no line end ", "a word": "letters", "100,000 letters": "x" * 100_000 + " and\n"}
    with open(tmp_path / "a.txt", "w") as file:
        for _ in range(megabytes):
            file.write((part[what] * (1_000_000 // len(part[what]) + 1))[:1_000_000])
    documents, held = memory_of(tmp_path / "a.txt", tokenizer, tmp_path / "cache")
    assert documents >= 2
    assert held < 500


@ON_LINUX
@pytest.mark.torture
def test_many_tiny_documents_take_less_than_500_megabytes(tmp_path):
    number = size(100_000, 1_000_000)
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(f'{{"text": "tiny {place} document"}}\n' for place in range(number))
    documents, held = memory_of(tmp_path / "a.jsonl", "bytes", tmp_path / "cache")
    assert documents == number
    assert held < 500

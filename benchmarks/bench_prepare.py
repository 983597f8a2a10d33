"""What preparing text costs: encoding speed, memory for one large file, documents of 44 to 100,000 bytes.

    python benchmarks/bench_prepare.py [--rounds 7] [--megabytes 1000] [--out FOLDER]
    python benchmarks/bench_prepare.py --only documents [--against OTHER/src]

Speed: megabytes per CPU-second of one thread, on pieces as preparation makes them. Every round runs every encoder
once, in an order that turns, after a warm-up round; the figures are medians over rounds, the ratios medians of the
rounds' own ratios. The ids of all encoders are compared over all of the text.

Memory: a file is generated, a fresh interpreter prepares it, and its peak resident size is read from the kernel
(preparation uses threads, so there are no children to add; the children's peak is recorded to show that).

Documents: 20 MB of text cut into documents of one size, as lines and as JSON lines, prepared with one worker by a
fresh interpreter; megabytes of text per CPU-second of all of `prepare`, each size as a share of the longest in the same
round. With ``--against`` another version prepares the same in turns, and the sha256 of every file is compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the comparison is of one thread each

import hasten
from hasten.data.corpus import CorpusSpec, open_corpus
from hasten.data.encoders import ENCODERS, disagrees
from hasten.data.sampling import sample
from hasten.data.tokenizer import Tokenizer, train_bpe

# A splitting rule of another family, as newer vocabularies have it.
_OTHER_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MEASURED_BYTES = 4_000_000

_SIZES = (44, 118, 1000, 100_000)
_DOCUMENTS_BYTES = 20_000_000
_DOCUMENTS = """
import hashlib, json, sys, time
from pathlib import Path
from hasten.data.corpus import CorpusSpec
from hasten.data.preparation import prepare
spec = CorpusSpec((sys.argv[1],), separator="\\n" if sys.argv[1].endswith(".txt") else None)
start = time.process_time()
data = prepare(spec, tokenizer=sys.argv[2], cache=Path(sys.argv[3]), workers=1)
seconds = time.process_time() - start
files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(data.folder.iterdir())}
print(json.dumps({
    "mb_per_cpu_second": (data.train.source_bytes + data.val.source_bytes) / 1e6 / seconds,
    "files": hashlib.sha256(json.dumps([data.folder.name, files]).encode()).hexdigest(),
}))
"""

_PREPARE = """
import json, resource, sys, time
from pathlib import Path
from hasten.data.corpus import CorpusSpec
from hasten.data.preparation import prepare
notes, spent = [], {}
def watch(progress):
    spent.setdefault(progress.stage, time.monotonic())
    notes[:] = progress.notes
start, cpu = time.monotonic(), time.process_time()
data = prepare(CorpusSpec((sys.argv[1],)), tokenizer=sys.argv[2], cache=Path(sys.argv[3]), on_progress=watch)
marks = [*spent.items(), ("end", time.monotonic())]
print(json.dumps({
    "seconds": time.monotonic() - start,
    "cpu_seconds": time.process_time() - cpu,
    "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    "children_peak_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000,
    "source_bytes": data.train.source_bytes + data.val.source_bytes,
    "tokens": data.train.num_tokens + data.val.num_tokens,
    "stage_seconds": {name: round(marks[i + 1][1] - at, 2) for i, (name, at) in enumerate(marks[:-1])},
    "notes": notes[:4],
}))
"""


def main() -> None:
    """Run both measurements, print their figures, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("speed", "memory", "documents"))
    parser.add_argument("--against", type=Path, help="the src folder of another version, for the documents")
    options = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("numpy", "tokenizers", "kitoken", "tiktoken")}
    parts = {
        "speed": lambda: encoding_speed(options.rounds),
        "memory": lambda: memory(options.megabytes),
        "documents": lambda: documents(options.rounds, options.against),
    }
    result = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": versions,
        **{name: part() for name, part in parts.items() if options.only in (None, name)},
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def encoding_speed(rounds: int) -> dict:
    """Return megabytes per CPU-second of every encoder, for our own vocabulary and for one with another rule."""
    texts = sample(piece.text for piece in open_corpus(CorpusSpec(("python",))).pieces("train"))
    own = train_bpe(texts, 4096)
    measured = sample(texts, most_bytes=_MEASURED_BYTES)
    return {
        "hasten bpe 4096": _compare(own, measured, rounds),
        "same vocabulary, GPT-4 style rule": _compare(_with_other_rule(own), measured, rounds),
    }


def _with_other_rule(tokenizer: Tokenizer) -> Tokenizer:
    description = json.loads(tokenizer.document)
    split = {"type": "Split", "pattern": {"Regex": _OTHER_RULE}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    return Tokenizer(json.dumps(description))


def _compare(tokenizer: Tokenizer, texts: list[str], rounds: int) -> dict:
    encoders = {name: make(tokenizer) for name, make in ENCODERS.items()}
    size = sum(len(text.encode()) for text in texts) / 1e6
    equal = {name: not disagrees(encode, tokenizer, texts) for name, encode in encoders.items()}  # and the warm-up
    speeds: dict[str, list[float]] = {name: [] for name in encoders}
    names = list(encoders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            for text in texts:
                encoders[name](text)
            speeds[name].append(size / (time.process_time() - start))
    plain = np.array(speeds["tokenizers"])
    table = {
        name: {
            "mb_per_cpu_second": round(statistics.median(values), 2),
            "lowest": round(min(values), 2),
            "highest": round(max(values), 2),
            "times_plain": round(float(np.median(np.array(values) / plain)), 2),
            "ids_equal": equal[name],
        }
        for name, values in speeds.items()
    }
    for name, row in table.items():
        print(
            f"{name:12s} {row['mb_per_cpu_second']:6.2f} MB/CPU-s  x{row['times_plain']:.2f}  ids equal: {equal[name]}"
        )
    return table | {"megabytes": round(size, 3), "rounds": rounds}


def documents(rounds: int, against: Path | None) -> list[dict]:
    """Return the speed of preparing documents of each size, beside that of the longest."""
    sources = {"now": Path(hasten.__file__).parents[1], **({"before": against.resolve()} if against else {})}
    rows = []
    with tempfile.TemporaryDirectory(prefix="hasten-bench-") as folder:
        files = _documents(Path(folder))
        for kind, tokenizer in itertools.product(("txt", "jsonl"), ("bytes", str(Path(folder, "tokenizer")))):
            cases = list(itertools.product(_SIZES, sources))
            runs: dict[tuple, list[dict]] = {case: [] for case in cases}
            for turn in range(rounds):
                for size, version in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
                    with tempfile.TemporaryDirectory(dir=folder) as cache:
                        command = [sys.executable, "-c", _DOCUMENTS, str(files[size, kind]), tokenizer, cache]
                        environment = {**os.environ, "PYTHONPATH": str(sources[version])}
                        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                    runs[size, version].append(json.loads(run.stdout))
            for size, version in cases:
                speeds, longest = (
                    np.array([run["mb_per_cpu_second"] for run in runs[one, version]]) for one in (size, _SIZES[-1])
                )
                row = {
                    "version": version,
                    "documents": "lines" if kind == "txt" else "JSON lines",
                    "tokenizer": "bytes" if tokenizer == "bytes" else "BPE 4096, kitoken",
                    "bytes_each": size,
                    "mb_per_cpu_second": round(float(np.median(speeds)), 2),
                    "lowest": round(float(speeds.min()), 2),
                    "highest": round(float(speeds.max()), 2),
                    "share_of_longest": round(float(np.median(speeds / longest)), 2),
                    "same_files": len({run["files"] for which in sources for run in runs[size, which]}) == 1,
                }
                print(" ".join(f"{value!s:>18s}" for value in row.values()), flush=True)
                rows.append(row)
    return rows


def _documents(folder: Path) -> dict[tuple[int, str], Path]:
    """Write real text, cut into documents of each size, in both formats, and a tokenizer learned from it."""
    texts = sample(piece.text for piece in open_corpus(CorpusSpec(("python",))).pieces("train"))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    train_bpe(sample(texts, most_bytes=_MEASURED_BYTES), 4096).save(tokenizer)
    words = " ".join(" ".join(texts).encode("ascii", "ignore").decode().split())
    text = (words * (_DOCUMENTS_BYTES // len(words) + 1))[:_DOCUMENTS_BYTES]
    files = {}
    for size in _SIZES:
        parts = [text[begin : begin + size] for begin in range(0, len(text), size)]
        files[size, "txt"], files[size, "jsonl"] = folder / f"{size}.txt", folder / f"{size}.jsonl"
        files[size, "txt"].write_text("\n".join(parts), encoding="utf-8")
        files[size, "jsonl"].write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), encoding="utf-8")
    return files


def memory(megabytes: int) -> dict:
    """Return peak resident sizes of preparing generated files of `megabytes`."""
    cases = {"lines": "bpe", "one line of words": "bpe", "one line without a space": "bpe"}
    results = {}
    for case, tokenizer in cases.items():
        with tempfile.TemporaryDirectory(prefix="hasten-bench-") as folder:
            path = Path(folder, "text.txt")
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(_generated(case, megabytes * 1_000_000))
            command = [sys.executable, "-c", _PREPARE, str(path), tokenizer, folder]
            environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
            run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            results[case] = row = json.loads(run.stdout) | {"file_bytes": path.stat().st_size}
        speed = row["source_bytes"] / 1e6 / row["seconds"]
        print(f"{case}: {row['peak_rss_mb']:.0f} MB peak, {row['seconds']:.1f} s, {speed:.1f} MB/s {row['notes'][:1]}")
    return results


def _generated(case: str, size: int) -> Iterator[str]:
    """Yield about `size` bytes of real source lines, shuffled; on one line, or letters only."""
    rng = random.Random(0)
    texts = sample(piece.text for piece in open_corpus(CorpusSpec(("python",))).pieces("train"))
    lines = [line for text in texts for line in text.encode("ascii", "ignore").decode().splitlines(keepends=True)]
    done = 0
    while done < size:
        part = "".join(rng.choices(lines, k=2000))
        if case == "one line of words":
            part = part.replace("\n", " ")
        elif case == "one line without a space":
            part = "".join(part.split())
        yield part
        done += len(part)


if __name__ == "__main__":
    main()

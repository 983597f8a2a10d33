"""What preparing text costs: encoding speed against plain `tokenizers`, and resident memory for one large file.

    python benchmarks/bench_prepare.py [--rounds 7] [--megabytes 1000] [--out FOLDER]

Speed: megabytes per CPU-second of one thread, on pieces as preparation makes them. Every round runs every encoder
once, in an order that turns, after a warm-up round; the figures are medians over rounds, the ratios medians of the
rounds' own ratios. The ids of all encoders are compared over all of the text.

Memory: a file is generated, a fresh interpreter prepares it, and its peak resident size is read from the kernel
(preparation uses threads, so there are no children to add; the children's peak is recorded to show that).
"""

from __future__ import annotations

import argparse
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
    options = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("numpy", "tokenizers", "kitoken", "tiktoken")}
    result = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": versions,
        "speed": encoding_speed(options.rounds),
        "memory": memory(options.megabytes),
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

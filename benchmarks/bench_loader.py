"""What batches cost: tokens collated per CPU-second from memory-mapped shards, by shape of the step.

    python benchmarks/bench_loader.py [--tokens 64000000] [--seconds 1] [--repeats 5] [--out result.json]

Every token counted is an input with its label and, with the mask, its document number, as int64, int64 and int32
tensors in a shuffled order. Shapes are measured in turn, `--repeats` times over, and the median is reported; the first
touch of the data, where checksums are computed, is timed by itself. Document lengths are log-normal with a median of
400 tokens and a mean of 690, near those of web text.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hasten.data.batches import PackedBatches
from hasten.data.order import order_key, permuted
from hasten.data.shards import PreparedData, ShardWriter, write_manifest

VOCAB_SIZE, DOCUMENT = 4096, 0
# (row length, rows of a step, rows of a micro-batch, document mask)
SHAPES = (
    (256, 32, 16, True),
    (256, 32, 16, False),
    (256, 32, 1, True),
    (1024, 32, 8, True),
    (1024, 512, 32, True),
    (2048, 256, 16, True),
)


def prepare(folder: Path, num_tokens: int) -> PreparedData:
    """Write `num_tokens` random tokens in documents of web-like length."""
    generator = np.random.default_rng(0)
    splits = {}
    for split, wanted in (("train", num_tokens), ("val", 1000)):
        with ShardWriter(folder, split, vocab_size=VOCAB_SIZE, document_token=DOCUMENT) as writer:
            written = 0
            while written < wanted:
                size = 1 + int(generator.lognormal(np.log(400), 1.04))
                writer.start_document()
                writer.append(generator.integers(1, VOCAB_SIZE, size), source_bytes=3 * size)
                written += size + 1
            splits[split] = writer.close()
    write_manifest(
        folder,
        splits=splits,
        corpus="random",
        corpus_sha256="",
        tokenizer_sha256="",
        vocab_size=VOCAB_SIZE,
        document_token=DOCUMENT,
    )
    return PreparedData.open(folder)


def batches_of(data: PreparedData, shape: tuple[int, int, int, bool]) -> PackedBatches:
    """Return the batches of one shape."""
    seq_len, rows, micro_rows, mask = shape
    return PackedBatches(
        data.train, seq_len=seq_len, rows_per_step=rows, micro_rows=micro_rows, seed=0, document_mask=mask
    )


def measure(batches: PackedBatches, start: int, seconds: float) -> tuple[float, list[float]]:
    """Take steps from row `start` for about `seconds`; return tokens per CPU-second and the wall time of each step."""
    tokens, row, waits = 0, start, []
    began = time.process_time()
    while (spent := time.process_time() - began) < seconds:
        asked = time.perf_counter()
        step = batches.take(row)
        waits.append(time.perf_counter() - asked)
        tokens += sum(batch.num_targets for batch in step)
        row += batches.rows_per_step
    return tokens / spent, waits


def main() -> None:
    """Run every shape, print the figures, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder), options.tokens)
        began = time.process_time()
        data.train.read(0, data.train.num_tokens)
        first_touch = data.train.num_tokens / (time.process_time() - began)
        speeds: dict[tuple, list[float]] = {shape: [] for shape in SHAPES}
        waits: dict[tuple, list[float]] = {shape: [] for shape in SHAPES}
        for repeat in range(options.repeats + 1):
            for shape in SHAPES:
                batches = batches_of(data, shape)
                speed, waited = measure(batches, repeat * batches.num_rows // 3, options.seconds)
                if repeat:  # the first round warms up
                    speeds[shape].append(speed)
                    waits[shape] += waited
        began = time.process_time()
        for block in range(100):
            permuted(np.arange(block << 16, (block + 1) << 16), 10**12, order_key(0, 0, "rows"))
        indexes = (100 << 16) / (time.process_time() - began)
    result = {
        "shapes": [
            {
                **dict(zip(("seq_len", "rows_per_step", "micro_rows", "document_mask"), shape)),
                "million_tokens_per_cpu_second": round(float(np.median(speeds[shape])) / 1e6, 1),
                "slowest_repeat": round(min(speeds[shape]) / 1e6, 1),
                "fastest_repeat": round(max(speeds[shape]) / 1e6, 1),
                "milliseconds_median": round(1e3 * float(np.median(waits[shape])), 3),
                "milliseconds_99th_percentile": round(1e3 * float(np.percentile(waits[shape], 99)), 3),
            }
            for shape in SHAPES
        ],
        "million_tokens_per_cpu_second_at_first_touch": round(first_touch / 1e6, 1),
        "million_indexes_permuted_per_cpu_second": round(indexes / 1e6, 1),
        "peak_resident_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "tokens": data.train.num_tokens,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""What batches cost: collation, the share of a training step, resuming in a huge corpus, prefetching, memory.

    python benchmarks/bench_loader.py [--tokens 64000000] [--seconds 1] [--repeats 5] [--out result.json]

- *collation*: tokens per CPU-second from memory-mapped shards into int64 inputs, int64 labels and int32 document
  numbers, in a shuffled order; shapes in turn, `--repeats` times over, medians. The first touch of the data, where
  checksums are computed, is timed by itself. Document lengths are log-normal with a median of 400 tokens, near those
  of web text.
- *gather*: one vectorised gather of all pieces against a Python loop over them, by length of the pieces.
- *step*: CPU-seconds of loading against those of a whole training step of the `nano` model, same steps.
- *prefetching*: wall time of training steps with and without the thread, alternating.
- *resume*: a made-up corpus of 10**12 tokens (no files; every length and token is computed), opened, moved to a random
  step, first batch.
- *memory*: private memory of a process that reads a small and a large corpus.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.data import PackedBatches
from hasten.data.batches import Batches, Buffers, RowSource
from hasten.data.order import order_key, permuted
from hasten.data.prefetch import Prefetched
from hasten.data.rows import ChunkedRows
from hasten.data.shard_files import spread
from hasten.data.shards import PreparedData, ShardWriter, TokenShards, write_manifest
from hasten.data.windows import Pack, Windows

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from synthetic_documents import Synthetic, counts_of

VOCAB_SIZE, DOCUMENT = 4096, 0
# (packing, row length, rows of a step, document mask, memory used again)
SHAPES = (
    ("best_fit", 256, 32, True, False),
    ("best_fit", 1024, 32, True, False),
    ("best_fit", 1024, 32, True, True),
    ("best_fit", 1024, 32, False, False),
    ("best_fit", 1024, 512, True, False),
    ("best_fit", 1024, 512, True, True),
    ("best_fit", 2048, 256, True, False),
    ("chunk", 1024, 32, True, False),
    ("pad", 1024, 32, True, False),
    ("stream", 1024, 32, True, False),
)
WINDOWS = 22_000  # of 46 million tokens each


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


def batches_of(shards: TokenShards, packing: str, seq_len: int, rows: int, mask: bool) -> Batches:
    """Return the batches of one shape, a step of `rows` rows as one micro-batch."""
    made = ChunkedRows(shards, seq_len) if packing == "stream" else Windows(shards, Pack(packing, (seq_len,))).rows()
    return Batches(RowSource(made, seed=0), seq_len=seq_len, micro_rows=rows, document_mask=mask)


def collation(shards: TokenShards, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Measure every shape in turn."""
    made = {shape: batches_of(shards, *shape[:4]) for shape in SHAPES}
    speeds: dict[tuple, list[float]] = {shape: [] for shape in SHAPES}
    waits: dict[tuple, list[float]] = {shape: [] for shape in SHAPES}
    for repeat in range(repeats + 1):
        for shape, batches in made.items():
            into = Buffers(shape[3]) if shape[4] else None
            position, tokens = (repeat * batches.source.rows.num_rows // 3,), 0
            began = time.process_time()
            while (spent := time.process_time() - began) < (seconds if repeat else 0.2):
                asked = time.perf_counter()
                step, position = batches.take(position, rows=shape[2], into=into)
                waits[shape].append(time.perf_counter() - asked)
                tokens += sum(batch.num_targets for batch in step)
            if repeat:  # the first round warms up
                speeds[shape].append(tokens / spent / 1e6)
    return [
        {
            **dict(zip(("packing", "seq_len", "rows", "document_mask", "memory_used_again"), shape)),
            "million_tokens_per_cpu_second": round(float(np.median(speeds[shape])), 1),
            "slowest_and_fastest_repeat": [round(min(speeds[shape]), 1), round(max(speeds[shape]), 1)],
            "milliseconds_median": round(1e3 * float(np.median(waits[shape])), 3),
            "milliseconds_99th_percentile": round(1e3 * float(np.percentile(waits[shape], 99)), 3),
        }
        for shape in SHAPES
    ]


def gathers(repeats: int) -> list[dict[str, Any]]:
    """Copy 32,768 tokens of pieces of one length from 128 MB, in one gather or piece by piece."""
    generator = np.random.default_rng(0)
    stream = generator.integers(0, VOCAB_SIZE, 64_000_000).astype(np.uint16)
    out = np.empty(1 << 15, np.int64)
    narrow = np.empty(1 << 15, np.uint16)
    results = []
    for length in (16, 128, 512, 1024):
        starts = generator.integers(0, len(stream) - length, (200, (1 << 15) // length))
        lengths = np.full(starts.shape[1], length)

        def together(starts: np.ndarray, lengths: np.ndarray = lengths) -> None:
            out[:] = np.take(stream, spread(starts, lengths), out=narrow, mode="clip")

        def one_by_one(starts: np.ndarray, length: int = length) -> None:
            place = 0
            for start in starts.tolist():
                out[place : place + length] = stream[start : start + length]
                place += length

        times = {together: [], one_by_one: []}
        for _ in range(repeats):
            for way, spent in times.items():
                spent.append(cpu_seconds(lambda way=way, starts=starts: [way(row) for row in starts]) / len(starts))
        nanoseconds = {way.__name__: round(1e9 * float(np.median(s)) / (1 << 15), 2) for way, s in times.items()}
        results.append({"piece_tokens": length, "nanoseconds_per_token": nanoseconds})
    return results


def training(shards: TokenShards, seconds: float) -> dict[str, Any]:
    """Train the `nano` model; return what loading takes of a step, and what prefetching saves of its wall time."""
    from hasten.model import SIZES, Decoder, ModelConfig

    results = []
    for seq_len, rows in ((256, 8), (1024, 8)):
        model = Decoder(ModelConfig(**SIZES["nano"], vocab_size=VOCAB_SIZE, seq_len=seq_len), seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        batches = batches_of(shards, "best_fit", seq_len, rows, True)
        cpu: dict[str, list[float]] = {"load": [], "train": []}
        wall: dict[str, list[float]] = {"plain": [], "prefetched": []}
        with Prefetched(batches) as prefetched:
            # Their positions differ, so that neither finds in the cache what the other has just read.
            ways = {"plain": (batches, (0,)), "prefetched": (prefetched, (batches.source.rows.num_rows // 2,))}
            prefetched.close()
            began = time.perf_counter()
            while time.perf_counter() - began < 60 * seconds:
                for name, (source, position) in ways.items():
                    for step in range(4):
                        asked, asked_cpu = time.perf_counter(), time.process_time()
                        (batch,), position = source.take(position, rows=rows)
                        got_cpu = time.process_time()
                        loss = model(batch.tokens_BT, batch.document_ids_BT, labels_BT=batch.labels_BT)
                        (loss / batch.num_targets).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        if name == "plain":
                            cpu["load"].append(got_cpu - asked_cpu)
                            cpu["train"].append(time.process_time() - got_cpu)
                        if step:  # the first step of a turn waits for the thread to find its place
                            wall[name].append(time.perf_counter() - asked)
                    ways[name] = (source, position)
                # No thread may work while the plain loop is timed.
                prefetched.close()
        load, train = (float(np.median(cpu[name])) for name in ("load", "train"))
        ratio = float(np.median(wall["prefetched"]) / np.median(wall["plain"]))
        results.append(
            {
                "seq_len": seq_len,
                "rows": rows,
                "load_milliseconds": round(1e3 * load, 3),
                "train_milliseconds": round(1e3 * train, 1),
                "share_of_step": round(load / (load + train), 5),
                "wall_time_prefetched_to_plain": round(ratio, 4),
                "steps_timed": len(wall["plain"]),
            }
        )
    return {"model": "nano", "vocabulary": VOCAB_SIZE, "threads": torch.get_num_threads(), "shapes": results}


def resuming(repeats: int) -> dict[str, Any]:
    """Open a corpus of 10**12 tokens whose rows are counted, go to a random step, take its batch."""
    generator = np.random.default_rng(0)
    results: dict[str, Any] = {"tokens": Synthetic(WINDOWS).num_tokens, "documents": Synthetic(WINDOWS).num_documents}
    for mode, lengths in (("view", (1024,)), ("bucket", (64, 128, 256, 512, 1024))):
        pack = Pack("best_fit" if mode == "view" else "bucketed", lengths)
        counts = counts_of(WINDOWS, pack)
        settings = {"seq_len": 1024, "batch_tokens": 1 << 19, "mode": mode, "counts": counts, "total_steps": 10**9}
        settings |= {} if mode == "view" else {"buckets": lengths}
        seconds: dict[str, list[float]] = {"open": [], "load state": [], "first batch": [], "next batch": []}
        for _ in range(repeats):
            stamps = [time.perf_counter()]
            data = PackedBatches(Synthetic(WINDOWS), **settings)
            stamps.append(time.perf_counter())
            rows = counts.rows_WK.sum(axis=0)
            share = generator.random()
            position = [int(3.5 * rows[0])] if mode == "view" else [2, *(int(share * count) for count in rows)]
            data.load_state_dict({**data.state_dict(), "step": int(share * 10**8), "position": position})
            stamps.append(time.perf_counter())
            items = iter(data)
            next(items)
            stamps.append(time.perf_counter())
            next(items)
            stamps.append(time.perf_counter())
            for name, spent in zip(seconds, np.diff(stamps).tolist()):
                seconds[name].append(spent)
        results[mode] = {
            "seconds_median": {name: round(float(np.median(spent)), 4) for name, spent in seconds.items()},
            "seconds_worst": {name: round(max(spent), 4) for name, spent in seconds.items()},
            "state_bytes": len(json.dumps(data.state_dict())),
            "windows_touched_by_the_last": len(data.windows.documents.touched),
        }
    return results


def private_megabytes(folder: Path) -> float:
    """Read 300 steps of a prepared corpus in a process of its own; return the memory that no file stands behind."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from hasten.data import PackedBatches, PreparedData\n"
        "data = PackedBatches(PreparedData.open(sys.argv[1]).train, seq_len=1024, batch_tokens=1 << 16)\n"
        "for _ in zip(range(300), data): pass\n"
        "status = Path('/proc/self/status').read_text().split()\n"
        "print(int(status[status.index('RssAnon:') + 1]) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 1)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the processor time that `work` takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Measure everything, print the figures, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        for path, tokens in ((small, options.tokens // 8), (large, options.tokens)):
            path.mkdir()
            data = prepare(path, tokens)
        touch = cpu_seconds(lambda: data.train.read(0, data.train.num_tokens))
        result["million_tokens_per_cpu_second_at_first_touch"] = round(data.train.num_tokens / touch / 1e6, 1)
        result["collation"] = collation(data.train, options.repeats, options.seconds)
        result["training"] = training(data.train, options.seconds)
        result["private_megabytes"] = {
            f"{tokens // 1_000_000} M tokens": private_megabytes(path)
            for path, tokens in ((small, options.tokens // 8), (large, options.tokens))
        }
        result["utilisation"] = Windows(data.train, Pack("best_fit", (1024,))).report.utilisation
    result["gather"] = gathers(options.repeats)
    result["resume"] = resuming(options.repeats)
    blocks = [np.arange(block << 16, (block + 1) << 16) for block in range(100)]
    spent = cpu_seconds(lambda: [permuted(block, 10**12, order_key(0, 0, "rows")) for block in blocks])
    result["million_indexes_permuted_per_cpu_second"] = round((100 << 16) / spent / 1e6, 1)
    result |= {"tokens": options.tokens, "numpy": np.__version__, "torch": torch.__version__}
    result |= {"python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

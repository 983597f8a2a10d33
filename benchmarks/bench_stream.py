"""What reading text from object storage costs a run: the loader's share of a step, beside the same run from a folder.

    OMP_NUM_THREADS=1 python benchmarks/bench_stream.py [--rounds 3] [--steps 60] [--mib 128] [--out result.json]

An S3 server (moto) in a process of its own, behind a proxy that makes every answer 100 ms late and spoils one in
twenty (503, connection reset, body cut short). Real training steps of `nano` on prepared text, the folder and the
storage in turn, each run from storage with an empty cache that is smaller than the text. The text is the standard
library's sources, repeated until it is large enough: what its tokens are has no influence on the time.

Then the same batches at the pace of an accelerator, which a sleep of 100 ms for 65,536 tokens stands for: the text is
read through in a minute and a half, so that the cache turns over.

Reported is the time in which the model waited for its batches, as a share of the time of the steps (`phases` of
``result.json``), and that of the first step by itself; the bytes that were asked for, and the most that the cache held.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parent.parent / "tests"
LATENCY, SHARE = 0.1, 0.05
PACE = 0.1  # seconds of a step of 65,536 tokens: what an accelerator does with some 100 million parameters
URL = "s3://bucket/prepared"


def serve() -> None:
    """Run the storage until standard input ends; print its address, then what was asked for at each line of input."""
    sys.path.insert(0, str(TESTS))
    from object_storage import Faults, object_storage

    faults = Faults()
    with object_storage(faults) as endpoint:
        print(endpoint, flush=True)
        for line in sys.stdin:
            print(json.dumps({"answers": len(faults.asked), "blocks": len(faults.ranges), "spoiled": faults.spoiled}))
            sys.stdout.flush()
            faults.asked, faults.spoiled = [], 0
            share, latency, seed = line.split()
            faults.share, faults.latency, faults.seed = float(share), float(latency), int(seed)


class Storage:
    """The storage in its own process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.endpoint = self._process.stdout.readline().strip()

    def counts(self, share: float = 0.0, latency: float = 0.0, seed: int = 0) -> dict[str, int]:
        """Return what was asked for since the last call, and set what is done to the answers from now on."""
        self._process.stdin.write(f"{share} {latency} {seed}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def prepared_text(folder: Path, mib: int) -> Path:
    """Return a folder of prepared data of about `mib` MiB of tokens: real text over and over."""
    from hasten.data.corpus import CorpusSpec
    from hasten.data.preparation import prepare
    from hasten.data.shards import ShardWriter, write_manifest

    small, folder = prepare(CorpusSpec(("python",))), folder / "data"
    folder.mkdir()
    settings = {"vocab_size": small.vocab_size, "document_token": small.document_token}
    splits = {}
    for split, tokens, least in (("train", small.train, mib << 19), ("val", small.val, 0)):
        starts = np.append(tokens.document_starts, tokens.num_tokens)
        whole = tokens.read(0, tokens.num_tokens)
        with ShardWriter(folder, split, shard_tokens=1 << 24, **settings) as writer:
            written = 0
            while written <= least:
                for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
                    writer.start_document()
                    writer.append(whole[begin + 1 : end], source_bytes=4 * (end - begin))
                written += len(whole)
            splits[split] = writer.close()
    for entry in small.manifest["files"]:
        shutil.copy(small.folder / entry["file"], folder)
    hashes = {"corpus_sha256": small.corpus_sha256, "tokenizer_sha256": small.tokenizer_sha256}
    write_manifest(folder, splits=splits, corpus="python", **hashes, **settings)
    return folder


def run(data: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the time that steps took and that the model waited for its batches."""
    import hasten

    began = time.perf_counter()
    result = hasten.train(
        data={"train": data, "shuffle_tokens": arguments.shuffle_tokens},
        model="nano",
        budget=arguments.steps,
        threads=1,
        out=str(out),
        evaluate={"every": f"{arguments.steps}", "tokens": 2048},
    )
    phases = json.loads((out / "result.json").read_text())["phases"]
    spent = phases["data"] + phases["train"]
    return {
        "seconds": time.perf_counter() - began,
        "step_seconds": spent / arguments.steps,
        "wait_share": phases["data"] / spent,
        "wait_seconds": phases["data"],
        "val_loss": result.values["val_loss"],
    }


def paced(data: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Take large steps at the pace of an accelerator, which a sleep stands for, and return the time that was waited."""
    from hasten.data.batches import Batches
    from hasten.data.prefetch import Prefetched
    from hasten.data.reading import read
    from hasten.data.shards import PreparedData

    source = read(PreparedData.open(data), seq_len=1024, seed=1, shuffle_tokens=arguments.shuffle_tokens)
    digest, waits, position = hashlib.sha256(), [], source.begin
    with Prefetched(Batches(source, seq_len=1024, micro_rows=64)) as batches:
        for _ in range(arguments.paced_steps):
            began = time.perf_counter()
            step, position = batches.take(position, rows=64)
            waits.append(time.perf_counter() - began)
            for batch in step:
                digest.update(batch.tokens_BT.numpy())
            time.sleep(PACE)
    return {
        "wait_share": sum(waits) / (sum(waits) + PACE * len(waits)),
        "wait_share_after_first": sum(waits[1:]) / (sum(waits[1:]) + PACE * len(waits[1:])),
        "first_wait": waits[0],
        "longest_later_wait": max(waits[1:]),
        "sha256": digest.hexdigest(),
    }


@contextmanager
def watched(storage: Storage, folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Begin with an empty cache and the storage's faults; yield what is filled, at the end, with what was seen."""
    shutil.rmtree(folder, ignore_errors=True)
    storage.counts(SHARE, LATENCY, seed)
    seen: dict[str, Any] = {}
    ended, most = threading.Event(), [0]
    watcher = threading.Thread(target=watch, args=(folder, ended, most))
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()
        seen |= {**storage.counts(), "most_cached_mib": most[0] / 2**20}


def watch(folder: Path, ended: threading.Event, most: list[int]) -> None:
    """Note the most bytes that ranges ever took, looked at every 50 ms while nobody writes."""
    from hasten.data.range_cache import RangeCache

    cache = RangeCache(folder, 1 << 30)
    while not ended.wait(0.05):
        try:
            with cache._locked():
                held = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name != "lock")
        except OSError:
            continue
        most[0] = max(most[0], held)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of both kinds of run, one after the other."""
    import fsspec
    import moto
    import s3fs
    import torch

    from hasten.data.remote import upload

    storage, rounds = Storage(), []
    try:
        os.environ.update(
            AWS_ENDPOINT_URL=storage.endpoint,
            AWS_ACCESS_KEY_ID="bench",
            AWS_SECRET_ACCESS_KEY="bench",
            AWS_DEFAULT_REGION="us-east-1",
        )
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            os.environ["HASTEN_CACHE"] = str(place / "cache")
            os.environ["HASTEN_STREAM_CACHE"] = f"{arguments.cache_mib}MiB"
            folder = prepared_text(place, arguments.mib)
            storage.counts()
            upload(folder, URL)
            stream = place / "cache" / "stream"
            for number in range(arguments.rounds):
                load = os.getloadavg()[0]
                near = run(str(folder), place / f"near-{number}", arguments)
                with watched(storage, stream, number) as seen:
                    far = run(URL, place / f"far-{number}", arguments)
                assert near["val_loss"] == far["val_loss"], (near, far)
                trained = {"near": near, "far": far | seen}
                near = paced(str(folder), arguments)
                with watched(storage, stream, 100 + number) as seen:
                    far = paced(URL, arguments)
                assert near["sha256"] == far["sha256"], (near, far)
                rounds.append({"load": load, "trained": trained, "paced": {"near": near, "far": far | seen}})
                print(json.dumps(rounds[-1]), flush=True)
            size = sum(path.stat().st_size for path in folder.glob("train*.bin"))
    finally:
        storage.close()
    uptime = subprocess.run(["uptime"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "rounds": rounds,
        **{
            f"{kind}_{where}_wait_share": float(np.median([one[kind][where]["wait_share"] for one in rounds]))
            for kind in ("trained", "paced")
            for where in ("near", "far")
        },
        "train_mib": size / 2**20,
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("out", "serve")},
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "uptime": uptime},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fsspec": fsspec.__version__,
            "s3fs": s3fs.__version__,
            "moto": moto.__version__,
        },
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--mib", type=int, default=128, help="of the text's tokens")
    parser.add_argument("--cache-mib", type=int, default=80)
    parser.add_argument("--shuffle-tokens", type=int, default=1 << 23)
    parser.add_argument("--paced-steps", type=int, default=600)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    figures = measure(arguments)
    print(json.dumps({key: value for key, value in figures.items() if key.endswith("wait_share")}))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

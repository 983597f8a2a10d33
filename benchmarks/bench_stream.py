"""What reading text from object storage costs a run: the loader's share of a step, beside the same run from a folder.

    OMP_NUM_THREADS=1 python benchmarks/bench_stream.py [--rounds 3] [--steps 60] [--mib 128] [--out result.json]

An S3 server (moto) in a process of its own, behind a proxy that makes every answer 100 ms late and spoils one in
twenty (503, connection reset, body cut short). Real training steps of `nano` on prepared text, the folder and the
storage in turn, each run from storage with an empty cache that is smaller than the text. The text is the standard
library's sources, repeated until it is large enough: what its tokens are has no influence on the time.

Reported is the time in which the model waited for its batches, as a share of the time of the steps (`phases` of
``result.json``), and that of the first step by itself; the bytes that were asked for, and the most that the cache held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parent.parent / "tests"
LATENCY, SHARE = 0.1, 0.05
URL = "s3://bucket/prepared"


def serve() -> None:
    """Run the storage until standard input ends; print its address, then what was asked for at each line of input."""
    sys.path.insert(0, str(TESTS))
    from object_storage import Faults, object_storage

    faults = Faults()
    with object_storage(faults) as endpoint:
        print(endpoint, flush=True)
        for line in sys.stdin:
            faults.share, faults.latency = map(float, line.split())
            print(json.dumps({"answers": len(faults.asked), "blocks": len(faults.ranges), "spoiled": faults.spoiled}))
            sys.stdout.flush()
            faults.asked, faults.spoiled = [], 0


class Storage:
    """The storage in its own process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.endpoint = self._process.stdout.readline().strip()

    def counts(self, share: float, latency: float) -> dict[str, int]:
        """Return what was asked for since the last call, and set what is done to the answers from now on."""
        self._process.stdin.write(f"{share} {latency}\n")
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

    waits: list[float] = []

    def look(event: Any) -> None:
        if event.kind == "step":
            waits.append(time.perf_counter())

    began = time.perf_counter()
    result = hasten.train(
        data={"train": data, "shuffle_tokens": arguments.shuffle_tokens},
        model="nano",
        budget=arguments.steps,
        threads=1,
        out=str(out),
        evaluate={"every": f"{arguments.steps}", "tokens": 2048},
        hooks=[look],
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


def watch(folder: Path, ended: threading.Event, most: list[int]) -> None:
    """Note the most bytes that ranges ever took, looked at every 50 ms."""
    while not ended.wait(0.05):
        try:
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
            storage.counts(0.0, 0.0)
            upload(folder, URL)
            for number in range(arguments.rounds):
                load = os.getloadavg()[0]
                near = run(str(folder), place / f"near-{number}", arguments)
                stream = place / "cache" / "stream"
                shutil.rmtree(stream, ignore_errors=True)
                storage.counts(SHARE, LATENCY)
                ended, most = threading.Event(), [0]
                watcher = threading.Thread(target=watch, args=(stream, ended, most))
                watcher.start()
                far = run(URL, place / f"far-{number}", arguments)
                ended.set()
                watcher.join()
                counts = storage.counts(0.0, 0.0)
                assert near["val_loss"] == far["val_loss"], (near, far)
                far |= {**counts, "fetched_mib": counts["blocks"], "most_cached_mib": most[0] / 2**20}
                rounds.append({"load": load, "near": near, "far": far})
                print(json.dumps(rounds[-1]), flush=True)
            size = sum(path.stat().st_size for path in folder.glob("train*.bin"))
    finally:
        storage.close()
    uptime = subprocess.run(["uptime"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "rounds": rounds,
        "wait_share_far": float(np.median([one["far"]["wait_share"] for one in rounds])),
        "wait_share_near": float(np.median([one["near"]["wait_share"] for one in rounds])),
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
    parser.add_argument("--cache-mib", type=int, default=64)
    parser.add_argument("--shuffle-tokens", type=int, default=1 << 23)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    figures = measure(arguments)
    print(json.dumps({key: figures[key] for key in ("wait_share_far", "wait_share_near")}))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the document mask costs in a training step over plain causal attention: same model, same tokens, CPU-seconds.

    python benchmarks/bench_mask.py [--sizes nano d384] [--lengths 512 1024 2048] [--windows 64 256 1024] [--rounds 12]

A step is forward, backward and AdamW on one thread, the making of the mask included. The forms take turns, the order
flips from round to round: `causal` (no documents), `documents` (what `loss_sum` does by default on one thread), `dense`
(what it does by default in short rows and on more threads), `boolean` (PyTorch's `scaled_dot_product_attention` with a
boolean mask), and windows over rows without documents. The figures are medians of the ratios to `causal` of the same
round, with a bootstrap interval. Documents have log-normal lengths with the median and the 90th percentile of the
functions of Python's standard library in bytes (257 and 993).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hasten.model import Decoder, ModelConfig, loss_sum, preset
from hasten.model.attention import Pairs

VOCAB_SIZE, TOKENS_PER_STEP = 4096, 4096


def config_of(size: str, length: int) -> ModelConfig:
    """Return a named size, or `d384`: 6 layers of 384, 6 heads of 64."""
    if size != "d384":
        return preset(size, vocab_size=VOCAB_SIZE, seq_len=length)
    shape = {"num_layers": 6, "width": 384, "num_heads": 6, "num_kv_heads": 6, "head_dim": 64, "mlp_width": 1024}
    return ModelConfig(**shape, vocab_size=VOCAB_SIZE, seq_len=length, tied=False)


def document_ids(rows: int, length: int, generator: np.random.Generator) -> Tensor:
    """Return ids of documents joined end to end and cut every `length` tokens."""
    deviation = math.log(993 / 257) / 1.2816
    lengths = np.exp(generator.normal(math.log(257), deviation, rows * length)).astype(int).clip(1)
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[: rows * length]
    return torch.from_numpy(ids).view(rows, length)


def boolean(document_ids_BT: Tensor) -> Pairs:
    """Return the plain mask: True where a position may be seen."""
    length = document_ids_BT.shape[1]
    same = document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :]
    return Pairs(same & torch.ones(length, length, dtype=torch.bool).tril())


def by(backend: str, model: Decoder, tokens_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the loss of packed rows by a back end."""
    model.attention = backend
    return loss_sum(model, tokens_BT, tokens_BT, ids_BT)


def measure(size: str, length: int, windows: list[int], rounds: int) -> dict:
    """Return the ratios of one size and row length."""
    generator = np.random.default_rng(0)
    model = Decoder(config_of(size, length), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = TOKENS_PER_STEP // length
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "causal": lambda tokens_BT, ids_BT: loss_sum(model, tokens_BT, tokens_BT),
        "documents": lambda tokens_BT, ids_BT: by("auto", model, tokens_BT, ids_BT),
        "dense": lambda tokens_BT, ids_BT: by("dense", model, tokens_BT, ids_BT),
        "boolean": lambda tokens_BT, ids_BT: model(tokens_BT, labels_BT=tokens_BT, mask=boolean(ids_BT)),
    }
    for window in (torch.tensor(window) for window in windows if window < length):
        forms[f"window {window}"] = lambda tokens_BT, _, window=window: loss_sum(
            model, tokens_BT, tokens_BT, None, window
        )
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):  # the first warms up
        tokens_BT = torch.from_numpy(generator.integers(0, VOCAB_SIZE, (rows, length)))
        ids_BT = document_ids(rows, length, generator)
        for name in list(forms) if number % 2 else list(reversed(forms)):
            model.attention = "auto"
            began = time.process_time()
            (forms[name](tokens_BT, ids_BT) / tokens_BT.numel()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number:
                seconds[name].append(time.process_time() - began)
    result: dict = {"size": size, "length": length, "rows": rows, "rounds": rounds}
    for name in forms:
        ratios = np.array(seconds[name]) / np.array(seconds["causal"])
        picks = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        result[name] = {
            "ratio": round(float(np.median(ratios)), 4),
            "interval_95": [round(float(low), 4), round(float(high), 4)],
            "cpu_seconds": round(float(np.median(seconds[name])), 4),
        }
    return result


def main() -> None:
    """Measure every size at every length, print, and write where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["nano", "d384"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512])
    parser.add_argument("--windows", nargs="*", type=int, default=[])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for size in options.sizes:
        for length in options.lengths:
            results.append(measure(size, length, options.windows, options.rounds))
            print(json.dumps(results[-1]), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        text = json.dumps({"threads": 1, **versions, "results": results}, indent=2)
        (options.out / "result.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""Does `hasten compare` find a planted effect, and leave a planted nothing alone?

    python benchmarks/bench_compare.py --out benchmarks/results/<date>_compare [--studies 20] [--workers 2]

Real studies of real runs, end to end. *Planted nothing*: the base's own recipe under another name, with seeds that the
base does not have; every study has seeds of its own, so the studies are independent. *Planted effects*: the same arm
with 0.3 times the learning rate, and with 0.03 times. A small byte-level decoder (2 layers of width 64) on the
built-in corpus, budget in steps, so that loss and training time are both judged. Finished studies are kept in the
folder given with ``--work`` and never done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import hasten
from hasten.comparison import Arm, Study
from hasten.recipe import resolve

SETTINGS = [
    "data=python",
    "data.tokenizer=bytes",
    "model.num_layers=2",
    "model.width=64",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.mlp_width=192",
    "seq_len=128",
    "batch_tokens=1024",
    "budget=150",
    "lr=0.01",
    "threads=1",
    "evaluate.every=100%",
    "evaluate.tokens=32768",
    "data.val_share=0.005",
]
PLANTED = {"0.3 times the rate": "lr=0.003", "0.03 times the rate": "lr=0.0003"}


def summary(found: hasten.comparison.Comparison) -> dict:
    """Return what is kept of a study with one arm."""
    arm = found.verdicts["arms"][0]
    kept = {name: arm[name] for name in ("verdict", "reason", "p", "p_raw", "n")}
    return {**kept, "effects": {name: arm["effects"][name] for name in ("bits_per_byte", "train_seconds")}}


def main() -> None:
    """Run the studies, print what they say, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="where the studies are kept")
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())

    def study(name: str, arm: str, first_seed: int) -> dict:
        base = resolve(None, [*SETTINGS, f"seed={first_seed}"]).recipe
        asked = Study(base, (Arm("arm", (arm,)),), seeds=options.seeds, ladder=())
        found = summary(hasten.compare(asked, out=work / name, workers=options.workers))
        print(name, json.dumps(found), flush=True)
        return found

    result: dict = {"settings": SETTINGS, "seeds": options.seeds, "nothing": [], "planted": {}}
    for name, arm in PLANTED.items():
        result["planted"][name] = study(name.replace(" ", "-"), arm, 0)
    for number in range(1, options.studies + 1):
        result["nothing"].append(study(f"nothing-{number}", f"seed={1000 * number + 500}", 1000 * number))
    said = [found["verdict"] for found in result["nothing"]]
    result["nothing_verdicts"] = {verdict: said.count(verdict) for verdict in sorted(set(said))}
    print("planted nothing:", result["nothing_verdicts"], flush=True)
    import torch

    result |= {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

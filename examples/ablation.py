"""Which change pays? A study of two arms with paired seeds, from Python. About half a minute on two CPU cores."""

from __future__ import annotations

import sysconfig
import tempfile
from pathlib import Path

import hasten

SMALL = {
    "model": {"num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 64},
    "data.tokenizer": "bytes",
    "seq_len": 64,
    "batch_tokens": 512,
    "threads": 1,
}


def main() -> None:
    """Compare a far lower learning rate, and nothing at all, with a base; read the verdicts."""
    folder = Path(tempfile.mkdtemp())
    sources = Path(sysconfig.get_paths()["stdlib"])
    text = folder / "text.txt"
    text.write_text((sources / "argparse.py").read_text(encoding="utf-8"), encoding="utf-8")
    found = hasten.compare(
        data=str(text),
        budget=40,
        arms={"crawl": "lr=0.00001", "twin": {}},
        seeds=2,
        ladder=(),
        out=folder / "study",
        **SMALL,
    )
    print(found.verdicts["study"]["answer"])
    for arm in found.verdicts["arms"]:
        print(f"{arm['name']}: {arm['verdict']}. {arm['reason']}")
    assert found.verdict("crawl") == "costs"
    assert found.verdict("twin") == "identical"


if __name__ == "__main__":
    main()

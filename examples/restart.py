"""A pool of seeds, judged early; the best goes on with its schedule unchanged. About half a minute on two CPU cores."""

from __future__ import annotations

import json
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
    """Let three seeds run to a quarter, keep the best, and see what it cost."""
    folder = Path(tempfile.mkdtemp())
    sources = Path(sysconfig.get_paths()["stdlib"])
    text = folder / "text.txt"
    text.write_text((sources / "argparse.py").read_text(encoding="utf-8"), encoding="utf-8")
    pool = folder / "pool"
    found = hasten.restart(data=str(text), budget=60, seeds=3, rungs="25%", keep="1", out=pool, **SMALL)
    result = json.loads((pool / "result.json").read_text(encoding="utf-8"))
    print(*result["says"], sep="\n")
    cost = result["cost"]
    others, total = cost["others"]["steps"], cost["total"]["steps"]
    print(f"seed {result['survivor']} went on; the others took {others} of {total} steps")
    assert found.status == "finished"
    assert cost["total"]["steps"] == result["plan"]["steps"] == 60


if __name__ == "__main__":
    main()

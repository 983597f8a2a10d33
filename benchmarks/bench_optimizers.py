"""What a step of each of our optimizers costs beside every installed peer's, in units of torch fused AdamW.

    python benchmarks/bench_optimizers.py [--lists tiny,small,gpt] [--only Lion,Muon] [--steps 30] [--threads 2]
                                          [--limit 120] [--quick] [--without LABEL,...] [--heavyball] [--out FOLDER]
                                          [--update] [--soap-reference PATH/soap.py]

Peers: ``pip install -r benchmarks/requirements-peers.txt``; one that is not installed is reported as missing. The SOAP
authors' code is one file of their repository, github.com/nikhilvyas/SOAP, which ``--soap-reference`` names. The whole
run takes about half an hour on two cores, ``--quick`` a few minutes. How everything is measured stands in the README
that is written beside the figures.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    *("hasten", "torch", "numpy", "pytorch_optimizer", "lion-pytorch", "schedulefree", "prodigyopt", "torch-optimi"),
    *("heavyball", "timm", "bitsandbytes", "torchao"),
)


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", default="tiny,small,gpt", help="parameter lists, comma-separated")
    parser.add_argument("--only", default="", help="families, comma-separated; all without it")
    parser.add_argument("--steps", type=int, help="rounds (30; 6 with --quick); Muon a third, SOAP four thirds")
    parser.add_argument("--limit", type=float, help="seconds after which a family starts no new round (120; 15)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that everything runs")
    parser.add_argument(
        "--without", default="", help="labels to leave out: bfloat16 Muon takes a minute a step on AVX2"
    )
    parser.add_argument("--heavyball", action="store_true", help="heavyball too: a minute of compiling for each")
    parser.add_argument("--out", type=Path, help="folder for result.json and README.md")
    parser.add_argument("--update", action="store_true", help="keep the families in --out that are not measured now")
    parser.add_argument("--soap-reference", type=Path, help="the SOAP authors' soap.py, to measure it too")
    options = parser.parse_args()
    options.steps = options.steps or (6 if options.quick else 30)
    options.limit = options.limit or (15.0 if options.quick else 120.0)
    return options


def in_fixed_environment(threads: int) -> None:
    """Start this program again unless OpenMP, which reads its settings once, has those that timing needs.

    With waiting threads that spin, a step of two threads on a loaded machine takes 20 to 40 times as long.
    """
    wanted = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "KINETO_LOG_LEVEL": "99"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


def machine(device: str) -> dict[str, Any]:
    """Return what the figures were taken on."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{names[0] if names else platform.processor() or 'unknown'} ({platform.machine()})",
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
    }


def versions(soap_reference: Path | None) -> dict[str, str]:
    """Return the versions of the packages that are installed, and the hash of the SOAP authors' file."""
    installed = {
        dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions()
    }
    found = {name: installed.get(name.lower().replace("_", "-")) for name in PACKAGES}
    if soap_reference:
        found["soap.py of the authors, sha256"] = hashlib.sha256(soap_reference.read_bytes()).hexdigest()[:16]
    return {name: version for name, version in found.items() if version}


def commit() -> str:
    """Return the checkout's commit, and whether files differ from it."""
    folder = Path(__file__).parent
    asked = [["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--", "../src", "."]]
    try:
        head, changed = (
            subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" with uncommitted changes" if changed.strip() else "")


def fresh_result(options: argparse.Namespace, families: list[str], lists: list[str]) -> dict[str, Any]:
    """Return the result before any measurement; with ``--update`` what ``--out`` holds of other families and lists."""
    result: dict[str, Any] = {"runs": [], "rows": [], "against": [], "singular_values": []}
    before = options.out / "result.json" if options.out else None
    if options.update and before and before.exists():
        known = json.loads(before.read_text(encoding="utf-8"))
        for key in ("rows", "against"):
            result[key] = [row for row in known[key] if row["family"] not in families or row["list"] not in lists]
        result["runs"] = known["runs"]
        result["singular_values"] = [] if "Muon" in families else known["singular_values"]
    return result


def save(result: dict[str, Any], folder: Path) -> None:
    """Write the figures and the page that shows them."""
    from optimizer_report import readme

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(result), encoding="utf-8")


def main() -> None:
    """Measure, print the tables and verdicts, and write them where ``--out`` says."""
    options = parsed()
    in_fixed_environment(options.threads)
    import torch
    from optimizer_peers import CANDIDATES, FAMILIES, LISTS, soap_authors
    from optimizer_report import figures_table, verdict_table, verdicts
    from optimizer_timing import families_of, measured, singular_values

    torch.set_num_threads(options.threads)
    families, lists = families_of(options.only), options.lists.split(",")
    if unknown := [name for name in lists if name not in LISTS]:
        raise SystemExit(f"--lists names {', '.join(unknown)}; give some of {', '.join(LISTS)}.")
    result = fresh_result(options, families, lists)
    load, stamp = os.getloadavg()[0], {"commit": commit(), "date": f"{datetime.date.today()}"}
    left_out = {*options.without.split(","), *(() if options.heavyball else ("heavyball",))}
    authors = soap_authors(options.soap_reference) if options.soap_reference else ()
    candidates = [c for c in (*CANDIDATES, *authors) if c.family in families and c.label not in left_out]
    if "Muon" in families:
        for candidate in (c for c in candidates if c.family == "Muon" and c.module not in ("heavyball", "timm.optim")):
            try:
                result["singular_values"].append(singular_values(candidate, options.device))
            except Exception as error:
                print(f"singular values of {candidate.label}: {error}", file=sys.stderr)
    for name in lists:
        for family in families:
            print(f"{name}: {family} ...", file=sys.stderr, flush=True)
            rows, against = measured(
                [c for c in candidates if c.family == family],
                name,
                steps=options.steps,
                limit_s=options.limit,
                device=options.device,
            )
            result["rows"] += [{**row, **stamp} for row in rows]
            result["against"] += against
        print(f"\n{name}\n{figures_table([row for row in result['rows'] if row['list'] == name])}\n", flush=True)
    place = {(name, family): i for i, (name, family) in enumerate(itertools.product(LISTS, FAMILIES))}
    result["rows"].sort(key=lambda row: place[row["list"], row["family"]])
    used = [name for name in LISTS if any(row["list"] == name for row in result["rows"])]
    shapes = {name: [size for _, size in LISTS[name].shapes()] for name in used}
    # Where somebody keeps the authors' file is nobody's business; what it is stands with the versions.
    words = [options.soap_reference.name if word == str(options.soap_reference) else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/bench_optimizers.py", *words])
    loads = {"load_at_start": load, "load_at_end": os.getloadavg()[0]}
    result["runs"].append({"command": command, **stamp, "threads": options.threads, **loads})
    result = {
        "machine": machine(options.device),
        "versions": versions(options.soap_reference),
        "lists": {
            name: {"parameters": sum(map(math.prod, sizes)), "tensors": len(sizes)} for name, sizes in shapes.items()
        },
        "verdicts": verdicts(result),
        **result,
    }
    print(verdict_table(result["verdicts"]))
    if options.out:
        save(result, options.out)


if __name__ == "__main__":
    sys.exit(main())

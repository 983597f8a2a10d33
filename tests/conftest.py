"""What the tests share: one thread, a cache of their own, a small real text, a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Threads are fixed before torch is imported anywhere: results are then the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A decoder small enough that a step takes milliseconds, with everything a large one has.
TINY = (
    "model.num_layers=2",
    "model.width=32",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.mlp_width=64",
    "data.tokenizer=bytes",
    "seq_len=64",
    "batch_tokens=512",
    "evaluate.tokens=2048",
    "threads=1",
)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of the tests stays out of the user's cache."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["HASTEN_CACHE"] = str(cache)
    return cache


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def library_text() -> str:
    """About 200 kB of real text: sources of the standard library, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "difflib.py", "heapq.py", "textwrap.py", "bisect.py")
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


@pytest.fixture(scope="session")
def text_file(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text as one file of whole lines, about 60 kB: small enough to be prepared in a moment."""
    path = tmp_path_factory.mktemp("text") / "library.txt"
    path.write_text(library_text[: library_text.index("\n", 60_000) + 1], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def validation_file(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another part of the same text, about 10 kB."""
    path = tmp_path_factory.mktemp("validation") / "held_out.txt"
    path.write_text(library_text[100_000 : library_text.index("\n", 110_000) + 1], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Settings of a tiny model, for the command line or `resolve`."""
    return TINY


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return what mounts a disk of a size such as ``64k``, which is really full when it is full."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", "-l", disk], check=True)

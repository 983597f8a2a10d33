"""What a run ran on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Return what decides the speed and the last bits of a run: versions and hardware; no host, user or path names."""
    import numpy
    import torch

    import hasten

    found: dict[str, Any] = {
        "hasten": hasten.__version__,
        "code": code_sha256(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [],
    }
    if torch.cuda.is_available():
        found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


@functools.cache
def code_sha256() -> str:
    """Return a sha256 over the name and content of every Python file of this package, read once in a process.

    Example:
        >>> len(code_sha256())
        64
    """
    import hasten

    return tree_sha256(Path(hasten.__file__).parent)


def tree_sha256(folder: Path) -> str:
    """Return a sha256 over the names and contents of the Python files below `folder`, wherever it lies.

    Args:
        folder: of a package.
    """
    digest = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name, path in sorted(files.items()):
        content = path.read_bytes().replace(b"\r\n", b"\n")  # as git may write them on Windows
        digest.update(f"{name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

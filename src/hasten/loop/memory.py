"""The most memory that training has held so far, as the machine counts it."""

from __future__ import annotations

import sys
from contextlib import suppress

import torch


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak of this process's memory in bytes; None where nobody counts it.

    On CUDA what PyTorch's allocator held on `device`; elsewhere the resident memory of the whole process (Python and
    PyTorch alone take about 0.3 GB of it).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        # Not getrusage on Linux: there a process begins with the peak of the one that started it.
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows has no such count in the standard library
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

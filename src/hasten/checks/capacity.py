"""How much memory this machine has, and how much of it this process holds."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Where Linux says what a container may take.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes(device: torch.device) -> int:
    """Return the memory that a run on `device` may take, in bytes; 0 where nobody says.

    On CUDA that of the GPU; elsewhere that of the machine, or of the container that this process is in.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no such count in the standard library
        return 0
    for place in LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number
            found = min(found, int(Path(place).read_text(encoding="ascii")))
    return found


def held_bytes() -> int:
    """Return the resident memory of this process in bytes, 0 where it cannot be read."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0

"""What is wrong or doubtful about a recipe on the machine it meets, before any text is read."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hasten.checks.findings import Finding, error, warning, worst_first
from hasten.recipe import Recipe

# A product this much slower than in float32 is no speed-up. Without bf16 instructions we measured 70 (AVX2, 2 cores).
SLOW = 1.2


@dataclass(frozen=True)
class Machine:
    """What a machine offers a run.

    Args:
        cuda_devices: number of CUDA devices.
        has_mps: whether Apple's GPU backend is there.
        has_compiler: whether `torch.compile` has what it needs.
        cores: CPU cores this process may use.
        slowdown: time of a matrix product on the CPU in the recipe's precision, in float32's.
    """

    cuda_devices: int = 0
    has_mps: bool = False
    has_compiler: bool = True
    cores: int = 1
    slowdown: float = 1.0


def check_machine(recipe: Recipe, machine: Machine) -> list[Finding]:
    """Return what is wrong or doubtful about `recipe` on `machine`, errors first."""
    return worst_first([*_device(recipe, machine), *_compiler(recipe, machine), *_processor(recipe, machine)])


def this_machine(recipe: Recipe) -> Machine:
    """Return what this machine offers; a reduced precision on a CPU is measured, which takes up to half a second."""
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cpu = recipe.device == "cpu" or (recipe.device == "auto" and not cuda)
    return Machine(
        cuda_devices=cuda,
        has_mps=torch.backends.mps.is_available(),
        has_compiler=compiler_found("cpu" if on_cpu else "cuda"),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        slowdown=_slowdown(recipe.precision.name) if on_cpu else 1.0,
    )


def free_bytes(folder: Path) -> int:
    """Return the space left on the disk that `folder` lies on, or will lie on."""
    folder = folder.absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def compiler_found(device: str) -> bool:
    """Say whether `torch.compile` has what it needs: a C++ compiler and Python's headers, or Triton on a GPU."""
    if device == "cuda":
        from torch.utils._triton import has_triton  # not there as an attribute until it is imported

        return has_triton()
    has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return has_compiler and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def _slowdown(precision: str) -> float:
    """Measure a matrix product of a small model's shape in `precision` against float32, on the CPU.

    The capability flags that PyTorch offers differ between versions and do not tell instructions from emulation.
    """
    import torch

    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "float32":
        return 1.0
    seconds = {}
    for dtype in (torch.float32, dtypes[precision]):
        a_TC, b_CF = torch.ones(256, 128, dtype=dtype), torch.ones(128, 384, dtype=dtype)
        torch.mm(a_TC, b_CF)
        seconds[dtype] = statistics.median(_timed(partial(torch.mm, a_TC, b_CF)) for _ in range(5))
    return seconds[dtypes[precision]] / seconds[torch.float32]


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _device(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    kind, _, number = recipe.device.partition(":")
    if kind == "cuda" and not machine.cuda_devices:
        yield error("device=cuda, but PyTorch finds no CUDA device here: leave device out, or give device=cpu.")
    elif kind == "cuda" and int(number or 0) >= machine.cuda_devices:
        last = machine.cuda_devices - 1
        yield error(f"device={recipe.device}, but there are only cuda:0 to cuda:{last}: give one of those.")
    elif kind == "mps" and not machine.has_mps:
        yield error("device=mps, but PyTorch finds no Apple GPU here: leave device out, or give device=cpu.")


def _compiler(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    if recipe.compile == "on" and not machine.has_compiler:
        yield error(
            "compile=on needs a C++ compiler with Python's headers (or Triton on a GPU), and there is none here: "
            "install one, or give compile=auto."
        )


def _processor(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    if machine.slowdown > SLOW:
        yield warning(
            f"precision={recipe.precision.name} is no gain on this CPU, where a matrix product takes "
            f"{machine.slowdown:.1f} times as long as in float32: give precision=float32 unless memory forces you."
        )
    if recipe.threads is not None and recipe.threads > machine.cores:
        yield warning(
            f"threads={recipe.threads} is more than the {machine.cores} cores of this process, which slows training "
            f"down: give at most {machine.cores}."
        )

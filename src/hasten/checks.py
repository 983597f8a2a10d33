"""What can be refused or warned about before the first step.

`check_machine` needs the recipe alone, before any text is read; `check` needs the prepared data too. Both are pure:
what they are told is in `Machine` and `Facts`, so that they can be asked about any machine and any corpus.
"""

from __future__ import annotations

import math
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
from typing import Literal

from hasten.errors import printable
from hasten.recipe import Recipe

# Up to here repeated data is worth nearly as much as fresh data: Muennighoff et al. 2023, arXiv:2305.16264.
EPOCHS_WORTH_FRESH_DATA = 4
# Fewer steps than this show a program that runs, not a model that learns.
FEWEST_STEPS = 20
# A product this much slower than in float32 is no speed-up. Without bf16 instructions we measured 70 (AVX2, 2 cores).
SLOW = 1.2
# Bytes of the float32 master weights of a checkpoint, and of the export while it is written beside an older one.
WEIGHT_BYTES, EXPORT_BYTES = 4, 8
# Share of a training token's cost that an evaluated one has (no backward pass); warn where the sum passes this share.
FORWARD_SHARE, EVALUATION_SHARE = 0.35, 0.25
FEWEST_VAL_TOKENS = 1000


@dataclass(frozen=True)
class Finding:
    """One thing to know before the first step: an ``error`` stops the run, a ``warning`` is told."""

    level: Literal["error", "warning"]
    message: str


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


@dataclass(frozen=True)
class Facts:
    """What is known once the data is prepared and the model is built.

    Args:
        vocab_size: token ids of the tokenizer.
        train_tokens, val_tokens: tokens of each split.
        params: parameters of the model.
        total_steps: optimizer steps of the run; None while a wall-clock budget is not planned.
        free_bytes: space left on the run folder's disk.
        state_bytes: of the optimizer.
        optimizer_warnings: what the optimizer's own plan warns about.
    """

    vocab_size: int
    train_tokens: int
    val_tokens: int
    params: int
    total_steps: int | None
    free_bytes: int
    state_bytes: int = 0
    optimizer_warnings: tuple[str, ...] = ()


def check_machine(recipe: Recipe, machine: Machine) -> list[Finding]:
    """Return what is wrong or doubtful about `recipe` on `machine`, errors first."""
    return _sorted([*_device(recipe, machine), *_compiler(recipe, machine), *_processor(recipe, machine)])


def check(recipe: Recipe, facts: Facts) -> list[Finding]:
    """Return what is wrong or doubtful about `recipe` with this data and model, errors first.

    What needs `facts.total_steps` is left out while that is None; ask `check_horizon` once it is planned.
    """
    findings = [*_rows(recipe, facts), *_vocabulary(recipe, facts), *_schedule(recipe), *_disk(recipe, facts)]
    findings += [_warning(f"{text[0].upper()}{text[1:]}") for text in facts.optimizer_warnings]
    return _sorted([*findings, *check_horizon(recipe, facts)])


def check_horizon(recipe: Recipe, facts: Facts) -> list[Finding]:
    """Return what is doubtful about the number of steps that a run takes; nothing while it is unknown."""
    if facts.total_steps is None:
        return []
    return _sorted([*_steps(recipe, facts, facts.total_steps), *_evaluation(recipe, facts, facts.total_steps)])


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
        import torch

        return torch.utils._triton.has_triton()
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


def _sorted(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: finding.level != "error")


def _error(message: str) -> Finding:
    return Finding("error", printable(message))


def _warning(message: str) -> Finding:
    return Finding("warning", printable(message))


def _device(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    kind, _, number = recipe.device.partition(":")
    if kind == "cuda" and not machine.cuda_devices:
        yield _error("device=cuda, but PyTorch finds no CUDA device here: leave device out, or give device=cpu.")
    elif kind == "cuda" and int(number or 0) >= machine.cuda_devices:
        last = machine.cuda_devices - 1
        yield _error(f"device={recipe.device}, but there are only cuda:0 to cuda:{last}: give one of those.")
    elif kind == "mps" and not machine.has_mps:
        yield _error("device=mps, but PyTorch finds no Apple GPU here: leave device out, or give device=cpu.")


def _compiler(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    if recipe.compile == "on" and not machine.has_compiler:
        yield _error(
            "compile=on needs a C++ compiler with Python's headers (or Triton on a GPU), and there is none here: "
            "install one, or give compile=auto."
        )


def _processor(recipe: Recipe, machine: Machine) -> Iterator[Finding]:
    if machine.slowdown > SLOW:
        yield _warning(
            f"precision={recipe.precision.name} is no gain on this CPU, where a matrix product takes "
            f"{machine.slowdown:.1f} times as long as in float32: give precision=float32 unless memory forces you."
        )
    if recipe.threads is not None and recipe.threads > machine.cores:
        yield _warning(
            f"threads={recipe.threads} is more than the {machine.cores} cores of this process, which slows training "
            f"down: give at most {machine.cores}."
        )


def _rows(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    seq_len, step_tokens = recipe.lengths.seq_len, recipe.tokens_per_step
    if facts.train_tokens <= seq_len:
        yield _error(
            f"The training text has {facts.train_tokens} tokens, and one row takes {seq_len + 1} "
            f"(lengths.seq_len={seq_len} and the token after it): give more text, or a smaller seq_len."
        )
    elif facts.train_tokens < step_tokens:
        yield _warning(
            f"batch.tokens={recipe.batch.tokens} is more than the {facts.train_tokens} tokens of the training text, "
            "so every step reads it more than once: give a smaller batch_tokens, or more text."
        )
    if facts.val_tokens < 2:
        yield _error(
            f"The held-out text has {facts.val_tokens} tokens, and a loss takes at least 2: give data.val=FILE, or a "
            "larger data.val_share."
        )
    elif facts.val_tokens < FEWEST_VAL_TOKENS:
        yield _warning(
            f"The held-out text has only {facts.val_tokens} tokens, so its loss is a rough guess: hold out more."
        )
    if step_tokens != recipe.batch.tokens:
        yield _warning(
            f"batch.tokens={recipe.batch.tokens} is not a multiple of lengths.seq_len={seq_len}: every step reads "
            f"{recipe.rows_per_step} whole rows, {step_tokens} tokens."
        )


def _vocabulary(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    if recipe.data.tokenizer == "bpe" and not recipe.init_from and facts.vocab_size < recipe.data.vocab_size:
        yield _warning(
            f"The corpus yields only {facts.vocab_size} of data.vocab_size={recipe.data.vocab_size} tokens: "
            "the model has that many, and nothing needs to be done."
        )


def _schedule(recipe: Recipe) -> Iterator[Finding]:
    schedule = recipe.schedule
    name = schedule.name
    if getattr(schedule, "floor", 0.0) == 1:
        yield _warning(
            f"schedule.floor=1 keeps schedule={name} at its peak, so it never decays: "
            "give a lower floor, or schedule=constant."
        )
    if schedule.warmup_start == 1 and schedule.warmup.value > 0:
        yield _warning(
            f"schedule.warmup_start=1 begins at the peak, so schedule.warmup={schedule.warmup} does nothing: "
            "give a lower start, or schedule.warmup=0."
        )


def _disk(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    # One more than is kept, because a checkpoint is only removed after the next one is verified; and the export, whole
    # and half written.
    keep = recipe.checkpoint.keep
    needed = (facts.params * WEIGHT_BYTES + facts.state_bytes) * (keep + 1) + facts.params * EXPORT_BYTES
    if facts.free_bytes < needed:
        yield _error(
            f"The run folder needs about {_size(needed)} for {keep} + 1 checkpoints and the model, and its disk has "
            f"{_size(facts.free_bytes)} left: free some, lower checkpoint.keep, or give out= on another disk."
        )


def _steps(recipe: Recipe, facts: Facts, total_steps: int) -> Iterator[Finding]:
    if total_steps < FEWEST_STEPS:
        yield _warning(
            f"budget={recipe.budget} gives only {total_steps} optimizer steps of {recipe.tokens_per_step} tokens, too "
            "few to learn from: give a larger budget, or a smaller batch_tokens."
        )
    rows = max(1, math.ceil((facts.train_tokens - 1) / recipe.lengths.seq_len))
    steps_per_epoch = rows / recipe.rows_per_step
    epochs = total_steps / steps_per_epoch
    if epochs > EPOCHS_WORTH_FRESH_DATA:
        yield _warning(
            f"The run reads its {facts.train_tokens} tokens {epochs:.1f} times; beyond about "
            f"{EPOCHS_WORTH_FRESH_DATA} times repeated text teaches less and less (Muennighoff et al., "
            "arXiv:2305.16264): give more text, or a smaller budget."
        )
    warmup = recipe.schedule.warmup
    steps = total_steps * recipe.schedule.warmup_share(
        total_steps=total_steps,
        tokens_per_step=recipe.tokens_per_step,
        steps_per_epoch=steps_per_epoch,
        seconds=recipe.budget.value if recipe.budget.unit == "seconds" else None,
    )
    if warmup.value > 0 and steps < 1:
        yield _warning(
            f"schedule.warmup={warmup} of {total_steps} steps is less than one step, so it does nothing: "
            "give at least 1, or 0 to leave it out."
        )
    elif steps >= total_steps:
        yield _error(
            f"schedule.warmup={warmup} is as long as the run of {total_steps} steps: shorten it, or give a "
            "larger budget."
        )


def _evaluation(recipe: Recipe, facts: Facts, total_steps: int) -> Iterator[Finding]:
    tokens = min(recipe.evaluate.tokens, facts.val_tokens)
    steps = recipe.evaluate.every.to_steps(
        total_steps=total_steps,
        tokens_per_step=recipe.tokens_per_step,
        steps_per_epoch=facts.train_tokens / recipe.tokens_per_step,
    )
    if steps is None:
        return
    share = FORWARD_SHARE * tokens / (max(steps, 1) * recipe.tokens_per_step)
    if share > EVALUATION_SHARE:
        yield _warning(
            f"Evaluating {tokens} tokens every {max(steps, 1)} steps takes about {share:.0%} of the time that training "
            "takes: raise evaluate.every, or lower evaluate.tokens."
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

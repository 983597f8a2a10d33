"""The smallest whole runs: what tests of kills, signals and changed surroundings start, and what they compare."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hasten.cli import main
from hasten.record import RunFolder, read_metrics

STEPS = 80
SAVED_EVERY = 4
# A step takes a few milliseconds, and every part of a run is there: two passes over the text, warm-up and decay,
# clipping, evaluations in between, checkpoints.
SMALL = (
    "model.num_layers=1",
    "model.width=16",
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.mlp_width=32",
    "data.tokenizer=bytes",
    "seq_len=32",
    "batch_tokens=64",
    "threads=1",
    "schedule.warmup=5",
    f"budget={STEPS}",
    f"checkpoint.every={SAVED_EVERY}",
    "evaluate.every=25%",
    "evaluate.tokens=256",
)
# What a clock decides, and how often the run was begun: all that may differ between two runs.
TIMES = frozenset({"time", "seconds", "phases", "costs", "tokens_per_second", "attempt"})


def small_settings(folder: Path, text: str) -> list[str]:
    """Write a text and held-out text into `folder`, cut from `text`, and return the settings of a small run on them."""
    (folder / "text.txt").write_text(text[:1500], encoding="utf-8")
    (folder / "held_out.txt").write_text(text[20_000:20_800], encoding="utf-8")
    return [f"data={folder / 'text.txt'}", f"val={folder / 'held_out.txt'}", *SMALL]


def without_times(values: Any) -> Any:
    """Return `values` without what a clock decides, at every depth."""
    if type(values) is not dict:
        return values
    return {key: without_times(value) for key, value in values.items() if key not in TIMES}


def what_is_left(out: Path) -> dict[str, Any]:
    """Return what must be the same in two runs: weights, last checkpoint and log lines, times apart."""
    newest = max((out / "checkpoints").glob("step-????????"))
    state = json.loads((newest / "state.json").read_text())
    state.pop("identity", None)  # of recipe and code; a recipe says where the run and its text lie
    exported = out / "final" / "model.safetensors"
    return {
        "final": exported.read_bytes() if exported.exists() else None,  # a paused run has none yet
        **{path.name: path.read_bytes() for path in sorted(newest.glob("*.safetensors"))},
        **{f"state.{key}": value for key, value in without_times(state).items()},
        "metrics": [without_times(line) for line in read_metrics(RunFolder(out))],
    }


def differences(out: Path, expected: dict[str, Any]) -> list[str]:
    """Return the names of what a run left otherwise than `expected`, which `what_is_left` returned for another."""
    left = what_is_left(out)
    return sorted(name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name))


def forked(work: Callable[[], int], *, log: Path | None = None) -> int:
    """Do `work` in a forked child that starts as warm as this process is, and return the child's process id.

    The child ends with the exit code that `work` returns or asks for, 1 with a traceback after any other error, and
    never comes back into the test runner. What it prints goes to the file `log`, if one is given.
    """
    _only_this_thread()
    child = os.fork()
    if not child:
        if log is not None:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.close(target)
        _end_with(work, prints=log is not None)
    return child


def forked_in_terminal(work: Callable[[], int]) -> tuple[int, int]:
    """Do `work` in a forked child with a terminal of its own; return its process id and our end of the terminal."""
    import pty

    _only_this_thread()
    child, terminal = pty.fork()
    if not child:
        _end_with(work, prints=True)
    return child, terminal


def _only_this_thread() -> None:
    # The worker of a pool that another test left behind waits for work that does not come, and holds nothing.
    others = [thread for thread in threading.enumerate() if not thread.daemon]
    live = [thread.name for thread in others if not thread.name.startswith("ThreadPoolExecutor")]
    assert live == ["MainThread"], f"a fork beside threads would copy what they hold: {live}"


def _end_with(work: Callable[[], int], *, prints: bool) -> NoReturn:
    code = 1
    try:
        # As a command in the foreground has them, whatever this process was begun with.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if prints:
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        code = work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child and return its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hasten(*arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    try:
        main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0

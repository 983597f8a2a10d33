"""Too little memory at a step: smaller micro-batches with the same tokens, or one sentence and a whole checkpoint."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from sizes import size

from hasten import checkpoint
from hasten.errors import RunError
from hasten.loop import Event, State, start
from hasten.loop.snapshots import snapshot
from hasten.loop.sources import prepare_for
from hasten.loop.steps import advance
from hasten.recipe import resolve

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process, as on Linux"),
]
STEPS, SHORT_AT = 6, 4


def address_space() -> int:
    """Return the bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def trained(text_file: Path, rows: int, more_bytes: int | None) -> tuple[State, list[str]]:
    """Train with micro-batches of so many rows; from step `SHORT_AT` on, with so much more memory than there is now."""
    sizes = ["batch_tokens=8192", f"batch.micro_rows={rows}", "model.mlp_width=512", f"budget={STEPS}"]
    fixed = [setting for setting in TINY if not setting.startswith(("batch_tokens", "model.mlp_width"))]
    recipe = resolve(None, [*fixed, *sizes, f"data={text_file}"]).recipe
    state, told = start(recipe, prepare_for(recipe)), list[str]()

    def look(event: Event) -> None:
        if event.kind == "warning":
            told.append(event.values["message"])

    advance(state, SHORT_AT, hooks=[look])
    taken = snapshot(state)
    checkpoint.save(Path("checkpoints"), SHORT_AT, taken.tensors, taken.plain, keep=2)
    if more_bytes is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + more_bytes, hard))
    return advance(state, STEPS, hooks=[look]), told


def in_process_of_its_own(text_file: Path, rows: int, more_bytes: int) -> str:
    """Return what became of a run that is short of memory; a used process has free memory of its own to go on with."""
    command = [sys.executable, __file__, text_file, str(rows), str(more_bytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.torture
def test_a_run_short_of_memory_goes_on_in_smaller_parts_or_says_so(text_file: Path) -> None:
    whole, _ = trained(text_file, 8, None)
    smaller = refused = 0
    for mebibytes in [0, 1, 2, 4, 6, 8, 10, 12, 14, 16][:: size(4, 1)]:
        said = in_process_of_its_own(text_file, 128, mebibytes << 20)
        checkpoint.load(Path("checkpoints/step-00000004"))  # whole, whatever came of it
        if said.startswith("RunError"):
            assert "There is no memory for step" in said
            refused += 1
        else:
            assert said.startswith(f"{STEPS} steps, {whole.tokens} tokens"), said
            smaller += "128 rows" not in said
    print(f"\n{smaller} went on in smaller parts, {refused} were refused")
    assert smaller + refused >= 2


if __name__ == "__main__":
    try:
        state, told = trained(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
        print(f"{state.step} steps, {state.tokens} tokens, {state.batches.micro_rows} rows, {len(told)} warnings")
    except RunError as error:
        print(f"RunError: {error}")

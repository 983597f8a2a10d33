"""A run resumed at any of its steps goes on as if it had never stopped: the same bits, and the same log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import size
from small_runs import SMALL, without_times

from hasten.checkpoint import load, save
from hasten.data.shards import PreparedData
from hasten.loop import Event, State, advance, capture, prepare_for, restore, start
from hasten.loop.between import validate
from hasten.recipe import Recipe, resolve

STEPS = 60
EVALUATED_EVERY = 7
EVERYTHING = {
    "budget": str(STEPS),
    "batch.micro_rows": "1",
    "lengths": "linear",
    "lengths.start": "8",
    "lengths.over": "50%",
    "lengths.replay": "0.3",
    "schedule.warmup": "6",
    "schedule.weight_decay": "linear(floor=0.1)",
    "clip.max_norm": "0.5",
}


@pytest.fixture(scope="module")
def run(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, PreparedData]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(library_text[:1850], encoding="utf-8")
    kept = [word for word in SMALL if word.partition("=")[0] not in EVERYTHING]
    settings = [f"data={text}", *kept, *(f"{key}={value}" for key, value in EVERYTHING.items())]
    recipe = resolve(None, settings).recipe
    return recipe, prepare_for(recipe)


def go_on(state: State, stop: int, log: list[Any]) -> State:
    """Train to step `stop`, with evaluations in between, and add to `log` all that is told on the way."""

    def note(event: Event) -> None:
        log.append((event.kind, event.step, without_times(dict(event.values))))

    while state.step < stop:
        advance(state, min(stop, state.step // EVALUATED_EVERY * EVALUATED_EVERY + EVALUATED_EVERY), hooks=[note])
        if state.step % EVALUATED_EVERY == 0:
            log.append(("evaluation", state.step, validate(state, max_tokens=256).loss))
    return state


def differences(tensors: dict[str, Any], plain: dict[str, Any], expected: Any) -> list[str]:
    """Return the names of what differs from the checkpoint `expected`, down to the last bit."""
    left = {f"{group}.{name}": t for group, named in tensors.items() for name, t in named.items()}
    right = {f"{group}.{name}": t for group, named in expected.tensors.items() for name, t in named.items()}
    assert left.keys() == right.keys()
    others = [name for name in left if not same_bits(left[name], right[name])]
    mine, theirs = without_times(plain), without_times(expected.state)
    return [*others, *(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.torture
def test_a_run_resumed_at_any_of_its_steps_is_bit_identical(run: tuple[Recipe, PreparedData], own_folder: Path) -> None:
    recipe, data = run
    log: list[Any] = []
    saved, told = {}, {0: 0}
    state = start(recipe, data)
    for step in range(STEPS + 1):
        go_on(state, step, log)
        saved[step], told[step] = save(own_folder, step, *capture(state), keep=STEPS + 1), len(log)
    assert state.batches.source.epochs(state.position) >= 2

    uninterrupted: list[Any] = []
    whole = go_on(start(recipe, data), STEPS, uninterrupted)
    assert differences(*capture(whole), load(saved[STEPS])) == []
    assert uninterrupted == log

    for stop in range(STEPS):
        resumed, again = start(recipe, data), []
        found = load(saved[stop])
        restore(resumed, found.tensors, found.state)
        assert differences(*capture(resumed), found) == [], stop
        # Every tenth goes to the end, the others over the next evaluation at least.
        end = STEPS if stop % 10 == 0 else min(STEPS, stop + size(8, STEPS))
        go_on(resumed, end, again)
        assert differences(*capture(resumed), load(saved[end])) == [], (stop, end)
        assert again == log[told[stop] : told[end]], (stop, end)

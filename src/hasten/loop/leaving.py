"""What a run leaves out of its data, counted by cause, and the damaged stretches among it."""

from __future__ import annotations

import math
from typing import Any

from hasten.data.batches import Batch
from hasten.errors import DamagedData, DataError
from hasten.loop.state import Jump, Shape, State
from hasten.loop.telling import Teller

DAMAGED, GUARDED = "damaged", "skipped by the guard"
# Documents that are named for a step that is left out.
NAMED_DOCUMENTS = 16


def jump(state: State) -> None:
    """Move the place in the data past every stretch that is left out and begins there."""
    while found := stretch_at(state, state.position):
        state.position = found.end
        count_left_out(state, DAMAGED, found.tokens)


def stretch_at(state: State, position: tuple[int, ...]) -> Jump | None:
    """Return the stretch that is left out and begins at `position`, None where the data goes on there."""
    return next((stretch for stretch in state.jumps if stretch.begin == position), None)


def count_left_out(state: State, cause: str, tokens: int) -> None:
    """Add to the tokens that this run has left out, by cause."""
    counts = state.notes.setdefault("left_out", {})
    counts[cause] = counts.get(cause, 0) + tokens


def leave_out_damaged(state: State, shape: Shape, tell: Teller, damage: DamagedData) -> None:
    """Leave out the step at the present place, whose tokens are damaged, now and whenever the run comes by again."""
    skipped = state.batches.skip(state.position, rows=shape.rows, length=shape.length)
    documents = documents_at(state, state.position, shape)
    state.jumps.append(Jump(state.position, skipped.position, skipped.tokens))
    tell("damage", reason=str(damage), file=damage.file, block=damage.block, tokens=skipped.tokens, documents=documents)
    left_out = f"Step {state.step + 1} leaves out {skipped.tokens:,} tokens (data.on_damage=skip)"
    tell("warning", message=f"{left_out}: {damage}")


def readable(state: State, rows: int) -> list[Batch]:
    """Return the micro-batches of the first step from the present place on whose tokens can be read; the place stays.

    Raises:
        DamagedData: the recipe says to stop, or a whole epoch is damaged.
    """
    position = state.position
    for _ in range(math.ceil(state.steps_per_epoch)):
        try:
            return state.batches.take(position, rows=rows)[0]
        except DamagedData:
            if state.recipe.data.on_damage == "stop":
                raise
            position = state.batches.skip(position, rows=rows).position
    return state.batches.take(position, rows=rows)[0]


def documents_at(state: State, position: tuple[int, ...], shape: Shape) -> list[dict[str, Any]]:
    """Return the documents that the step at `position` reads: at most `NAMED_DOCUMENTS`, each once, as plain data.

    None where it is damaged which they are: they are only named.
    """
    try:
        parts = state.batches.documents(position, rows=shape.rows, length=shape.length)
    except DataError:
        return []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for part in parts:
        found.setdefault((part.source, part.document), {"source": part.source, "document": part.document})
    return list(found.values())[:NAMED_DOCUMENTS]

"""What packing makes of a corpus: for the packing of a recipe, and for the others beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.data.reading import packing_reports
from hasten.data.shards import PreparedData
from hasten.data.windows import Report
from hasten.loop.state import packing_settings
from hasten.recipe import Recipe

# Documents up to which the packings that were not chosen are looked at too: about a second for each.
CHEAP_DOCUMENTS = 5_000_000
NAMES = ("best_fit", "chunk", "pad")


@dataclass(frozen=True)
class Packed:
    """What becomes of the corpus in rows.

    Attributes:
        packing: its name; ``bucket`` where documents are sorted into rows of several lengths.
        is_chosen: whether the recipe asks for it.
        rows: of an epoch.
        room: positions in them.
        targets: positions that carry loss.
        padding: share of the positions that carry none.
        cut: documents that were cut although a row would hold them.
        documents: in all.
        lost: tokens in no row, or with none to predict.
    """

    packing: str
    is_chosen: bool
    rows: int
    room: int
    targets: int
    padding: float
    cut: int
    documents: int
    lost: int


def packings(recipe: Recipe, data: PreparedData) -> tuple[Packed, ...]:
    """Return what the packing of `recipe` does to `data`, then what the others would do, where that is cheap."""
    settings = packing_settings(recipe)
    is_bucket = settings["mode"] == "bucket"
    chosen = "bucket" if is_bucket else settings["packing"]
    found = [_packed(chosen, packing_reports(data, **settings), is_chosen=True)]
    if data.train_size.num_documents > CHEAP_DOCUMENTS:
        return tuple(found)
    for name in NAMES:
        if name != chosen:
            # Chunks have no documents that are too long: whatever is asked for, they are split.
            overflow = "split" if name == "chunk" else settings["overflow"]
            reports = packing_reports(data, seq_len=settings["seq_len"], packing=name, overflow=overflow)
            found.append(_packed(name, reports, is_chosen=False))
    return tuple(found)


def _packed(name: str, reports: Sequence[Report], *, is_chosen: bool) -> Packed:
    room, targets = sum(report.room for report in reports), sum(report.targets for report in reports)
    return Packed(
        packing=name,
        is_chosen=is_chosen,
        rows=sum(report.rows for report in reports),
        room=room,
        targets=targets,
        padding=1.0 - targets / room if room else 0.0,
        cut=sum(report.cuts for report in reports),
        documents=sum(report.documents for report in reports),
        lost=sum(sum(report.lost.values()) for report in reports),
    )

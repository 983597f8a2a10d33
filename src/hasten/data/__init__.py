"""From text files to batches: corpus, tokenizer, prepared shards, rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.data.dataset import PackedBatches
    from hasten.data.documents import documents_of
    from hasten.data.items import for_transformers
    from hasten.data.lengths import LengthSchedule
    from hasten.data.shards import PreparedData

# Public name -> how to import the module it comes from. Nothing is imported before it is asked for.
_HOMES: dict[str, Callable[[], ModuleType]] = {
    "LengthSchedule": lambda: importlib.import_module("hasten.data.lengths"),
    "PackedBatches": lambda: importlib.import_module("hasten.data.dataset"),
    "PreparedData": lambda: importlib.import_module("hasten.data.shards"),
    "documents_of": lambda: importlib.import_module("hasten.data.documents"),
    "for_transformers": lambda: importlib.import_module("hasten.data.items"),
}

__all__ = ["LengthSchedule", "PackedBatches", "PreparedData", "documents_of", "for_transformers"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hasten.data' has no attribute {name!r}")
    value = getattr(_HOMES[name](), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

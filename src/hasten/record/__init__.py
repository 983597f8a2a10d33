"""What a run leaves on disk beside its checkpoints: its folder, its lines, its result, and the lock on it."""

from hasten.record.environment import environment
from hasten.record.folder import RunFolder
from hasten.record.lines import (
    Record,
    cut_back,
    read_events,
    read_metrics,
    read_result,
    write_result,
    write_whole,
)

__all__ = [
    "Record",
    "RunFolder",
    "cut_back",
    "environment",
    "read_events",
    "read_metrics",
    "read_result",
    "write_result",
    "write_whole",
]

"""What each technique of a run did, as the run itself proved it at its end."""

from __future__ import annotations

from typing import Any

from hasten.report.runs import Run
from hasten.report.wording import number


def proven_facts(run: Run) -> list[tuple[str, str]]:
    """Return the newest proof of a run: names and what was done, in order; none where it gave none."""
    return [(str(row[0]), number(row[1])) for row in _rows(run, "facts") if type(row) is list and len(row) == 2]


def proven_warnings(run: Run) -> list[str]:
    """Return what the newest proof of a run warns of, each once."""
    return list(dict.fromkeys(message for message in _rows(run, "warnings") if type(message) is str and message))


def _rows(run: Run, key: str) -> list[Any]:
    rows = run.latest("proof").get(key)
    return rows if type(rows) is list else []

"""Something to know before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hasten.errors import printable


@dataclass(frozen=True)
class Finding:
    """One thing to know before the first step: an ``error`` stops the run, a ``warning`` is told."""

    level: Literal["error", "warning"]
    message: str


def worst_first(findings: list[Finding]) -> list[Finding]:
    """Return `findings`, errors before warnings."""
    return sorted(findings, key=lambda finding: finding.level != "error")


def error(message: str) -> Finding:
    """Return a finding that stops the run."""
    return Finding("error", printable(message))


def warning(message: str) -> Finding:
    """Return a finding that is told."""
    return Finding("warning", printable(message))

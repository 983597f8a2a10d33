"""How large a test of reliability is: what fits into everyone's test run, or what ``make torture`` asks for."""

from __future__ import annotations

import os


def size(ci: int, torture: int) -> int:
    """Return `ci`, or `torture` where the environment has ``HASTEN_TORTURE=1``."""
    return torture if os.environ.get("HASTEN_TORTURE") == "1" else ci

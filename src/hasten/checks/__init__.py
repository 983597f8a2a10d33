"""What can be refused or warned about before the first step.

`check_machine` needs the recipe alone, before any text is read; `check` needs the prepared data too. Both are pure:
what they are told is in `Machine` and `Facts`, so that they can be asked about any machine and any corpus.
"""

from hasten.checks.capacity import machine_bytes
from hasten.checks.findings import Finding
from hasten.checks.machine import Machine, check_machine, compiler_found, free_bytes, this_machine
from hasten.checks.run import TRAINED_BYTES, Facts, check, check_horizon, check_size

__all__ = [
    "TRAINED_BYTES",
    "Facts",
    "Finding",
    "Machine",
    "check",
    "check_horizon",
    "check_machine",
    "check_size",
    "compiler_found",
    "free_bytes",
    "machine_bytes",
    "this_machine",
]

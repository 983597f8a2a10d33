"""A schedule: a frozen, printable, stateless value that maps the progress of a run to a factor.

One concept serves learning rate, weight decay, momentum, betas, row length and batch size. ``progress`` runs from 0
(before the first step) to 1 (after the last), whatever it is counted in (steps or tokens); the factor multiplies the
peak. Pieces compose:

    warmup(0.01) | cosine(floor=0.01)                    a warm-up of 1 % of the run, then half a cosine
    warmup(0.01) | hold(0.7) | linear(floor=0)           a trapezoid; the line takes what is left
    warmup(0.01) | wsd(cooldown=0.2, shape="sqrt")       the same with a cool-down of 20 %
    warmup(0.01) | inverse_sqrt() | cooldown(0.1)
"""

from hasten.schedules.curves import (
    SCHEDULES,
    constant,
    cooldown,
    cosine,
    cycles,
    hold,
    inverse_sqrt,
    linear,
    power,
    sqrt,
    stages,
    warmup,
    wsd,
)
from hasten.schedules.doubts import findings
from hasten.schedules.groups import SETTINGS, apply, as_lr_scheduler
from hasten.schedules.pieces import LAST_REPLAN, Schedule
from hasten.schedules.progress import Progress
from hasten.schedules.text import parse

__all__ = [
    "LAST_REPLAN",
    "SCHEDULES",
    "SETTINGS",
    "Progress",
    "Schedule",
    "apply",
    "as_lr_scheduler",
    "constant",
    "cooldown",
    "cosine",
    "cycles",
    "findings",
    "hold",
    "inverse_sqrt",
    "linear",
    "parse",
    "power",
    "sqrt",
    "stages",
    "warmup",
    "wsd",
]

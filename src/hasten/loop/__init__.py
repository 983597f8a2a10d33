"""The only training loop: start a run, advance it, or train it from a recipe to a finished run folder."""

from hasten.loop.finish import Result
from hasten.loop.session import train
from hasten.loop.snapshots import capture, restore
from hasten.loop.sources import prepare_for
from hasten.loop.state import State, start
from hasten.loop.steps import advance, train_step
from hasten.loop.telling import Event, Hook

__all__ = [
    "Event",
    "Hook",
    "Result",
    "State",
    "advance",
    "capture",
    "prepare_for",
    "restore",
    "start",
    "train",
    "train_step",
]

"""What a recipe will do, before it is paid for: its curves over the run, as data, as a picture and in the terminal."""

from hasten.planning.outlook import Curve, curves, facts, known_steps
from hasten.planning.picture import draw
from hasten.planning.terminal import chart

__all__ = ["Curve", "chart", "curves", "draw", "facts", "known_steps"]

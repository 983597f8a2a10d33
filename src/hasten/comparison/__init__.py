"""Which technique pays: recipes with paired seeds and one budget, their effects with intervals, a verdict on each."""

from hasten.comparison.compare import Comparison, compare
from hasten.comparison.study import Arm, Study

__all__ = ["Arm", "Comparison", "Study", "compare"]

"""What each technique of a run did: counted step by step, told in facts, and doubted where it did nothing."""

from hasten.proof.doubts import warnings_of
from hasten.proof.facts import facts_of
from hasten.proof.tally import Seen, count, empty, quantile

__all__ = ["Seen", "count", "empty", "facts_of", "quantile", "warnings_of"]

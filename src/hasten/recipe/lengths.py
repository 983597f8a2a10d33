"""How long rows are and how many tokens a step reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hasten.recipe.fields import Choices, Count

if TYPE_CHECKING:
    from hasten.data.lengths import ConstantLength


class ConstantLengths(Choices):
    """Rows of one length throughout.

    Args:
        seq_len: tokens of a row, at least 2.
    """

    name: Literal["constant"] = "constant"
    seq_len: Annotated[int, Field(ge=2, le=2**24)] = 256

    def build(self) -> ConstantLength:
        """Return the schedule of row lengths."""
        from hasten.data.lengths import ConstantLength

        return ConstantLength(self.seq_len)


class BatchChoices(Choices):
    """How much text an optimizer step reads.

    Args:
        tokens: of one optimizer step; the step takes as many whole rows as fit.
        micro_rows: rows that pass through the model at once; found from the memory when it is not given. It
            changes speed and memory, never the sum that a step follows.
    """

    tokens: Count = 2048
    micro_rows: Count | None = None

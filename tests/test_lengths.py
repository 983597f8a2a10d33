"""Row lengths over the progress of a run."""

from __future__ import annotations

import pytest

from hasten.data.lengths import LENGTHS, ConstantLength
from hasten.errors import RecipeError


@pytest.mark.parametrize("progress", [0.0, 1e-9, 0.5, 1.0])
def test_a_constant_length_is_the_same_at_every_progress(progress):
    assert ConstantLength(256)(progress) == 256


@pytest.mark.parametrize("seq_len", [0, -1])
def test_a_length_below_one_is_refused(seq_len):
    with pytest.raises(RecipeError, match=f"lengths.seq_len={seq_len} is no length; give at least 1"):
        ConstantLength(seq_len)
    assert ConstantLength(1)(0.0) == 1


def test_lengths_are_values():
    assert repr(LENGTHS["constant"](64)) == "ConstantLength(seq_len=64)"
    assert LENGTHS["constant"](64) == ConstantLength(64)

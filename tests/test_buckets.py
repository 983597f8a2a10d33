"""Buckets: one row length a step, every row once in an epoch whatever lengths were allowed, no cycles of lengths."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.data.buckets import BucketSource
from hasten.data.documents import documents_of
from hasten.data.windows import Pack, Windows
from hasten.errors import DataError

WIDTHS = (4, 8, 16)


def windows_of(lengths, widths=WIDTHS):
    """Documents of these lengths in rows of several widths; no token but the document token, 0, comes twice."""
    first = 1
    documents = []
    for length in lengths:
        documents.append(np.arange(first, first + length))
        first += length
    return Windows(documents_of(documents, document_token=0), Pack("bucketed", widths))


def source_of(lengths, widths=WIDTHS, seed=0):
    windows = windows_of(lengths, widths)
    return BucketSource([windows.rows(number) for number in range(len(widths))], seed=seed)


def steps_of(source, caps, *, rows=2, position=None):
    """Yield (draw, position after) with one cap after the other."""
    position = position or source.begin
    for cap in caps:
        draw = source.draw(position, rows=rows, length=cap)
        position = draw.position
        yield draw


def epoch_of(source, caps, *, rows=2, epoch=0):
    """Return the draws of one epoch, caps repeated as needed."""
    position, draws = (epoch, *source.begin[1:]), []
    while position[0] == epoch:
        draws.append(source.draw(position, rows=rows, length=caps[len(draws) % len(caps)]))
        position = draws[-1].position
    return draws


def bucket_of(draw):
    ((rows, _),) = draw.parts
    return rows.seq_len


def targets_of(draw):
    """The (input, label) pairs of a draw that carry loss."""
    ((rows, numbers),) = draw.parts
    tokens, labels = np.empty((2, len(numbers), rows.seq_len), np.int64)
    rows.fill(numbers, tokens, labels, None)
    return list(zip(tokens[labels >= 0].tolist(), labels[labels >= 0].tolist()))


LENGTHS = [2, 3, 15, 7, 3, 40, 1, 9, 9, 2, 2, 5, 6, 30, 12, 0, 3]
some_lengths = st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any)
some_caps = st.lists(st.sampled_from([1, 4, 7, 8, 16, 100]), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(some_lengths, some_caps, st.integers(1, 9), st.integers(0, 3))
def test_every_token_of_an_epoch_comes_once_whatever_is_allowed(lengths, caps, rows, epoch):
    source = source_of(lengths)
    pairs = Counter(pair for draw in epoch_of(source, caps, rows=rows, epoch=epoch) for pair in targets_of(draw))
    stream = [token for document in windows_pairs(lengths) for token in document]
    assert pairs == Counter(pairwise(stream))


def windows_pairs(lengths):
    first = 1
    for length in lengths:
        yield [0, *range(first, first + length)]
        first += length


@settings(max_examples=60, deadline=None)
@given(some_lengths, some_caps, st.integers(1, 9))
def test_steps_have_one_length_and_never_more_tokens_than_asked_for(lengths, caps, rows):
    source = source_of(lengths)
    for draw in epoch_of(source, caps, rows=rows):
        ((part, numbers),) = draw.parts
        assert part.seq_len in WIDTHS
        assert part.seq_len % draw.length == 0
        assert 1 <= len(numbers) <= rows * 16 // part.seq_len


@settings(max_examples=40, deadline=None)
@given(some_lengths, some_caps, st.integers(1, 9))
def test_only_the_last_step_of_a_bucket_in_an_epoch_is_short(lengths, caps, rows):
    source = source_of(lengths)
    draws = epoch_of(source, caps, rows=rows)
    for width, size in zip(source.widths, source.sizes):
        counts = [len(draw.parts[0][1]) for draw in draws if bucket_of(draw) == width]
        assert sum(counts) == size
        assert all(count == rows * 16 // width for count in counts[:-1])
    assert len(draws) == source.steps_per_epoch(rows)


@settings(max_examples=40, deadline=None)
@given(some_lengths, some_caps, st.integers(1, 5))
def test_longer_rows_than_allowed_come_only_where_no_others_are_left_and_are_cut(lengths, caps, rows):
    source = source_of(lengths)
    position = source.begin
    for cap in caps:
        taken, draw = position[1:], source.draw(position, rows=rows, length=cap)
        left = [width for width, done, size in zip(source.widths, taken, source.sizes) if done < size]
        allowed = [width for width in left if width <= cap]
        assert bucket_of(draw) in (allowed or left[:1])
        # 7 divides nothing, but 4 does.
        assert draw.length == (bucket_of(draw) if allowed else {1: 1, 4: 4, 7: 4, 8: 8}[cap])
        position = draw.position


def test_rows_that_no_allowed_length_divides_stay_whole():
    source = source_of([15] * 9)
    assert source.sizes == (0, 0, 9)
    assert [source.draw(source.begin, rows=1, length=cap).length for cap in (3, 4, 5, 15, 16)] == [16, 4, 4, 8, 16]
    source = source_of([11] * 9, (4, 6, 12))
    assert [source.draw(source.begin, rows=1, length=cap).length for cap in (3, 5, 6, 11, 12)] == [3, 4, 6, 6, 12]


@settings(max_examples=40, deadline=None)
@given(some_lengths, some_caps, st.integers(0, 20), st.integers(0, 3))
def test_a_resumed_run_reads_what_the_uninterrupted_one_did(lengths, caps, stop, seed):
    source, again = source_of(lengths, seed=seed), source_of(lengths, seed=seed)
    whole = list(steps_of(source, caps * 3))
    stop = min(stop, len(whole) - 1)
    position = whole[stop - 1].position if stop else source.begin
    resumed = list(steps_of(again, (caps * 3)[stop:], position=position))
    for one, other in zip(whole[stop:], resumed, strict=True):
        assert (one.length, one.position) == (other.length, other.position)
        assert np.array_equal(one.parts[0][1], other.parts[0][1])


def test_the_epoch_ends_for_all_buckets_at_once_and_the_next_has_another_order():
    source = source_of(LENGTHS * 9)
    first, second = epoch_of(source, [16]), epoch_of(source, [16], epoch=1)
    assert first[-1].position == (1, 0, 0, 0)
    assert [draw.position[0] for draw in first[:-1]] == [0] * (len(first) - 1)
    assert [draw.length for draw in first] != [draw.length for draw in second]
    rows = [[tuple(draw.parts[0][1]) for draw in draws if draw.length == 4] for draws in (first, second)]
    assert rows[0] != rows[1]
    # All run in proportion: none is used up long before the epoch ends.
    for width in WIDTHS:
        assert max(n for n, draw in enumerate(first) if draw.length == width) > 0.85 * len(first)


def test_short_rows_come_first_then_long_ones_then_all_of_them():
    source = source_of(LENGTHS * 30)
    epoch = source.steps_per_epoch(2)
    share = sum(source.sizes[:1]) * 4 / sum(size * width for size, width in zip(source.sizes, WIDTHS))
    short = int(0.5 * share * epoch)
    lengths = [draw.length for draw in epoch_of(source, [4] * short + [16] * epoch)]
    assert set(lengths[:short]) == {4}
    # Half of the short ones were read, so half of the long ones come before the next short one.
    next_short = lengths.index(4, short)
    assert {*lengths[short:next_short]} == {8, 16}
    assert 0.3 * epoch < next_short < 0.7 * epoch
    rest = np.array(lengths[next_short:])
    halves = [(part == 4).mean() for part in np.array_split(rest, 2)]
    assert abs(halves[0] - halves[1]) < 0.1


def log_normal(count, seed=0):
    return np.random.default_rng(seed).lognormal(3.0, 1.0, count).astype(int).tolist()


def correlation(lengths):
    steps = np.log2(np.array(lengths, float))
    return float(np.corrcoef(steps[:-1], steps[1:])[0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_no_pattern_of_lengths_repeats_under_a_constant_cap(seed):
    widths = (8, 16, 32, 64)
    source = source_of(log_normal(3000), widths, seed)
    lengths = [draw.length for draw in epoch_of(source, [64])]
    assert len(lengths) > 300
    # Long stretches of one length, sorted or in cycles, have a correlation near 1; short cycles show in the periods.
    assert abs(correlation(lengths)) < 0.3
    falling = np.diff(np.flatnonzero(np.concatenate([[True], np.diff(lengths) > 0, [True]])))
    assert max(falling) < 15
    periods = [np.mean(np.array(lengths[period:]) == lengths[:-period]) for period in range(1, 60)]
    shares = np.array(list(Counter(lengths).values())) / len(lengths)
    assert max(periods) < (shares**2).sum() + 0.15


def test_buckets_of_equally_many_steps_do_not_come_in_cycles():
    lengths = [3] * 800 + [7] * 400 + [15] * 200  # 100 steps of each width
    source = source_of(lengths)
    order = [draw.length for draw in epoch_of(source, [16], rows=4)]
    triples = Counter(tuple(order[n : n + 3]) for n in range(0, len(order) - 2, 3))
    assert max(triples.values()) < 0.4 * sum(triples.values())
    assert len(triples) > 5


def test_epochs_count_the_share_that_was_read():
    source = source_of(LENGTHS * 5)
    epochs = [0.0] + [source.epochs(draw.position) for draw in epoch_of(source, [4, 16])]
    assert all(a < b for a, b in pairwise(epochs))
    assert epochs[-1] == 1.0
    assert source.epochs((7, *source.begin[1:])) == 7.0


def test_utilisation_is_the_share_of_positions_with_a_target():
    # With the document token 16, 16, 3 and 4 tokens, of which the very last has nothing to predict.
    source = source_of([15, 15, 2, 3])
    assert source.sizes == (2, 0, 2)
    assert source.utilisation == (0.75, 1.0, 1.0)
    assert source.shares == (0.2, 0.0, 0.8)
    assert source.num_rows == 2.5


def test_an_empty_bucket_is_never_asked():
    source = source_of([15] * 20)
    assert source.sizes == (0, 0, 20)
    assert {bucket_of(draw) for draw in epoch_of(source, [4, 16])} == {16}


@pytest.mark.parametrize(
    ("widths", "match"),
    [((8, 4), r"\[8, 4\] must rise"), ((4, 4), "must rise"), ((6, 16), r"\[6, 16\] must rise and each divide")],
)
def test_widths_that_do_not_rise_or_divide_are_refused(widths, match):
    buckets = [Windows(documents_of([[1, 2, 3]]), Pack("best_fit", (width,))).rows() for width in widths]
    with pytest.raises(DataError, match=match):
        BucketSource(buckets, seed=0)


@pytest.mark.parametrize("position", [(0,), (0, 0), (-1, 0, 0, 0), (0, 99, 0, 0), (0, -1, 0, 0), (0, 0, 0, 0, 0)])
def test_a_position_from_elsewhere_is_refused(position):
    source = source_of(LENGTHS)
    with pytest.raises(DataError, match="is no position in 3 buckets"):
        source.draw(position, rows=2, length=16)
    with pytest.raises(DataError, match="comes from other text or other row lengths"):
        source.epochs((0, *source.sizes))

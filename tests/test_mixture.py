"""Mixtures keep their proportions at every place, and every source comes round whole."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.data.documents import documents_of
from hasten.data.mixture import MixedRows, MixtureSource, Proportions
from hasten.data.windows import Pack, Windows
from hasten.errors import DataError

weights_of = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=30)


def corpus(first, documents, length=12, document_token=0):
    """Documents whose tokens are `first`, `first + 1` and so on, no token twice."""
    numbers = np.arange(first, first + documents * length).reshape(documents, length)
    return documents_of(list(numbers), document_token=document_token)


def rows_of(first, documents, capacity=8, **more):
    return Windows(corpus(first, documents, **more), Pack("best_fit", (capacity,))).rows()


def written(rows, numbers, with_ids=True):
    tokens, labels = np.full((2, len(numbers), rows.seq_len), -7, np.int64)
    ids = np.full(tokens.shape, -7, np.int32) if with_ids else None
    targets = rows.fill(np.asarray(numbers), tokens, labels, ids)
    return tokens, labels, ids, targets


# --- proportions ------------------------------------------------------------------------------------------------


def one_at_a_time(weights, count):
    """The components of the first `count` places by their definition: each node splits its own places, in order."""
    shares = Proportions(weights).shares
    trees = [(share, number, number) for number, share in enumerate(shares)]
    made = len(shares)
    while len(trees) > 1:
        (light, _, left), (heavy, _, right), *trees = sorted(trees)
        share = Fraction(round(light / (light + heavy) * 2**48), 2**48)
        trees = [*trees, (light + heavy, made, (share, left, right))]
        made += 1
    (_, _, root), seen, found = trees[0], Counter(), []
    for _ in range(count):
        node, path = root, ()
        while not isinstance(node, int):
            share, left, right = node
            before = seen[path]
            seen[path] += 1
            goes_left = int((before + 1) * share + Fraction(1, 2)) > int(before * share + Fraction(1, 2))
            node, path = (left, (*path, 0)) if goes_left else (right, (*path, 1))
        found.append(node)
    return found


@settings(max_examples=30, deadline=None)
@given(weights_of)
def test_components_are_those_of_a_walk_through_the_tree_one_place_at_a_time(weights):
    assert Proportions(weights).at(0, 300).tolist() == one_at_a_time(weights, 300)


@settings(max_examples=60, deadline=None)
@given(weights_of, st.integers(0, 10**15), st.integers(0, 500))
def test_shares_hold_at_every_place(weights, place, count):
    proportions = Proportions(weights)
    taken = np.array(proportions.taken(place), float)
    components = proportions.at(place, count)
    assert sum(proportions.taken(place)) == place
    for n in range(0, count, 7):
        wanted = [share * (place + n) for share in proportions.shares]
        now = taken + np.bincount(components[:n], minlength=len(weights))
        # A place of 10**15 is itself known only to 0.1 in these floats, and shares of 2**-48 add up to a few rows.
        assert np.abs(now - wanted).max() < 1.7 + place * len(weights) * 2.0**-49


def test_two_components_are_never_off_by_more_than_a_half_and_three_by_one():
    rng = np.random.default_rng(0)
    for size, most in ((2, 0.5), (3, 1.0)):
        for _ in range(20):
            proportions = Proportions(rng.random(size) + 1e-3)
            counts = np.cumsum(np.eye(size)[proportions.at(0, 3000)], axis=0)
            ideal = np.arange(1, 3001)[:, None] * np.array(proportions.shares)
            assert np.abs(counts - ideal).max() <= most + 1e-6


@settings(max_examples=30, deadline=None)
@given(weights_of, st.integers(0, 10**13), st.integers(0, 200), st.integers(0, 200))
def test_places_are_the_same_however_they_are_asked_for(weights, place, first, second):
    proportions = Proportions(weights)
    whole = proportions.at(place, first + second)
    assert np.array_equal(whole, np.concatenate([proportions.at(place, first), proportions.at(place + first, second)]))
    counted = np.bincount(whole, minlength=len(weights)) + proportions.taken(place)
    assert tuple(counted) == proportions.taken(place + first + second)


def test_many_places_at_once_are_those_of_small_calls():
    proportions = Proportions([0.5, 0.3, 0.2, 1e-4])
    whole = proportions.at(5, 40_000)
    assert np.array_equal(whole, np.concatenate([proportions.at(5 + n, 100) for n in range(0, 40_000, 100)]))


def test_only_the_ratios_of_weights_matter():
    assert np.array_equal(Proportions([7, 3]).at(0, 999), Proportions([0.7, 0.3]).at(0, 999))
    assert Proportions([1e300, 3e300]).taken(1000) == (250, 750)


def test_a_tiny_weight_gets_its_few_rows():
    weights = [1.0] + [1e-9] * 3
    assert Proportions(weights).taken(10**12)[1:] == pytest.approx([1000] * 3, abs=2)
    assert Proportions([1.0, 2.0**-39]).taken(2**42)[1] == pytest.approx(8, abs=1)


def test_one_component_has_every_place():
    assert Proportions([0.3]).at(7, 5).tolist() == [0] * 5
    assert Proportions([0.3]).taken(7) == (7,)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 2.0**-41])
def test_a_weight_that_reads_nothing_is_refused(weight):
    with pytest.raises(DataError, match=r"The weight of source 1 is .* (above 0|less than one row)"):
        Proportions([1.0, weight])


def test_no_weights_are_refused():
    with pytest.raises(DataError, match="no sources"):
        Proportions([])


# --- rows -------------------------------------------------------------------------------------------------------


def test_mixed_rows_are_the_rows_of_their_sources():
    parts = [rows_of(100, 9), rows_of(1000, 4), rows_of(2000, 13)]
    mixed = MixedRows(parts, [1, 2, 3])
    assert mixed.num_rows == sum(rows.num_rows for rows in parts)
    assert mixed.num_targets == sum(rows.num_targets for rows in parts)
    numbers = np.random.default_rng(0).integers(0, mixed.num_rows, 200)
    whole = written(mixed, numbers)
    for place, number in enumerate(numbers.tolist()):
        part = int(mixed.bounds.searchsorted(number, side="right")) - 1
        alone = written(parts[part], [number - mixed.bounds[part]])
        assert all(np.array_equal(one[0], all_[place]) for one, all_ in zip(alone, whole))
    without = written(mixed, numbers, with_ids=False)
    assert np.array_equal(without[0], whole[0])


def test_rows_of_one_source_only_are_written_too():
    parts = [rows_of(100, 9), rows_of(1000, 4)]
    tokens, _, _, targets = written(MixedRows(parts, [1, 2]), [parts[0].num_rows])
    assert tokens[0, 1] >= 1000
    assert targets[0] == written(parts[1], [0])[3][0]


def test_sources_with_other_rows_or_weights_are_refused():
    parts = [rows_of(100, 9), rows_of(1000, 9, capacity=16)]
    with pytest.raises(DataError, match=r"rows of \[8, 16\] tokens"):
        MixedRows(parts, [1, 1])
    with pytest.raises(DataError, match="3 weights for 2 sources"):
        MixedRows(parts, [1, 1, 1])
    with pytest.raises(DataError, match="one tokenizer"):
        MixedRows([rows_of(100, 9), rows_of(1000, 9, document_token=5)], [1, 1])


# --- the source -------------------------------------------------------------------------------------------------


def drawn(source, rows, steps, position=None, length=8):
    position, numbers = position or source.begin, []
    for _ in range(steps):
        draw = source.draw(position, rows=rows, length=length)
        ((_, part),) = draw.parts
        numbers += part.tolist()
        assert draw.length == length
        position = draw.position
    return numbers, position


def test_every_row_of_a_source_comes_once_before_any_comes_twice():
    parts = [rows_of(100, 30), rows_of(1000, 7)]
    source = MixtureSource(parts, [0.5, 0.5], seed=3)
    numbers, position = drawn(source, 5, 60)
    bounds = source.rows.bounds
    for component, rows in enumerate(parts):
        own = [n for n in numbers if bounds[component] <= n < bounds[component + 1]]
        assert len(own) == 150
        for begin in range(0, 150 - rows.num_rows, rows.num_rows):
            assert len(set(own[begin : begin + rows.num_rows])) == rows.num_rows
        assert source.component_epochs(position)[component] == 150 / rows.num_rows
    assert source.epochs(position) == 300 / source.rows.num_rows


def test_every_step_is_mixed_in_proportion():
    source = MixtureSource([rows_of(100, 30), rows_of(1000, 30), rows_of(2000, 30)], [6, 3, 1], seed=0)
    position = (0,)
    for _ in range(100):
        draw = source.draw(position, rows=20, length=8)
        of_each = np.histogram(draw.parts[0][1], source.rows.bounds)[0]
        assert np.abs(of_each - [12, 6, 2]).max() <= 2
        position = draw.position


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**14), st.integers(1, 40), st.integers(0, 40), st.integers(0, 3))
def test_a_step_is_a_function_of_seed_and_position(place, rows, later, seed):
    parts = [rows_of(100, 30), rows_of(1000, 7)]
    source, again = (MixtureSource(parts, [0.7, 0.3], seed=seed) for _ in range(2))
    whole, end = drawn(source, rows + later, 1, (place,))
    assert end == (place + rows + later,)
    assert whole[rows:] == drawn(again, later, 1, (place + rows,))[0]


def test_lengths_view_the_same_rows_in_the_same_order():
    source = MixtureSource([rows_of(100, 30), rows_of(1000, 7)], [0.7, 0.3], seed=0)
    assert drawn(source, 6, 5, length=2) == drawn(source, 6, 5, length=8)


def test_sources_of_one_size_have_orders_of_their_own():
    source = MixtureSource([rows_of(100, 40), rows_of(1000, 40)], [1, 1], seed=0)
    bounds = source.rows.bounds
    numbers = np.array(drawn(source, 2 * int(bounds[1]), 1)[0])
    first, second = numbers[numbers < bounds[1]], numbers[numbers >= bounds[1]] - bounds[1]
    assert sorted(first) == sorted(second)
    assert (first == second).mean() < 0.2

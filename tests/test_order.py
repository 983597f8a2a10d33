"""The shuffled order: a bijection for every size, another one for every key, computed anywhere at once."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.data.order import BLOCK_PLACES, EndlessOrder, WindowOrder, order_key, permuted


def test_a_permutation_of_every_size_up_to_2000_is_a_bijection():
    for size in range(1, 2001):
        assert np.array_equal(np.sort(permuted(np.arange(size), size, order_key(0, size, "t"))), np.arange(size)), size


@pytest.mark.parametrize("size", [10**12, 2**40 + 1, 2**62])
def test_a_huge_permutation_stays_inside_without_repeats_and_without_memory(size):
    indexes = np.concatenate([np.arange(20_000), size - 1 - np.arange(20_000)])
    tracemalloc.start()
    values = permuted(indexes, size, order_key(1, 0, "t"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(values)) == len(indexes)
    assert values.min() >= 0
    assert values.max() < size
    assert peak < 100 * indexes.nbytes
    # Spread over the whole range: each of ten equal parts gets its tenth.
    shares = np.bincount((values.astype(float) / size * 10).astype(int), minlength=10) / len(values)
    np.testing.assert_allclose(shares, 0.1, atol=0.01)


def test_a_permutation_is_exact_beyond_the_whole_numbers_of_a_float():
    indexes = np.array([2**61 + 1, 2**61 + 2, 2**61 + 3])
    assert len(np.unique(permuted(indexes, 2**62, 5))) == 3
    assert permuted(indexes, 2**62, 5).dtype == np.int64


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_value_depends_on_its_index_size_and_key_alone(size, key, data):
    indexes = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), np.int64)
    whole = permuted(np.arange(size), size, key)
    assert permuted(indexes, size, key).tolist() == whole[indexes].tolist()
    one_key_each = permuted(indexes, size, np.full(len(indexes), key, np.uint64))
    assert one_key_each.tolist() == whole[indexes].tolist()


def many_permutations(size: int, count: int) -> np.ndarray:
    """Return `count` permutations under as many keys, one a row."""
    keys = np.array([order_key(0, number, "t") for number in range(count)], np.uint64)
    return permuted(np.tile(np.arange(size), (count, 1)), size, np.repeat(keys, size).reshape(count, size))


def chi_squared_sigmas(counts: np.ndarray, freedom: int) -> float:
    """Return by how many standard deviations `counts` are less even than chance."""
    expected = counts.sum() / counts.size
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tiny_permutations_come_in_every_order_equally_often(size):
    seen = Counter(map(tuple, many_permutations(size, 10_000).tolist()))
    counts = np.array([seen[order] for order in itertools.permutations(range(size))])
    assert chi_squared_sigmas(counts, len(counts) - 1) < 5


@pytest.mark.parametrize("size", [5, 9, 16, 17, 33])
def test_every_number_comes_at_every_place_and_after_every_other_equally_often(size):
    orders = many_permutations(size, 10_000)
    places = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    assert chi_squared_sigmas(places, (size - 1) ** 2) < 5
    distances = np.bincount(((orders[:, 1:] - orders[:, :-1]) % size).ravel(), minlength=size)[1:]
    assert chi_squared_sigmas(distances, size - 2) < 5


def test_neighbours_do_not_stay_together():
    steps = np.abs(np.diff(permuted(np.arange(100_000), 100_000, 3)))
    assert np.mean(steps) == pytest.approx(100_000 / 3, rel=0.02)
    assert (steps == 1).sum() < 20


def test_keys_differ_where_a_sum_would_collide():
    keys = {order_key(seed, epoch, purpose) for seed in range(20) for epoch in range(20) for purpose in ("a", "b")}
    assert len(keys) == 800
    assert order_key(-1, 0, "a") != order_key(1, 0, "a")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 300), epoch=st.integers(0, 50), seed=st.integers(-5, 2**70))
def test_every_epoch_holds_every_number_once(size, epoch, seed):
    order = EndlessOrder(size, seed=seed, purpose="rows")
    assert np.sort(order.at(epoch * size, size)).tolist() == list(range(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 10**12), place=st.integers(0, 10**15), count=st.integers(1, 3 * BLOCK_PLACES))
def test_a_place_of_the_order_is_the_same_however_it_is_asked_for(size, place, count):
    whole = EndlessOrder(size, seed=3, purpose="rows").at(place, count)
    order = EndlessOrder(size, seed=3, purpose="rows")
    assert len(whole) == count
    for offset in {0, count // 2, count - 1}:
        assert order.at(place + offset, 1).tolist() == [whole[offset]]


def test_epochs_seeds_and_purposes_have_different_orders():
    first = EndlessOrder(1000, seed=0, purpose="rows").at(0, 1000)
    others = [
        EndlessOrder(1000, seed=0, purpose="rows").at(1000, 1000),
        EndlessOrder(1000, seed=1, purpose="rows").at(0, 1000),
        EndlessOrder(1000, seed=0, purpose="windows").at(0, 1000),
    ]
    for other in others:
        assert (first == other).mean() < 0.01


def test_an_order_handed_out_cannot_be_changed():
    order = EndlessOrder(10, seed=0, purpose="rows")
    with pytest.raises(ValueError, match="read-only"):
        order.at(0, 5)[0] = 99


# --- windows --------------------------------------------------------------------------------------------------------

sizes_of_windows = st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(any)


def window_order(sizes, **changed) -> WindowOrder:
    return WindowOrder(np.array(sizes), **{"seed": 0, "purpose": "rows", "group": 3, **changed})


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_of_windows, group=st.integers(1, 30), epoch=st.integers(0, 9), seed=st.integers(0, 2**64))
def test_every_epoch_of_windows_holds_every_number_once(sizes, group, epoch, seed):
    order = window_order(sizes, group=group, seed=seed)
    total = sum(sizes)
    assert np.sort(order.at(epoch * total, total)).tolist() == list(range(total))


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_of_windows, group=st.integers(1, 9), cuts=st.lists(st.integers(0, 60), max_size=9))
def test_windows_come_the_same_however_they_are_asked_for(sizes, group, cuts):
    whole = window_order(sizes, group=group).at(7, sum(cuts))
    order, parts, place = window_order(sizes, group=group), [], 7
    for count in cuts:
        parts += order.at(place, count).tolist()
        place += count
    assert whole.tolist() == parts
    assert [window_order(sizes, group=group).at(place - 1, 1).item()] == whole.tolist()[-1:] or not whole.size


def test_no_more_windows_than_a_group_are_mixed_and_each_comes_once():
    sizes = np.arange(1, 24)
    order = window_order(sizes, group=4)
    windows = np.repeat(np.arange(23), sizes)[order.at(0, int(sizes.sum()))]
    groups = []
    while len(windows):
        here = set(windows[:1].tolist())
        while len(here) < 4 and len(here) < len(set(windows.tolist())):
            here = set(windows[: np.flatnonzero(~np.isin(windows, list(here)))[0] + 1].tolist())
        size = int(sizes[list(here)].sum())
        assert set(windows[:size].tolist()) == here
        groups.append(here)
        windows = windows[size:]
    assert [len(here) for here in groups] == [4, 4, 4, 4, 4, 3]
    assert set().union(*groups) == set(range(23))


def test_a_group_is_mixed_through_and_beyond_a_block():
    order = window_order([BLOCK_PLACES, BLOCK_PLACES // 2], group=2)
    total = 3 * BLOCK_PLACES // 2
    numbers = order.at(0, total)
    assert np.sort(numbers).tolist() == list(range(total))
    firsts, lasts = numbers[:1000], numbers[-1000:]
    assert abs((firsts < BLOCK_PLACES).mean() - 2 / 3) < 0.06
    assert abs((lasts < BLOCK_PLACES).mean() - 2 / 3) < 0.06


def test_windows_of_other_epochs_seeds_and_purposes_have_other_orders():
    sizes = [50] * 40
    first = window_order(sizes).at(0, 2000)
    others = [
        window_order(sizes).at(2000, 2000),
        window_order(sizes, seed=1).at(0, 2000),
        window_order(sizes, purpose="other").at(0, 2000),
    ]
    for other in others:
        assert (first == other).mean() < 0.01


def test_an_order_of_a_trillion_rows_takes_the_memory_of_its_windows():
    order = window_order(np.full(20_000, 50_000_000), group=8)
    tracemalloc.start()
    numbers = order.at(10**12 // 3, 1000)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert len(set((numbers // 50_000_000).tolist())) == 8
    with pytest.raises(ValueError, match="read-only"):
        order.at(10**12 // 3, 5)[0] = 99

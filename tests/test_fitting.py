"""Packers: no token falls through, rows hold what they may, best fit is the textbook's."""

from __future__ import annotations

import ast
import dataclasses
import sysconfig
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hasten.data.fitting import (
    OVERFLOWS,
    PACKINGS,
    Packing,
    best_fit,
    bucketed,
    chunk,
    pad,
)
from hasten.errors import DataError, RecipeError

LENGTHS = st.one_of(
    st.lists(st.integers(0, 40), max_size=60),
    st.lists(st.sampled_from([0, 1, 7, 8, 9, 500]), max_size=60),
    st.integers(0, 60).flatmap(lambda length: st.integers(0, 60).map(lambda count: [length] * count)),
)
CAPACITIES = st.integers(1, 45)


def pieces_of(lengths: list[int], capacity: int, overflow: str) -> list[int]:
    """Return the lengths of the pieces that documents come in, each document by itself."""
    pieces = []
    for length in lengths:
        if length <= capacity:
            pieces.append(length)
        elif overflow == "split":
            pieces += [capacity] * (length // capacity) + [length % capacity]
        elif overflow == "truncate":
            pieces.append(capacity)
    return [piece for piece in pieces if piece]


def textbook(pieces: list[int], capacity: int, *, opens_above: int = 0) -> tuple[list[int], list[int]]:
    """Return the fills of rows, ascending, and the pieces left over: one piece after another, the longest first."""
    spaces, left = [], []
    for piece in sorted(pieces, reverse=True):
        tightest = bisect_left(spaces, piece)
        if tightest < len(spaces):
            insort(spaces, spaces.pop(tightest) - piece)
        elif piece > opens_above:
            insort(spaces, capacity - piece)
        else:
            left.append(piece)
    return sorted(capacity - space for space in spaces), left


def fills(packing: Packing) -> list[int]:
    """Return the tokens in each row, ascending."""
    assert len(packing.firsts_R1) == 1 or (np.diff(packing.firsts_R1) > 0).all(), "an empty row"
    return sorted(np.add.reduceat(packing.lengths_P, packing.firsts_R1[:-1]).tolist() if packing.num_rows else [])


def check_law(lengths: list[int], packings: tuple[Packing, ...], overflow: str = "split") -> None:
    """Every token is in one piece or counted as lost; rows are no fuller than they may be; arrays are what they say."""
    seen = [np.zeros(length, int) for length in lengths]
    for packing in packings:
        columns = (packing.documents_P, packing.offsets_P, packing.lengths_P, packing.firsts_R1)
        assert [column.dtype for column in columns] == [np.int64] * 4
        assert len(columns[0]) == len(columns[1]) == len(columns[2]) == packing.firsts_R1[-1]
        assert packing.firsts_R1[0] == 0
        assert packing.num_rows == len(packing.firsts_R1) - 1
        assert packing.num_tokens == packing.lengths_P.sum()
        assert max(fills(packing), default=0) <= packing.capacity
        assert 0.0 < packing.utilisation <= 1.0
        for document, offset, length in zip(*columns[:3]):
            assert length >= 1
            assert 0 <= offset <= lengths[document] - length
            seen[document][offset : offset + length] += 1
    longest = packings[-1].capacity
    lost = {"truncated": 0, "dropped": 0}
    for length, times in zip(lengths, seen):
        kept = length if length <= longest else {"split": length, "truncate": longest, "drop": 0}[overflow]
        assert times.tolist() == [1] * kept + [0] * (length - kept)
        if overflow != "split":
            lost["truncated" if overflow == "truncate" else "dropped"] += length - kept
    assert packings[-1].lost == lost
    assert all(packing.lost == {"truncated": 0, "dropped": 0} for packing in packings[:-1])


def num_cut(lengths: list[int], packings: tuple[Packing, ...]) -> int:
    """Return how many documents are in more than one piece although the longest row would hold them."""
    documents = np.concatenate([packing.documents_P for packing in packings])
    pieces = np.bincount(documents, minlength=len(lengths))
    return int(((pieces > 1) & (np.array(lengths) <= packings[-1].capacity)).sum()) if lengths else 0


# --- best fit -------------------------------------------------------------------------------------------------------


def test_rows_are_as_full_as_the_textbooks_in_10_000_random_cases():
    rng = np.random.default_rng(0)
    for case in range(10_000):
        capacity = int(rng.integers(1, 60))
        # From a few distinct lengths to all different, from far shorter than a row to several rows long.
        longest = int(rng.integers(1, 2 + capacity * rng.choice([0.3, 1.0, 1.0, 2.5])))
        lengths = rng.integers(0, longest + 1, rng.integers(0, 80))
        overflow = OVERFLOWS[case % 3]
        expected, _ = textbook(pieces_of(lengths.tolist(), capacity, overflow), capacity)
        assert fills(best_fit(lengths, capacity, overflow=overflow)) == expected, (lengths.tolist(), capacity, overflow)


@pytest.mark.parametrize("capacity", [65_535, 65_536, 65_537, 1_000_000])
def test_rows_are_as_full_as_the_textbooks_at_and_beyond_the_radix_sort(capacity):
    lengths = np.random.default_rng(1).integers(0, int(1.3 * capacity), 3000)
    lengths[:4] = capacity - 1, capacity, capacity + 1, 65_536
    expected, _ = textbook(pieces_of(lengths.tolist(), capacity, "split"), capacity)
    assert fills(best_fit(lengths, capacity)) == expected


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITIES, overflow=st.sampled_from(OVERFLOWS))
@example(lengths=[], capacity=1, overflow="split")
@example(lengths=[0, 0], capacity=1, overflow="split")
@example(lengths=[1], capacity=1, overflow="truncate")
@example(lengths=[5000], capacity=7, overflow="split")
@example(lengths=[5000], capacity=7, overflow="drop")
@example(lengths=[3] * 50, capacity=1, overflow="split")
def test_best_fit_keeps_every_token_once_and_cuts_nothing_that_fits(lengths, capacity, overflow):
    packing = best_fit(lengths, capacity, overflow=overflow)
    check_law(lengths, (packing,), overflow)
    assert packing.cuts == num_cut(lengths, (packing,)) == 0
    assert fills(packing) == textbook(pieces_of(lengths, capacity, overflow), capacity)[0]


def test_a_document_at_and_around_the_capacity():
    for length, pieces, rows in ((7, [7], 1), (8, [8], 1), (9, [8, 1], 2), (16, [8, 8], 2), (17, [8, 8, 1], 3)):
        packing = best_fit([length], 8)
        assert packing.lengths_P.tolist() == pieces
        assert packing.offsets_P.tolist() == [8 * number for number in range(len(pieces))]
        assert packing.num_rows == rows
    assert best_fit([9], 8, overflow="truncate").lost == {"truncated": 1, "dropped": 0}
    assert best_fit([9], 8, overflow="drop").lost == {"truncated": 0, "dropped": 9}
    assert best_fit([8], 8, overflow="drop").lost == {"truncated": 0, "dropped": 0}


def test_rests_of_long_documents_share_rows_with_short_ones():
    packing = best_fit([11, 5, 2], 8)
    assert fills(packing) == [2, 8, 8]
    row = next(r for r in range(3) if packing.firsts_R1[r + 1] - packing.firsts_R1[r] == 2)
    pieces = slice(packing.firsts_R1[row], packing.firsts_R1[row + 1])
    assert packing.documents_P[pieces].tolist() == [1, 0]
    assert packing.offsets_P[pieces].tolist() == [0, 8]


def log_normal(count: int) -> np.ndarray:
    """Return lengths with the median (403) and the mean (690) of documents from the web."""
    sigma = np.sqrt(2 * np.log(690 / 403))
    return np.maximum(1, np.random.default_rng(0).lognormal(np.log(403), sigma, count)).astype(np.int64)


def functions() -> np.ndarray:
    """Return how many bytes each function of the standard library has."""
    lengths = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        places = np.cumsum([0, *(len(line.encode()) for line in text.splitlines(keepends=True))])
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths.append(places[node.end_lineno - 1] + node.end_col_offset - places[node.lineno - 1])
    return np.array(lengths, np.int64)


def check_bars(lengths_N: np.ndarray) -> None:
    for capacity, least in ((512, 0.9995), (2048, 0.9995), (8192, 0.999)):
        packing = best_fit(lengths_N, capacity)
        assert packing.utilisation >= least
        assert packing.num_tokens == lengths_N.sum()
        assert num_cut(lengths_N.tolist(), (packing,)) == packing.cuts == sum(packing.lost.values()) == 0
        for p in (np.s_[:], np.s_[::-1]):  # the order of the documents does not matter for the fills
            assert best_fit(lengths_N[p], capacity).num_rows == packing.num_rows


def test_rows_of_documents_from_the_web_are_full():
    check_bars(log_normal(65_536))


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_rows_of_functions_are_full():
    lengths_N = functions()
    assert len(lengths_N) > 10_000
    check_bars(lengths_N)


# --- rows of several lengths ----------------------------------------------------------------------------------------


def textbook_classes(lengths: list[int], capacities: list[int], overflow: str) -> list[list[int]]:
    """Return the fills of each class: documents of the class open rows, what is shorter fills the gaps."""
    left, classes = pieces_of(lengths, capacities[-1], overflow), []
    for capacity, shorter in zip(reversed(capacities), [*capacities[-2::-1], 0]):
        filled, left = textbook(left, capacity, opens_above=shorter)
        classes.append(filled)
    assert not left
    return classes[::-1]


@settings(max_examples=120, deadline=None)
@given(
    lengths=LENGTHS,
    capacities=st.sets(CAPACITIES, min_size=1, max_size=5).map(sorted),
    overflow=st.sampled_from(OVERFLOWS),
)
@example(lengths=[], capacities=[4, 8], overflow="split")
@example(lengths=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], capacities=[1, 2, 4, 8], overflow="split")
def test_classes_are_the_textbooks_and_keep_every_token_once(lengths, capacities, overflow):
    packings = bucketed(lengths, capacities, overflow=overflow)
    assert [packing.capacity for packing in packings] == capacities
    check_law(lengths, packings, overflow)
    assert num_cut(lengths, packings) == 0
    assert [fills(packing) for packing in packings] == textbook_classes(lengths, capacities, overflow)


def test_a_document_opens_rows_of_the_smallest_length_that_holds_it():
    for length, rows in (
        (1, [1, 0, 0]),
        (4, [1, 0, 0]),
        (5, [0, 1, 0]),
        (8, [0, 1, 0]),
        (9, [0, 0, 1]),
        (16, [0, 0, 1]),
    ):
        assert [packing.num_rows for packing in bucketed([length], (4, 8, 16))] == rows
    assert [packing.num_rows for packing in bucketed([16 + 5], (4, 8, 16))] == [0, 1, 1]


def test_what_fills_a_gap_is_gone_from_its_own_class():
    short, long = bucketed([6, 2, 2], (4, 8))
    assert long.documents_P.tolist() == [0, 1]
    assert short.documents_P.tolist() == [2]


def test_one_class_is_best_fit():
    lengths = log_normal(2000)
    for ours, theirs in zip(
        dataclasses.astuple(bucketed(lengths, (512,))[0]), dataclasses.astuple(best_fit(lengths, 512))
    ):
        assert np.array_equal(ours, theirs)


# --- for comparison -------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITIES)
@example(lengths=[], capacity=3)
@example(lengths=[0, 3, 0, 0, 3, 0], capacity=3)
def test_chunks_are_the_stream_cut_at_every_row(lengths, capacity):
    packing = chunk(lengths, capacity)
    check_law(lengths, (packing,))
    assert packing.cuts == num_cut(lengths, (packing,))
    stream = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    rows = [stream[first : first + capacity] for first in range(0, len(stream), capacity)]
    columns = list(zip(packing.documents_P, packing.offsets_P, packing.lengths_P))
    filled = [
        [(d, o + i) for d, o, n in columns[first:last] for i in range(n)]
        for first, last in zip(packing.firsts_R1, packing.firsts_R1[1:])
    ]
    assert filled == rows


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITIES, overflow=st.sampled_from(OVERFLOWS))
def test_a_padded_row_holds_one_piece(lengths, capacity, overflow):
    packing = pad(lengths, capacity, overflow=overflow)
    check_law(lengths, (packing,), overflow)
    assert packing.cuts == num_cut(lengths, (packing,)) == 0
    assert packing.lengths_P.tolist() == pieces_of(lengths, capacity, overflow)
    assert packing.firsts_R1.tolist() == list(range(len(packing.lengths_P) + 1))


def test_only_chunks_cut_documents_that_fit():
    assert chunk([3, 6, 2], 5).cuts == 1
    assert chunk([5, 5, 5], 5).cuts == 0
    assert chunk([4, 5, 6], 5).cuts == 1  # the last one fits no row


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [*PACKINGS.values(), lambda lengths, capacity: bucketed(lengths, (64, capacity))[1]])
def test_packing_is_a_pure_function(pack):
    lengths = log_normal(500)
    before = lengths.copy()
    first, second = (dataclasses.asdict(pack(lengths, 512)) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert np.array_equal(lengths, before)
    assert not any(np.shares_memory(value, lengths) for value in first.values() if isinstance(value, np.ndarray))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32, np.uint64, np.int64])
def test_lengths_come_in_any_integer_type(dtype):
    packing = best_fit(np.array([300, 20_000, 0, 40], dtype), 4096)
    check_law([300, 20_000, 0, 40], (packing,))


@pytest.mark.parametrize("pack", PACKINGS.values())
@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([1.5, 2.0], "type float64 and shape .*; give one whole number"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (3, r"shape \(\)"),
        ([True], "type bool"),
        ([4, -1, 2], "Document 1 has the length -1; give lengths of at least 0"),
    ],
)
def test_what_is_no_length_is_refused(pack, lengths, words):
    with pytest.raises(DataError, match=words):
        pack(lengths, 8)


@pytest.mark.parametrize("pack", PACKINGS.values())
@pytest.mark.parametrize("capacity", [0, -1, 2.5])
def test_a_capacity_that_holds_nothing_is_refused(pack, capacity):
    with pytest.raises(RecipeError, match="cannot be filled; give whole numbers ascending from at least 1"):
        pack([1], capacity)


@pytest.mark.parametrize("capacities", [(), (8, 8), (8, 4), (0, 4)])
def test_classes_that_do_not_ascend_are_refused(capacities):
    with pytest.raises(RecipeError, match="ascending from at least 1"):
        bucketed([1], capacities)


@pytest.mark.parametrize("pack", [best_fit, pad])
def test_an_unknown_overflow_is_refused_with_the_nearest(pack):
    with pytest.raises(
        RecipeError, match=r"overflow='splitt' is unknown, did you mean 'split'\?; give split, truncate"
    ):
        pack([1], 8, overflow="splitt")

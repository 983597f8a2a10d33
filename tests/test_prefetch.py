"""Prefetching: the same batches, an error where it belongs, and no thread left behind."""

from __future__ import annotations

import gc
import threading

import pytest
from test_batches import places, tokens_of

from hasten.data.prefetch import Prefetched


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hasten-batches")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    gc.collect()
    for thread in threads():
        thread.join(5)
    assert threads() == []


def test_batches_are_those_without_prefetching():
    expected, position, there = places(), (0,), (0,)
    with Prefetched(places()) as prefetched:
        for _ in range(20):
            step, position = prefetched.take(position, rows=3)
            plain, there = expected.take(there, rows=3)
            assert tokens_of(step) == tokens_of(plain)
            assert [b.num_targets for b in step] == [b.num_targets for b in plain]
            assert position == there
        assert len(threads()) == 1


def test_another_step_than_the_expected_one_is_given_all_the_same():
    asked = [((0,), 3, None), ((3,), 3, 8), ((6,), 2, 8), ((40,), 2, 8), ((42,), 2, None), ((44,), 2, None)]
    with Prefetched(places()) as prefetched:
        for position, rows, length in asked:
            step, after = prefetched.take(position, rows=rows, length=length)
            plain, there = places().take(position, rows=rows, length=length)
            assert (tokens_of(step), after) == (tokens_of(plain), there)
            assert step[0].tokens_BT.shape == plain[0].tokens_BT.shape


class Recorded:
    """Batches that say by which thread each step was made."""

    def __init__(self) -> None:
        self.document_mask, self.made = True, []

    def take(self, position, **asked):
        self.made.append((position, asked.get("length"), threading.current_thread() is threading.main_thread()))
        if position == (9,):
            raise ValueError("the step at 9 cannot be made")
        return places().take(position, **asked)


def test_the_next_step_is_made_by_the_thread_as_it_was_announced():
    recorded = Recorded()
    with Prefetched(recorded) as prefetched:
        prefetched.take((0,), rows=3, then=(3, 8))
        prefetched.take((3,), rows=3, length=8)
        prefetched.take((6,), rows=3, length=4)
    made = [(position, length) for position, length, is_main in recorded.made if is_main]
    assert made == [((0,), None), ((6,), 4)]
    assert ((3,), 8, False) in recorded.made


def test_an_error_is_raised_where_its_step_is_asked_for():
    with Prefetched(Recorded()) as prefetched:
        prefetched.take((3,), rows=3)
        prefetched.take((6,), rows=3)
        with pytest.raises(ValueError, match="the step at 9"):
            prefetched.take((9,), rows=3)
        with pytest.raises(ValueError, match="the step at 9"):
            prefetched.take((9,), rows=3)
        assert tokens_of(prefetched.take((12,), rows=3)[0]) == tokens_of(places().take((12,), rows=3)[0])


def test_an_error_in_a_step_that_nobody_asks_for_is_none():
    with Prefetched(Recorded()) as prefetched:
        prefetched.take((6,), rows=3)
        assert tokens_of(prefetched.take((12,), rows=3)[0]) == tokens_of(places().take((12,), rows=3)[0])


def test_a_batch_stays_valid_until_the_one_after_next_is_asked_for():
    with Prefetched(places()) as prefetched:
        first, position = prefetched.take((0,), rows=3)
        before = tokens_of(first)
        _, position = prefetched.take(position, rows=3)
        prefetched._ahead[1].result()
        assert tokens_of(first) == before
        # Memory is used again: the fourth step lies where the first one lay.
        addresses = [prefetched.take((9 * i,), rows=3)[0][0].tokens_BT.data_ptr() for i in range(6)]
    assert len(set(addresses)) <= 3


def test_closing_ends_the_thread_and_taking_again_starts_another():
    prefetched = Prefetched(places())
    prefetched.close()
    prefetched.take((0,), rows=3)
    thread = threads()[0]
    prefetched.close()
    assert not thread.is_alive()
    assert tokens_of(prefetched.take((3,), rows=3)[0]) == tokens_of(places().take((3,), rows=3)[0])
    prefetched.close()


def test_an_object_that_is_gone_leaves_no_thread():
    prefetched = Prefetched(places())
    prefetched.take((0,), rows=3)
    thread = threads()[0]
    del prefetched
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()

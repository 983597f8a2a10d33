"""Batches: a pure function of the seed and a position, in which no token is lost or seen twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_documents import Places
from test_shards import DOCUMENT, some_documents, write

from hasten.data.batches import Batch, Batches, Buffers, Draw, RowSource
from hasten.data.rows import ChunkedRows
from hasten.data.shards import PreparedData
from hasten.data.windows import Pack, Windows
from hasten.errors import DataError, RecipeError


def places(lengths=(30, 2, 9, 44, 7, 1, 0, 63, 5), *, seq_len: int = 16, **changed) -> Batches:
    """Return batches whose tokens are places in the stream."""
    rows = Windows(Places(lengths, 99), Pack("best_fit", (seq_len,))).rows()
    return Batches(RowSource(rows, seed=0), **{"seq_len": seq_len, "micro_rows": 2, **changed})


def tokens_of(step: list[Batch]) -> list[int]:
    return [token for batch in step for token in batch.tokens_BT.flatten().tolist()]


def joined(step: list[Batch]) -> list[torch.Tensor]:
    """Return tokens, labels and document ids of a whole step."""
    return [torch.cat([getattr(b, name) for b in step]) for name in ("tokens_BT", "labels_BT", "document_ids_BT")]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(lambda lengths: sum(lengths) >= 2),
    rows=st.integers(1, 9),
    micro_rows=st.integers(1, 10),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 3),
    packing=st.sampled_from(["best_fit", "chunk", "stream"]),
)
def test_every_token_of_every_epoch_is_seen_once(lengths, rows, micro_rows, seed, epoch, packing):
    documents = Places(lengths, 99)
    made = ChunkedRows(documents, 8) if packing == "stream" else Windows(documents, Pack(packing, (8,))).rows()
    batches = Batches(RowSource(made, seed=seed), seq_len=8, micro_rows=micro_rows)
    # As many steps as epochs have rows end exactly at the end of an epoch, steps across epoch ends included.
    position, seen, targets = (epoch * made.num_rows,), Counter(), 0
    for _ in range(made.num_rows):
        step, position = batches.take(position, rows=rows)
        seen.update(token for b in step for token in b.tokens_BT[b.labels_BT != -100].tolist())
        targets += sum(b.num_targets for b in step)
    assert seen == dict.fromkeys(range(sum(lengths) - 1), rows)
    assert targets == rows * (sum(lengths) - 1)
    assert batches.source.epochs(position) == epoch + rows


@pytest.mark.parametrize("micro_rows", [1, 2, 3, 4, 5, 6, 7, 100])
def test_micro_batches_together_are_the_step(micro_rows):
    whole, _ = places(micro_rows=6).take((42,), rows=6)
    parts, _ = places(micro_rows=micro_rows).take((42,), rows=6)
    assert len(whole) == 1
    assert all(torch.equal(a, b) for a, b in zip(joined(whole), joined(parts)))
    assert [len(b.tokens_BT) for b in parts[:-1]] == [micro_rows] * (len(parts) - 1)


def test_the_stream_of_rows_does_not_depend_on_the_size_of_a_step():
    whole = tokens_of(places().take((7,), rows=12)[0])
    parts, position = [], (7,)
    for rows in (1, 4, 2, 5):
        step, position = places().take(position, rows=rows)
        parts += tokens_of(step)
    assert parts == whole


def test_epochs_and_seeds_have_different_orders():
    source = places(range(1, 200)).source
    num_rows = source.rows.num_rows
    ((_, first),) = source.draw((0,), rows=num_rows, length=16).parts
    ((_, second),) = source.draw((num_rows,), rows=num_rows, length=16).parts
    ((_, other),) = RowSource(source.rows, seed=1).draw((0,), rows=num_rows, length=16).parts
    for order in (second, other):
        assert sorted(order.tolist()) == list(range(num_rows))
        assert (first == order).mean() < 0.1


@pytest.mark.parametrize("position", [(), (-1,), (1, 2)])
def test_a_position_that_is_none_is_refused(position):
    with pytest.raises(DataError, match="no position in rows"):
        places().take(position, rows=1)


def test_batches_of_stored_text_are_what_torch_expects(tmp_path):
    shards = PreparedData.open(write(tmp_path, some_documents([100, 3, 0, 250, 77]), shard_tokens=99)).train
    batches = Batches(RowSource(ChunkedRows(shards, 8), seed=0), seq_len=8, micro_rows=4)
    (batch,), _ = batches.take((0,), rows=4)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.document_ids_BT.dtype == torch.int32
    assert batch.tokens_BT.shape == batch.labels_BT.shape == batch.document_ids_BT.shape == (4, 8)
    assert all(t.is_contiguous() for t in (batch.tokens_BT, batch.labels_BT, batch.document_ids_BT))
    assert torch.equal(batch.document_ids_BT, (batch.tokens_BT == DOCUMENT).cumsum(1).int())
    assert batch.to("cpu") is batch
    assert batch.to("meta").labels_BT.device.type == "meta"


def test_a_batch_kept_or_changed_leaves_later_ones_alone():
    batches = places()
    kept, _ = batches.take((8,), rows=4)
    before = [tensor.clone() for tensor in joined(kept)]
    batches.take((12,), rows=4)
    assert all(torch.equal(a, b) for a, b in zip(joined(kept), before))
    for batch in kept:
        for tensor in (batch.tokens_BT, batch.labels_BT, batch.document_ids_BT):
            tensor.fill_(5)
    assert all(torch.equal(a, b) for a, b in zip(joined(batches.take((8,), rows=4)[0]), before))


def test_a_text_shorter_than_a_row_is_usable():
    batches = places([3], seq_len=64, micro_rows=2)
    step, _ = batches.take((0,), rows=5)
    assert [(b.num_targets, len(b.tokens_BT)) for b in step] == [(4, 2), (4, 2), (2, 1)]
    assert batches.source.epochs((1,)) == 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("micro_rows", [1, 2, 100])
def test_ranks_share_a_step_in_slices_that_differ_by_a_row_at_most(world_size, micro_rows):
    whole, position = places().take((3,), rows=7)
    shares = [
        places(rank=rank, world_size=world_size, micro_rows=micro_rows).take((3,), rows=7) for rank in range(world_size)
    ]
    assert [token for step, _ in shares for token in tokens_of(step)] == tokens_of(whole)
    assert {after for _, after in shares} == {position} == {(10,)}
    sizes = [sum(len(batch.tokens_BT) for batch in step) for step, _ in shares]
    assert sum(sizes) == 7
    assert max(sizes) - min(sizes) <= 1
    assert all(len(batch.tokens_BT) <= micro_rows for step, _ in shares for batch in step)
    assert sum(batch.num_targets for step, _ in shares for batch in step) == sum(b.num_targets for b in whole)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_is_none_is_refused(rank, world_size):
    with pytest.raises(RecipeError, match="ranks count from 0"):
        places(rank=rank, world_size=world_size)


def test_a_step_with_fewer_rows_than_ranks_is_refused():
    with pytest.raises(RecipeError, match="leaves some of 3 ranks without any"):
        places(world_size=3).take((0,), rows=2)
    assert len(places(world_size=3).take((0,), rows=3)[0]) == 1


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=8),
    rows=st.integers(1, 5),
    micro_rows=st.integers(1, 3),
)
def test_the_tokens_and_their_order_are_the_same_under_every_schedule_of_lengths(lengths, rows, micro_rows):
    position = expected_position = (0,)
    for length in lengths:
        step, position = places(micro_rows=micro_rows).take(position, rows=rows, length=length)
        expected, expected_position = places(micro_rows=micro_rows).take(expected_position, rows=rows)
        assert position == expected_position
        assert [batch.tokens_BT.shape[1] for batch in step] == [length] * len(step)
        for name in ("tokens_BT", "labels_BT", "document_ids_BT"):
            viewed = [value for batch in step for value in getattr(batch, name).flatten().tolist()]
            assert viewed == [value for batch in expected for value in getattr(batch, name).flatten().tolist()]
        assert [batch.num_targets for batch in step] == [batch.num_targets for batch in expected]


@pytest.mark.parametrize("length", [-1, 3, 5, 12, 32])
def test_lengths_that_do_not_divide_a_row_are_refused(length):
    with pytest.raises(RecipeError, match=f"Rows of {length} tokens cannot be cut from rows of seq_len=16"):
        places().take((0,), rows=2, length=length)


@pytest.mark.parametrize("length", [16, 8, 2])
def test_positions_begin_again_with_every_document_and_every_row(length):
    for batch in places().take((0,), rows=9, length=length)[0]:
        for tokens, labels, ids, got in zip(
            batch.tokens_BT.tolist(),
            batch.labels_BT.tolist(),
            batch.document_ids_BT.tolist(),
            batch.positions_BT.tolist(),
        ):
            expected = []
            for place in range(length):
                goes_on = place and ids[place] == ids[place - 1]
                expected.append(expected[-1] + 1 if goes_on else 0)
                if goes_on and labels[place] != -100:
                    assert tokens[place] == tokens[place - 1] + 1
            assert got == expected


def test_without_a_document_mask_positions_run_through_the_row():
    batch = places(document_mask=False).take((0,), rows=2)[0][0]
    assert batch.document_ids_BT is None
    assert batch.positions_BT.tolist() == [list(range(16))] * 2
    assert batch.viewed(8).positions_BT.tolist() == [list(range(8))] * 4


class TwoParts:
    """A source with two parts that are fewer rows than were asked for, in rows of half the length."""

    begin = (0,)

    def __init__(self, rows: ChunkedRows) -> None:
        self.rows = rows

    def draw(self, position, *, rows, length):
        return Draw(length, ((self.rows, np.array([4, 0])), (self.rows, np.array([2]))), (position[0] + 1,))

    def epochs(self, position):
        return 0.0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_a_source_cannot_give_is_padding_without_targets(world_size):
    rows = ChunkedRows(Places([40], 99), 8)
    shares = [
        Batches(TwoParts(rows), seq_len=16, micro_rows=1, rank=rank, world_size=world_size).take((0,), rows=3, length=4)
        for rank in range(world_size)
    ]
    batches = [batch for step, _ in shares for batch in step]
    assert [batch.tokens_BT.shape for batch in batches] == [(4, 4)] * 3
    tokens = [token for batch in batches for token in batch.tokens_BT.flatten().tolist()]
    assert tokens == [32, 33, 34, 35, 36, 37, 38, 99, *range(8), *range(16, 24), *[99] * 24]
    labels = [label for batch in batches for label in batch.labels_BT.flatten().tolist()]
    assert [label - token for label, token in zip(labels, tokens)].count(1) == 23
    assert labels.count(-100) == 25
    assert [batch.num_targets for batch in batches] == [15, 8, 0]


def test_skipped_steps_are_where_reading_them_would_have_led():
    batches = places()
    _, position = batches.take((5,), rows=3)
    _, position = batches.take(position, rows=3)
    skipped = batches.skip((5,), rows=3, steps=2)
    assert (skipped.position, skipped.tokens) == (position, 2 * 3 * 16)
    assert batches.skip((5,), rows=3, steps=0).position == (5,)


def test_steps_run_across_the_ends_of_epochs_and_each_epoch_has_every_token_once():
    batches = places()
    num_rows = batches.source.rows.num_rows
    seen = Counter()
    for row in range(0, 3 * num_rows, 3):
        step, after = batches.take((row,), rows=3)
        seen.update(t for b in step for t in b.tokens_BT[b.labels_BT != -100].tolist())
    assert set(seen.values()) == {3}
    assert sorted(seen) == list(range(160))
    assert batches.source.epochs(after) == 3.0


def test_memory_given_is_written_to_and_otherwise_fresh():
    batches, memory = places(), Buffers(document_mask=True)
    first, _ = batches.take((0,), rows=2, into=memory)
    kept = first[0].tokens_BT.clone()
    second, _ = batches.take((2,), rows=2, into=memory)
    assert torch.equal(first[0].tokens_BT, second[0].tokens_BT)
    assert not torch.equal(kept, second[0].tokens_BT)
    fresh, _ = batches.take((2,), rows=2)
    assert torch.equal(fresh[0].tokens_BT, second[0].tokens_BT)
    batches.take((0,), rows=2)
    assert torch.equal(fresh[0].tokens_BT, second[0].tokens_BT)
    larger, _ = batches.take((0,), rows=6, into=memory)
    assert tokens_of(larger) == tokens_of(batches.take((0,), rows=6)[0])

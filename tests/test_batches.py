"""Batches: a pure function of the seed and a row number, in which no token is lost or seen twice."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_documents import Places
from test_packing import stored
from test_shards import DOCUMENT, some_documents, write

from hasten.data.batches import Batch, Batches, Buffers, Draw, PackedBatches, RowSource
from hasten.data.rows import ChunkedRows
from hasten.data.shards import PreparedData, TokenShards
from hasten.data.windows import Pack, Windows
from hasten.errors import DataError, RecipeError


def batches(shards: TokenShards, **changed) -> PackedBatches:
    settings = {"seq_len": 8, "rows_per_step": 4, "micro_rows": 4, "seed": 0, **changed}
    return PackedBatches(shards, **settings)


def joined(step: list[Batch]) -> list[torch.Tensor]:
    """Return tokens, labels and document ids of a whole step."""
    return [torch.cat([getattr(b, name) for b in step]) for name in ("tokens_BT", "labels_BT", "document_ids_BT")]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(joined(a), joined(b)))


def pairs_of(step: list[Batch]) -> list[tuple[int, int]]:
    """Return every (input, target) of a step."""
    tokens, labels, _ = joined(step)
    return [pair for pair in zip(tokens.ravel().tolist(), labels.ravel().tolist()) if pair[1] != -100]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    """About a thousand tokens in a dozen documents over several shards."""
    documents = some_documents([100, 3, 0, 250, 77, 1, 64, 200, 30, 150, 90, 10])
    return PreparedData.open(write(tmp_path_factory.mktemp("data"), documents, shard_tokens=333)).train


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(2, 70),
    seq_len=st.integers(1, 80),
    rows_per_step=st.integers(1, 9),
    micro_rows=st.integers(1, 10),
    seed=st.integers(0, 2**64),
)
def test_every_token_of_every_epoch_is_seen_once(
    tmp_path_factory, num_tokens, seq_len, rows_per_step, micro_rows, seed
):
    stream, shards = stored(tmp_path_factory.mktemp("data"), num_tokens)
    source = batches(shards, seq_len=seq_len, rows_per_step=rows_per_step, micro_rows=micro_rows, seed=seed)
    # As many steps as epochs have rows end exactly at the end of an epoch, steps across epoch ends included.
    taken = [source.take(step * rows_per_step) for step in range(source.num_rows)]
    seen = Counter(pair for step in taken for pair in pairs_of(step))
    assert seen == dict.fromkeys(zip(stream[:-1].tolist(), stream[1:].tolist()), rows_per_step)
    assert sum(b.num_targets for step in taken for b in step) == rows_per_step * (num_tokens - 1)


@settings(max_examples=20, deadline=None)
@given(num_tokens=st.integers(2, 70), seq_len=st.integers(1, 20), epoch=st.integers(0, 5))
def test_each_epoch_by_itself_holds_every_token_once(tmp_path_factory, num_tokens, seq_len, epoch):
    stream, shards = stored(tmp_path_factory.mktemp("data"), num_tokens)
    source = batches(shards, seq_len=seq_len, rows_per_step=1, micro_rows=1)
    rows = range(epoch * source.num_rows, (epoch + 1) * source.num_rows)
    seen = sorted(pair for row in rows for pair in pairs_of(source.take(row)))
    assert seen == sorted(zip(stream[:-1].tolist(), stream[1:].tolist()))


@pytest.mark.parametrize("micro_rows", [1, 2, 3, 4, 5, 6, 7, 100])
def test_micro_batches_together_are_the_step(shards, micro_rows):
    whole = batches(shards, rows_per_step=6, micro_rows=6).take(42)
    parts = batches(shards, rows_per_step=6, micro_rows=micro_rows).take(42)
    assert same(whole, parts)
    assert [len(b.tokens_BT) for b in parts[:-1]] == [micro_rows] * (len(parts) - 1)
    assert sum(b.num_targets for b in parts) == whole[0].num_targets


def test_the_stream_of_rows_does_not_depend_on_the_size_of_a_step(shards):
    streams = []
    for rows_per_step in (1, 2, 3, 4, 6, 12):
        source = batches(shards, rows_per_step=rows_per_step, micro_rows=2)
        steps = [joined(source.take(row)) for row in range(0, 360, rows_per_step)]
        streams.append(hashlib.sha256(b"".join(t.numpy().tobytes() for step in zip(*steps) for t in step)).hexdigest())
    assert len(set(streams)) == 1


def test_resumed_stream_equals_the_uninterrupted_one(shards):
    endless = iter(batches(shards))
    uninterrupted = [next(endless) for _ in range(103)]
    for stop in np.random.default_rng(0).integers(0, 100, 20).tolist():
        before, after = batches(shards), batches(shards)
        for _ in zip(range(stop), before):
            pass
        after.load_state_dict({"row": stop * 4})
        resumed = iter(after)
        assert all(same(next(resumed), expected) for expected in uninterrupted[stop : stop + 3])
        assert after.state_dict() == {"row": (stop + 3) * 4}


def test_the_state_saved_is_the_state_to_resume_from(shards):
    source, other = batches(shards), batches(shards)
    for _ in zip(range(7), source):
        pass
    other.load_state_dict(source.state_dict())
    assert same(next(iter(other)), next(iter(source)))


def test_a_row_can_be_taken_at_any_place_at_once(shards):
    source = batches(shards)
    far = source.take(10**15)
    assert same(far, batches(shards).take(10**15))
    assert not same(far, source.take(10**15 + 4))


def test_epochs_and_seeds_have_different_orders(shards):
    source = batches(shards, rows_per_step=1)
    epoch = source.num_rows
    first = [joined(source.take(row))[0] for row in range(epoch)]
    second = [joined(source.take(row))[0] for row in range(epoch, 2 * epoch)]
    other = [joined(batches(shards, rows_per_step=1, seed=1).take(row))[0] for row in range(epoch)]
    for order in (second, other):
        assert sum(torch.equal(a, b) for a, b in zip(first, order)) < epoch / 10


def test_document_ids_count_the_document_tokens_of_a_row(shards):
    tokens, _, ids = joined(batches(shards, rows_per_step=50).take(0))
    assert ids.dtype == torch.int32
    assert torch.equal(ids, (tokens == DOCUMENT).cumsum(1).int())
    assert batches(shards, document_mask=False).take(0)[0].document_ids_BT is None


def test_tensors_are_what_torch_expects(shards):
    batch = batches(shards).take(0)[0]
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.tokens_BT.shape == batch.labels_BT.shape == batch.document_ids_BT.shape == (4, 8)
    assert all(t.is_contiguous() for t in (batch.tokens_BT, batch.labels_BT, batch.document_ids_BT))
    assert batch.to("cpu") is batch
    assert batch.to("meta").labels_BT.device.type == "meta"


def test_a_batch_kept_or_changed_leaves_later_ones_alone(shards):
    source = batches(shards)
    kept = source.take(8)
    before = [tensor.clone() for tensor in joined(kept)]
    source.take(12)
    assert all(torch.equal(x, y) for x, y in zip(joined(kept), before))
    for tensor in (kept[0].tokens_BT, kept[0].labels_BT, kept[0].document_ids_BT):
        tensor.fill_(5)
    assert all(torch.equal(x, y) for x, y in zip(joined(source.take(8)), before))


def test_a_text_shorter_than_a_row_is_usable(tmp_path):
    stream, short = stored(tmp_path, 3)
    source = batches(short, seq_len=64, rows_per_step=5, micro_rows=2)
    assert (source.num_rows, source.steps_per_epoch) == (1, 0.2)
    assert pairs_of(source.take(0)) == list(zip(stream[:-1].tolist(), stream[1:].tolist())) * 5


def test_a_text_of_one_token_is_refused(tmp_path):
    only = PreparedData.open(write(tmp_path, [np.array([], int)])).train
    assert only.num_tokens == 1
    with pytest.raises(DataError, match="has 1 token, and there is nothing to predict"):
        batches(only)


def test_an_epoch_in_steps_counts_whole_rows(shards):
    source = batches(shards, rows_per_step=5)
    assert source.num_rows == -(-(shards.num_tokens - 1) // 8)
    assert source.steps_per_epoch == source.num_rows / 5


@pytest.mark.parametrize("state", [{}, {"row": -1}, {"row": 1.5}, {"row": "1"}, {"row": True}])
def test_a_position_that_is_none_is_refused(shards, state):
    with pytest.raises(DataError, match="row number of at least 0"):
        batches(shards).load_state_dict(state)


def test_iterating_moves_the_state_by_whole_steps(shards):
    source = batches(shards)
    assert source.state_dict() == {"row": 0}
    first = next(iter(source))
    assert source.state_dict() == {"row": 4}
    assert same(first, batches(shards).take(0))


# --- batches of any source ------------------------------------------------------------------------------------------


def places(lengths=(30, 2, 9, 44, 7, 1, 0, 63, 5), *, seq_len: int = 16, **changed) -> Batches:
    """Return batches whose tokens are places in the stream."""
    rows = Windows(Places(lengths, 99), Pack("best_fit", (seq_len,))).rows()
    return Batches(RowSource(rows, seed=0), **{"seq_len": seq_len, "micro_rows": 2, **changed})


def tokens_of(step: list[Batch]) -> list[int]:
    return [token for batch in step for token in batch.tokens_BT.flatten().tolist()]


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

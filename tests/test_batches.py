"""Batches: a pure function of the seed and a row number, in which no token is lost or seen twice."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import stored
from test_shards import DOCUMENT, some_documents, write

from hasten.data.batches import Batch, PackedBatches
from hasten.data.shards import PreparedData, TokenShards
from hasten.errors import DataError


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

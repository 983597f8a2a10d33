"""The stream of a run: one hash whatever the ranks, the workers and the stops."""

from __future__ import annotations

import hashlib
import json
from itertools import islice

import numpy as np
import pytest
import torch
from test_shards import some_documents, write

from hasten.data import LengthSchedule, PackedBatches, PreparedData

STEPS = 12
NAMES = ("input_ids", "labels", "document_ids", "position_ids")
SCHEDULE = LengthSchedule(64, (16, 32, 64), growth="linear", share=0.5, replay=0.3)

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than this machine has cores


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Some ten thousand tokens over several shards, in documents of all sizes."""
    sizes = np.random.default_rng(0).lognormal(4, 1.2, 120).astype(int).tolist()
    return PreparedData.open(write(tmp_path_factory.mktemp("data"), some_documents(sizes), shard_tokens=2000)).train


def packed(shards, mode: str, total_steps: int, **changed) -> PackedBatches:
    return PackedBatches(
        shards, seq_len=64, batch_tokens=640, mode=mode, seed=3, lengths=SCHEDULE, total_steps=total_steps, **changed
    )


def hashed(digest, items: list[dict]) -> None:
    """Add a step, given as the items of its ranks in order."""
    for name in NAMES:
        whole = torch.cat([item[name] for item in items])
        digest.update(f"{name} {tuple(whole.shape)}".encode())
        digest.update(whole.numpy())


def stream_hash(shards, mode: str, *, world_size: int, num_workers: int) -> str:
    """Return the hash of the global batches of a run."""
    loaders = [
        packed(shards, mode, STEPS, rank=rank, world_size=world_size).loader(num_workers=num_workers)
        for rank in range(world_size)
    ]
    digest = hashlib.sha256()
    steps = 0
    for items in zip(*loaders, strict=True):
        hashed(digest, items)
        steps += 1
    assert steps == STEPS
    return digest.hexdigest()


@pytest.fixture(scope="module")
def alone(shards) -> dict[str, str]:
    return {mode: stream_hash(shards, mode, world_size=1, num_workers=0) for mode in ("view", "bucket")}


def test_every_choice_makes_another_stream(shards, alone):
    assert len(set(alone.values())) == 2
    other = packed(shards, "view", STEPS)
    other.skip()
    digest = hashlib.sha256()
    for item in other:
        hashed(digest, [item])
    assert digest.hexdigest() != alone["view"]


# 10 rows of a step are shared by 3, 4 and 8 ranks unevenly.
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mode", ["view", "bucket"])
def test_the_stream_is_the_same_for_any_number_of_ranks(shards, alone, mode, world_size):
    assert stream_hash(shards, mode, world_size=world_size, num_workers=0) == alone[mode]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_stream_is_the_same_for_any_number_of_workers(shards, alone, world_size, num_workers):
    mode = "view" if world_size == 2 else "bucket"
    assert stream_hash(shards, mode, world_size=world_size, num_workers=num_workers) == alone[mode]


@pytest.mark.heavy
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("mode", ["view", "bucket"])
def test_the_stream_is_the_same_for_all_ranks_and_workers(shards, alone, mode, world_size, num_workers):
    assert stream_hash(shards, mode, world_size=world_size, num_workers=num_workers) == alone[mode]


@pytest.mark.parametrize("mode", ["view", "bucket"])
def test_the_stream_is_the_same_across_a_thousand_stops(shards, mode):
    total = 1500
    whole = hashlib.sha256()
    for item in packed(shards, mode, total):
        hashed(whole, [item])
    stops = sorted(np.random.default_rng(1).choice(np.arange(1, total), 1000, replace=False).tolist())
    stopped, state = hashlib.sha256(), packed(shards, mode, total).state_dict()
    for begin, stop in zip([0, *stops], [*stops, total]):
        data = packed(shards, mode, total)
        data.load_state_dict(json.loads(json.dumps(state)))
        for item in islice(data, stop - begin):
            hashed(stopped, [item])
        state = data.state_dict()
        assert state["step"] == stop
    assert stopped.hexdigest() == whole.hexdigest()
    assert len(json.dumps(state)) <= 1024


def test_the_stream_is_the_same_across_stops_that_change_ranks_and_workers(shards, alone):
    digest, state, step = hashlib.sha256(), None, 0
    for world_size, num_workers, steps in ((3, 0, 2), (1, 2, 4), (8, 0, 1), (2, 1, 3), (1, 0, 2)):
        datasets = [packed(shards, "bucket", STEPS, rank=rank, world_size=world_size) for rank in range(world_size)]
        for data in datasets if state else ():
            data.load_state_dict(state)
        loaders = [iter(data.loader(num_workers=num_workers)) for data in datasets]
        for _ in range(steps):
            hashed(digest, [next(loader) for loader in loaders])
        states = [data.state_dict() for data in datasets]
        state, step = states[0], step + steps
        assert all(other == state for other in states)
        assert state["step"] == step
    assert digest.hexdigest() == alone["bucket"]

"""Every optimizer is the same over the shards of FSDP2 as in one process, whatever the number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed
from sharded_training import (
    BF16_CASES,
    CASES,
    COLUMN_SETTINGS,
    COUNTED_CASES,
    MODIFIER_CASES,
    MOVED_CASES,
    PACKED_CASES,
    REAL_CASES,
    RULE_CASES,
    SAVED_CASES,
    WORLDS,
    Case,
    same,
    snapshot,
)
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import hasten
from hasten.optim import OPTIMIZERS

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs fork and gloo",
)

SECONDS = 300
Lines = dict[str, list[dict]]

every_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world} ranks")


def every(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [case.name for case in cases])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Iterator[dict[int, Lines]]:
    """What every rank measured: by number of ranks, by case, a record for each rank."""
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).parent / "sharded_ranks.py"
    paths = [str(script.parent), str(Path(hasten.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ranks = subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = ranks.communicate(timeout=SECONDS)
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
    print(output)
    records: dict[int, Lines] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = records.setdefault(int(path.name.partition(".")[0]), {})
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            lines.setdefault(record["case"], []).append(record)
    return records


def records_of(found: dict[int, Lines], world: int, name: str) -> list[dict]:
    """Return one record for each rank, all of which came to an end."""
    records = found.get(world, {}).get(name, [])
    errors = [record["error"] for record in records if "error" in record]
    assert not errors, errors[0]
    assert len(records) == world, f"{world - len(records)} of {world} ranks did not come to this case"
    return records


def check_same(records: list[dict]) -> None:
    """Weights after training and as `eval` shows them are those of one process; `train` brings the first back."""
    for record in records:
        assert record["distance"] <= 1e-6
        assert record["eval_distance"] <= 1e-6
        assert record["is_restored"]


def test_the_table_has_every_optimizer():
    assert [case.rule for case in RULE_CASES] == list(OPTIMIZERS)
    assert len({case.name for case in CASES}) == len(CASES)


@every_world
@every(RULE_CASES)
def test_sharded_weights_equal_those_of_one_process(found, world, name):
    check_same(records_of(found, world, name))


@every(REAL_CASES)
def test_gradients_of_fsdp_lead_to_the_weights_of_one_process(found, name):
    check_same(records_of(found, int(name.split()[-1]), name))


@every_world
@every(MODIFIER_CASES)
def test_modified_steps_are_the_same_sharded(found, world, name):
    check_same(records_of(found, world, name))


@every_world
@every(PACKED_CASES)
def test_state_in_8_bits_is_the_same_sharded(found, world, name):
    records = records_of(found, world, name)
    check_same(records)
    assert all(record["is_same"] for record in records)


@every_world
@every(BF16_CASES)
def test_bfloat16_weights_are_the_same_sharded(found, world, name):
    records = records_of(found, world, name)
    if name.startswith("stochastic"):
        # Each rank draws random numbers for its own rows: as far apart as two seeds are, and no further.
        assert all(record["is_finite"] and record["distance"] < 0.2 for record in records)
    else:
        check_same(records)


@every_world
@pytest.mark.parametrize("name", ["rule schedule_free_adamw", "ema adamw", "ema muon"])
def test_evaluation_weights_are_others_and_the_same_sharded(found, world, name):
    records = records_of(found, world, name)
    assert any(record["is_evaluated_apart"] for record in records)
    check_same(records)


@every(SAVED_CASES)
def test_resumed_sharded_run_equals_uninterrupted_one(found, name):
    assert all(record["is_same"] for record in records_of(found, WORLDS[0], f"resumed {name}"))


@every(MOVED_CASES)
def test_what_two_ranks_saved_goes_on_over_three(found, name):
    assert all(record["distance"] <= 1e-6 for record in records_of(found, WORLDS[1], f"resumed {name}"))


@pytest.mark.parametrize("case", [*RULE_CASES, *MODIFIER_CASES], ids=lambda case: case.name)
def test_asking_an_unused_optimizer_for_its_state_moves_no_weight(case):
    # PyTorch takes a step at rate 0 to find out what the state is.
    settings = {} if case.rule == "prodigy" else {"decay_follows_lr": False}
    model, opt = replace(case, settings={**case.settings, **settings}).build(None)
    start = snapshot(model)
    get_optimizer_state_dict(model, opt)
    assert same(snapshot(model), start)


@every_world
@pytest.mark.parametrize("rule", COLUMN_SETTINGS)
def test_shards_of_columns_are_refused_where_rows_are_needed(found, world, rule):
    for record in records_of(found, world, f"columns {rule}"):
        assert ("fully_shard" in record["refusal"]) == (rule != "adam")


@every_world
@every(COUNTED_CASES)
def test_matrices_are_sent_to_one_rank_and_back_once(found, world, name):
    for record in records_of(found, world, f"counted {name}"):
        # One exchange for all matrices together, whatever their number; NorMuon adds up norms.
        assert record["matrices"] > 2
        assert record["sent"].pop("alltoall_base_") == 2
        assert record["sent"].pop("allreduce_", 0) == (name == "rule normuon")
        assert not record["sent"]


@every_world
@every(COUNTED_CASES)
def test_the_work_on_matrices_is_split_over_the_ranks(found, world, name):
    work = [record["work"] for record in records_of(found, world, f"counted {name}")]
    (single,) = records_of(found, 1, f"counted {name}")
    assert sum(work) == single["work"]
    assert 0 < min(work) <= max(work) < 0.75 * single["work"]

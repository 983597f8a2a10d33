"""The proof of a run: counted exactly, the same after every stop, told at every end."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from hasten.checkpoint import load, save
from hasten.loop import Event, advance, capture, prepare_for, restore, start, train
from hasten.loop.proving import prove
from hasten.loop.watching import is_looked_at
from hasten.proof import Seen, count, empty, facts_of, quantile, warnings_of
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events, read_result

# Everything that a tally holds changes in such a run.
BUSY = (
    "lengths=linear",
    "lengths.start=16",
    "lengths.replay=0.2",
    "batch.schedule=stages((0, 0.25), (0.5, 1.0))",
    "batch.micro_rows=2",
    "schedule.weight_decay=linear(floor=0.1)",
    "optimizer.cautious=true",
    "optimizer.ema=0.9",
)


def seen(**values: object) -> Seen:
    plain = {
        "targets": 60,
        "positions": 64,
        "seq_len": 16,
        "micro_batches": 1,
        "window": None,
        "norm": 1.0,
        "limit": math.inf,
        "clipped": False,
        "skipped": False,
        "loss_scale": 1.0,
        "groups": {},
    }
    return Seen(**{**plain, **values})


def of_kind(folder: str, kind: str) -> list[dict]:
    return [event for event in read_events(RunFolder(Path(folder))) if event["kind"] == kind]


# --- counting -------------------------------------------------------------------------------------------------------


def test_a_tally_is_plain_data_that_json_gives_back():
    tally = empty()
    for number in range(50):
        count(tally, seen(norm=0.1 * number, window=number + 1, groups={"all": {"lr": 0.1 * number}}))
    assert json.loads(json.dumps(tally)) == tally


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_quantiles_of_norms_are_right_to_two_percent(share):
    rng, tally = random.Random(0), empty()
    norms = [math.exp(rng.gauss(0, 2)) for _ in range(2000)]
    for norm in norms:
        count(tally, seen(norm=norm))
    exact = np.quantile(norms, share, method="inverted_cdf")
    assert quantile(tally, share) == pytest.approx(exact, rel=0.0221)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_norms_that_are_no_number_are_counted_apart(norm):
    tally = empty()
    count(tally, seen(norm=norm, limit=1.0))
    assert tally["norm"] == {"bins": {}, "max": 0.0, "broken": 1}
    assert tally["clip"]["above"] == 0
    assert quantile(tally, 0.5) is None


def test_a_gradient_of_zero_is_a_norm_too():
    tally = empty()
    count(tally, seen(norm=0.0))
    assert quantile(tally, 0.5) == 0.0


@pytest.mark.parametrize(("norm", "above"), [(1.0, 0), (1.0001, 1)])
def test_only_a_norm_over_its_limit_is_above_it(norm, above):
    tally = empty()
    count(tally, seen(norm=norm, limit=1.0))
    assert tally["clip"]["above"] == above


def test_the_loss_scale_is_followed_up_and_down():
    tally = empty()
    for scale in (8.0, 4.0, 4.0, 2.0, 4.0):
        count(tally, seen(loss_scale=scale))
    assert tally["loss_scale"] == {"falls": 2, "rises": 1, "first": 8.0, "min": 2.0, "max": 8.0, "last": 4.0}


def test_few_steps_are_looked_at_closely():
    looked = [step for step in range(10_000) if is_looked_at(step)]
    assert looked[:8] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert len(looked) < 170


def test_nothing_is_said_of_a_run_without_a_step(text_file, tiny):
    recipe = resolve(None, [f"data={text_file}", *tiny, "budget=5"]).recipe
    proof = prove(start(recipe, prepare_for(recipe)))
    assert (proof.facts, proof.warnings) == ([], [])
    assert (facts_of(proof.data), warnings_of(recipe, proof.data)) == ([], [])


# --- the same after every stop --------------------------------------------------------------------------------------


def test_a_run_resumed_at_any_step_proves_what_one_that_never_stopped_does(text_file, tiny, tmp_path):
    recipe = resolve(None, [f"data={text_file}", *tiny, "budget=18", *BUSY]).recipe
    data = prepare_for(recipe)
    whole = prove(advance(start(recipe, data), 18))
    for stop in (1, 2, 3, 9, 16, 17):
        stopped = advance(start(recipe, data), stop)
        saved = load(save(tmp_path / str(stop), stop, *capture(stopped), keep=1))
        resumed = start(recipe, data)
        restore(resumed, saved.tensors, saved.state)
        assert prove(advance(resumed, 18)).data == whole.data


def test_what_was_captured_does_not_count_on_with_the_run(text_file, tiny):
    recipe = resolve(None, [f"data={text_file}", *tiny, "budget=8"]).recipe
    data = prepare_for(recipe)
    state = advance(start(recipe, data), 4)
    tensors, plain = capture(state)
    before = copy.deepcopy(plain["notes"])
    advance(state, 6)
    other = start(recipe, data)
    restore(other, tensors, plain)
    advance(other, 8)
    assert plain["notes"] == before


def test_a_run_paused_twice_proves_what_one_that_never_paused_does(tiny, text_file, validation_file):
    given = [*tiny, f"data={text_file}", f"val={validation_file}", "budget=12", *BUSY]
    whole = train(resolve(None, [*given, "out=whole"]).recipe)
    parts = resolve(None, [*given, "out=parts"]).recipe
    first = train(parts, until="25%")
    assert (first.values["proof"]["steps"], first.values["proof"]["is_whole"]) == (3, False)
    train(parts, until=7)
    assert train(parts).values["proof"] == whole.values["proof"]
    assert [event["data"]["steps"] for event in of_kind("parts", "proof")] == [3, 7, 12]


# --- told at every end ----------------------------------------------------------------------------------------------


def test_a_finished_run_tells_facts_and_warnings_and_keeps_the_numbers(tiny, text_file, validation_file):
    events: list[Event] = []
    given = [*tiny, f"data={text_file}", f"val={validation_file}", "budget=6", "clip.max_norm=90", "out=run"]
    result = train(resolve(None, given).recipe, hooks=[events.append])
    (proof,) = of_kind("run", "proof")
    assert all(len(fact) == 2 and all(fact) for fact in proof["facts"])
    assert proof["data"] == read_result(RunFolder(Path("run")))["proof"] == result.values["proof"]
    (told,) = proof["warnings"]
    assert told.startswith("clip enabled, acted on 0 of 6 steps: max_norm 90 was never reached")
    assert told in [event.values["message"] for event in events if event.kind == "warning"]
    assert "proof" not in of_kind("run", "finish")[0]


def test_the_proof_names_what_the_run_depended_on(tiny, text_file, validation_file):
    recipe = resolve(None, [*tiny, f"data={text_file}", f"val={validation_file}", "budget=2", "out=run"]).recipe
    values = train(recipe).values
    proof = values["proof"]
    assert (proof["recipe_sha256"], proof["seed"]) == (recipe.sha256, 0)
    assert [proof[f"{name}_sha256"] for name in ("corpus", "tokenizer")] == [
        values[f"{name}_sha256"] for name in ("corpus", "tokenizer")
    ]


def test_a_diverged_run_proves_what_it_did_until_then(tiny, text_file, validation_file):
    given = [*tiny, f"data={text_file}", f"val={validation_file}", "budget=40", "lr=100", "precision=fp16", "out=run"]
    result = train(resolve(None, [*given, "schedule.warmup=0"]).recipe)
    assert result.status == "diverged"
    assert 0 < result.values["proof"]["steps"] < 40
    assert result.values["proof"]["is_whole"] is False

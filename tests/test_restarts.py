"""A pool of seeds: what it costs, how it is judged, that the survivor is the run it would have been alone."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hasten
from hasten.loop import prepare_for, train
from hasten.recipe import resolve
from hasten.record import RunFolder
from hasten.restarts import restart
from hasten.restarts.judging import Course, agreement, expected_gap, fault, ranking, read_course
from hasten.restarts.lead import measure_lead, row_losses
from hasten.restarts.outcome import Rung, lead_in_words
from hasten.restarts.plan import Plan, plan, read_pool


def pool_of(seeds=8, rungs="5%,10%,25%", keep="0.5", **more):
    return read_pool(seeds=seeds, first_seed=0, rungs=rungs, keep=keep, **more)


def planned(pool, budget):
    return plan(pool, budget, tokens_of=lambda horizon, begin, end: 512 * (end - begin))


# --- the plan -------------------------------------------------------------------------------------------------------


def test_whole_pool_costs_the_budget():
    found = planned(pool_of(keep="4,2,1"), 10_000)
    # 8 * 5% + 4 * 5% + 2 * 15% + 75% = 1.65 horizons
    assert found.horizon == pytest.approx(10_000 / 1.65, abs=3)
    assert 10_000 - 12 < found.steps <= 10_000
    assert sum(found.tokens) == 512 * found.steps


@given(
    seeds=st.integers(1, 20), rungs=st.sets(st.integers(1, 60), min_size=1, max_size=3), budget=st.integers(3000, 10**6)
)
def test_horizon_is_the_largest_that_the_budget_allows(seeds, rungs, budget):
    pool = pool_of(seeds, ",".join(f"{share}%" for share in sorted(rungs)))
    found = planned(pool, budget)
    assert found.steps <= budget
    fixed = pool_of(seeds, ",".join(pool.rungs), fixed_horizon=True)
    assert planned(fixed, found.horizon).steps == found.steps
    assert planned(fixed, found.horizon + 1).steps > budget


def test_fixed_horizon_puts_the_pool_on_top():
    found = planned(pool_of(fixed_horizon=True), 400)
    assert found.horizon == 400
    assert found.steps == 660


@pytest.mark.parametrize(
    ("seeds", "keep", "kept"),
    [(8, "0.5", (4, 2, 1)), (8, "4,2,1", (4, 2, 1)), (16, "0.5", (8, 4, 1)), (1, "0.5", (1, 1, 1))],
)
def test_share_kept_is_rounded_up_and_one_is_left(seeds, keep, kept):
    assert pool_of(seeds, keep=keep).keep == kept


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"seeds": 0}, "at least 1"),
        ({"rungs": "10%,5%"}, "do not rise"),
        ({"rungs": "100%"}, "below 100%"),
        ({"rungs": "30s"}, "steps"),
        ({"rungs": ""}, "at least one"),
        ({"keep": "4,2"}, "3 rungs"),
        ({"keep": "4,2,2"}, "end with 1"),
        ({"keep": "4,5,1"}, "fall"),
        ({"keep": "nan"}, "whole number"),
        ({"keep": "some"}, "list of numbers"),
        ({"tries": 3}, "at least 8"),
        ({"least_gain": 1.0}, "below 1"),
    ],
)
def test_pool_that_cannot_be_is_refused(settings, word):
    with pytest.raises(hasten.RecipeError, match=word):
        pool_of(**settings)


def test_budget_that_is_too_small_for_its_rungs_is_refused():
    with pytest.raises(hasten.RecipeError, match="larger budget"):
        planned(pool_of(), 20)


def test_plan_comes_back_from_its_file():
    found = planned(pool_of(), 400)
    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found


# --- judging --------------------------------------------------------------------------------------------------------


def test_equal_losses_go_to_the_smaller_seed():
    assert ranking({2: 1.5, 0: 1.5, 1: 1.0}) == [1, 0, 2]


@pytest.mark.parametrize(("loss", "is_given_up"), [(4.95, False), (4.951, True), (5.2, True), (float("nan"), True)])
def test_run_that_gains_less_than_asked_is_given_up(loss, is_given_up):
    reason = fault(Course({0: 5.0, 10: loss}), 10, least_gain=0.01)
    assert bool(reason) == is_given_up


def test_slow_run_is_only_ranked_where_nothing_replaces_it():
    assert fault(Course({0: 5.0, 10: 5.2}), 10) == ""


def test_run_that_diverges_later_had_arrived_at_the_rung_before():
    course = Course({0: 5.0, 10: 4.0}, diverged=True, reason="loss is nan")
    assert fault(course, 10) == ""
    assert "loss is nan" in fault(course, 20, before=10)
    assert "loss is nan" in fault(course, None, before=10)


def test_expected_gap_is_that_of_simulated_draws():
    chance = random.Random(0)
    gaps = []
    for _ in range(4000):
        first, second = sorted(chance.gauss(0, 1) for _ in range(8))[:2]
        gaps.append(second - first)
    assert expected_gap(8) == pytest.approx(statistics.fmean(gaps), abs=0.03)


def test_agreement_of_two_seeds_is_not_claimed():
    assert agreement({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0}) == (2, None)
    assert agreement({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0}) == (3, None)


@pytest.mark.parametrize(
    ("second_rows", "larger", "words"),
    [
        ([2.50, 2.51, 2.49, 2.50], True, "is larger than that noise"),
        ([1.0, 3.0, 1.2, 2.9], False, "other text could turn it round"),
        ([2.011, 2.010, 2.009, 2.010], False, "by chance"),
    ],
)
def test_lead_is_held_against_the_text_and_against_the_seeds(second_rows, larger, words):
    losses = {0: 2.0, 1: statistics.fmean(second_rows), 2: 2.6}
    lead = measure_lead(losses, {0: [2.0] * 4, 1: second_rows})
    assert lead.larger is larger
    stage = planned(pool_of(), 400).stages[0]
    assert words in lead_in_words(Rung(stage, losses, (0,), lead))


# --- real pools -----------------------------------------------------------------------------------------------------


def settings(tiny, text_file, validation_file, budget):
    return [*tiny, f"data={text_file}", f"val={validation_file}", f"budget={budget}"]


def weights(folder):
    return (Path(folder) / "final" / "model.safetensors").read_bytes()


def trained_alone(result, folder="alone"):
    recipe = resolve(result.run / "recipe.toml", {"out": folder}).recipe
    return train(recipe)


def assert_is_exact(result, seeds):
    """The survivor is what its recipe gives alone, and the steps are those of the plan."""
    assert result.status == "finished"
    assert trained_alone(result).values["val_loss"] == result.values["val_loss"]
    assert weights("alone") == weights(result.run)
    assert result.values["cost"]["total"]["steps"] == result.values["plan"]["steps"]
    planned_tokens = sum(result.values["plan"]["tokens"])
    assert result.values["cost"]["total"]["tokens"] == pytest.approx(planned_tokens, rel=0.01)
    losses = {seed["seed"]: seed["loss"] for seed in result.values["rungs"][-1]["seeds"]}
    assert result.survivor == min(losses, key=losses.get)
    assert sorted(path.name for path in (result.folder / "runs").iterdir()) == [f"seed-{k}" for k in range(seeds)]


def test_survivor_is_the_run_it_would_have_been_alone(tiny, text_file, validation_file):
    recipe = resolve(None, settings(tiny, text_file, validation_file, 24)).recipe
    dry = restart(recipe, seeds=2, rungs="25%", out="pool", dry_run=True)
    assert not Path("pool").exists()
    result = restart(recipe, seeds=2, rungs="25%", out="pool")
    assert result.values["plan"]["stages"] == dry.values["stages"]
    assert_is_exact(result, seeds=2)
    again = restart(recipe, seeds=2, rungs="25%", out="pool")
    assert again.already_finished
    assert again.values == result.values
    with pytest.raises(hasten.RecipeError, match=r"optimizer\.lr.*--out"):
        restart(resolve(recipe, {"lr": 0.5}).recipe, seeds=2, rungs="25%", out="pool")
    with pytest.raises(hasten.RecipeError, match="rungs: 25% -> 50%"):
        restart(recipe, seeds=2, rungs="50%", out="pool")


def test_rows_judged_average_to_the_loss_at_the_rung(tiny, text_file, validation_file):
    recipe = resolve(None, [*settings(tiny, text_file, validation_file, 24), "out=run"]).recipe
    train(recipe, until=5)
    folder = RunFolder(Path("run"))
    rows = row_losses(folder, recipe, prepare_for(recipe), 5)
    assert len(rows) == 2048 // 64
    assert statistics.fmean(rows) == pytest.approx(read_course(folder).losses[5], abs=1e-5)
    assert row_losses(folder, recipe, prepare_for(recipe), 6) is None


def test_pool_that_never_converges_gives_up_after_its_tries(tiny, text_file, validation_file):
    words = [*settings(tiny, text_file, validation_file, 20), "lr=100", "precision=fp16", "schedule.warmup=0"]
    command = [*words, "--seeds", "1", "--rungs", "90%", "--tries", "2", "--out", "pool"]
    done = subprocess.run(
        [sys.executable, "-m", "hasten", "restart", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "seed 1 takes its place" in done.stdout
    values = json.loads(Path("pool/result.json").read_text(encoding="utf-8"))
    assert (values["status"], values["survivor"], sorted(values["given_up"])) == ("failed", None, ["0", "1"])
    assert values["cost"]["given_up"]["steps"] == values["cost"]["total"]["steps"] > 0


def test_folder_of_something_else_is_refused(tiny, text_file):
    Path("pool").mkdir()
    Path("pool/notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(hasten.RecipeError, match="no pool of seeds"):
        restart(data=str(text_file), budget=100, out="pool")


@pytest.mark.parametrize(
    ("setting", "word"), [({"data": "-"}, "standard input"), ({"target_loss": 2.0}, "target_loss")]
)
def test_recipe_that_makes_no_pool_is_refused(text_file, setting, word):
    with pytest.raises(hasten.RecipeError, match=word):
        restart(**{"data": str(text_file), "budget": 100, "out": "pool", **setting})


def test_time_is_turned_into_steps_once(tiny, text_file, validation_file):
    words = settings(tiny, text_file, validation_file, "20s")
    found = restart(resolve(None, words).recipe, seeds=2, rungs="25%", out="pool", dry_run=True).values
    assert found["says"].startswith("budget=20s is taken as ")
    assert 100 < found["budget"] < 100_000
    assert found["horizon"] == pytest.approx(found["budget"] / 1.25, abs=2)


@pytest.mark.heavy
@pytest.mark.skipif(os.name == "nt", reason="kills process groups")
def test_eight_seeds_survive_a_kill_and_end_with_the_same_bytes(tiny, text_file, validation_file):
    words = settings(tiny, text_file, validation_file, 120)
    recipe = resolve(None, words).recipe
    owner = subprocess.Popen(
        [sys.executable, "-m", "hasten", "restart", *words, "--out", "pool", "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: len(list(Path("pool").glob("runs/*/result.json"))) >= 3)
    os.killpg(owner.pid, signal.SIGKILL)
    owner.wait()
    wait_for(lambda: _is_left("pool"))
    killed = restart(recipe, out="pool", workers=2)
    assert_is_exact(killed, seeds=8)
    assert [len(rung["seeds"]) for rung in killed.values["rungs"]] == [8, 4, 2]


def _is_left(pool):
    """Say whether no run of the pool goes on: its locks are gone or can be taken."""
    for run in Path(pool).glob("runs/*"):
        try:
            with RunFolder(run).lock():
                pass
        except hasten.RunError:
            return False
    return True


def wait_for(holds, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)

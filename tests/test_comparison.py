"""A study with real runs: done once, killed and continued, extended, and never changed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hasten
from hasten.comparison import compare
from hasten.comparison.conclusions import METHODS
from hasten.comparison.ledger import Ledger
from hasten.comparison.lineup import lineup
from hasten.comparison.study import Study, read_arm, write_study
from hasten.pool import places
from hasten.recipe import resolve


@pytest.fixture(scope="module")
def base(tiny, text_file, validation_file):
    return [*tiny, f"data={text_file}", f"val={validation_file}", "seed=7"]


def study(base, *arms, **more):
    given = {"seeds": 2, "ladder": (), **more}
    budget = () if any(text.startswith("budget") for text in base) else ("budget=20",)
    return Study(resolve(None, [*base, *budget]).recipe, tuple(read_arm(arm) for arm in arms), **given)


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):
    """A study of an arm that pays, one that costs, one that changes nothing, and one that cannot learn at all."""
    told = []
    folder = tmp_path_factory.mktemp("study") / "st"
    arms = (
        "muon:optimizer=muon",
        "crawl:lr=0.00001",
        "twin",
        "wild:optimizer=sgd lr=100 clip=none optimizer.weight_decay=10",
    )
    found = compare(
        study(base, *arms, ladder=(0.5,)),
        out=folder,
        workers=2,
        tell=lambda kind, **values: told.append((kind, values)),
    )
    return found, told


def entry(found, name):
    return next(arm for arm in found.verdicts["arms"] if arm["name"] == name)


def test_verdicts_are_those_that_were_planted(first):
    found, _ = first
    assert entry(found, "crawl")["effects"]["bits_per_byte"]["mean"] > 0.05
    assert entry(found, "muon")["effects"]["bits_per_byte"]["mean"] < 0
    assert found.verdict("twin") == "identical"
    assert found.verdict("wild") == "diverged"
    assert entry(found, "wild")["runs"][0]["status"] == "diverged"


def test_every_run_is_an_ordinary_run_folder(first):
    found, _ = first
    run = entry(found, "crawl")["runs"][1]
    folder = found.folder / "runs" / run["run"]
    recipe = resolve(folder).recipe
    assert (recipe.seed, recipe.optimizer.lr, str(recipe.budget)) == (8, 0.00001, "20")
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["val_bpb"] == run["val_bpb"]
    assert not (folder / "checkpoints").exists()
    assert (folder / "final" / "model.safetensors").exists()


def test_arms_of_one_recipe_share_their_runs(first):
    found, _ = first
    assert [run["run"] for run in entry(found, "twin")["runs"]] == [
        run["run"] for run in found.verdicts["base"]["runs"]
    ]
    assert len(list((found.folder / "runs").glob("twin-*"))) + len(list((found.folder / "runs").glob("base-*"))) == 2


def test_better_arm_climbs_the_ladder_and_a_worse_one_is_censored(first):
    found, _ = first
    muon, crawl = entry(found, "muon"), entry(found, "crawl")
    assert [rung["share"] for rung in muon["ladder"]] == [0.5, 0.5]
    assert muon["effects"]["steps_to_loss"]["censored"] == 0
    assert (crawl["ladder"], crawl["effects"]["steps_to_loss"]["censored"]) == ([], 2)


def test_file_holds_what_was_returned(first):
    found, _ = first
    assert json.loads((found.folder / "verdicts.json").read_text(encoding="utf-8")) == found.verdicts
    for arm in found.verdicts["arms"]:
        assert {"name", "verdict", "effects", "n", "p"} <= set(arm)


def test_finished_study_does_nothing_again(first, base):
    found, _ = first
    told = []
    again = compare(found.folder / "study.toml", out=found.folder, tell=lambda kind, **values: told.append(kind))
    assert again.verdicts["arms"] == found.verdicts["arms"]
    assert "run" not in told


def test_study_is_extended_by_a_seed_and_an_arm_and_runs_only_those(first, base):
    found, _ = first
    Path("st").mkdir()
    shutil.copytree(found.folder / "runs", "st/runs")  # a study's runs are found by what is in them
    write_study(study(base, "crawl:lr=0.00001"), Path("st/study.toml"))
    shutil.copy(found.folder / "verdicts.json", "st/verdicts.json")
    told = []
    more = compare(
        study(base, "calm:lr=0.003", seeds=3), out="st", workers=2,
        tell=lambda kind, **values: told.append((kind, values.get("variant"))),
    )  # fmt: skip
    assert [arm["name"] for arm in more.verdicts["arms"]] == ["crawl", "calm"]
    ran = sorted(name for kind, name in told if kind == "run")
    assert ran == ["base", "calm", "calm", "calm", "crawl"]
    about = more.verdicts["study"]
    assert (about["seeds"], about["looks"], about["level"]) == ([7, 8, 9], 2, pytest.approx(1 - 0.05 / 6))
    assert "extended after a look" in about["correction"]


def test_seeds_are_added_until_the_interval_is_narrow_or_there_are_no_more(first, base):
    found, _ = first
    Path("st").mkdir()
    shutil.copytree(found.folder / "runs", "st/runs")
    write_study(study(base, "crawl:lr=0.00001"), Path("st/study.toml"))
    wide = compare(study(base, "crawl:lr=0.00001", half_width=0.9), out="st", workers=2)
    about = wide.verdicts["study"]
    assert (about["looked_at"], about["sequential"], about["level"]) == ([2], True, 0.975)
    told = []
    narrow = compare(
        study(base, "crawl:lr=0.00001", half_width=1e-6, max_seeds=3), out="st", workers=2,
        tell=lambda kind, **values: told.append(kind),
    )  # fmt: skip
    about = narrow.verdicts["study"]
    assert (about["looked_at"], about["level"]) == ([2, 3], pytest.approx(1 - 0.05 / 6))
    assert told.count("run") == 2


def finished(base, seeds):
    """Return a study of which every run has ended, its results written without any training."""
    Path("st").mkdir()
    given = study([*base, "budget=60s"], "calm:lr=0.003", seeds=seeds)
    ledger = Ledger(given, Path("st"), lineup(given), places("cpu", 1, 1))
    for index in range(seeds):
        for name, bits in (("base", 2.0), ("calm", 1.96)):
            run = ledger.run(name, index)
            run.folder.mkdir(parents=True)
            noise = 0.01 * math.sin(7.0 * index + len(run.name))
            result = {"status": "finished", "val_bpb": bits + noise, "val_loss": bits, "steps": 20, "tokens": 900}
            phases = {"train": 60.0 + 0.01 * index, "data": 0.0}
            (run.folder / "result.json").write_text(json.dumps({**result, "phases": phases, "seconds": 61.0}))
    write_study(dataclasses.replace(given, seeds=1), Path("st/study.toml"))
    return given


def test_study_is_judged_by_either_interval_and_says_what_both_cost(base):
    given = finished(base, 10)
    by_t = compare(given, out="st", workers=1).verdicts
    by_bootstrap = compare(dataclasses.replace(given, interval="bootstrap"), out="st", workers=1).verdicts
    (t,), (bootstrap,) = by_t["arms"], by_bootstrap["arms"]
    assert (by_t["study"]["method"], by_bootstrap["study"]["method"]) == (METHODS["t"], METHODS["bootstrap"])
    assert by_t["study"]["correction"] == "Holm, 1 comparison"
    assert by_bootstrap["study"]["judged_by"] == [["t", "bootstrap"]]
    assert by_bootstrap["study"]["correction"].endswith("error of all looks is at most 10 %")
    assert by_bootstrap["study"]["level"] == 0.95
    found = bootstrap["effects"]["bits_per_byte"]
    assert (found["method"], found["each"]) == ("bootstrap", t["effects"]["bits_per_byte"]["each"])
    assert found["low"] != t["effects"]["bits_per_byte"]["low"]
    assert bootstrap["p_raw"] == found["p"]
    assert (bootstrap["verdict"] == "pays") == (found["high"] < 0)


def test_bootstrap_goes_as_far_as_it_is_good_and_t_takes_over(base):
    given = dataclasses.replace(finished(base, 12), interval="bootstrap")
    methods, notes = [], []
    for seeds in (9, 10, 12):
        found = compare(
            dataclasses.replace(given, seeds=seeds), out="st", workers=1,
            tell=lambda kind, **values: notes.append(values["message"]) if kind == "note" else None,
        )  # fmt: skip
        about, effect = found.verdicts["study"], found.verdicts["arms"][0]["effects"]["bits_per_byte"]
        methods.append(effect["method"])
        assert about["method"].startswith(METHODS[effect["method"]])
    assert methods == ["t", "bootstrap", "t"]
    assert about["judged_by"] == [["t"], ["bootstrap"], ["t"]]
    assert "9 pairs are too few for a bootstrap" in notes[0]
    assert "this look takes 99.58 %" in notes[1]
    assert "extended after a look, so" in about["correction"]


def test_folder_of_something_else_is_left_alone(base):
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(hasten.RunError, match="something else"):
        compare(study(base, "twin"), out="mine")
    assert sorted(path.name for path in Path("mine").iterdir()) == ["thesis.tex"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_run_that_cannot_begin_stops_the_study_with_its_words(base):
    with pytest.raises(hasten.RunError, match=r"gpu, seed 7: device=cuda.*logs"):
        compare(study(base, "gpu:device=cuda", seeds=1), out="st", workers=1)
    assert json.loads(Path("st/verdicts.json").read_text(encoding="utf-8"))["study"]["complete"] is False


def test_rates_are_tried_on_a_seed_of_their_own(base):
    found = compare(study([*base, "budget=3"], "crawl:lr=0.00001", seeds=1, lr_tries=2), out="st", workers=2)
    tuning = found.verdicts["study"]["tuning"]
    assert (tuning["seed"], tuning["tries"]) == (100_007, 2)
    assert tuning["arms"]["crawl"]["taken"] == 2e-5
    assert tuning["arms"]["crawl"]["at_edge"]
    assert entry(found, "crawl")["runs"][0]["lr"] == 2e-5
    assert tuning["cost_seconds"] > 0


def test_killed_study_goes_on_and_ends_with_the_same_numbers(first, base, tmp_path):
    found, _ = first
    words = [*base, "budget=20", "--arm", "crawl:lr=0.00001", "--seeds", "2", "--ladder", "none", "--workers", "2"]
    command = [sys.executable, "-m", "hasten", "compare", *words, "--out", "st"]
    runs = tmp_path / "st" / "runs"
    for num_runs in (1, 3):  # killed in the first runs, and again in later ones
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
        until(lambda: process.poll() is not None or len(list(runs.glob("*/metrics.jsonl"))) >= num_runs)  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, stdout=subprocess.DEVNULL, cwd=tmp_path, check=True)
    verdicts = json.loads((tmp_path / "st" / "verdicts.json").read_text(encoding="utf-8"))
    for mine, other in ((verdicts["arms"][0], entry(found, "crawl")), (verdicts["base"], found.verdicts["base"])):
        assert [run["val_bpb"] for run in mine["runs"]] == [run["val_bpb"] for run in other["runs"]]
    assert (tmp_path / "st" / "report.html").is_file()


def until(holds, seconds=400):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)

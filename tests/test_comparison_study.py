"""What a study compares: arms and modes read, refused and extended."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import hasten
from hasten.comparison.compare import next_look
from hasten.comparison.lineup import lineup
from hasten.comparison.study import Arm, Study, changed, extended, read_arm, read_study, share_of_budget, write_study
from hasten.duration import Duration
from hasten.recipe import resolve

BASE = resolve(None, ["budget=100", "data=my.txt", "lr=0.01"]).recipe
MUON, CALM = Arm("muon", ("optimizer=muon",)), Arm("calm", ("lr=0.002",))


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("muon:optimizer=muon lr=0.02", Arm("muon", ("optimizer=muon", "lr=0.02"))),
        ("lr=0.02", Arm("lr=0.02", ("lr=0.02",))),
        ("lr=0.02 seed=3", Arm("lr=0.02 seed=3", ("lr=0.02", "seed=3"))),
        ("twin", Arm("twin")),
        ("twin:", Arm("twin")),
        ("file:data='my: file.txt'", Arm("file", ("data=my: file.txt",))),
        ("schedule=warmup(0.1):x", Arm("schedule=warmup(0.1):x", ("schedule=warmup(0.1):x",))),
    ],
)
def test_arm_is_read(text, arm):
    assert read_arm(text) == arm


def test_study_comes_back_from_its_file():
    study = Study(BASE, (MUON, Arm("twin")), seeds=5, ladder=(0.5,), half_width=0.01, spend=60.0, interval="bootstrap")
    write_study(study, Path("study.toml"))
    assert read_study(Path("study.toml")) == study


def test_study_is_written_by_hand_in_any_of_its_forms():
    Path("base.toml").write_text("lr = 0.01\nbudget = '100'\n", encoding="utf-8")
    Path("study.toml").write_text(
        "base = 'base.toml data=my.txt'\nseeds = 2\ninterval = 'bootstrap'\n[arms]\ncalm = 'lr=0.002'\ntwin = []\n"
        "[arms.muon]\noptimizer = 'muon'\n[arms.nested.optimizer]\nbetas = [0.9, 0.95]\n",
        encoding="utf-8",
    )
    study = read_study(Path("study.toml"))
    assert (study.base, study.seeds, study.interval) == (BASE, 2, "bootstrap")
    assert study.arms == (CALM, Arm("twin"), MUON, Arm("nested", ("optimizer.betas=[0.9, 0.95]",)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ()}, "nothing to compare"),
        ({"arms": (MUON, MUON)}, "Two arms"),
        ({"arms": (Arm("base"),)}, "cannot be called"),
        ({"arms": (Arm("a/b"),)}, "no name"),
        ({"arms": (Arm("x\x1b[31m"),)}, "no name"),
        ({"mode": "ad-one"}, "did you mean 'add-one'"),
        ({"seeds": 0}, "at least 2"),
        ({"lr_tries": 1}, "at least 2"),
        ({"margin": 0.0}, "margin"),
        ({"interval": "bootstrp"}, "did you mean 'bootstrap'"),
        ({"half_width": 2.0}, "share"),
        ({"ladder": (0.8, 0.5)}, "rise"),
        ({"ladder": (0.5, 1.0)}, "below 1"),
        ({"mode": "grid", "arms": tuple(Arm(f"a{i}") for i in range(6))}, "64 combinations"),
        ({"mode": "leave-one-out"}, "at least two"),
        ({"base": resolve(None, ["data=-"]).recipe}, "read once"),
        ({"base": resolve(None, ["target_loss=2"]).recipe}, "ends runs early"),
        ({"base": resolve(None, ["branch_from=runs/a"]).recipe}, "begin afresh"),
    ],
)
def test_what_no_study_can_be_is_refused(changes, words):
    with pytest.raises(hasten.RecipeError, match=words):
        Study(**{"base": BASE, "arms": (MUON,), **changes})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("budget=200", "same budget"),
        ("val=other.txt", "same held-out text"),
        ("data.val_share=0.2", "same held-out text"),
        ("max_steps=200", "must be the same"),
        ("out=x", "own folders"),
        ("lrr=0.1", "arm 'a'.*did you mean 'optimizer.lr'"),
    ],
)
def test_arm_changes_nothing_that_all_must_share(setting, words):
    with pytest.raises(hasten.RecipeError, match=words):
        changed(BASE, [setting], "arm 'a'")


def test_optimizer_of_an_arm_brings_its_own_rate():
    base = resolve(None, ["budget=100"]).recipe
    assert changed(base, ["optimizer=muon"], "").optimizer.lr == resolve(None, ["optimizer=muon"]).recipe.optimizer.lr


def names(mode, *arms):
    who = lineup(Study(BASE, arms, mode=mode))
    return [variant.name for variant in who.variants], [(pair.name, pair.against) for pair in who.pairs]


def test_add_one_compares_every_arm_with_the_base():
    assert names("add-one", MUON, CALM) == (["base", "muon", "calm"], [("muon", "base"), ("calm", "base")])


def test_leave_one_out_compares_with_all_together():
    everyone, pairs = names("leave-one-out", MUON, CALM)
    assert everyone == ["all", "without muon", "without calm"]
    assert pairs == [("without muon", "all"), ("without calm", "all")]
    who = lineup(Study(BASE, (MUON, CALM), mode="leave-one-out"))
    assert who.variant("without calm").recipe == changed(BASE, MUON.settings, "")
    assert (who.variant("all").recipe.optimizer.name, who.variant("all").recipe.optimizer.lr) == ("muon", 0.002)


def test_grid_has_every_combination_that_can_be():
    clip, fast = Arm("clip", ("clip=off",)), Arm("fast", ("lr=0.02",))
    everyone, _ = names("grid", MUON, CALM, clip)
    assert everyone[1:] == ["muon", "calm", "clip", "muon+calm", "muon+clip", "calm+clip", "muon+calm+clip"]
    assert names("grid", CALM, fast)[0] == ["base", "calm", "fast"]  # two rates at once are no recipe


def test_head_to_head_compares_everyone_with_everyone():
    _, pairs = names("head-to-head", MUON, CALM)
    assert pairs == [("muon vs base", "base"), ("calm vs base", "base"), ("calm vs muon", "muon")]


def test_arms_that_exclude_each_other_cannot_be_left_out_one_by_one():
    with pytest.raises(hasten.RecipeError, match="Two arms set lr"):
        names("leave-one-out", CALM, Arm("fast", ("lr=0.02",)))


def test_study_is_extended_by_arms_and_seeds():
    old = Study(BASE, (MUON,), seeds=3)
    more = extended(old, Study(BASE, (CALM,), seeds=5, ladder=()), Path("st"))
    assert (more.arms, more.seeds, more.ladder) == ((MUON, CALM), 5, ())
    assert extended(old, Study(BASE, (MUON,), seeds=2), Path("st")).seeds == 3


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (Study(resolve(BASE, ["lr=0.02"]).recipe, (MUON,)), "another base.*optimizer.lr"),
        (Study(BASE, (Arm("muon", ("lr=1",)),)), "another name"),
        (Study(BASE, (MUON,), mode="grid"), "add-one"),
        (Study(BASE, (MUON,), lr_tries=3), "lr-tries 0"),
    ],
)
def test_study_never_becomes_another_one(new, words):
    with pytest.raises(hasten.RunError, match=words):
        extended(Study(BASE, (MUON,)), new, Path("st"))


@pytest.mark.parametrize(
    ("budget", "share", "expected"), [("100", 0.65, "65"), ("3", 0.1, "1"), ("60s", 0.5, "30s"), ("1ep", 0.5, "0.5ep")]
)
def test_share_of_a_budget_is_a_budget(budget, share, expected):
    assert share_of_budget(Duration.parse(budget), share) == Duration.parse(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[arms", "cannot be read"),
        ("seedz = 3\n[arms]\na = ''", "did you mean 'seeds'"),
        ("arms = 3", "must be a table"),
        ("format = 9\n[arms]\na = ''", "format 9"),
        ("seeds = 'x'\n[arms]\na = ''", "wrong kind"),
    ],
)
def test_file_that_is_no_study_is_one_sentence(text, words):
    Path("study.toml").write_text(text, encoding="utf-8")
    with pytest.raises(hasten.RecipeError, match=words):
        read_study(Path("study.toml"))


@pytest.mark.parametrize("name", ["compare", "effects", "study"])
def test_examples_in_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(f"hasten.comparison.{name}")).failed == 0


@pytest.mark.parametrize(("seeds", "expected"), [(3, 5), (5, 8), (8, 12), (1, 2), (14, 20), (20, 20)])
def test_looks_come_at_half_as_many_seeds_again(seeds, expected):
    assert next_look(seeds, 20) == expected

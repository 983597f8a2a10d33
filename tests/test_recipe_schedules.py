"""The schedules of a recipe: what is written builds what it says, survives TOML, and is refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from hasten import schedules
from hasten.errors import RecipeError
from hasten.recipe import resolve
from hasten.schedules import cosine, cycles, inverse_sqrt, linear, parse, power, sqrt, stages, warmup, wsd

RUN = {"total_steps": 1000, "tokens_per_step": 100}
RISE = warmup(0.02, start=0.01)


def built(*settings: str, **run: float) -> dict[str, schedules.Schedule]:
    recipe = resolve(None, list(settings)).recipe
    assert resolve(recipe.to_toml()).recipe == recipe
    return recipe.schedule.build_all(**{**RUN, **run})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["schedule=cosine"], RISE | cosine()),
        (["schedule=wsd", "schedule.cooldown=20%", "schedule.shape=sqrt"], RISE | wsd(0.2, "sqrt")),
        (["schedule=wsd", "schedule.cooldown=100", "schedule.shape=linear"], RISE | wsd(0.1, "linear")),
        (["schedule=wsd", "schedule.cooldown=5ktok", "schedule.warmup=0"], wsd(0.05)),
        (["schedule=power", "schedule.exponent=3", "schedule.floor=0"], RISE | power(3.0, floor=0.0)),
        (["schedule=inverse_sqrt"], RISE | inverse_sqrt()),
        (["schedule=inverse_sqrt", "schedule.timescale=50", "schedule.floor=0.1"], RISE | inverse_sqrt(0.05, 0.1)),
        (["schedule=stages"], RISE | stages((0.8, 0.316), (0.9, 0.1))),
        (["schedule=stages", "schedule.levels=[[0.5, 0.1], [0.75, 0.01]]"], RISE | stages((0.5, 0.1), (0.75, 0.01))),
        (
            ["schedule=cycles", "schedule.count=5", "schedule.warmup=0", "schedule.rewarm=20"],
            cycles(5, rewarm=0.02 / 0.2),
        ),
        (["schedule=cycles", "schedule.count=1", "schedule.rewarm=100%"], RISE | cycles(1, rewarm=0.0)),
        (["schedule=custom", "schedule.expression=warmup(0.1) | cosine()"], warmup(0.1) | cosine()),
        (["schedule=sqrt", "schedule.warmup=0", "schedule.start=0.7"], sqrt(start=0.7)),
    ],
)
def test_a_recipe_builds_the_schedule_that_it_says(settings, expected):
    assert built(*settings) == {"lr": expected}


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_schedule_has_a_variant_that_falls_back_on_nothing(name):
    schedule = built(f"schedule={name}")["lr"]
    assert schedule(0.0) == 0.01
    assert schedule(0.02) == pytest.approx(1.0)
    assert schedules.findings(schedule, 1000) == ()


def test_what_is_scheduled_beside_the_rate_is_in_the_mapping():
    found = built("schedule=linear", "schedule.weight_decay=linear(0.5)", "schedule.beta1=warmup(0.1, start=0.9)")
    assert found == {"lr": RISE | linear(), "weight_decay": linear(0.5), "beta1": warmup(0.1, start=0.9)}
    every = [f"schedule.{name}=constant(0.5)" for name in ("weight_decay", "momentum", "beta1", "beta2")]
    assert list(built("schedule=custom", *every)) == list(schedules.SETTINGS)


def test_the_mapping_is_what_apply_takes():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.2)
    found = built("schedule=linear", "schedule.weight_decay=linear(0.5)", "schedule.beta2=constant(0.5)")
    schedules.apply(optimizer, found, 1.0)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.001), pytest.approx(0.1))
    assert group["betas"] == (0.9, pytest.approx(0.999 / 2))


def test_texts_that_mean_the_same_are_the_same_recipe():
    first = resolve(None, ["schedule=custom", "schedule.expression=warmup(.1)|cosine(0.01)"]).recipe
    second = resolve(None, ["schedule=custom", "schedule.expression=warmup(0.1, start=0.01) | cosine()"]).recipe
    assert first == second
    assert first.sha256 == second.sha256
    assert parse(first.schedule.expression) == warmup(0.1) | cosine()


def test_a_time_is_a_share_of_a_wall_clock_budget():
    found = built("schedule=wsd", "schedule.warmup=6s", "schedule.cooldown=12s", "budget=60s", seconds=60.0)
    assert found["lr"] == warmup(0.1) | wsd(0.2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["schedule=wsd", "schedule.warmup=30%", "schedule.cooldown=70%"], "leave nothing of the run"),
        (["schedule=wsd", "schedule.cooldown=1000"], "leave nothing of the run"),
        (["schedule=wsd", "schedule.cooldown=10s"], "schedule.cooldown=10s is a time"),
        (["schedule=wsd", "schedule.cooldown=1ep"], "unknown length"),
        (["schedule=cycles", "schedule.rewarm=25%", "schedule.warmup=0"], "as long as one of the 4 cycles"),
        (["schedule=cycles", "schedule.rewarm=250", "schedule.warmup=0"], "as long as one of the 4 cycles"),
        (["schedule=linear", "schedule.start=0.5"], "schedule.warmup=0"),
        (["schedule=custom", "schedule.warmup=5%"], "no meaning for schedule=custom"),
        (["schedule=cosine", "schedule.cooldown=5%"], "belongs to schedule='wsd'"),
        (["schedule=custom", "schedule.expression=warmp(0.1)"], "did you mean 'warmup'"),
        (["schedule=custom", "schedule.expression=__import__('os')"], "no schedule"),
        (["schedule.weight_decay=linear(2)"], "outside [0, 1]"),
        (["schedule.momentum=0.5"], "is no schedule"),
        (["schedule=stages", "schedule.levels=[[0.5, 0.1], [0.4, 0.01]]"], "let them rise"),
        (["schedule=stages", "schedule.levels=[0.5, 0.1]"], "[[0.5, 0.1], [0.75, 0.01]]"),
        (["schedule=stages", "schedule.levels=[]"], "[[0.5, 0.1], [0.75, 0.01]]"),
        (["schedule=power", "schedule.exponent=0"], "above 0"),
        (["schedule=cycles", "schedule.warmup_start=2"], "schedule.warmup_start=2"),
        (["schedule=stages", "schedule.warmup_start=2"], "schedule.warmup_start=2"),
        (["schedule=cycles", "schedule.count=0"], "at least 1"),
        (["schedule=wsd", "schedule.shape=sine"], "one of 'sqrt', 'linear', 'cosine'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(settings, says):
    with pytest.raises(RecipeError) as refused:
        built(*settings)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        (["schedule=wsd", "schedule.warmup=30%", "schedule.cooldown=69%"], True),
        (["schedule=cycles", "schedule.rewarm=249", "schedule.warmup=0"], True),
    ],
)
def test_just_inside_the_bounds_is_taken(settings, holds):
    assert isinstance(built(*settings)["lr"], schedules.Schedule) is holds

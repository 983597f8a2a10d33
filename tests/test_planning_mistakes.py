"""Mistakes that a plan catches before they are paid for, each with its other side, where it is silent."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.checks import Facts, check
from hasten.errors import RecipeError
from hasten.loop import prepare_for
from hasten.planning.answers import answers, mistakes
from hasten.planning.costs import flops
from hasten.planning.measurement import Measured, Point
from hasten.planning.outline import Outline, outline
from hasten.planning.plans import plan
from hasten.planning.times import Compiling, compiling, steps_within
from hasten.recipe import Recipe, resolve

CUSTOM = "schedule=custom schedule.expression="


@pytest.fixture(scope="module")
def given(text_file: Path, tiny: tuple[str, ...]) -> Recipe:
    return resolve(None, [f"data={text_file}", *tiny, "compile=off", "budget=100"]).recipe


def told(given: Recipe, *settings: str) -> str:
    """Return what a plan finds wrong, errors marked."""
    found = plan(resolve(given, settings).recipe, measure=False)
    return "\n".join(f"{finding.level}: {finding.message}" for finding in found.findings)


def outlined(given: Recipe, *settings: str) -> Outline:
    recipe = resolve(given, settings).recipe
    return outline(recipe, prepare_for(recipe))


def said(found: Outline, measured: Measured | None = None, choice: Compiling | None = None) -> str:
    """Return what is worth it by a plan's answers."""
    lengths = found.course(100).lengths.realised(100)
    operations = sum(found.optimizer.operations.values())
    costs = flops(
        found.config, lengths=lengths, seen=found.seen, tokens_per_step=found.tokens_per_step, total_steps=100,
        optimizer_operations=operations,
    )  # fmt: skip
    return "\n".join(answers(found, costs, measured, None, choice, steps=100))


def measured(*seconds_by_length: tuple[int, float], **more: object) -> Measured:
    points = tuple(Point(length, 1, None, 10, seconds, seconds) for length, seconds in seconds_by_length)
    return Measured(points, evaluation_seconds=1e-4, checkpoint_seconds=0.1, **more)


def test_a_sound_recipe_has_no_mistakes(given):
    assert told(given) == ""


@pytest.mark.parametrize(
    ("wrong", "right", "says"),
    [
        (f"{CUSTOM}'linear(0, share=0.5)'", "schedule=linear", "zero at about 50% of the steps"),
        (f"{CUSTOM}'stages((0, 1), (0.4, 0.005))'", f"{CUSTOM}'stages((0, 1), (0.4, 0.02))'", "At half-time the rate"),
        ("schedule.weight_decay='linear(1)'", "schedule.weight_decay='linear(0.5)'", "never decays"),
        ("schedule.weight_decay='constant(1)'", "schedule.weight_decay='linear(0.5)'", "never changes"),
        ("batch.schedule='constant(1)'", "batch.schedule='linear(0.25)' batch.micro_rows=1", "never changes the step"),
        ("budget=1000", "budget=400", "teaches less and less"),
        ("optimizer=muon batch_tokens=64", "optimizer=muon batch_tokens=8192 budget=20", "Muon computes"),
        ("optimizer=soap batch_tokens=64", "optimizer=soap batch_tokens=8192 budget=20", "Soap computes"),
        ("data.packing=pad data.separator='def '", "data.separator='def '", "of the positions in the rows are padding"),
        ("evaluate.every=1", "evaluate.every=20", "raise evaluate.every"),
        ("batch_tokens=131072 budget=20", "budget=20", "so every step reads it more than once"),
        ("budget=19", "budget=20", "too few to learn from"),
        ("lengths=linear lengths.start=32 lengths.over=1", "lengths=linear lengths.start=32", "changes nothing"),
    ],
)  # fmt: skip
def test_a_mistake_is_caught_and_its_other_side_is_not(wrong, right, says, given):
    assert says in told(given, *shlex.split(wrong))
    assert says not in told(given, *shlex.split(right))


@pytest.mark.parametrize(("warmup", "is_long"), [("100", True), ("99", False)])
def test_a_warmup_as_long_as_the_run_is_refused(warmup, is_long, given):
    if not is_long:
        assert "as long as the run" not in told(given, f"schedule.warmup={warmup}")
        return
    with pytest.raises(RecipeError, match="as long as the run"):
        told(given, f"schedule.warmup={warmup}")


def test_a_warmup_that_the_measured_steps_are_too_few_for_is_an_error(given):
    recipe = resolve(given, ["budget=60s", "schedule.warmup=50"]).recipe
    facts = Facts(257, 10**6, 10**4, params=1000, total_steps=50, free_bytes=10**12)
    assert "as long as the run of 50 steps" in check(recipe, facts)[0].message
    assert all("as long" not in finding.message for finding in check(recipe, replace(facts, total_steps=51)))


@pytest.mark.parametrize(
    ("needed", "level", "says"),
    [
        (900, None, ""),
        (901, "warning", "leaves little"),
        (1000, "warning", "of the 1.0 kB"),
        (1001, "error", "there are"),
    ],
)
def test_more_memory_than_there_is_is_an_error(needed, level, says, given):
    facts = Facts(257, 10**6, 10**4, params=10, total_steps=100, free_bytes=10**12)
    found = check(given, replace(facts, needed_bytes=needed, memory_bytes=1000))
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(says in finding.message for finding in found)


def test_a_model_that_cannot_fit_is_told_without_trying_a_step(given, monkeypatch):
    monkeypatch.setattr("hasten.planning.outline.machine_bytes", lambda device: 10**6)
    found = plan(resolve(given, ["budget=20"]).recipe)
    assert found.has_errors
    assert "Training takes about" in found.findings[0].message
    assert found.speed == ()


# --- what only measured steps show ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "is_slower"), [(1.3, True), (0.6, False)])
def test_low_precision_slower_than_float32_is_told_with_its_ratio(ratio, is_slower, given):
    found, seen = outlined(given, "precision=bf16"), measured((64, 1.0), float32_ratio=ratio)
    mistaken = [finding.message for finding in mistakes(found, seen, None)]
    assert any("takes 1.3 times as long as in float32" in message for message in mistaken) == is_slower
    assert ("takes 0.6 of the time of one in float32" in said(found, seen)) != is_slower


@pytest.mark.parametrize(("training", "never_pays"), [(299.0, True), (301.0, False)])
def test_a_budget_too_short_for_compiling_is_told(training, never_pays, given):
    found = outlined(given, "compile=on")
    choice = compiling(found.recipe, "cpu", training)
    mistaken = [finding.message for finding in mistakes(found, measured((64, 1.0)), choice)]
    assert any("never pays" in message for message in mistaken) == never_pays


def test_auto_compiles_by_the_rule_of_the_loop(given):
    auto = resolve(given, ["compile=auto"]).recipe
    assert not compiling(auto, "cpu", 600.0).is_on
    assert compiling(auto, "cpu", 601.0).is_on in (True, False)  # where there is a compiler
    assert not compiling(given, "cpu", 1e6).is_on
    assert "Compiling: no, compile=off." in said(outlined(given), choice=compiling(given, "cpu", 1e6))


@pytest.mark.parametrize(("short", "worth"), [(0.98, False), (0.5, True)])
def test_a_length_schedule_is_judged_by_the_steps_measured(short, worth, given):
    found = outlined(given, "lengths=steps", "lengths.start=32", "lengths.over=50%")
    answer = said(found, measured((64, 1.0), (32, short)))
    assert ("saves about 25% of the training time" in answer) == worth
    assert (
        "lengths=steps is not worth it here for time, because by the steps measured it saves 1.0%" in answer
    ) != worth


def test_no_length_schedule_is_an_answer_too(given):
    assert "A length schedule is not worth it here, because attention is" in said(outlined(given, "model.width=256"))
    long = outlined(given, "seq_len=1024", "batch_tokens=1024", "data.document_mask=false")
    assert "may be worth it" in said(long)


@pytest.mark.parametrize(("computing", "is_busy"), [(0.5, True), (0.8, False)])
def test_a_busy_machine_is_told(computing, is_busy, given):
    busy = Measured((Point(64, 1, None, 10, seconds=1.0, cpu_seconds=computing),))
    assert ("busy with other work" in said(outlined(given), busy)) == is_busy


@pytest.mark.parametrize(("tokens", "is_worth"), [(64, False), (8192, True)])
def test_an_optimizer_that_computes_more_than_the_model_wants_larger_steps(tokens, is_worth, given):
    answer = said(outlined(given, "optimizer=muon", f"batch_tokens={tokens}"))
    assert ("optimizer=muon is hardly worth it in steps of 64 tokens" in answer) != is_worth
    assert ("optimizer=muon's own products are" in answer) == is_worth


@pytest.mark.parametrize(("is_slow", "level"), [(False, "error"), (True, "warning")])
def test_steps_that_cannot_be_done_are_told(is_slow, level, given):
    failed = Measured(failure="memory ran out", is_slow=is_slow)
    (finding,) = mistakes(outlined(given), failed, None)
    assert (finding.level, "memory ran out" in finding.message) == (level, True)


def test_evaluations_and_saving_leave_fewer_steps(given):
    recipe, seen = resolve(given, ["budget=100s", "evaluate.every=10%"]).recipe, measured((64, 1.0))
    steps, _ = steps_within(recipe, "cpu", seen, 1.0, tokens=10_000)
    assert steps == 91
    often, _ = steps_within(resolve(recipe, ["checkpoint.every=1s"]).recipe, "cpu", seen, 1.0, tokens=10_000)
    assert often == 81

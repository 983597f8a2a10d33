"""What is refused or warned about before the first step, on both sides of every boundary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hasten.checks import (
    Facts,
    Machine,
    check,
    check_horizon,
    check_machine,
    compiler_found,
    free_bytes,
    this_machine,
)
from hasten.checks.run import EXPORT_BYTES, WEIGHT_BYTES, check_size
from hasten.errors import RecipeError
from hasten.loop import train
from hasten.recipe import Recipe, resolve

BASE = """
seq_len = 100
batch_tokens = 1000
budget = 1000
[data]
tokenizer = "bytes"
[evaluate]
every = "10%"
tokens = 1000
[schedule]
warmup = "2%"
"""
GOOD = Facts(
    vocab_size=257,
    train_tokens=1_000_001,
    val_tokens=10_000,
    params=1000,
    total_steps=1000,
    free_bytes=10**9,
    state_bytes=8000,
)
MACHINE = Machine(cuda_devices=2, has_mps=True, has_compiler=True, cores=4)


def recipe_of(*overrides: str) -> Recipe:
    return resolve(BASE, overrides).recipe


def told(recipe: Recipe, **changes: int | None) -> str:
    return "\n".join(f"{finding.level}: {finding.message}" for finding in check(recipe, replace(GOOD, **changes)))


def told_of_machine(override: str, **changes: float) -> str:
    findings = check_machine(recipe_of(override), replace(MACHINE, **changes))
    return "; ".join(f"{finding.level}: {finding.message}" for finding in findings)


def test_a_good_run_has_no_findings():
    assert check(recipe_of(), GOOD) == []
    assert check_machine(recipe_of(), MACHINE) == []


@pytest.mark.parametrize(
    ("wrong", "right", "start", "names"),
    [
        ({"train_tokens": 100}, {"train_tokens": 1100}, "error", "100 tokens, and one row takes 101"),
        ({"train_tokens": 999}, {"train_tokens": 1001}, "warning", "batch.tokens=1000"),
        ({"val_tokens": 1}, {"val_tokens": 1000}, "error", "held-out"),
        ({"val_tokens": 999}, {"val_tokens": 1000}, "warning", "only 999 tokens"),
        ({"total_steps": 4001}, {"total_steps": 4000}, "warning", "arXiv:2305.16264"),
        ({"free_bytes": 43_999}, {"free_bytes": 44_000}, "error", "checkpoint.keep"),
    ],
)
def test_boundary_of_the_data(wrong, right, start, names):
    message = told(recipe_of("checkpoint.keep=2"), **wrong)
    assert any(part.startswith(start) and names in part for part in message.splitlines()), message
    assert names not in told(recipe_of("checkpoint.keep=2"), **right)


def test_disk_holds_what_is_kept_and_the_one_being_written():
    assert (WEIGHT_BYTES * 1000 + GOOD.state_bytes) * 3 + EXPORT_BYTES * 1000 == 44_000


@pytest.mark.parametrize(
    ("wrong", "right", "names"),
    [
        ("batch_tokens=1050", "batch_tokens=1100", "1000 tokens"),
        ("schedule.floor=1", "schedule.floor=0.99", "schedule.floor=1"),
        ("schedule.warmup_start=1", "schedule.warmup_start=0.99", "schedule.warmup_start=1"),
        ("schedule.warmup=0.09%", "schedule.warmup=0.1%", "less than one step"),
        ("schedule.warmup=1ep", "schedule.warmup=0.99ep", "as long as the run"),
        ("evaluate.every=1", "evaluate.every=2", "evaluate.every"),
    ],
)
def test_boundary_of_a_setting(wrong, right, names):
    assert names in told(recipe_of(wrong))
    assert names not in told(recipe_of(right))


def test_a_warmup_left_out_is_no_finding():
    assert told(recipe_of("schedule.warmup=0", "schedule.warmup_start=1")) == ""


def test_a_vocabulary_that_the_corpus_cannot_fill_is_told():
    bpe = recipe_of("data.tokenizer=bpe", "data.vocab_size=300")
    assert "299 of data.vocab_size=300" in told(bpe, vocab_size=299)
    assert told(bpe, vocab_size=300) == ""
    assert told(recipe_of(), vocab_size=257) == ""


@pytest.mark.parametrize(("steps", "is_few"), [(19, True), (20, False)])
def test_a_budget_of_a_handful_of_steps_is_told(steps, is_few):
    recipe = recipe_of(f"budget={steps}", "schedule.warmup=1", "evaluate.every=50%")
    assert ("too few to learn from" in told(recipe, total_steps=steps)) == is_few


def test_what_needs_the_horizon_waits_for_it():
    timed = recipe_of("budget=60s", "schedule.warmup=0.1s")
    assert check(timed, replace(GOOD, total_steps=None)) == []
    assert check_horizon(timed, replace(GOOD, total_steps=None)) == []
    assert "less than one step" in told(timed, total_steps=599)
    assert "less than one step" not in told(timed, total_steps=601)
    assert len(check_horizon(timed, replace(GOOD, total_steps=3))) >= 2


def test_errors_come_first():
    levels = [finding.level for finding in check(recipe_of(), replace(GOOD, val_tokens=500, free_bytes=0))]
    assert levels == ["error", "warning"]


@pytest.mark.parametrize(
    ("override", "wrong", "right", "names"),
    [
        ("device=cuda", {"cuda_devices": 0}, {"cuda_devices": 1}, "error: device=cuda"),
        ("device=cuda:1", {"cuda_devices": 1}, {"cuda_devices": 2}, "error: device=cuda:1"),
        ("device=mps", {"has_mps": False}, {"has_mps": True}, "error: device=mps"),
        ("compile=on", {"has_compiler": False}, {"has_compiler": True}, "error: compile=on"),
        ("precision=bf16", {"slowdown": 1.3}, {"slowdown": 1.1}, "warning: precision=bf16"),
        ("threads=3", {"cores": 2}, {"cores": 3}, "warning: threads=3"),
    ],
)
def test_boundary_of_a_machine(override, wrong, right, names):
    assert told_of_machine(override, **wrong).startswith(names)
    assert told_of_machine(override, **right) == ""


def test_compile_auto_never_needs_a_compiler():
    assert told_of_machine("compile=auto", has_compiler=False) == ""


def test_this_machine_is_looked_at():
    machine = this_machine(recipe_of("precision=bf16", "device=cpu"))
    assert machine.cores >= 1
    assert machine.slowdown > 0
    assert machine.has_compiler == compiler_found("cpu")
    assert this_machine(recipe_of()).slowdown == 1.0


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path):
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.5)
    assert free_bytes(Path("not/there/yet")) > 0


def test_messages_are_one_sentence():
    worst = replace(GOOD, train_tokens=50, val_tokens=0, free_bytes=0, total_steps=1)
    for finding in check(recipe_of("batch_tokens=1050", "schedule.floor=1"), worst):
        assert finding.message.endswith(".")
        assert "\n" not in finding.message


def test_an_optimizer_that_costs_much_beside_the_batch_is_told():
    said = told(recipe_of(), optimizer_warnings=("muon computes 2 GFLOP a step; a larger batch makes it cheaper.",))
    assert said == "warning: Muon computes 2 GFLOP a step; a larger batch makes it cheaper."


LONG = ("lengths=linear", "lengths.start=25")  # 25, 50 and 100


@pytest.mark.parametrize(
    ("over", "steps", "level", "said"),
    [
        ("60%", 1000, None, ""),
        ("100%", 1000, "error", "the whole run, so the model never sees its full length of 100 tokens"),
        ("1000", 1000, "error", "the whole run"),
        ("999", 1000, "warning", "leaves only 0% of the run"),
        ("95%", 1000, "warning", "leaves only 5% of the run at the full length"),
        ("90%", 1000, None, ""),
        ("1", 1000, "warning", "less than two steps, so lengths=linear changes nothing"),
        ("2", 1000, None, ""),
    ],
)
def test_a_growth_that_ends_too_late_or_does_nothing_is_told(over, steps, level, said):
    found = check_horizon(recipe_of(*LONG, f"lengths.over={over}"), replace(GOOD, total_steps=steps, width=8))
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(said in finding.message for finding in found)


def test_a_length_that_is_never_reached_is_told():
    recipe = recipe_of(*LONG, "lengths.sizes=[10, 20, 50, 100]", "lengths.over=2")
    assert "never reaches rows of 20 tokens in 1000 steps" in check_horizon(recipe, GOOD)[0].message


def test_a_growth_that_cannot_save_work_is_told():
    found = check_horizon(recipe_of(*LONG), replace(GOOD, width=2000))
    assert [finding.message for finding in found] == [
        "At lengths.seq_len=100 and a width of 2000, attention is only about 0% of the work, so lengths=linear cannot "
        "save more than that: expect a gain from longer rows."
    ]


def test_a_window_schedule_that_saves_nothing_is_told():
    recipe = recipe_of("lengths=window", "lengths.start=10")
    found = check_horizon(recipe, replace(GOOD, window_saves=False))
    assert "lengths=window saves no time in rows of 100 tokens here" in found[0].message
    assert not check_horizon(recipe, GOOD)


@pytest.mark.parametrize(("micro_rows", "is_told"), [(1, False), (5, False), (10, True)])
def test_a_batch_schedule_that_never_changes_the_step_is_told(micro_rows, is_told):
    recipe = recipe_of("batch.schedule=stages((0, 0.5), (0.5, 1.0))")
    found = check_horizon(recipe, replace(GOOD, micro_rows=micro_rows))
    assert bool(found) == is_told
    assert all("batch.schedule never changes the step: it always has 10 rows" in f.message for f in found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("schedule=custom", "schedule.expression=linear(share=0.5, floor=0) | hold()"), "zero at about 50%"),
        (("schedule=wsd", "schedule.cooldown=0.05%"), "less than one of 1000 steps"),
        (("schedule=stages", "schedule.levels=[[0.5,1.0]]"), "changes nothing, as it is 1 before"),
        (("schedule.weight_decay=constant(1.0)",), "schedule.weight_decay=constant(1.0) never changes weight_decay"),
        (("schedule.floor=1",), "schedule.floor=1 keeps schedule=cosine at its peak"),
        (("schedule.warmup_start=1",), "schedule.warmup_start=1 begins at the peak"),
        (("schedule.warmup=0.01%",), "is less than one step, so it does nothing"),
    ],
)
def test_a_schedule_that_does_nothing_or_harm_is_told_once(settings, said):
    found = check(recipe_of(*settings), GOOD)
    assert [finding.level for finding in found] == ["warning"]
    assert said in found[0].message


@pytest.mark.parametrize(("params", "memory", "fits"), [(1000, 8000, True), (1001, 8000, False), (10**12, 0, True)])
def test_a_model_that_cannot_fit_is_refused_before_it_is_built(params, memory, fits):
    assert [finding.level for finding in check_size(params, memory)] == ([] if fits else ["error"])


def test_a_model_that_cannot_fit_is_refused_by_training(text_file):
    settings = [f"data={text_file}", "budget=2", "out=run", "data.tokenizer=bytes", "model.mlp_width=1000000000"]
    with pytest.raises(RecipeError, match=r"Weights and gradients of .* of memory"):
        train(resolve(None, settings).recipe)
    assert not Path("run").exists()


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_machine_is_looked_at_for_every_device(device):
    machine = this_machine(recipe_of(f"device={device}"))
    assert machine.cuda_devices == torch.cuda.device_count()

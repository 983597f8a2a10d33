"""What a plan counts and measures: operations, memory, speed, time, packing, and how all of it is told."""

from __future__ import annotations

import doctest
import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hasten.cli import main
from hasten.data.shards import PreparedData
from hasten.duration import Duration
from hasten.errors import RecipeError, RunError
from hasten.loop import State, prepare_for, start
from hasten.model import Decoder, flops_per_token
from hasten.model.shape import attention_flops_per_token
from hasten.planning.measurement import Measured, Point, measure
from hasten.planning.memory import Memory, estimated, measured, saved_bytes
from hasten.planning.outline import Outline, outline
from hasten.planning.page import write_page
from hasten.planning.plans import Plan, assembled, plan
from hasten.planning.price import Price
from hasten.planning.times import times_within
from hasten.planning.trial import trial
from hasten.planning.wording import headline, sections
from hasten.recipe import Recipe, resolve


@pytest.fixture(scope="module")
def given(text_file: Path, tiny: tuple[str, ...]) -> tuple[str, ...]:
    return (f"data={text_file}", *tiny, "compile=off")


def recipe_of(given: tuple[str, ...], *settings: str) -> Recipe:
    return resolve(resolve(None, given).recipe, settings).recipe


def started(given: tuple[str, ...], *settings: str) -> tuple[State, PreparedData]:
    recipe = recipe_of(given, "budget=20", *settings)
    data = prepare_for(recipe)
    return start(recipe, data), data


def outlined(given: tuple[str, ...], *settings: str) -> Outline:
    recipe = recipe_of(given, *settings)
    return outline(recipe, prepare_for(recipe))


@pytest.fixture(scope="module")
def growing(given: tuple[str, ...]) -> Plan:
    """A plan of a run whose rows grow, with steps timed in a process of their own."""
    recipe = recipe_of(given, "budget=40", "lengths=steps", "lengths.start=32", "lengths.over=50%")
    return plan(recipe, price="3.60 EUR", seconds=1.0)


@pytest.fixture(scope="module")
def timed(given: tuple[str, ...]) -> Plan:
    """A plan of a run with a wall-clock budget, its steps timed in this process."""
    found = outlined(given, "budget=30s")
    return assembled(found, trial(found.recipe, found.data, seconds=1.0))


# --- operations -------------------------------------------------------------------------------------------------


def test_matrix_operations_are_those_that_pytorch_counts(given):
    state, _ = started(given, "data.document_mask=false")
    (batch, *_), _ = state.batches.take(state.position, rows=1)
    with FlopCounterMode(display=False) as counter:
        logits_BTV = state.model(batch.tokens_BT)
        F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten()).backward()
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    length = state.config.seq_len
    matrices = flops_per_token(state.config, length) - attention_flops_per_token(state.config, (length + 1) / 2)
    assert products == pytest.approx(matrices * length)


def test_attention_counts_only_what_is_computed(given):
    dense = outlined(given, "budget=20")
    assert dense.seen == {64: 32.5}, "short rows are computed whole on a CPU, documents masked"
    skips = outlined(given, "budget=20", "seq_len=512", "batch_tokens=512", "data.separator=def ")
    assert 1 < skips.seen[512] < 200, "long rows go document by document"
    window = ("lengths=window", "lengths.start=8", "lengths.over=50%")
    narrow = outlined(given, "budget=20", "seq_len=512", "batch_tokens=512", "data.document_mask=false", *window)
    assert 100 < narrow.seen[512] < 256.5


def test_the_share_of_attention_follows_the_row(growing):
    share = growing.flops.attention_share
    assert share[32] < share[64] < 1
    assert growing.flops.total == pytest.approx(growing.flops.per_token * growing.positions)


# --- memory -----------------------------------------------------------------------------------------------------


def test_what_is_kept_for_the_backward_pass_is_counted(given):
    state, _ = started(given)
    narrow, _ = started(given, "precision=bf16")
    assert 0.4 < saved_bytes(narrow) / saved_bytes(state) < 0.7
    longer, _ = started(given, "seq_len=128")
    assert 1.9 < saved_bytes(longer) / saved_bytes(state) < 2.3


def test_parts_of_memory_are_those_of_the_tensors(given):
    state, _ = started(given, "precision=bf16")
    params = sum(parameter.numel() for parameter in state.model.parameters())
    vectors = sum(parameter.numel() for parameter in state.model.parameters() if parameter.ndim < 2)
    found = estimated(state, optimizer_state=7, machine=0)
    assert found.weights == 6 * params - 2 * vectors
    assert (found.gradients, found.optimizer_state) == (4 * params, 7)
    assert not found.is_measured


@pytest.mark.parametrize("peak", [100, 60, 20])
def test_a_measured_peak_is_the_sum_of_its_parts(peak):
    found = measured(Memory(10, 10, 20, 15, 5, 30, 90, False), peak)
    parts = [value for name, value in asdict(found).items() if name not in ("total", "is_measured", "machine")]
    assert found.total == peak
    assert sum(parts) == max(peak, 45)
    assert min(parts) >= 0


# --- speed and time ---------------------------------------------------------------------------------------------


def point(length: int, micro_batches: int, seconds: float, window: int | None = None) -> Point:
    return Point(length, micro_batches, window, steps=10, seconds=seconds, cpu_seconds=seconds)


def test_a_step_of_another_size_costs_the_update_and_its_share_of_the_rest():
    found = Measured((point(64, 4, 9.0), point(32, 4, 5.0), point(64, 1, 3.0)), micro_batches=4)
    assert found.update_seconds == pytest.approx(1.0)
    assert found.step_seconds(64) == pytest.approx(9.0)
    assert found.step_seconds(64, 0.5) == pytest.approx(5.0)
    assert found.step_seconds(32, 0.5) == pytest.approx(3.0)


def test_few_micro_batches_stand_for_many():
    found = Measured((point(64, 3, 7.0), point(64, 1, 3.0)), micro_batches=10)
    assert found.step_seconds(64) == pytest.approx(21.0)


def test_a_window_costs_what_lies_between():
    found = Measured((point(64, 1, 4.0), point(64, 1, 2.0, window=16)), micro_batches=1)
    assert [found.step_seconds(64, window=w) for w in (16, 40, 64, None)] == pytest.approx([2.0, 3.0, 4.0, 4.0])


@pytest.mark.parametrize(
    ("every", "times"),
    [("10%", 9), ("100", 9), ("101", 9), ("2ktok", 9), ("10s", 5), ("60s", 0), ("61s", 0), ("1ep", 1), ("1%", 99)],
)
def test_evaluations_are_counted_without_the_one_at_the_end(every, times):
    run = {"seconds": 60.0, "steps": 1000, "steps_per_epoch": 500.0, "tokens_per_step": 20}
    assert times_within(Duration.parse(every), **run) == times


def test_more_often_than_every_step_is_every_step():
    assert times_within(Duration.parse("0.01%"), seconds=1.0, steps=10) == 9


def test_every_kind_of_step_is_timed(given):
    recipe = recipe_of(given, "lengths=linear", "lengths.start=16", "batch.schedule=linear(0.25)", "batch_tokens=512")
    recipe = resolve(recipe, ["batch.micro_rows=2"]).recipe
    found = trial(recipe, prepare_for(recipe), seconds=100.0)
    assert [(p.length, p.micro_batches) for p in found.points] == [(64, 4), (32, 4), (16, 4), (64, 1)]
    assert all(p.steps >= 1 and p.seconds > 0 and p.cpu_seconds > 0 for p in found.points)
    assert found.peak_bytes > 50e6
    assert (found.threads, found.micro_batches, found.float32_ratio) == (1, 4, None)
    assert min(found.evaluation_seconds, found.checkpoint_seconds) > 0


def test_windows_and_low_precision_are_timed_too(given):
    recipe = recipe_of(given, "lengths=window", "lengths.start=8", "precision=bf16")
    found = trial(recipe, prepare_for(recipe), seconds=1.0)
    assert [(p.length, p.window) for p in found.points] == [(64, None), (64, 8)]
    assert found.float32_ratio > 0


def test_large_steps_are_timed_by_few_of_their_micro_batches(given):
    recipe = recipe_of(given, "batch_tokens=65536", "batch.micro_rows=64")
    found = trial(recipe, prepare_for(recipe), seconds=0.001)
    assert [p.micro_batches for p in found.points] == [3, 1]
    assert found.micro_batches == 16
    assert "3 and 1 micro-batches" in found.notes[0]


def test_a_trial_that_cannot_be_done_says_why(given):
    found = measure(recipe_of(given), Path("not") / "there", seconds=1.0)
    assert "manifest" in found.failure
    assert found.points == ()


# --- the whole plan ---------------------------------------------------------------------------------------------


def test_a_plan_holds_together(growing: Plan):
    assert growing.steps == 40
    assert growing.positions == 40 * 512
    assert growing.lengths == {32: 0.5, 64: 0.5}
    assert growing.epochs == pytest.approx(40 * 8 / growing.packing[0].rows)
    assert growing.parameters.total == growing.parameters.embedding + growing.parameters.other
    assert [speed.length for speed in growing.speed] == [32, 64]
    assert growing.times.training == pytest.approx(sum(20 * speed.seconds_per_step for speed in growing.speed))
    assert growing.memory.is_measured
    assert growing.cost.endswith("EUR")
    assert not growing.has_errors


def test_a_plan_is_plain_data(growing: Plan):
    values = json.loads(json.dumps(growing.to_dict(), allow_nan=False))
    assert values["memory"]["total"] == growing.memory.total
    assert values["recipe"]["lengths"]["name"] == "steps"


def test_a_wall_clock_budget_is_filled_by_the_steps_measured(timed: Plan):
    spent = timed.times.training + timed.times.evaluations + timed.times.checkpoints
    assert timed.steps > 20
    assert spent == pytest.approx(30.0, rel=0.1)


def test_without_measuring_nothing_is_said_of_time(given):
    found = plan(recipe_of(given, "budget=30s", "schedule.warmup=5"), measure=False)
    assert (found.steps, found.tokens, found.times, found.speed, found.cost) == (None, None, None, (), None)
    assert not found.memory.is_measured
    assert any("no known share" in note for note in found.notes)
    assert "at least" in headline(found)


def test_a_mixture_says_how_often_it_reads_each_source(text_file, validation_file, tiny):
    sources = f"data.train=['{text_file}', '{validation_file}']"
    found = plan(recipe_of((sources, *tiny), "data.weights=[1, 1]", "budget=20"), measure=False)
    assert len(found.source_epochs) == 2
    assert max(found.source_epochs.values()) > 2 * min(found.source_epochs.values())


def test_every_token_is_in_a_row_or_counted_as_left_out(given):
    found = outlined(given, "budget=20", "data.packing=pad")
    assert [packed.packing for packed in found.packed] == ["pad", "best_fit", "chunk"]
    assert [packed.is_chosen for packed in found.packed] == [True, False, False]
    for packed in found.packed:
        assert packed.targets + packed.lost == found.data.train_size.num_tokens
    bucketed = outlined(given, "budget=20", "lengths=linear", "lengths.start=32", "lengths.mode=bucket")
    assert [packed.packing for packed in bucketed.packed] == ["bucket", "best_fit", "chunk", "pad"]


def test_a_plan_in_words_says_it_all(growing: Plan):
    told = {name: text for _, lines in sections(growing) for name, text in lines}
    assert told["steps"] == "40"
    assert "tokens/s" in told["rows of 32"]
    assert "of 25" in told["at most"] or "GB" in told["at most"]
    assert "EUR" in told["in all"]
    assert "documents cut" in told["padded instead"]


def test_a_page_needs_nothing_else(growing: Plan, own_folder: Path):
    text = write_page(growing, own_folder / "new" / "plan.html").read_text(encoding="utf-8")
    assert "<svg" in text
    assert "<script" not in text
    assert "src=" not in text
    assert "row length" in text
    assert write_page(growing, own_folder).name == "plan.html"
    (own_folder / "file").write_text("")
    with pytest.raises(RunError, match="Could not write"):
        write_page(growing, own_folder / "file" / "plan.html")


def test_the_command_prints_json_alone(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *given, "budget=20", "--quick", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 20


def test_the_command_says_everything_and_ends_with_2_if_the_run_cannot_be(given, capsys, own_folder):
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "plan",
                *given,
                "budget=20",
                "lengths=linear",
                "lengths.start=32",
                "lengths.over=100%",
                "--no-measure",
                "--page",
                "p.html",
            ]
        )
    said = capsys.readouterr().out
    assert ended.value.code == 2
    for word in ("parameters", "best fit", "x lengths.over=100%", "p.html", "not measured"):
        assert word in said
    assert (own_folder / "p.html").exists()


def test_the_command_draws_what_changes_over_tokens_and_json_nothing(given, capsys):
    arguments = ["plan", *given, "budget=400", "lengths=steps", "lengths.start=32", "--quick"]
    with pytest.raises(SystemExit):
        main(arguments)
    said = capsys.readouterr().out
    drawn = said[said.index("learning rate\n") : said.index("\nmodel")]
    assert [line for line in drawn.splitlines() if line[:1].isalpha()] == ["learning rate", "row length"]
    assert drawn.count("200k tokens") == 1
    assert "\x1b" not in said
    assert max(map(len, said.splitlines()[:30])) <= 80
    assert len(drawn.splitlines()) <= 13


def test_the_curves_end_at_the_tokens_that_the_plan_counts(given):
    found = plan(recipe_of(given, "budget=40", "data.packing=pad", "data.separator=def "), measure=False)
    assert found.tokens < 0.95 * found.positions
    assert found.curves[0].tokens[-1] == pytest.approx(found.tokens, abs=1)


def test_one_of_a_thing_is_in_the_singular(given, validation_file, own_folder):
    (own_folder / "one.txt").write_text("a single document, without an end " * 40)
    found = plan(
        recipe_of(given, "data=one.txt", f"val={validation_file}", "data.separator=@", "budget=1"), measure=False
    )
    told = [text for _, lines in sections(found) for _, text in lines]
    assert any("in 1 document;" in text for text in told)
    assert any("of 1 document cut" in text for text in told)
    assert "1 step" in told
    assert "1 step," in headline(found)


@pytest.mark.parametrize(("text", "hour"), [("2.5", "2.50"), ("2.50 EUR", "2.50 EUR"), ("$3", "$3.00"), (".5", "0.50")])
def test_a_price_keeps_its_currency(text, hour):
    assert Price.parse(text).of(3600) == hour


@pytest.mark.parametrize("text", ["", "free", "1 2", "-1"])
def test_no_price_is_refused(text):
    with pytest.raises(RecipeError, match="no price of an hour"):
        Price.parse(text)


@pytest.mark.parametrize("name", ["costs", "memory", "price", "times", "wording"])
def test_the_examples_in_the_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"hasten.planning.{name}")).failed == 0


def test_a_model_to_start_from_is_the_model_that_is_planned(given):
    recipe = recipe_of(given, "budget=20")
    data = prepare_for(recipe)
    config = recipe.model.build(data.vocab_size, 64)
    with torch.no_grad():
        assert outline(recipe, data, Decoder(config, seed=1)).config == config

"""Plans: curves are what a run will do, pictures and charts show them, the command prints what is known."""

from __future__ import annotations

import doctest
import importlib
import io
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.cli import main
from hasten.errors import RecipeError, RunError
from hasten.planning import Curve, chart, curves, draw, facts, known_steps
from hasten.planning.axis import Axis, axis_of
from hasten.planning.picture import panels_of
from hasten.recipe import Recipe, resolve
from hasten.schedules import cosine, linear, warmup


def recipe_of(*settings: str) -> Recipe:
    return resolve(None, list(settings)).recipe


def by_name(recipe: Recipe, **options: object) -> dict[str, Curve]:
    return {curve.name: curve for curve in curves(recipe, **options)}


# --- curves -----------------------------------------------------------------------------------------------------


def test_the_rate_is_the_schedule_times_the_peak_at_every_step():
    rate = by_name(recipe_of("budget=200", "lr=0.02", "schedule=cosine", "schedule.warmup=20"))["learning rate"]
    schedule = warmup(0.1) | cosine()
    assert rate.total_steps == 200
    assert rate.progress == tuple(step / 200 for step in range(201))
    assert rate.values == pytest.approx([0.02 * schedule(step / 200) for step in range(201)], rel=1e-12)


def test_what_is_scheduled_beside_the_rate_has_its_own_curve():
    found = by_name(recipe_of("budget=100", "optimizer.weight_decay=0.2", "schedule.weight_decay=linear(0.5)"))
    assert found["weight decay"].values == pytest.approx([0.2 * linear(0.5)(step / 100) for step in range(101)])
    found = by_name(recipe_of("budget=100", "optimizer=muon", "schedule.momentum=warmup(0.5, start=0.5)"))
    assert found["momentum"].values[0] == pytest.approx(found["momentum"].values[-1] / 2)
    found = by_name(recipe_of("budget=100", "optimizer.betas=[0.8, 0.9]", "schedule.beta2=constant(0.5)"))
    assert set(found["beta2"].values) == {0.45}
    assert "beta1" not in found
    assert "weight decay" not in found


def test_lengths_and_sizes_are_the_recipes_and_the_rate_follows_the_size():
    recipe = recipe_of(
        "budget=100", "lengths=steps", "lengths.start=64", "lengths.over=50%", "schedule=constant", "schedule.warmup=0",
        "batch.schedule=stages((0, 0.25), (0.5, 1.0))", "lr=0.01",
    )  # fmt: skip
    found = by_name(recipe)
    assert [found["row length"].values[step] for step in (0, 24, 25, 49, 50, 100)] == [64, 64, 128, 128, 256, 256]
    assert [found["tokens of a step"].values[step] for step in (0, 49, 50)] == [512, 512, 2048]
    assert [found["learning rate"].values[step] for step in (0, 49, 50)] == pytest.approx([0.005, 0.005, 0.01])
    assert found["row length"].by_steps


def test_lengths_and_sizes_may_be_any_function():
    found = by_name(recipe_of("budget=10"), lengths=lambda x: 64 if x < 0.5 else 256, rows=lambda x: 8.0)
    assert set(found["row length"].values) == {64, 256}
    assert set(found["tokens of a step"].values) == {8 * 256}


def test_a_growing_window_has_its_curve():
    found = by_name(recipe_of("budget=100", "lengths=window", "lengths.start=64", "lengths.over=50%"))
    assert (found["attention window"].values[0], found["attention window"].values[50]) == (64, 256)


@pytest.mark.parametrize(
    ("budget", "steps"), [("100", 100), ("204800tok", 100), ("204801tok", 101), ("60s", None), ("2ep", None)]
)
def test_steps_are_known_where_the_budget_counts_them(budget, steps):
    assert known_steps(recipe_of(f"budget={budget}")) == steps


def test_a_run_of_unknown_steps_is_planned_over_shares():
    recipe = recipe_of("budget=60s", "schedule=wsd", "schedule.warmup=6s", "schedule.cooldown=25%", "lr=1.0")
    rate = by_name(recipe)["learning rate"]
    assert rate.total_steps is None
    assert [rate.values[point] for point in (100, 500, 750, 1000)] == pytest.approx([1.0, 1.0, 1.0, 0.01])
    assert by_name(recipe_of("budget=4ep", "schedule.warmup=1ep", "lr=1.0"))["learning rate"].values[250] == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        ("budget=60s", "schedule.warmup=100"),
        ("budget=2ep", "schedule.warmup=20ktok"),
        ("budget=60s", "schedule=wsd", "schedule.cooldown=1ep"),
        ("budget=60s", "lengths=linear", "lengths.over=100"),
    ],
)
def test_a_span_that_is_no_known_share_is_refused(settings):
    with pytest.raises(RecipeError, match="no known share"):
        curves(recipe_of(*settings))


def test_given_steps_make_shares_of_counted_spans():
    rate = curves(recipe_of("budget=60s", "schedule.warmup=100", "lr=1.0"), 1000)[0]
    assert (rate.values[99] < 1.0, rate.values[100]) == (True, 1.0)


# --- facts ------------------------------------------------------------------------------------------------------


def test_facts_are_what_is_known_before_the_data_is_read():
    said, doubts = facts(recipe_of("budget=1000", "batch_tokens=2048", "seq_len=256", "lr=0.01", "schedule.floor=0.1"))
    known = dict(said)
    assert known["steps"] == "1,000"
    assert known["tokens"] == "2,048,000"
    assert known["batch"] == "8 rows of 256 tokens a step"
    assert known["warm-up"] == "20 steps, 2% of the run"
    assert known["learning rate"] == "0.0001 at first, 0.01 at most, 0.001 at the end"
    assert known["row length"] == "256 (100%)"
    assert doubts == ()


def test_facts_name_what_would_do_nothing():
    _, doubts = facts(recipe_of("budget=100", "schedule.warmup=0.5%"))
    assert any("less than one of 100 steps" in doubt for doubt in doubts)
    _, doubts = facts(recipe_of("budget=100", "schedule.weight_decay=linear(1)"))
    assert any("never decays" in doubt for doubt in doubts)


# --- pictures ---------------------------------------------------------------------------------------------------


def three(total_steps: int = 300) -> list[Curve]:
    return [
        curve
        for name in ("cosine", "linear", "sqrt")
        for curve in curves(recipe_of(f"budget={total_steps}", f"schedule={name}"), label=name)
    ]


def test_a_png_is_written_whole_and_the_same_every_time(own_folder):
    first, second = draw(three(), own_folder / "new" / "a.png"), draw(three(), own_folder / "b.png")
    content = first.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height > 400) == (1200, True)
    assert content == second.read_bytes()


def test_an_svg_names_recipes_and_quantities_as_text(own_folder):
    more = curves(recipe_of("budget=300", "lengths=steps", "schedule.weight_decay=linear(0.5)"), label="<grows>")
    path = draw([*three(), *more], own_folder / "a.svg", title="Four & more")
    assert path.read_bytes() == draw([*three(), *more], own_folder / "b.svg", title="Four & more").read_bytes()
    texts = [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    for said in (
        "cosine",
        "linear",
        "sqrt",
        "<grows>",
        "learning rate",
        "row length",
        "weight decay",
        "tokens",
        "500k",
    ):
        assert said in texts
    assert "Four & more" in texts
    assert "tokens of a step" not in texts, "what no recipe changes is left out"


def test_tokens_are_those_of_all_steps_before():
    rows = "batch.schedule=stages((0, 0.25), (0.5, 1.0))"
    assert curves(recipe_of("budget=100"))[0].tokens == tuple(2048.0 * step for step in range(101))
    growing = curves(recipe_of("budget=100", rows))[0].tokens
    assert [growing[step] for step in (0, 1, 50, 51, 100)] == [0, 512, 50 * 512, 50 * 512 + 2048, 50 * (512 + 2048)]
    assert curves(recipe_of("budget=50000", rows))[0].tokens[-1] == pytest.approx(25_000 * (512 + 2048), rel=1e-6)
    assert curves(recipe_of("budget=20Mtok", rows))[0].tokens[-1] == pytest.approx(20e6, rel=1e-3)
    assert curves(recipe_of("budget=100"), utilisation=0.5)[0].tokens[-1] == 100 * 1024
    assert curves(recipe_of("budget=60s"))[0].tokens is None


def test_larger_steps_and_longer_runs_reach_further_on_the_axis():
    base, longer = curves(recipe_of("budget=100")), curves(recipe_of("budget=300"))
    larger, same = curves(recipe_of("budget=100", "batch_tokens=8192")), curves(recipe_of("budget=204800tok"))
    axis = axis_of([base, longer, larger, same])
    assert (axis.unit, axis.last) == ("tokens", 100 * 8192)
    ends = [axis.places(run[0])[-1] / axis.last for run in (base, longer, larger, same)]
    assert ends == [0.25, 0.75, 1.0, 0.25]


def test_the_axis_is_what_is_known_of_every_run(own_folder):
    timed = curves(recipe_of("budget=60s"), label="timed")
    steps = Curve("learning rate", "", (0.0, 1.0), (1.0, 0.0), total_steps=30)
    assert axis_of([three(), [steps]]).unit == "steps"
    assert [axis_of([three(), timed]).places(curve)[-1] for curve in (three()[0], timed[0])] == [100, 100]
    path = draw([*three(), *timed], own_folder / "a.svg")
    assert "% of the run" in path.read_text(encoding="utf-8")


@given(st.floats(1, 1e13), st.integers(2, 8), st.sampled_from(["tokens", "steps"]))
def test_ticks_are_few_whole_round_numbers_up_to_the_end(last, most, unit):
    axis = Axis(unit, last)
    ticks = axis.ticks(most)
    assert 1 <= len(ticks) - 1 <= most
    assert ticks[0] == 0
    assert last / 2 <= ticks[-1] <= last * (1 + 1e-9)
    assert f"{ticks[1]:.0f}".rstrip("0") in ("1", "2", "5")
    assert len({axis.number(tick) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize("name", ["a.jpg", "a", "png"])
def test_another_ending_is_refused(name, own_folder):
    with pytest.raises(RecipeError, match=r"\.png or \.svg"):
        draw(three(), own_folder / name)


def test_a_picture_that_cannot_be_written_is_said(own_folder):
    (own_folder / "file").write_text("")
    with pytest.raises(RunError, match="Could not write"):
        draw(three(), own_folder / "file" / "a.png")


# --- charts -----------------------------------------------------------------------------------------------------


def lines_of(panel: list[Curve], **options: object) -> list[str]:
    return ["".join(cell.text for cell in line) for line in chart(panel, [panel], **options)]


def test_a_chart_stands_where_the_values_are():
    rise = Curve("rate", "", tuple(x / 100 for x in range(101)), tuple(x / 100 for x in range(101)), 100)
    *rows, axis, labels = chart([rise], [[rise]], width=60, height=11, plain=True)
    columns = len(rows[0]) - 1
    for column in range(columns):
        drawn = [number for number, row in enumerate(rows) if row[column + 1].curve == 0]
        wanted = (1 - (column + 0.5) / columns) * (len(rows) - 1)
        assert drawn, column
        assert min(abs(row - wanted) for row in drawn) <= 1, column
    assert "".join(cell.text for cell in labels).split() == ["0", "20", "40", "60", "80", "100", "steps"]
    assert set("".join(cell.text for cell in axis).strip()) == {"+", "-"}


def test_ticks_stand_over_their_labels_and_charts_over_each_other():
    found = curves(recipe_of("budget=20Mtok", "lengths=steps", "schedule.weight_decay=linear(0.1)"))
    panels = panels_of(found)
    charts = [["".join(c.text for c in line) for line in chart(p, panels, width=79, plain=True)] for p in panels]
    assert len(panels) == 3
    assert len({tuple(lines[-2:]) for lines in charts}) == 1, "one axis for all"
    line, labels = charts[0][-2:]
    for tick, label in zip([at for at, c in enumerate(line) if c == "+"], ("0", "5M", "10M", "15M", "20M tokens")):
        begin = labels.index(f" {label}") + 1
        assert begin - 7 <= tick <= begin + len(label)
    bare = chart(panels[0], panels, width=79, plain=True, is_last=False)
    assert ["".join(cell.text for cell in row) for row in bare] == charts[0][:-1]


def test_values_held_in_steps_are_written_beside_their_lines():
    (lengths,) = (c for c in curves(recipe_of("budget=100", "lengths=steps")) if c.by_steps and c.name == "row length")
    for plain in (True, False):
        *rows, _, _ = lines_of([lengths], height=5, plain=plain)
        assert [word for row in rows if (word := row.split()[0]).isdigit()] == ["256", "128", "64", "0"]
    *rows, _, _ = lines_of([lengths], height=3)
    assert [row.split()[0] for row in rows] == ["256", "128", "64"]


def test_a_jump_is_drawn_through_and_its_sides_stay_apart():
    jump = Curve("length", "", tuple(x / 100 for x in range(101)), (64.0,) * 50 + (256.0,) * 51, 100, by_steps=True)
    *rows, _, _ = chart([jump], [[jump]], width=60, height=5, plain=True)
    tops = [column for column, cell in enumerate(rows[0]) if cell.curve == 0]
    lows = [column for column, cell in enumerate(rows[3]) if cell.curve == 0]
    assert min(tops) == max(lows)
    assert abs(min(tops) - len(rows[0]) / 2) <= 1
    assert rows[0][0].text.strip().startswith("256")


def test_plain_charts_are_ascii_and_others_braille():
    panel = [curve for curve in three() if curve.name == "learning rate"]
    plain, dotted = lines_of(panel, plain=True), lines_of(panel)
    assert all(line.isascii() for line in plain)
    assert {"*", "+", "o"} <= set("".join(plain))
    assert any(0x2800 < ord(character) < 0x2900 for line in dotted for character in line)
    assert {len(line) for line in plain[:-2]} == {72}


values = st.lists(st.floats(0.0, 1e6), min_size=2, max_size=40)


@given(values, st.integers(30, 120), st.sampled_from([3, 5, 11]), st.booleans(), st.booleans())
def test_every_curve_fills_its_width_and_stays_inside(heights, width, height, plain, by_steps):
    progress = tuple(place / (len(heights) - 1) for place in range(len(heights)))
    curve = Curve("anything", "", progress, tuple(heights), 1000, by_steps)
    *rows, axis, labels = chart([curve], [[curve]], width=width, height=height, plain=plain)
    assert len(rows) == height
    assert all(sum(len(cell.text) for cell in row) == width for row in rows)
    assert sum(len(cell.text) for cell in axis) == width
    assert sum(len(cell.text) for cell in labels) <= width
    for column in range(1, len(rows[0])):
        assert any(row[column].curve == 0 for row in rows), column


def test_what_never_changes_has_no_panel_but_the_rate():
    assert [panel[0].name for panel in panels_of(curves(recipe_of("schedule=constant", "schedule.warmup=0")))] == [
        "learning rate"
    ]
    assert [panel[0].name for panel in panels_of(curves(recipe_of("lengths=linear")))] == [
        "learning rate",
        "row length",
    ]


@pytest.mark.parametrize("name", ["axis", "outlook", "picture", "terminal"])
def test_the_examples_in_the_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"hasten.planning.{name}")).failed == 0


# --- the command ------------------------------------------------------------------------------------------------


def command(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_curves_alone_read_no_text(capsys, own_folder: Path):
    assert command(["plan", "budget=1000", "schedule=wsd", "schedule.warmup=0.05%", "data=nowhere", "--curves"]) == 0
    said = capsys.readouterr().out
    assert "2,048,000" in said
    assert "hold() | sqrt(floor=0.01, share=0.2)" in said
    assert "less than one of 1000 steps" in said
    assert "2M tokens" in said


def test_the_command_draws_several_recipes(own_folder, capsys):
    arguments = ["plan", "budget=300", "--with", "schedule=linear", "--with", "schedule=sqrt lr=0.001"]
    assert command([*arguments, "--out", "curves.svg"]) == 0
    said = capsys.readouterr().out
    for label in ("* cosine", "+ linear", "o schedule=sqrt lr=0.001", "600k tokens", "curves.svg"):
        assert label in said
    assert "schedule=sqrt lr=0.001" in (own_folder / "curves.svg").read_text(encoding="utf-8")


def test_a_terminal_without_braille_gets_letters(monkeypatch):
    for encoding, is_plain in (("ascii", True), ("utf-8", False)):
        written = io.BytesIO()
        terminal = io.TextIOWrapper(written, encoding=encoding, write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            assert command(["plan", "--curves"]) == 0
        assert written.getvalue().isascii() == is_plain


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "budget=100", "--out", "a.jpg"], ".png or .svg"),
        (["plan", "--with", "schedule=linar"], "schedule.name=linar"),
        (["plan", "--with", "schedule='linear"], "--with"),
        (["plan", "--with", "linear"], "key=value"),
        (["plan", "schedule.warmup=100", "--curves"], "no known share"),
        (["plan", "--curves", "--price", "2"], "--price has no effect beside --curves"),
        (["plan", "--price", "cheap"], "no price of an hour"),
        (["plan", "data=nothing.txt"], "nothing.txt"),
        (["plan", "data=nothing.txt", "lr=fast"], "optimizer.lr"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, says, capsys, own_folder: Path):
    assert command(arguments) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Traceback" not in said.err
    assert list(own_folder.iterdir()) == []

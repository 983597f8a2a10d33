"""The report of a study, of runs over seeds, and of what each technique did: whole, offline, escaped, honest."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import Page, make_run
from fake_study import ARMS, FakeArm, make_study
from test_report import browse, needs_chromium, page_of, words

from hasten.errors import RunError
from hasten.record import Record, RunFolder
from hasten.report import write_report, write_study_report
from hasten.report.curves import overlay
from hasten.report.forest import draw_forest, forest
from hasten.report.runs import read_runs
from hasten.report.study import read_study
from hasten.report.study_charts import study_curves
from hasten.report.tables import warnings
from hasten.report.trajectories import read_trajectories
from hasten.report.verdicts import ladder_table

TUNING = {
    "tries": 2,
    "seed": 100000,
    "cost_seconds": 61.2,
    "arms": {"muon": {"tried": {"0.01": 1.52, "0.02": 1.49}, "taken": 0.02, "at_edge": True}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("studies") / "muon", tuning=TUNING)


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return page_of(study)


def change_verdicts(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "verdicts.json"
    verdicts = json.loads(path.read_text(encoding="utf-8"))
    change(verdicts)
    path.write_text(json.dumps(verdicts), encoding="utf-8")
    return folder


def test_first_screen_answers_what_to_use(page: Page) -> None:
    said = words(page)
    first_screen = said[: said.index("Effects, the best first")]
    assert "Use muon: 5.5 % fewer bits per byte in the same time, and no arm does better." in first_screen
    for meaning in ("pays use it", "costs leave it", "none no difference larger than 1 %", "about 4 more seeds",
                    "identical changed nothing at all: the setting had no effect", "diverged in 2 of 3 seeds",
                    "not reached in 2 of 3 seeds", "equal in every digit", "812 MB (+3.1 %)"):  # fmt: skip
        assert meaning in first_screen, meaning
    assert re.search(r"−5\.\d % \[−6\.\d, −5\.\d\]", first_screen)
    order = [first_screen.index(f"{arm} {word}") for arm, word in (("base", "base"), ("muon", "pays"), ("sgd", "div"))]
    assert order == sorted(order)


def test_page_tells_how_it_was_measured_and_every_run(page: Page) -> None:
    said = words(page)
    for part in ("paired t on log ratios", "Holm, 7 comparisons", "2, each with 1 thread", "1 h 35 min",
                 "optimizer sgd",
                 "2 learning rates were tried for every arm, on seed 100000", "0.01: 1.520, 0.02: 1.490",
                 "the best may lie outside", "65 % of the budget", "Only the points are results",
                 "2 runs that did not finish are left out", "50 %, 65 %, 80 % of the budget"):  # fmt: skip
        assert part in said, part
    assert len(re.findall(r"-s[012]-[0-9a-f]{8}\b", said)) == 24


def test_pictures_and_tables_lie_beside_the_page(study: Path, page: Page) -> None:
    for name in ("forest.png", "curves.png", "curves_time.png"):
        assert (study / name).read_bytes().startswith(b"\x89PNG"), name
    assert {"table.md", "table.csv", "table.tex"} <= {path.name for path in study.iterdir()}
    assert not list(study.glob("*.tmp"))
    drawings = re.findall(r"<svg viewBox.*?</svg>", page.source, flags=re.S)
    assert len(drawings) == 3
    assert not any(re.search(r"#[0-9a-fA-F]{6}|font-family", drawing) for drawing in drawings)


def test_page_of_a_study_goes_where_it_is_asked_to(study: Path, tmp_path: Path) -> None:
    assert write_study_report(study, tmp_path / "out" / "page.html") == tmp_path / "out" / "page.html"
    assert (tmp_path / "out" / "forest.png").exists()
    assert write_report([study], tmp_path / "folder") == tmp_path / "folder" / "report.html"


def test_raw_table_holds_the_numbers_of_the_study(study: Path, page: Page) -> None:
    with open(study / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    verdicts = json.loads((study / "verdicts.json").read_text(encoding="utf-8"))
    muon = verdicts["arms"][0]["effects"]["bits_per_byte"]
    (row,) = [row for row in rows if row["arm"] == "muon" and row["effect"] == "bits_per_byte"]
    assert [float(row[key]) for key in ("mean", "low", "high", "p")] == [muon[k] for k in ("mean", "low", "high", "p")]
    assert float(row["verdict_p_corrected"]) == 0.021
    (censored,) = [row for row in rows if row["arm"] == "lr x 0.3" and row["effect"] == "seconds_to_loss"]
    assert (censored["mean"], censored["censored"]) == ("", "2")
    assert {row["arm"] for row in rows} == {"base", *(arm.name for arm in ARMS)}


NASTY = 'a|b <script>x()</script> & 50 % $x$ {y} \\z #1 ~^_"\x1b[31m\u202e\n=1'


def test_whatever_a_study_wrote_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    arms = [FakeArm(NASTY, "pays", -0.05, {NASTY: NASTY}, reason=NASTY), FakeArm("=cmd()", "costs", 0.02)]
    make_study(tmp_path, arms, with_runs=False, name=NASTY, answer=NASTY, method=NASTY)
    page = page_of(tmp_path)
    assert "<script>x()</script> & 50 %" in page.text
    files = [(tmp_path / f"table.{kind}").read_text(encoding="utf-8") for kind in ("md", "tex", "csv")]
    for text in (page.source, *files):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    markdown, latex, _ = files
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")} == {11}
    assert r"a\|b \<script\>" in markdown
    assert r"a\textbar{}b \textless{}script\textgreater{}" in latex
    assert r"50 \% \$x\$ \{y\} \textbackslash{}z \#1 \textasciitilde{}\textasciicircum{}\_" in latex
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        assert "'=cmd()" in {row[1] for row in csv.reader(file)}


def damage(keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(verdicts: dict[str, Any]) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
        for key in way:
            verdicts = verdicts[key]
        verdicts[last] = value

    return change


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        ("format", 2, "format is 2"),
        ("study", None, "study is missing"),
        ("arms", {}, "arms should be a list"),
        ("arms.0", "x", r"arms\[0\] should be an object"),
        ("arms.1.verdict", "great", r'arms\[1\].verdict is "great"'),
        ("arms.0.effects.bits_per_byte.mean", "low", r"effects.bits_per_byte.mean should be a number, not \"low\""),
        ("base.runs", [3], r"base.runs\[0\] should be an object, not 3"),
        ("study.complete", 1, "study.complete should be true or false"),
    ],
)
def test_damaged_verdicts_are_one_sentence(tmp_path: Path, keys: str, value: Any, said: str) -> None:
    change_verdicts(make_study(tmp_path, ARMS[:2], with_runs=False), damage(keys, value))
    with pytest.raises(RunError, match=said) as refused:
        write_report([tmp_path])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", '{"format": 1, "stu', "[1]", "[" * 100_000])
def test_half_written_verdicts_are_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "verdicts.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"give the command of the study again"):
        write_report([tmp_path])


def test_study_without_verdicts_and_study_among_runs_are_refused(tmp_path: Path, study: Path) -> None:
    (tmp_path / "study.toml").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"has no verdicts.json yet"):
        write_report([tmp_path])
    with pytest.raises(RunError, match="give one study alone"):
        write_report([study, study])


def test_unmeasured_and_non_finite_values_leave_a_page(tmp_path: Path) -> None:
    def change(verdicts: dict[str, Any]) -> None:
        bare = {"name": "bare", "verdict": "unknown"}
        strange = {"mean": "nan", "low": float("nan"), "high": "inf", "n": 1, "method": "too few"}
        verdicts["arms"] = [bare, {"name": "strange", "verdict": "none", "effects": {"bits_per_byte": strange}}]

    change_verdicts(make_study(tmp_path, ARMS[:2], seeds=1), change)
    assert "bare unknown cannot tell yet" in words(page_of(tmp_path))
    assert not (tmp_path / "forest.png").exists()


def test_single_seed_has_no_interval(tmp_path: Path) -> None:
    said = words(page_of(make_study(tmp_path, ARMS[:2], seeds=1)))
    assert re.search(r"−\d\.\d+ % \(one seed, no interval\)", said)


@pytest.mark.parametrize(("missing", "said"), [(3, "3 runs of this study are missing"), (0, "is not complete")])
def test_incomplete_study_says_so_first(tmp_path: Path, missing: int, said: str) -> None:
    make_study(tmp_path, ARMS[:2], with_runs=False, complete=False, runs_missing=missing)
    text = words(page_of(tmp_path))
    assert said in text[: text.index("muon pays")]


def test_missing_and_damaged_runs_cost_only_their_curves(tmp_path: Path) -> None:
    make_study(tmp_path, ARMS[:2])
    gone, broken, *_ = sorted((tmp_path / "runs").iterdir())
    shutil.rmtree(gone)
    (broken / "events.jsonl").write_text("{\n{}\n", encoding="utf-8")
    said = words(page_of(tmp_path))
    assert "The records of 2 finished runs are gone or damaged" in said
    assert gone.name in said
    shutil.rmtree(tmp_path / "runs")
    assert "Nothing to draw" in words(page_of(tmp_path))
    assert not (tmp_path / "curves.png").exists()


def test_run_outside_the_study_is_never_read(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ARMS[:1])
    inside = next((study / "runs").glob("base-s0-*"))
    shutil.move(inside, tmp_path / "elsewhere")
    change_verdicts(study, damage("base.runs.0.run", "../../elsewhere"))
    read = read_trajectories(read_study(study), study)
    assert [len(found) for _, found in read.by_arm] == [2, 3]
    assert read.unread == 1


def test_lines_of_steps_are_not_needed(tmp_path: Path) -> None:
    make_study(tmp_path, ARMS[:2])
    before = page_of(tmp_path).source
    for path in tmp_path.glob("runs/*/metrics.jsonl"):
        path.write_bytes(b"\xff not a line\n")
    for path in tmp_path.glob("runs/*/result.json"):
        path.unlink()
    assert page_of(tmp_path).source == before


def test_evaluations_are_placed_by_what_had_been_trained(tmp_path: Path) -> None:
    placed, spaced = make_study(tmp_path / "a", ARMS[:1]), make_study(tmp_path / "b", ARMS[:1], is_placed=False)
    first, second = (read_trajectories(read_study(folder), folder) for folder in (placed, spaced))
    assert (first.is_spaced, second.is_spaced) == (False, True)
    for one, other in zip(first.by_arm[1][1], second.by_arm[1][1], strict=True):
        assert np.allclose(one.tokens, other.tokens, rtol=0.01)
        assert one.seconds[-1] == other.seconds[-1]
    assert "placed by their step number" in words(page_of(spaced))


def test_curves_are_the_mean_over_seeds_in_the_band_of_all(study: Path) -> None:
    read = read_study(study)
    charts = study_curves(read, read_trajectories(read, study))
    assert [chart.x_label for chart in charts] == ["training tokens", "training time"]
    band = next(curve for curve in charts[1].curves if curve.kind == "band")
    line = next(curve for curve in charts[1].curves if curve.label == "base")
    assert (band.y <= line.y).all()
    assert (line.y <= band.high).all()
    ends = [curve.y for curve in charts[1].curves if curve.kind == "points" and curve.colour == line.colour]
    assert np.allclose(np.sort(ends[0]), sorted(run.val_bpb for run in read.base.runs))


def test_overlay_covers_what_all_series_cover() -> None:
    one, other = np.array([0.0, 10.0]), np.array([5.0, 15.0])
    together = overlay([(one, one), (other, other + 2)])
    assert (together.x[0], together.x[-1]) == (5, 10)
    assert np.allclose(together.mean, together.x + 1)
    assert np.allclose(together.high - together.low, 2)
    assert overlay([(one, one), (one + 20, one)]) is None
    assert overlay([(one, one), (one, one * np.nan)]) is None
    assert len(overlay([(np.arange(999.0), np.arange(999.0))] * 2).x) == 200


def test_forest_shows_every_arm_sorted_and_why_one_has_no_interval(study: Path) -> None:
    svg = draw_forest(forest(read_study(study)))
    found = [svg.index(f">{name}<") for name in ("muon", "muon, no warmup", "soap", "lr x 0.3", "sgd")]
    assert found == sorted(found)
    for why in ("diverged in 2 of 3 seeds", "equal in every digit", "not reached in 2 of 3 seeds", "Tokens to the"):
        assert why in svg, why


def test_many_arms_with_long_names_stay_apart(tmp_path: Path) -> None:
    arms = [FakeArm(f"an-optimizer-with-quite-a-long-name-{i:02d}" + "x" * 30, "pays", -i / 1000) for i in range(30)]
    arms[7] = FakeArm("wild", "unknown", 0.0)
    make_study(tmp_path, arms)
    change_verdicts(tmp_path, damage("arms.7.effects.bits_per_byte.high", 40.0))
    read = read_study(tmp_path)
    svg = draw_forest(forest(read))
    heights = sorted(float(y) for y in re.findall(r'y="([0-9.]+)"[^>]*>an-opt', svg))
    assert svg.count("…") == 29
    assert len(heights) == 29
    assert min(np.diff(heights)) > 20
    assert "23 arms with smaller gains" in words(page_of(tmp_path))


def test_ladder_says_which_horizon_was_enough(study: Path) -> None:
    read = read_study(study)
    heads, rows = ladder_table(read.arms[2], read)
    assert heads == ["50\xa0%", "65\xa0%", "80\xa0%"]
    assert [row[2] for row in rows[:2]] == ["never: censored, so this seed has no figure"] * 2
    assert rows[2][2] == "65\xa0% of the budget"
    assert ladder_table(read.base, read) == ([], [])


def test_whole_run_can_be_the_shortest_that_was_enough(tmp_path: Path) -> None:
    read = read_study(change_verdicts(make_study(tmp_path, ARMS[:1], with_runs=False), damage("arms.0.ladder", [])))
    assert [row[2] for row in ladder_table(read.arms[0], read)[1]] == ["the whole budget"] * 3


def test_arms_compared_with_each_other_are_drawn_once_and_named_once(tmp_path: Path) -> None:
    arms = [FakeArm("a vs base", "pays", -0.05), FakeArm("b vs base", "pays", -0.04), FakeArm("b vs a", "costs", 0.01)]
    make_study(tmp_path, arms, mode="head-to-head", primary="bits_per_byte and train_seconds", budget="300")

    def change(verdicts: dict[str, Any]) -> None:
        for entry in verdicts["arms"]:
            entry["arm"], _, entry["against"] = entry["name"].split(" ")
        verdicts["arms"][2]["runs"] = verdicts["arms"][1]["runs"]

    read = read_study(change_verdicts(tmp_path, change))
    (by_tokens, _) = study_curves(read, read_trajectories(read, tmp_path))
    assert sorted(curve.label for curve in by_tokens.curves if curve.label) == ["a", "b", "base"]
    said = words(page_of(tmp_path))
    assert "b vs a costs the worse of the two" in said
    assert "300 steps for every run" in said
    assert "Held-out bits per byte and Training time per run" in said
    assert ">Training time per run<" in draw_forest(forest(read))


def test_leaving_out_reads_the_other_way_round(tmp_path: Path) -> None:
    arms = [FakeArm("without muon", "costs", 0.05), FakeArm("without z", "pays", -0.02)]
    said = words(page_of(make_study(tmp_path, arms, with_runs=False, mode="leave-one-out")))
    assert "without muon costs worse without it: keep it" in said
    assert "without z pays better without it" in said


# --- what each technique did ----------------------------------------------------------------------------------------


def proven(folder: Path, *warned: str, **proof: Any) -> Path:
    make_run(folder, steps=50, scale=0.01)
    record = Record(RunFolder(folder), 1)
    record.event("proof", step=25, facts=[["Old", "no longer so"]], warnings=["old"])
    for message in warned:
        record.event("warning", step=50, message=message)
    record.event("proof", step=50, **proof)
    record.close()
    return folder


def test_page_shows_what_each_technique_did(tmp_path: Path) -> None:
    facts = [["Clipping", "0 of 50 steps"], ["<b>Lengths</b>", "64 to 256 tokens"], "broken", [1]]
    said = words(page_of(proven(tmp_path / "run", facts=facts, warnings=[])))
    assert "What each technique did Clipping 0 of 50 steps <b>Lengths</b> 64 to 256 tokens" in said
    assert "no longer so" not in said
    assert "What each technique did" not in words(page_of(make_run(tmp_path / "plain", steps=5)))


def test_warnings_of_the_proof_are_said_once(tmp_path: Path) -> None:
    clip = "clip enabled, acted on 0 of 50 steps: the norm never came near max_norm."
    folder = proven(tmp_path / "run", clip, facts=[], warnings=[clip, "soap enabled, did nothing.", 3])
    (run,) = read_runs([folder])
    assert warnings(run) == [clip, "soap enabled, did nothing."]


# --- in a browser ---------------------------------------------------------------------------------------------------


@needs_chromium
def test_study_answers_in_the_first_screen_and_fits_a_phone(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ARMS[1:], complete=False, runs_missing=2, with_runs=False)
    text = html.escape(write_report([study]).read_text(encoding="utf-8"))
    script = """
        const [desk, phone] = [...document.querySelectorAll("iframe")].map((frame) => frame.contentDocument);
        const end = desk.querySelector(".verdicts").getBoundingClientRect().bottom;
        phone.querySelectorAll("details").forEach((part) => { part.open = true; });
        const excess = phone.documentElement.scrollWidth - phone.documentElement.clientWidth;
        document.body.innerHTML = `above the fold: ${end <= 800}, excess: ${excess}.`;
    """
    frames = "".join(
        f'<iframe width="{width}" height="800" style="border:0" srcdoc="{text}"></iframe>' for width in (1280, 360)
    )
    holder = tmp_path / "holder.html"
    holder.write_text(f"<body>{frames}<script>onload = () => {{{script}}}</script></body>", encoding="utf-8")
    elements, _ = browse(holder, tmp_path / "profile")
    assert "above the fold: true, excess: 0." in elements

"""The report: every kind of run gives a page that is whole, offline, escaped and readable."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import RECIPE, START, Page, make_run

from hasten.errors import RunError
from hasten.record import Record, RunFolder, write_result
from hasten.report import write_report
from hasten.report.charts import Chart, Curve, evaluations
from hasten.report.curves import smooth, thin
from hasten.report.figures import draw
from hasten.report.overlays import comparison_charts, groups
from hasten.report.runs import read_runs
from hasten.report.tables import warnings


def page_of(*folders: Path, out: Path | None = None) -> Page:
    page = Page(write_report(list(folders), out))
    assert page.faults == []
    assert not re.search(r"(https?:)?//[a-z]", page.source)
    return page


def words(page: Page) -> str:
    return " ".join(" ".join(page.parts).split())  # also turns no-break spaces into plain ones


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "python-nano")


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return page_of(finished)


def test_first_screen_says_what_was_trained_how_well_and_at_what_cost(page: Page) -> None:
    said = words(page)
    first_screen = said[: said.index("Curves")]
    for part in ("nano on python", "Finished", "1.232 bits for each byte", "69 % less than the model before training",
                 "xz -9 1.930", "byte unigram 4.610", "untrained 3.960", "3 min 12 s", "4.92 M", "27.5 k"):  # fmt: skip
        assert part in first_screen


def test_page_holds_every_part_of_the_story(page: Page) -> None:
    said = words(page)
    for part in ("Training loss", "Held-out text", "Learning rate", "Row length", "Gradient norm", "Throughput",
                 "Clipped on 43 of 600 steps (7.2 %)", "clipped above 1", "Where the time went", "Saving checkpoints",
                 "Everything else", "Not compiled: saves about 9 s", "return self._buffer[:size]", "9f9f9f",
                 "3 (first at encodings/x.py byte 12)", "hasten train data=python budget=600", "PyTorch 2.13.0",
                 "max_norm = 1.0"):  # fmt: skip
        assert part in said, part


def test_page_forbids_itself_every_fetch(page: Page) -> None:
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.source


def test_every_chart_has_a_picture_and_pictures_of_an_earlier_report_go(finished: Path) -> None:
    pictures = finished / "report"
    pictures.mkdir(exist_ok=True)
    (pictures / "loss_scale.png").write_bytes(b"old")
    (pictures / "holiday.png").write_bytes(b"mine")
    page_of(finished)
    drawn = {path.stem for path in pictures.glob("*.png")}
    assert drawn == {"loss", "validation", "learning_rate", "gradient_norm", "row_length", "throughput", "holiday"}
    assert (pictures / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_chart_colours_all_come_from_the_page(page: Page) -> None:
    charts = re.findall(r"<svg.*?</svg>", page.source, flags=re.S)
    assert len([chart for chart in charts if "role=" in chart]) == 6
    assert not any(re.search(r"#[0-9a-fA-F]{6}|font-family", chart) for chart in charts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_both_schemes(scheme: str) -> None:
    css = resources.files("hasten.report").joinpath("style.css").read_text(encoding="utf-8")
    light, dark = (css[start : css.index("}", start)] for start in [m.start() for m in re.finditer(":root", css)][:2])
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    assert all(contrast(colours[name], colours["paper"]) >= 4.5 for name in ("ink", "muted", "bad", "good"))
    assert contrast(colours["warn"], colours["warn-paper"]) >= 4.5
    assert all(contrast(colours[f"c{i}"], colours["paper"]) >= 3.0 for i in range(8))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


NASTY = '<script>alert(1)</script>&amp;"\x00\x1b[31m\u202e\ud800 {{ 7 * 7 }} $x_1$ 漢字'


def test_whatever_a_run_wrote_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    start = {**START, "command": NASTY, "data": {"corpus": NASTY, "counts": {NASTY: 1}}, "environment": {"cpu": NASTY}}
    recipe = RECIPE.replace('"nano"', json.dumps(NASTY.replace("\ud800", "")))
    first = make_run(tmp_path / "_a<b>&'$x^2$", steps=3, start=start, sample=NASTY, recipe=recipe)
    second = make_run(tmp_path / "漢字", steps=3, start=start, sample=NASTY)
    for page in (page_of(first), page_of(first, second, out=tmp_path / "both.html")):
        assert r'<script>alert(1)</script>&amp;"\x00\x1b[31m\u202e\ud800 {{ 7 * 7 }} $x_1$ 漢字' in page.text
        assert "_a<b>&'$x^2$" in page.text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page.source)


@pytest.mark.parametrize("steps", [0, 1, 2, 40])
def test_unfinished_run_says_how_far_it_got(tmp_path: Path, steps: int) -> None:
    said = words(page_of(make_run(tmp_path / "run", steps=steps, finished=False)))
    assert f"Not finished: no result was written, at step {steps}" in said
    assert ("No optimizer step is on record." in said) == (steps == 0)


@pytest.mark.parametrize("broken_from", [1, 20])
def test_diverged_run_says_where_the_loss_was_lost(tmp_path: Path, broken_from: int) -> None:
    folder = make_run(tmp_path / "run", steps=60, broken_from=broken_from, finished=False)
    result = {"status": "diverged", "reason": "loss is nan", "val_bpb": math.nan, "val_loss": None, "steps": 60}
    write_result(RunFolder(folder), result)
    said = words(page_of(folder))
    assert "Diverged (loss is nan)" in said
    assert f"not a finite number on {61 - broken_from} of 60 steps" in said
    assert ("None of the 60 recorded losses" in said) == (broken_from == 1)


FILES = ("recipe.toml", "metrics.jsonl", "events.jsonl", "result.json")


def test_damaged_files_are_named_and_the_page_gives_no_paths_away(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=5)
    for name in FILES:
        (folder / name).write_bytes(b"\xff not json or toml\n{}\n")
    page = page_of(folder)
    assert all(f"{name} could not be read and is left out" in words(page) for name in FILES)
    assert str(tmp_path) not in page.source


@pytest.mark.parametrize("kept", FILES)
def test_any_file_alone_is_enough_for_a_page(tmp_path: Path, kept: str) -> None:
    folder = make_run(tmp_path / "run", steps=5)
    for name in set(FILES) - {kept}:
        (folder / name).unlink()
    assert "How it was done" in words(page_of(folder))


def test_strange_values_leave_a_page(tmp_path: Path) -> None:
    record = Record(RunFolder(tmp_path), 1)
    record.event("start", step=0, environment=[1], model="text", data={"train": [None]}, params="many", command=7)
    for step, loss in enumerate([math.inf, -1.0, None, "what", 1e300, True, 0.0]):
        record.metric(step=step, loss=loss, lr=None, grad_norm=-math.inf, tokens="x", seq_len=0)
    record.event("evaluation", step=1, val_bpb=None, val_loss="x")
    record.event("replan", step=3, total_steps=None, knots=[[0, 0.0]])
    record.close()
    write_result(RunFolder(tmp_path), {"status": 3, "phases": [1], "seconds": "x", "val_bpb": "low", "tokens": -1})
    (tmp_path / "recipe.toml").write_text('clip = 3\nschedule = "x"\n', encoding="utf-8")
    assert "Training loss" in words(page_of(tmp_path))


def test_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nothing' is not a run folder"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(RunError, match="No run folder was given"):
        write_report([])


def test_page_that_cannot_be_written_is_said_in_a_sentence(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(RunError, match="Could not write the report"):
        write_report([finished], tmp_path / "file" / "page.html")


def test_page_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2, finished=False)
    assert write_report([folder]) == folder / "report.html"
    assert write_report([folder], tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert (tmp_path / "new" / "page" / "loss.png").exists()
    assert write_report([folder], tmp_path / "folder") == tmp_path / "folder" / "report.html"


def test_clipping_that_never_acted_is_warned_of(tmp_path: Path) -> None:
    off = RECIPE.replace('name = "norm"\nmax_norm = 1.0', 'name = "none"')
    idle = make_run(tmp_path / "idle", steps=50, scale=0.01)
    busy = make_run(tmp_path / "busy", steps=50)
    without = make_run(tmp_path / "off", steps=50, recipe=off, max_norm=math.inf)
    said = [warnings(run) for run in read_runs([idle, busy, without])]
    assert said == [["clip enabled, acted on 0 of 50 steps: max_norm 1 was never reached."], [], []]
    assert "Clipping is off." in words(page_of(without))


def test_a_length_schedule_that_never_acted_is_warned_of(tmp_path: Path) -> None:
    growing = RECIPE + '\n[lengths]\nname = "linear"\nseq_len = {}\n'
    idle = make_run(tmp_path / "idle", steps=50, recipe=growing.format(256))
    busy = make_run(tmp_path / "busy", steps=50, recipe=growing.format(512))
    said = [warnings(run) for run in read_runs([idle, busy])]
    assert said == [["lengths=linear enabled, acted on 0 of 50 steps: every row had 256 tokens."], []]


def test_resumed_run_forgets_what_it_did_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=50)
    record = Record(RunFolder(folder), 2)
    record.event("resume", step=20)
    record.event("evaluation", step=22, val_bpb=1.5, val_loss=3.0)
    record.close()
    (run,) = read_runs([folder])
    steps, values = evaluations(run)
    assert list(steps) == [0, 5, 10, 15, 20, 22]
    assert values[-1] == 1.5
    assert run.status == "unfinished"


def test_plans_of_a_wall_clock_budget_are_listed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=30)
    record = Record(RunFolder(folder), 1)
    record.event("plan", step=0, total_steps=28, knots=[[0, 0.0], [28, 1.0]])
    record.event("replan", step=3, total_steps=30, knots=[[0, 0.0]], reason="0.3 s a step: 30 steps fit")
    record.close()
    said = words(page_of(folder))
    assert "0 28 first plan" in said
    assert "3 30 0.3 s a step: 30 steps fit" in said
    assert "planned again once" in said


def test_fp16_run_shows_its_loss_scale(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=30, recipe=RECIPE.replace("float32", "fp16"))
    assert "0 of 30 steps overflowed" in words(page_of(folder))
    assert (folder / "report" / "loss_scale.png").exists()


def test_several_runs_lie_over_each_other_with_their_differences(finished: Path, tmp_path: Path) -> None:
    slow = make_run(tmp_path / "slow", lr=0.001, recipe=RECIPE.replace("0.003", "0.001"), steps=100)
    said = words(page_of(finished, slow, out=tmp_path))
    assert "2 runs compared" in said
    assert "optimizer.lr 0.003 0.001" in said
    assert "python-nano has the lowest held-out figure" in said
    assert "schedule.name" not in said[: said.index("Curves")]


def seeded(folder: Path, seed: int, recipe: str = RECIPE, **settings: Any) -> Path:
    return make_run(folder, seed=seed, recipe=recipe.replace("seed = 0", f"seed = {seed}"), steps=40, **settings)


def test_runs_that_differ_only_in_the_seed_are_one_curve_with_a_band(tmp_path: Path) -> None:
    folders = [seeded(tmp_path / f"muon-s{seed}-{seed}a", seed) for seed in range(3)]
    other = seeded(tmp_path / "slow", 0, RECIPE.replace("0.003", "0.001"), lr=0.001)
    runs = read_runs([folders[0], other, *folders[1:]])
    assert [group.label for group in groups(runs)] == ["muon, 3 seeds", "slow"]
    loss = next(chart for chart in comparison_charts(runs) if chart.name == "loss")
    assert [(curve.label, curve.kind) for curve in loss.curves] == [
        ("", "band"), ("muon, 3 seeds", "line"), ("slow", "line"),
    ]  # fmt: skip
    said = words(page_of(folders[0], other, *folders[1:], out=tmp_path))
    assert "Bands reach from the lowest to the highest seed." in said
    assert "muon, 3 seeds" in said


def test_repeats_of_a_seed_and_runs_without_a_recipe_stay_apart(tmp_path: Path) -> None:
    twice = [seeded(tmp_path / name, 1) for name in ("a", "b")]
    bare = [seeded(tmp_path / name, seed) for seed, name in enumerate(("c", "d"))]
    for folder in bare:
        (folder / "recipe.toml").unlink()
    assert [group.label for group in groups(read_runs([*twice, *bare]))] == ["a", "b", "c", "d"]


def test_label_of_a_line_steps_aside_for_a_curve() -> None:
    def label_height(value: float) -> float:
        curve = Curve("", np.array([0.0, 50.0, 100.0]), np.array([4.0, value, value]))
        svg = draw(Chart("c", "Title", "", "", [curve], references=[("xz", 2.0)], from_zero=True))
        return float(re.search(r'y="([0-9.]+)"[^>]*>xz 2<', svg)[1])

    assert label_height(1.0) == label_height(1.9) == label_height(3.0) < label_height(2.1)


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "run", steps=2) for parent in ("a", "b")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run", "a/run (2)"]


def test_more_runs_than_colours_can_be_drawn(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"run-{i}", steps=4, seed=i) for i in range(10)]
    assert "10 runs compared" in words(page_of(*folders))


def test_long_run_is_drawn_as_groups_and_says_so(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "long", steps=5000))
    assert "5,000 steps are drawn as 360 groups of about 14." in words(page)
    assert "lowest to highest of 14 steps" in words(page)
    assert len(page.source) < 400_000


@pytest.mark.parametrize("place", [0, 1, 5_000, 9_999])
def test_thinning_keeps_every_spike(place: int) -> None:
    values = np.ones(10_000)
    values[place] = 77.0
    thinned = thin(np.arange(10_000.0), values)
    assert len(thinned.x) == 360
    assert np.nanmax(thinned.high) == 77.0
    assert np.nanmin(thinned.low) == 1.0


def test_thinning_leaves_short_series_alone_and_gaps_as_gaps() -> None:
    assert thin(np.arange(720.0), np.ones(720)).low is None
    assert len(thin(np.arange(721.0), np.ones(721)).x) == 360
    broken = thin(np.arange(7200.0), np.where(np.arange(7200) < 3600, 1.0, np.inf))
    assert np.isfinite(broken.mean).sum() == 180


def test_smoothing_keeps_lines_and_gaps() -> None:
    falling = np.arange(50.0)[::-1]
    assert np.allclose(smooth(falling, 7)[:-3], falling[:-3])
    assert np.isnan(smooth(np.array([1.0, np.nan, 3.0, 4.0]), 3)[1])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome executable on this machine")


def browse(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """Open a page in headless Chromium and return its elements and what was said on the console."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--enable-logging=stderr", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--no-first-run", *options, "--dump-dom", page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8", check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@needs_chromium
def test_browser_shows_the_page_without_complaint(finished: Path, tmp_path: Path) -> None:
    elements, console = browse(write_report([finished]), tmp_path / "profile")
    assert "nano on python" in elements
    assert "1.232" in elements
    assert console == ""


@needs_chromium
def test_page_fits_a_phone_with_everything_unfolded(finished: Path, tmp_path: Path) -> None:
    long_name = make_run(tmp_path / ("a-run-with-quite-a-name" * 5), steps=20, sample="x" * 3000, seed=1)
    pages = [
        write_report([finished], tmp_path / "one.html"),
        write_report([long_name], tmp_path / "long.html"),
        write_report([finished, long_name], tmp_path / "two.html"),
    ]
    frame = '<iframe width="360" height="700" style="border:0" srcdoc="{}"></iframe>'
    frames = "".join(frame.format(html.escape(page.read_text(encoding="utf-8"))) for page in pages)
    script = """
        const excess = [...document.querySelectorAll("iframe")].map((frame) => {
            const page = frame.contentDocument;
            page.querySelectorAll("details").forEach((part) => { part.open = true; });
            return page.documentElement.scrollWidth - page.documentElement.clientWidth;
        });
        document.body.innerHTML = "excess: " + excess.join(", ") + ".";
    """
    holder = tmp_path / "phone.html"
    holder.write_text(f"<body>{frames}<script>onload = () => {{{script}}}</script></body>", encoding="utf-8")
    elements, _ = browse(holder, tmp_path / "profile")
    assert "excess: 0, 0, 0." in elements

"""Text that drives a terminal, turns the direction of writing or is markup: shown as what it is, never obeyed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_run import START, Page, make_run
from fake_study import FakeArm, make_study
from rich.console import Console

from hasten.cli import main
from hasten.cli.display import Display
from hasten.comparison.study import Arm, Study
from hasten.errors import DataError, RecipeError, RunError, printable
from hasten.recipe import resolve
from hasten.record import Record, RunFolder
from hasten.report import page as run_page
from hasten.report import study_page, write_report
from hasten.report.render import render
from hasten.report.runs import read_runs
from hasten.report.study import read_study
from hasten.report.trajectories import read_trajectories

NASTY = {
    "a colour": "\x1b[31mred\x1b[0m",
    "a cleared screen": "\x1b[2J\x1b[H",
    "a window title": "\x1b]0;pwned\x07",
    "a hyperlink": "\x1b]8;;http:evil\x1b\\click\x1b]8;;\x1b\\",
    "the clipboard": "\x1b]52;c;cm0gLXJmIC8K\x07",
    "a device string": "\x1bP$q q\x1b\\",
    "a one-byte code": "\x9b31m \x9d0;pwned\x9c \x90q\x9c",
    "a bell": "\x07\x07",
    "backspaces": "safe\x08\x08\x08\x08evil",
    "a carriage return": "error\rall is well",
    "a form feed and a vertical tab": "a\x0cb\x0bc",
    "a delete": "a\x7fb",
    "a next line": "a\x85b",
    "a line separator": "a\u2028b",
    "a paragraph separator": "a\u2029b",
    "an override of direction": "\u202egnp.exe",
    "isolates of direction": "\u2066a\u2067b\u2068c\u2069",
    "marks of direction": "\u200ea\u200fb\u061cc",
    "an embedding": "\u202aa\u202bb\u202cc\u202dd",
    "shifts": "\x0e\x0f\x05",
    "markup of a terminal": "[bold red]loud[/] [link=http:evil]click[/link] :skull:",
    "a script": "<script>alert(1)",
    "an image": '"><img src=x onerror=alert(1)>',
    "a template": "{{ 7 * 7 }}{% raw %}${7*7}",
    "a comment": "--><!-- ]]> </style",
}
every_nasty = pytest.mark.parametrize("what", NASTY)


def drives(text: str) -> str:
    """Return what of `text` would drive a terminal."""
    return "".join(character for character in text if printable(character) != character)


def is_inert(page: Path | str) -> bool:
    """Say whether a page is whole, fetches nothing, runs nothing and has no character that turns or hides others."""
    path = page if isinstance(page, Path) else Path("inert.html")
    if isinstance(page, str):
        path.write_text(page, encoding="utf-8")
    read = Page(path)
    return read.faults == [] and drives(read.source) == ""


@every_nasty
def test_the_terminal_shows_what_a_run_says_and_obeys_nothing(what: str) -> None:
    nasty, out = NASTY[what], io.StringIO()
    result = SimpleNamespace(
        folder=Path(f"runs/{nasty}"), reason=nasty, status="diverged", already_finished=False,
        values={"steps": 3, "total_steps": 9, "val_bpb": 2.0},
    )  # fmt: skip
    with Display() as display:
        markup_is_off = display.console._markup is False
        display.console = Console(file=out, highlight=False, soft_wrap=True, markup=False, emoji=False, width=200)
        for kind, values in (
            ("note", {"message": nasty}),
            ("warning", {"message": nasty}),
            ("sample", {"text": nasty}),
            ("branch", {"run": nasty, "run_step": 3}),
            ("compile", {"on": False, "reason": "no compiler"}),
        ):
            display(SimpleNamespace(kind=kind, step=1, values=values))
        display.finished(result, Path(f"runs/{nasty}/report.html"))
        display.stopped(result)
        display.paused(result)
        display.dry(resolve(None, [f"data={nasty}.txt"]).recipe)
    assert drives(out.getvalue()) == ""
    assert printable(nasty) in out.getvalue().replace("\n", "") or what == "a comment"
    assert markup_is_off


@every_nasty
def test_names_of_runs_are_listed_as_they_are(own_folder: Path, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    nasty = NASTY[what].replace("/", "")
    make_run(own_folder / "runs" / f"x{nasty}", steps=1)
    (own_folder / "runs" / f"x{nasty}" / "result.json").write_text(json.dumps({"status": NASTY[what], "steps": "many"}))
    with pytest.raises(SystemExit) as ended:
        main(["runs", "runs"])
    assert ended.value.code == 0
    said = capfd.readouterr().out
    assert drives(said) == ""
    assert "x" in said


@every_nasty
def test_a_message_about_it_is_one_plain_line(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    nasty = NASTY[what]
    for arguments in (
        ["train", f"data={nasty}x"],
        ["train", f"x{nasty}=1"],
        ["report", f"runs/{nasty}"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        said = capfd.readouterr().err
        assert drives(said) == ""
        assert said.count("\n") == 1
    for kind in (RecipeError, DataError, RunError):
        assert drives(str(kind(f"{nasty}\n{nasty}"))) == ""
        assert "\n" not in str(kind(f"{nasty}\n{nasty}"))


@every_nasty
def test_the_record_is_plain_text_and_gives_it_back(own_folder: Path, what: str) -> None:
    from hasten.record import read_events

    record = Record(RunFolder(own_folder), 1)
    record.event("sample", step=1, text=NASTY[what], prompt=NASTY[what])
    record.close()
    assert drives((own_folder / "events.jsonl").read_text()) == ""
    assert read_events(RunFolder(own_folder))[0]["text"] == NASTY[what]


@every_nasty
def test_a_report_of_a_run_shows_it_and_runs_nothing(own_folder: Path, what: str) -> None:
    nasty = NASTY[what]
    start = {**START, "command": nasty, "data": {"corpus": nasty, "counts": {nasty: 1}}, "environment": {"cpu": nasty}}
    folder = make_run(own_folder / f"run{nasty.replace('/', '')}", steps=3, start=start, sample=nasty)
    other = make_run(own_folder / f"other{nasty.replace('/', '')}", steps=3, start=start, sample=nasty)
    one = render("page.html", {"charts": [], **run_page._one(read_runs([folder])[0])})
    both = render("page.html", {"charts": [], **run_page._several(read_runs([folder, other]))})
    assert is_inert(one)
    assert is_inert(both)
    shown = Page(Path("inert.html"))
    assert printable(nasty) in shown.text


@every_nasty
def test_a_report_of_a_study_shows_it_and_runs_nothing(own_folder: Path, what: str) -> None:
    nasty = NASTY[what]
    arms = (FakeArm(f"arm {nasty}", "pays", -0.05, {nasty: nasty}, reason=nasty), FakeArm("plain", "none"))
    folder = make_study(own_folder / "study", arms, seeds=2, evaluations=3, lines=3, name=nasty, answer=nasty)
    study = read_study(folder)
    values = study_page._values(study, read_trajectories(study, folder))
    tables = {name: make(study) for name, make in study_page.TABLES.items()}
    shown = [(name, tables[name]) for name in ("table.md", "table.tex")]
    assert is_inert(render("study.html", values | {"forest": "", "forest_caption": "", "charts": [], "tables": shown}))
    assert drives("".join(tables.values()).replace("\r\n", "\n")) == ""


def test_everything_at_once_is_inert_in_the_whole_page_with_its_pictures(own_folder: Path) -> None:
    nasty = " ".join(NASTY.values())
    start = {**START, "command": nasty, "data": {"corpus": nasty, "counts": {nasty: 1}}}
    folders = [make_run(own_folder / f"{name}<script>&'\"\u202e", steps=5, start=start, sample=nasty) for name in "ab"]
    assert is_inert(write_report(folders, own_folder / "both.html"))
    arms = (FakeArm(f"arm {nasty}", "pays", -0.05, {"lr": nasty}, reason=nasty), FakeArm("<script>alert(1)", "none"))
    assert is_inert(write_report([make_study(own_folder / "study", arms, seeds=2, evaluations=3, lines=3)]))


def test_a_plan_shows_the_name_of_a_text_and_runs_nothing(
    own_folder: Path, library_text: str, tiny: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    name = '"><img src=x onerror=alert(1)><script>\x1b[31m\u202e{{ 7 * 7 }}'
    (own_folder / f"{name}.txt").write_text(library_text[:20_000])
    with pytest.raises(SystemExit) as ended:
        main(["plan", f"data={name}.txt", *tiny, "budget=20", "--quick", "--page", "plan.html"])
    assert ended.value.code == 0
    assert drives(capfd.readouterr().out) == ""
    assert is_inert(own_folder / "plan.html")
    assert printable(name) in Page(own_folder / "plan.html").text


@every_nasty
def test_an_arm_is_never_called_that(what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Study(resolve(None, ["data=x.txt"]).recipe, (Arm(NASTY[what], ("lr=0.1",)),))
    assert drives(str(caught.value)) == ""

"""The page about a study, with its tables and pictures beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hasten.errors import RunError, printable
from hasten.files import create_text
from hasten.report import paper, verdicts
from hasten.report.figures import draw
from hasten.report.forest import draw_forest, forest
from hasten.report.render import place_of, render, shown_charts
from hasten.report.study import Arm, Study, read_study
from hasten.report.study_charts import BY_TIME, CURVES, study_curves
from hasten.report.trajectories import Trajectories, read_trajectories

TABLES: dict[str, Callable[[Study], str]] = {
    "table.md": paper.markdown,
    "table.tex": paper.latex,
    "table.csv": paper.raw,
}
PICTURES = ("forest", CURVES, BY_TIME)


def write_study_report(folder: Path, out: Path | None = None) -> Path:
    """Write what a study found as one offline HTML page, with tables and pictures beside it; return the page's path.

    Beside the page: ``table.md``, ``table.tex`` (booktabs) and ``table.csv`` (raw numbers), ``forest.png``,
    ``curves.png`` (by tokens) and ``curves_time.png``. Of the runs only events are read, so 200 runs take seconds.

    Args:
        folder: a study that ``hasten compare`` wrote; one that still goes on is welcome.
        out: the page (``*.html``) or a folder for it; ``report.html`` in the study by default.

    Raises:
        RunError: the folder has no ``verdicts.json`` that can be read, or the page cannot be written.

    Example:
        ``write_study_report(Path("studies/muon"))``
    """
    folder = Path(folder)
    study = read_study(folder)
    trajectories = read_trajectories(study, folder)
    page = place_of(folder if out is None else Path(out))
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for name in PICTURES:  # of an earlier report: a picture that no longer holds would tell a lie
            page.with_name(f"{name}.png").unlink(missing_ok=True)
        curves = study_curves(study, trajectories)
        charts = [(chart, draw(chart, page.with_name(f"{chart.name}.png"))) for chart in curves]
        plot = forest(study)
        svg = "" if plot is None else draw_forest(plot, page.with_name("forest.png"))
        tables = {name: make(study) for name, make in TABLES.items()}
        for name, text in tables.items():
            _replace(page.with_name(name), text)
        values = _values(study, trajectories) | {
            "forest": Markup(svg),
            "forest_caption": plot.caption if plot else "",
            "charts": shown_charts(charts),
            "tables": [(name, tables[name]) for name in ("table.md", "table.tex")],
        }
        _replace(page, render("study.html", values))
    except OSError as error:
        raise RunError(
            f"Could not write the report {printable(str(page))}: {error.strerror}; give another place with --out."
        ) from error
    return page


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    with create_text(partial) as file:
        file.write(text)
    os.replace(partial, path)


def _values(study: Study, trajectories: Trajectories) -> dict[str, Any]:
    # The first sentence is large, what follows it is not, so that the table stays on the first screen.
    answer = re.split(r"(?<=[.!?])\s+(?=[A-Z])", study.answer or "There is no answer yet.", maxsplit=1)
    return {
        "heading": study.name,
        "names": [study.name],
        "answer": answer[0],
        "answer_rest": "".join(answer[1:]),
        "summary": _summary(study),
        "notices": verdicts.notices(study, trajectories),
        "rows": verdicts.answer_rows(study),
        "base": study.base.name,
        "level": verdicts.plain_percent(study.level),
        "arms": [_details(arm, study) for arm in study.everyone],
        "tuning": verdicts.tuning_rows(study),
        "tuning_cost": _tuning_cost(study),
        "method": verdicts.method_facts(study),
    }


def _summary(study: Study) -> str:
    arms = [arm for arm in study.arms if arm.verdict == "pays"]
    tried = f"{verdicts.counted(len(study.arms), 'arm')} against {study.base.name}"
    pay = f"{len(arms)} {'pays' if len(arms) == 1 else 'pay'}"
    return f"{tried}: {pay}. {verdicts.budget(study) or 'The same budget'} for every run."


def _tuning_cost(study: Study) -> str:
    tuning = study.tuning
    if tuning is None:
        return ""
    seed = "" if tuning.seed is None else f", on seed {tuning.seed}, which no comparison uses"
    return (
        f"{verdicts.number(tuning.tries)} learning rates were tried for every arm{seed}. "
        f"This cost {verdicts.seconds(tuning.cost_seconds)} on top."
    )


def _details(arm: Arm, study: Study) -> dict[str, Any]:
    said = verdicts.verdict(arm, study)
    shares, ladder = verdicts.ladder_table(arm, study)
    return {
        "name": arm.name,
        "against": arm.against,
        "verdict": arm.verdict,
        "word": said.word,
        "meaning": said.meaning,
        "reason": arm.reason,
        "changes": [(key, verdicts.setting(value)) for key, value in arm.changes.items()],
        "corrected": "" if arm.p is None else verdicts.p_value(arm.p),
        "effects": verdicts.effect_rows(arm),
        "runs": verdicts.run_rows(arm),
        "shares": shares,
        "ladder": ladder,
    }

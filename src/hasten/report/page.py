"""The page about runs: reads them, has the charts drawn, and puts everything into one HTML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.errors import RunError, printable
from hasten.files import create_text
from hasten.report import tables
from hasten.report.charts import CHART_NAMES, run_charts
from hasten.report.figures import draw
from hasten.report.overlays import comparison_charts
from hasten.report.proof import proven_facts
from hasten.report.render import place_of, render, shown_charts
from hasten.report.runs import Run, read_runs
from hasten.report.study import is_study
from hasten.report.study_page import write_study_report


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one offline HTML page about `runs`, with a PNG of every chart beside it, and return its path.

    Runs whose recipes differ in nothing but the seed share one curve with a band. One study instead of runs gives the
    page of `write_study_report`.

    Args:
        runs: run folders; several are laid over each other. Runs that go on, diverged or broke off are welcome. Or one
            study that ``hasten compare`` wrote.
        out: the page (``*.html``) or a folder for it; ``report.html`` in the first run folder by default. The
            pictures go into a folder named like the page (``report/loss.png``, ...).

    Raises:
        RunError: a path is no run folder, a study is not given alone, or the page cannot be written.

    Example:
        ``write_report([Path("runs/first"), Path("runs/second")], Path("compared.html"))``
    """
    runs = [Path(folder) for folder in runs]
    studies = [folder for folder in runs if is_study(folder)]
    if studies and len(runs) > 1:
        raise RunError(
            f"{printable(str(studies[0]))!r} is a study, and {len(runs)} folders were given; give one study alone, or "
            "runs, such as those in its runs folder."
        )
    if studies:
        return write_study_report(studies[0], out)
    read = read_runs(runs)
    charts = run_charts(read[0]) if len(read) == 1 else comparison_charts(read)
    page = place_of(runs[0] if out is None else Path(out))
    pictures = page.with_suffix("")
    if pictures.is_symlink():
        raise RunError(
            f"{printable(str(pictures))} is a link, and pictures are written beside their page only: delete it, or "
            "give another place with --out."
        )
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for name in CHART_NAMES:  # of an earlier report: a picture that no longer holds would tell a lie
            (pictures / f"{name}.png").unlink(missing_ok=True)
        drawn = [(chart, draw(chart, pictures / f"{chart.name}.png")) for chart in charts]
        partial = page.with_name(f"{page.name}.tmp")
        values = {"charts": shown_charts(drawn), **(_one(read[0]) if len(read) == 1 else _several(read))}
        with create_text(partial) as file:
            file.write(render("page.html", values))
        os.replace(partial, page)
    except OSError as error:
        raise RunError(
            f"Could not write the report {printable(str(page))}: {error.strerror}; give another place with --out."
        ) from error
    return page


def _one(run: Run) -> dict[str, Any]:
    return {
        "heading": tables.title(run),
        "names": [run.name],
        "status": run.status,
        "status_words": tables.status_words(run),
        "verdict": tables.verdict(run),
        "bars": tables.bars([run]),
        "figures": tables.key_figures(run),
        "results": [],
        "differences": [],
        "runs": [_details(run)],
    }


def _several(runs: Sequence[Run]) -> dict[str, Any]:
    results = tables.results_table(runs)
    best = next((row for row in results if row["is_best"]), None)
    return {
        "heading": f"{len(runs)} runs compared",
        "names": [run.name for run in runs],
        "status": "",
        "status_words": "",
        "verdict": f"{best['name']} has the lowest held-out figure: {best['bpb']} bits per byte." if best else "",
        "bars": tables.bars(runs),
        "figures": [],
        "results": results,
        "differences": tables.differences(runs),
        "runs": [_details(run) for run in runs],
    }


def _details(run: Run) -> dict[str, Any]:
    start = run.latest("start")
    return {
        "name": run.name,
        "warnings": tables.warnings(run),
        "time_spent": tables.time_spent(run),
        "proof": proven_facts(run),
        "samples": tables.samples(run),
        "data": tables.data_facts(run),
        "model": tables.model_facts(run),
        "environment": tables.environment_facts(run),
        "replans": tables.replans(run),
        "compilation": tables.compilation(run),
        "happenings": tables.happenings(run),
        "command": str(start.get("command") or ""),
        "resumed": len(run.of_kind("resume")),
        "recipe": run.recipe_text,
    }

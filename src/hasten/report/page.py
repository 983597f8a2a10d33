"""The page: reads the runs, has the charts drawn, and puts everything into one HTML file."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import hasten
from hasten.errors import RunError, printable
from hasten.report import tables
from hasten.report.charts import CHART_NAMES, Chart, comparison_charts, run_charts
from hasten.report.figures import draw
from hasten.report.runs import Run, read_runs


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one offline HTML page about `runs`, with a PNG of every chart beside it, and return its path.

    Args:
        runs: run folders; several are laid over each other. Runs that go on, diverged or broke off are welcome.
        out: the page (``*.html``) or a folder for it; ``report.html`` in the first run folder by default. The
            pictures go into a folder named like the page (``report/loss.png``, ...).

    Raises:
        RunError: a path is no run folder, or the page cannot be written.

    Example:
        ``write_report([Path("runs/first"), Path("runs/second")], Path("compared.html"))``
    """
    read = read_runs(runs)
    charts = run_charts(read[0]) if len(read) == 1 else comparison_charts(read)
    out = Path(runs[0]) if out is None else Path(out)
    page = out if out.suffix.lower() in (".html", ".htm") else out / "report.html"
    pictures = page.with_suffix("")
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for name in CHART_NAMES:  # of an earlier report: a picture that no longer holds would tell a lie
            (pictures / f"{name}.png").unlink(missing_ok=True)
        drawn = [(chart, draw(chart, pictures / f"{chart.name}.png")) for chart in charts]
        partial = page.with_name(f"{page.name}.tmp")
        partial.write_text(_html(read, drawn), encoding="utf-8", newline="\n")
        os.replace(partial, page)
    except OSError as error:
        raise RunError(
            f"Could not write the report {printable(str(page))}: {error.strerror}; give another place with --out."
        ) from error
    return page


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever a run wrote is shown, never obeyed: control characters and turned writing become visible.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    return environment.from_string(_own_file("page.html"))


def _own_file(name: str) -> str:
    return resources.files("hasten.report").joinpath(name).read_text(encoding="utf-8")


def _html(runs: Sequence[Run], drawn: Sequence[tuple[Chart, str]]) -> str:
    return _template().render(
        style=Markup(_own_file("style.css")),
        version=hasten.__version__,
        charts=[
            {
                "name": chart.name,
                "title": chart.title,
                "unit": chart.unit,
                "caption": chart.caption,
                "legend": _legend(chart),
                "svg": Markup(svg),
            }
            for chart, svg in drawn
        ],
        **(_one(runs[0]) if len(runs) == 1 else _several(runs)),
    )


def _legend(chart: Chart) -> list[Any]:
    named = [curve for curve in chart.curves if curve.label]
    return named if len(named) > 1 else []


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

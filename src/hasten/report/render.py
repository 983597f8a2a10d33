"""Templates to pages: everything that comes out of a file is escaped on its way."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import hasten
from hasten.errors import printable
from hasten.report.charts import Chart


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return the page that one of our templates makes of `values`."""
    page = _environment().get_template(template)
    return page.render(style=Markup(_own_file("style.css")), version=hasten.__version__, **values)


def place_of(out: Path) -> Path:
    """Return the path of the page that is asked for by its name or by its folder."""
    return out if out.suffix.lower() in (".html", ".htm") else out / "report.html"


def shown_charts(drawn: Sequence[tuple[Chart, str]]) -> list[dict[str, Any]]:
    """Return charts and their pictures as the templates want them."""
    return [
        {
            "name": chart.name,
            "title": chart.title,
            "unit": chart.unit,
            "caption": chart.caption,
            "legend": _legend(chart),
            "svg": Markup(svg),
        }
        for chart, svg in drawn
    ]


def _legend(chart: Chart) -> list[Any]:
    named = [curve for curve in chart.curves if curve.label]
    return named if len(named) > 1 else []


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_own_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever a run wrote is shown, never obeyed: control characters and turned writing become visible.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )


def _own_file(name: str) -> str:
    return resources.files("hasten.report").joinpath(name).read_text(encoding="utf-8")

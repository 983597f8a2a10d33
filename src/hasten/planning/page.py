"""A plan as one offline HTML page."""

from __future__ import annotations

import os
import tempfile
from importlib import resources
from pathlib import Path

from hasten.errors import RunError, printable
from hasten.files import create_text
from hasten.planning.picture import draw
from hasten.planning.plans import Plan
from hasten.planning.wording import headline, sections


def write_page(plan: Plan, out: Path) -> Path:
    """Write a plan as one page that needs nothing else, and return its path.

    Args:
        plan: of a run.
        out: the page, ``*.html``, or a folder for it.

    Raises:
        RunError: it cannot be written.
    """
    import jinja2

    out = Path(out)
    page = out if out.suffix.lower() in (".html", ".htm") else out / "plan.html"
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    text = resources.files("hasten.planning").joinpath("plan.html").read_text(encoding="utf-8")
    told = [(title, lines) for title, lines in sections(plan) if lines]
    html = environment.from_string(text).render(
        headline=headline(plan), sections=told, plan=plan, picture=_picture(plan), settings=_settings(plan)
    )
    partial = page.with_name(f"{page.name}.tmp")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        with create_text(partial) as file:
            file.write(html)
        os.replace(partial, page)
    except OSError as error:
        raise RunError(
            f"Could not write the page {printable(str(page))}: {error.strerror}; give another --page."
        ) from error
    return page


def _picture(plan: Plan) -> str:
    """Return the curves as an SVG element; empty where there are none."""
    if not plan.curves:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        svg = draw(plan.curves, Path(folder) / "curves.svg").read_text(encoding="utf-8")
    return svg[svg.index("<svg") :]


def _settings(plan: Plan) -> list[tuple[str, str]]:
    """Return every setting of the recipe with its full name."""
    found = []
    for key, value in plan.recipe.items():
        table = value.items() if isinstance(value, dict) else [("", value)]
        found += [(f"{key}.{name}".rstrip("."), str(inner)) for name, inner in table if inner is not None]
    return found

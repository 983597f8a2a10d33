"""``hasten report``: one offline page about one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN ...", help="Run folders; several are laid over each other.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the page.", show_default="RUN/report.html")
    ] = None,
) -> int:
    """Write an offline HTML page (and PNG pictures) about one run or several.

    \b
    hasten report runs/python-nano-1a2b3c4d
    hasten report runs/a runs/b --out compared.html
    """
    from hasten.report import write_report

    typer.echo(write_report(runs, out))
    return 0

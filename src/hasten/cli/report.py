"""``hasten report``: one offline page about a run, several runs, or a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN ... | STUDY", help="Run folders, laid over each other; or the folder of a study."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the page.", show_default="RUN/report.html")
    ] = None,
) -> int:
    """Write an offline HTML page (and PNG pictures) about one run, several, or a study.

    Runs that differ only in the seed become one curve with a band. A study also gets tables to paste into a paper.

    \b
    hasten report runs/python-nano-1a2b3c4d
    hasten report runs/a runs/b --out compared.html
    hasten report studies/muon
    """
    from hasten.errors import printable
    from hasten.report import write_report

    typer.echo(printable(str(write_report(runs, out))))
    return 0

"""``hasten runs``: what run folders there are, and cleaning them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds run folders.")] = Path("runs"),
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="NAME", help="Delete this run folder whole.")
    ] = None,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Delete the checkpoints of finished runs; models and records stay."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")] = False,
) -> int:
    """List run folders, and delete what is not needed any more.

    \b
    hasten runs                        list ./runs
    hasten runs --prune                free the checkpoints of finished runs
    hasten runs --remove NAME          delete a run
    """
    from hasten.cli.display import size
    from hasten.errors import printable

    found = find_runs(folder)
    if remove or prune:
        doomed = _named(folder, found, remove) if remove else _finished_checkpoints(found)
        freed = sum(folder_bytes(path) for path in doomed)
        if not doomed:
            typer.echo("Nothing to delete.")
            return 0
        for path in doomed:
            typer.echo(f"{printable(str(path))}  {size(folder_bytes(path))}")
        if not yes and not typer.confirm(f"Delete these, {size(freed)} in all?"):
            return 0
        for path in doomed:
            if path.is_symlink():  # the link goes, and not what somebody else keeps elsewhere
                path.unlink()
            else:
                shutil.rmtree(path)
        typer.echo(f"Deleted; {size(freed)} freed.")
        return 0
    _print_table(folder, found)
    return 0


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders directly below `folder` (or `folder` itself if it is one), oldest first.

    Raises:
        RunError: there is no such folder.
    """
    from hasten.errors import RunError, printable

    if not folder.is_dir():
        raise RunError(f"There is no folder {printable(str(folder))}; `hasten train` makes one.")
    if (folder / "recipe.toml").is_file():
        return [folder]
    found = [path for path in folder.iterdir() if (path / "recipe.toml").is_file()]
    return sorted(found, key=lambda path: ((path / "recipe.toml").stat().st_mtime, path.name))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below `folder`; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _named(folder: Path, found: list[Path], names: list[str]) -> list[Path]:
    from hasten.errors import RunError, nearest, printable

    known = {path.name: path for path in found}
    for name in names:
        if name not in known:
            raise RunError(f"{printable(str(folder))} holds no run named {printable(name)!r}{nearest(name, known)}.")
    return [known[name] for name in names]


def _finished_checkpoints(found: list[Path]) -> list[Path]:
    return [
        path / "checkpoints"
        for path in found
        if _result(path).get("status") == "finished" and (path / "checkpoints").is_dir()
    ]


def _result(path: Path) -> dict[str, Any]:
    from hasten.errors import RunError
    from hasten.record import RunFolder, read_result

    try:
        return read_result(RunFolder(path)) or {"status": "unfinished"}
    except RunError:  # the others are listed all the same
        return {"status": "damaged"}


def _told(result: dict[str, Any], key: str, say: Callable[[float], str]) -> str:
    """Return a number of a result as text; nothing where there is none, whoever wrote the file."""
    value = result.get(key)
    return say(value) if type(value) in (int, float) and math.isfinite(value) else ""


def _print_table(folder: Path, found: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hasten.cli.display import count, duration, size
    from hasten.errors import one_line, printable

    console = Console(highlight=False, markup=False, emoji=False)
    if not found:
        console.print(f"No runs in {printable(str(folder))}.", markup=False)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("run", "status"):
        table.add_column(heading)
    for heading in ("bits per byte", "steps", "tokens", "time", "on disk"):
        table.add_column(heading, justify="right")
    for path in found:
        result = _result(path)
        table.add_row(
            one_line(path.name, 255),
            one_line(str(result.get("status", "unknown")), 20),
            _told(result, "val_bpb", "{:.3f}".format),
            _told(result, "steps", "{:,}".format),
            _told(result, "tokens", count),
            _told(result, "seconds", duration),
            size(folder_bytes(path)),
        )
    console.print(table)

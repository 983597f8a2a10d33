"""``hasten plan``: what a recipe will do, before it is paid for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.toml] [KEY=VALUE ...]",
            help="A recipe (a TOML file, a run folder or the name of a built-in one) and settings that override it.",
        ),
    ] = None,
    curves: Annotated[bool, typer.Option("--curves", help="Draw the schedules over the run.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the curves to this picture as well (.png or .svg).", show_default=False),
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="'KEY=VALUE ...'", help="Draw the recipe with these settings too; repeatable."),
    ] = None,
) -> int:
    """Show the steps, the rates and the lengths of a run without training, and draw its schedules.

    \b
    hasten plan budget=20Mtok
    hasten plan schedule=wsd --curves
    hasten plan budget=1000 --curves --with schedule=linear --with schedule=sqrt --out curves.png
    """
    from rich.console import Console

    from hasten.cli import DONE
    from hasten.cli.train import split_arguments
    from hasten.errors import printable
    from hasten.planning import curves as curves_of
    from hasten.planning import draw
    from hasten.recipe import resolve

    source, settings = split_arguments(arguments or [])
    resolved = resolve(source, settings)
    recipes = [(resolved.recipe.schedule.name, resolved.recipe)]
    recipes += [_changed(resolved.recipe, text) for text in others or []]
    is_drawn = curves or out is not None or bool(others)
    found = [curve for label, recipe in recipes for curve in curves_of(recipe, label=label)] if is_drawn else []
    picture = None if out is None else draw(found, out)

    console = Console(highlight=False, soft_wrap=True)
    for note in resolved.notes:
        console.print(f"  {printable(note)}", style="dim", markup=False)
    _print_facts(console, resolved.recipe)
    if is_drawn:
        _print_curves(console, found)
    if picture is not None:
        console.print(printable(str(picture)), markup=False)
    return DONE


def _changed(recipe: Any, text: str) -> tuple[str, Any]:
    """Return a label and the recipe that `recipe` is with the settings in `text`."""
    from hasten.errors import RecipeError, printable
    from hasten.recipe import resolve

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RecipeError(
            f"--with {printable(text)!r} cannot be read ({error}): write --with 'KEY=VALUE ...'."
        ) from None
    label = words[0].removeprefix("schedule=") if len(words) == 1 else text
    return label, resolve(recipe, words).recipe


def _print_facts(console: Any, recipe: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from hasten.errors import printable
    from hasten.planning import facts

    said, doubts = facts(recipe)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in said:
        table.add_row(Text(name), Text(printable(value)))
    console.print(table)
    for doubt in doubts:
        console.print(Text(f"! {printable(doubt)}", style="yellow"))


def _print_curves(console: Any, found: list[Any]) -> None:
    """Print a chart for every quantity that changes: braille in colour, letters where either cannot be shown."""
    from rich.text import Text

    from hasten.errors import printable
    from hasten.planning import chart
    from hasten.planning.picture import PALETTE, panels_of
    from hasten.planning.terminal import LETTERS

    panels = panels_of(found)
    has_colour = console.is_terminal and console.color_system is not None
    plain = not console.encoding.lower().startswith("utf") or (len(panels[0]) > 1 and not has_colour)
    for number, panel in enumerate(panels):
        console.print()
        heading = Text(panel[0].name, style="bold")
        for place, curve in enumerate(panel):
            if len(panel) > 1:
                mark = LETTERS[place % len(LETTERS)] if plain else "━"
                heading.append(f"   {mark} {printable(curve.label)}", style=f"not bold {PALETTE[place % len(PALETTE)]}")
        console.print(heading)
        width = min(console.width if console.is_terminal else 80, 100) - 1
        for line in chart(panel, panels, width=width, height=11 if number == 0 else 5, plain=plain):
            text = Text()
            for cell in line:
                text.append(cell.text, style=None if cell.curve is None else PALETTE[cell.curve % len(PALETTE)])
            console.print(text, no_wrap=True, overflow="crop", crop=True)

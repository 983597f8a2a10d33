"""``hasten plan``: what a recipe will do, before it is paid for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
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
    no_measure: Annotated[
        bool,
        typer.Option("--no-measure", "--quick", help="Time no steps: no speed, no time, memory as a lower bound."),
    ] = False,
    price: Annotated[
        str | None, typer.Option("--price", help="Of an hour of this machine: 2.5 or '2.50 EUR'.", show_default=False)
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Write the plan as an HTML page too.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
    curves: Annotated[
        bool, typer.Option("--curves", help="Only draw the schedules over the run; no text is read.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Only draw, and into this picture as well (.png or .svg).", show_default=False),
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="'KEY=VALUE ...'", help="Only draw, with these settings too; repeatable."),
    ] = None,
) -> int:
    """Say what a run will take before it is paid for: steps, time, memory, cost, and the mistakes in it.

    The text is prepared (and kept for the run) and ten real steps are timed, about 20 seconds.

    \b
    hasten plan data=my.txt budget=15min               everything, with real steps timed, and curves over tokens
    hasten plan recipe.toml --price "2.50 EUR" --page plan.html
    hasten plan budget=20Mtok --no-measure             without timing anything
    hasten plan schedule=wsd --curves                  the schedules alone, at once
    hasten plan budget=1000 --with schedule=linear --with schedule=sqrt --out curves.png
    """
    from hasten.cli.arguments import split_arguments
    from hasten.recipe import resolve

    source, settings = split_arguments(arguments or [])
    is_drawn = curves or out is not None or bool(others)
    if is_drawn:
        _refuse_beside_curves({"--page": page, "--price": price, "--json": as_json, "--no-measure": no_measure})
        return _draw(resolve(source, settings), out, others or [])
    return _plan(resolve(source, settings), no_measure, price, page, as_json)


def _refuse_beside_curves(given: dict[str, Any]) -> None:
    from hasten.errors import RecipeError

    for name, value in given.items():
        if value:
            raise RecipeError(f"{name} has no effect beside --curves, --out and --with, which only draw: leave it out.")


def _plan(resolved: Any, no_measure: bool, price: str | None, page: Path | None, as_json: bool) -> int:
    import json

    from rich.console import Console
    from rich.text import Text

    from hasten.cli import DONE, WRONG_INPUT
    from hasten.cli.display import describe_preparation
    from hasten.errors import printable
    from hasten.planning.page import write_page
    from hasten.planning.plans import plan_of

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    aside = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with aside.status("preparing") as status:

        def tell(progress: Any) -> None:
            status.update(f"preparing: {describe_preparation(progress)}")

        def begin() -> None:
            status.update("timing real steps, about 20 s")

        found = plan_of(
            resolved.recipe, resolved.notes, timed=not no_measure, price=price, on_progress=tell, on_trial=begin
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        _print_plan(console, found)
    if page is not None:
        path = write_page(found, page)
        (aside if as_json else console).print(Text(printable(str(path))))
    return WRONG_INPUT if found.has_errors else DONE


def _print_plan(console: Any, found: Any) -> None:
    from rich.text import Text

    from hasten.errors import printable
    from hasten.planning.wording import headline, sections

    for note in found.notes:
        console.print(Text(f"  {printable(note)}", style="dim"))
    console.print(Text(headline(found), style="bold"))
    for title, lines in sections(found):
        if lines:
            console.print(Text(f"\n{title}", style="bold"))
            _print_lines(console, [(f"  {name}", value) for name, value in lines])
        if title == "run" and found.curves:
            _print_curves(console, found.curves, is_compact=True)
    if found.answers:
        console.print(Text("\nworth it here?", style="bold"))
    for answer in found.answers:
        console.print(Text(f"  {printable(answer)}"))
    if found.findings:
        console.print()
    for finding in found.findings:
        style = "bold red" if finding.level == "error" else "yellow"
        mark = "x" if finding.level == "error" else "!"
        console.print(Text(f"{mark} {printable(finding.message)}", style=style))


def _print_lines(console: Any, lines: list[tuple[str, str]]) -> None:
    """Print names and what there is to say of them, in two columns."""
    from rich.table import Table
    from rich.text import Text

    from hasten.errors import printable

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(printable(name)), Text(printable(value)))
    console.print(table)


def _draw(resolved: Any, out: Path | None, others: list[str]) -> int:
    from rich.console import Console

    from hasten.cli import DONE
    from hasten.errors import printable
    from hasten.planning import curves as curves_of
    from hasten.planning import draw

    recipes = [(resolved.recipe.schedule.name, resolved.recipe)]
    recipes += [_changed(resolved.recipe, text) for text in others]
    found = [curve for label, recipe in recipes for curve in curves_of(recipe, label=label)]
    picture = None if out is None else draw(found, out)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for note in resolved.notes:
        console.print(f"  {printable(note)}", style="dim", markup=False)
    _print_facts(console, resolved.recipe)
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
    from rich.text import Text

    from hasten.errors import printable
    from hasten.planning import facts

    said, doubts = facts(recipe)
    _print_lines(console, said)
    for doubt in doubts:
        console.print(Text(f"! {printable(doubt)}", style="yellow"))


def _print_curves(console: Any, found: Sequence[Any], *, is_compact: bool = False) -> None:
    """Print a chart for every quantity that changes: braille in colour, letters where either cannot be shown.

    Args:
        found: the curves.
        is_compact: low charts over one axis, with its labels below the last of them.
    """
    from rich.text import Text

    from hasten.errors import printable
    from hasten.planning import chart
    from hasten.planning.picture import PALETTE, panels_of
    from hasten.planning.terminal import LETTERS

    panels = panels_of(found)
    has_colour = console.is_terminal and console.color_system is not None
    plain = not console.encoding.lower().startswith("utf") or (len(panels[0]) > 1 and not has_colour)
    tall, low = (5, 3) if is_compact else (11, 5)
    for number, panel in enumerate(panels):
        if not is_compact or number == 0:
            console.print()
        heading = Text(panel[0].name, style="bold")
        for place, curve in enumerate(panel):
            if len(panel) > 1:
                mark = LETTERS[place % len(LETTERS)] if plain else "━"
                heading.append(f"   {mark} {printable(curve.label)}", style=f"not bold {PALETTE[place % len(PALETTE)]}")
        console.print(heading)
        width = min(console.width if console.is_terminal else 80, 100) - 1
        is_last = not is_compact or number == len(panels) - 1
        height = tall if number == 0 else low
        for line in chart(panel, panels, width=width, height=height, plain=plain, is_last=is_last):
            text = Text()
            for cell in line:
                text.append(cell.text, style=None if cell.curve is None else PALETTE[cell.curve % len(PALETTE)])
            console.print(text, no_wrap=True, overflow="crop", crop=True)

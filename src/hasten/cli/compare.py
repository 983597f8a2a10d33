"""``hasten compare``: which changes of a recipe pay, on this data, on this machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BASE.toml|STUDY.toml] [KEY=VALUE ...]",
            help="The base (a recipe file or a built-in one) and its settings; or a study file.",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar='NAME:"KEY=VALUE ..."', help="What to compare; repeatable."),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Paired runs of each arm.", show_default="3")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="STUDY", help="The folder of the study.")] = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="add-one, leave-one-out, grid or head-to-head.", show_default="add-one"),
    ] = None,
    ladder: Annotated[
        str | None,
        typer.Option(
            "--ladder",
            help="Shorter budgets a better arm is run with; none: no.",
            show_default="0.5,0.65,0.8",
        ),
    ] = None,
    lr_tries: Annotated[
        int | None,
        typer.Option("--lr-tries", help="Learning rates tried first, for each arm alike.", show_default="0"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--until", metavar="1%", help="Add seeds until every interval is this narrow to either side."),
    ] = None,
    max_seeds: Annotated[int | None, typer.Option("--max-seeds", help="At most so many.", show_default="20")] = None,
    spend: Annotated[
        str | None, typer.Option("--spend", metavar="2h", help="Add no more seeds after so much time of runs.")
    ] = None,
    margin: Annotated[
        str | None,
        typer.Option("--margin", help="A difference in bits per byte that makes no difference.", show_default="1%"),
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option("--interval", help="t, or bootstrap (from 10 seeds on).", show_default="t"),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Where runs are done: local (this machine) or ray (a Ray cluster).")
    ] = "local",
    workers: Annotated[int | None, typer.Option("--workers", help="Runs side by side.", show_default="cores")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads of a run.", show_default="1")] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="NAME", help="Go on with runs though this changed, e.g. code; repeatable."),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write report.html at the end.")] = False,
) -> int:
    """Measure which changes of a recipe pay: paired seeds, one budget, an honest interval. The same command goes on.

    \b
    hasten compare data=my.txt budget=60s --arm muon:"optimizer=muon" --arm calm:"lr=0.002" --out studies/first
    hasten compare --out studies/first --seeds 6            more seeds
    hasten compare --out studies/first --interval bootstrap the same runs, judged by the other interval
    hasten compare data=my.txt budget=5Mtok --arm muon:optimizer=muon --lr-tries 3 --until 0.5%
    hasten compare study.toml --out studies/second          from a file with [base] and [arms]
    hasten compare study.toml --engine ray                  the runs on a Ray cluster
    """
    from hasten.cli import DONE, INTERRUPTED
    from hasten.cli.arguments import seconds, share, shares
    from hasten.comparison.compare import run_study

    study, folder = _asked(
        arguments or [],
        arm or [],
        out,
        {
            "seeds": seeds,
            "mode": mode,
            "ladder": shares("--ladder", ladder),
            "lr_tries": lr_tries,
            "half_width": share("--until", precision),
            "max_seeds": max_seeds,
            "spend": seconds("--spend", spend),
            "margin": share("--margin", margin),
            "interval": interval,
        },
    )
    display = _Display()
    try:
        found = run_study(
            study, folder, engine=engine, workers=workers, threads=threads, allow=allow or (), tell=display
        )
    except KeyboardInterrupt:
        display.say(f"stopped; what ran is kept in {folder}, and the same command goes on.")
        return INTERRUPTED
    page = None
    if not no_report:
        from hasten.report import write_report

        page = write_report([folder])
    display.found(found.verdicts, page)
    return DONE


def _asked(arguments: list[str], arms: list[str], out: Path | None, settings: dict[str, Any]) -> Any:
    """Return the study and its folder; with nothing but a folder, the study that is in it."""
    from hasten.cli.arguments import split_arguments
    from hasten.comparison.compare import asked, is_study_file
    from hasten.comparison.study import read_arm, read_study
    from hasten.errors import RecipeError
    from hasten.recipe import resolve

    source, texts = split_arguments(arguments)
    given = tuple(read_arm(text) for text in arms)
    known = None if out is None else out / "study.toml"
    if source is None and not texts and known is not None and known.is_file():
        study = asked(read_study(known), (), settings)
        names = {one.name: one for one in study.arms}
        return asked(study, tuple(one for one in given if names.get(one.name) != one), {}), out
    if is_study_file(source):
        if texts:
            raise RecipeError(f"{texts[0]!r} beside a study file has no place: write it into [base] of {source}.")
        study = asked(source, given, settings)
    else:
        study = asked(resolve(source, texts).recipe, given, settings)
    return study, out if out is not None else Path("studies") / study.base.default_run_name()


class _Display:
    """Says what happens in a study, a line at a time."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(
            highlight=False, soft_wrap=True, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140
        )
        self._began, self._done, self._runs, self._widest = time.monotonic(), 0, 0, 4

    def __call__(self, kind: str, **values: Any) -> None:
        """Take note of an event of the study."""
        {"plan": self._plan, "run": self._run, "look": self._look, "note": self._note, "tuned": self._tuned}[kind](
            **values
        )

    def say(self, text: str, style: str = "") -> None:
        """Print a line, whatever is in it."""
        from rich.text import Text

        from hasten.errors import printable

        self._console.print(Text(printable(text), style=style))

    def _plan(self, **plan: Any) -> None:
        self._runs = plan["runs"] + plan["tries"]
        self._widest = max(len(name) for name in plan["arms"])
        room = plan["places"]
        budget = plan["budget"]
        if not self._runs:
            self.say(f"every run of {plan['folder']} is done already.")
            return
        count = f"{self._runs} runs to do: {len(plan['arms'])} arms with {plan['seeds']} seeds each"
        side = f"{room.workers} at a time, {room.threads} {'thread' if room.threads == 1 else 'threads'} each"
        self.say(f"{count}, budget {budget}, {side}; in {plan['folder']}")
        if budget.unit == "seconds":
            about = self._runs * budget.value / room.workers
            self.say(f"  about {_time(about)} of training, and a little around each run", "dim")
        if plan["tries"]:
            self.say(f"  {plan['tries']} of them try learning rates first", "dim")
        if plan["most_rungs"]:
            shares = ", ".join(f"{share:g}" for share in plan["ladder"])
            self.say(
                f"  then at most {plan['most_rungs']} shorter ones ({shares} of the budget), to find how early the "
                "better arms are there; --ladder none leaves them out",
                "dim",
            )

    def _run(self, *, run: Any, variant: str, share: float) -> None:
        self._done += 1
        bits, seconds = run["val_bpb"], run["train_seconds"]
        short = f" with {share:g} of the budget" if share != 1.0 else ""
        reached = f"{bits:.4f} bits per byte" if bits is not None else run["status"]
        took = f", {run['steps']:,} steps in {_time(seconds)}" if seconds else ""
        count = f"[{self._done}/{self._runs}]" if share == 1.0 and self._done <= self._runs else "[+]"
        self.say(f"{count:>8} {variant:<{self._widest}}  seed {run['seed']}  {reached}{took}{short}")

    def _look(self, *, seeds: int, verdicts: Any) -> None:
        if verdicts["study"]["sequential"]:
            said = ", ".join(f"{arm['name']} {arm['verdict']}" for arm in verdicts["arms"])
            self.say(f"  after {seeds} seeds: {said}", "dim")

    def _note(self, *, message: str) -> None:
        self.say(f"! {message}", "yellow")

    def _tuned(self, *, tuning: Any) -> None:
        for name, arm in tuning["arms"].items():
            edge = ": the best is at the edge of what was tried, give the arm another lr" if arm["at_edge"] else ""
            self.say(f"  {name}: lr={arm['taken']:g} of {', '.join(arm['tried'])}{edge}", "yellow" if edge else "dim")

    def found(self, verdicts: Any, page: Path | None) -> None:
        """Print the verdicts and the answer."""
        from rich.table import Table
        from rich.text import Text

        from hasten.errors import printable

        base = verdicts["base"]
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("arm", "verdict"):
            table.add_column(name, no_wrap=True)
        for name in ("bits/byte", "change", "between", "to its loss", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row(Text(printable(base["name"])), "", _number(base["mean_bits_per_byte"]), "", "", "", "")
        for arm in verdicts["arms"]:
            effects = arm["effects"]
            bits = effects["bits_per_byte"]
            has_interval = bits is not None and bits["low"] is not None
            between = f"{_percent(bits['low'])} to {_percent(bits['high'])}" if has_interval else ""
            table.add_row(
                Text(printable(arm["name"])),
                Text(arm["verdict"], style=_STYLES[arm["verdict"]]),
                _number(arm["mean_bits_per_byte"]),
                _effect(bits),
                between,
                _effect(effects["seconds_to_loss"]),
                _effect(effects["train_seconds"]),
            )
        self._console.print()
        self._console.print(table)
        for arm in verdicts["arms"]:
            self.say(f"  {arm['name']}: {arm['reason']}", "dim")
        study = verdicts["study"]
        self._console.print()
        self.say(study["answer"], "bold")
        self.say(
            f"Changes are relative to {'the other' if study['mode'] == 'head-to-head' else base['name']}; less is "
            f"better. Intervals: {100 * study['level']:.3g} %, {study['method']}, {len(study['seeds'])} seeds; "
            f"{study['correction']}. All runs took {_time(study['cost_seconds'])}.",
            "dim",
        )
        if page is not None:
            self.say(f"report  {page}")


_STYLES = {
    "pays": "bold green",
    "costs": "bold red",
    "none": "",
    "unknown": "yellow",
    "identical": "magenta",
    "diverged": "bold red",
}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:+.2f} %" if abs(value) < 0.1 else f"{100 * value:+.0f} %"


def _effect(effect: Any) -> str:
    if effect is None:
        return ""
    if effect["mean"] is None:
        return f"not in {effect['censored']}/{effect['n']}"
    bound = "at most " if effect["at_most"] else ""
    return "same" if effect["method"] == "identical" else f"{bound}{_percent(effect['mean'])}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"

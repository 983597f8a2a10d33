"""``hasten restart``: a pool of seeds, of which the best goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def restart(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.toml] [KEY=VALUE ...]",
            help="A recipe (a TOML file or the name of a built-in one) and settings that override it.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds that are started, from the recipe's own upward.")] = 8,
    rungs: Annotated[
        str, typer.Option("--rungs", help="Where they are judged: shares of the horizon, or steps.")
    ] = "5%,10%,25%",
    keep: Annotated[
        str, typer.Option("--keep", help="How many go on from each rung (4,2,1), or a share of them.")
    ] = "0.5",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder of the pool.", show_default="restarts/NAME"),
    ] = None,
    tries: Annotated[
        int | None,
        typer.Option("--tries", help="Replace seeds that fail to converge, until so many were started in all."),
    ] = None,
    least_gain: Annotated[
        str,
        typer.Option("--least-gain", help="With --tries: a held-out loss that falls by less from rung to rung fails."),
    ] = "1%",
    fixed_horizon: Annotated[
        bool, typer.Option("--fixed-horizon", help="The survivor has the whole budget; the pool comes on top.")
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="Where runs are done: local (this machine) or ray (a Ray cluster).")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", help="Runs side by side.", show_default="one a core")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads of each run.", show_default="1")] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="NAME", help="Go on with runs though this changed, e.g. code; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prepare, check, print the plan; train nothing.")] = False,
) -> int:
    """Train a pool of seeds for a short while, judge them on held-out text, and let the best go on.

    The whole pool counts against the budget, so the run that is left is shorter than one run of that budget alone. The
    same command goes on with a pool that was stopped.

    \b
    hasten restart data=my.txt budget=2000 --seeds 8
    hasten restart recipe.toml --seeds 8 --rungs 5%,10%,25% --keep 4,2,1 --out pool
    hasten restart recipe.toml --seeds 1 --tries 3         one run; a new seed if it does not converge
    """
    from hasten.cli import DIVERGED, DONE, INTERRUPTED
    from hasten.cli.arguments import share, split_arguments
    from hasten.cli.display import Display
    from hasten.recipe import resolve
    from hasten.restarts import restart as run

    source, settings = split_arguments(arguments or [])
    resolved = resolve(source, settings)
    with Display() as display:
        for note in resolved.notes:
            display.note(note)
        pool = _Pool(display)
        try:
            result = run(
                resolved.recipe,
                seeds=seeds,
                rungs=rungs,
                keep=keep,
                tries=tries,
                least_gain=share("--least-gain", least_gain),
                fixed_horizon=fixed_horizon,
                out=out,
                engine=engine,
                workers=workers,
                threads=threads,
                allow=allow or (),
                dry_run=dry_run,
                hooks=[pool],
            )
        except (KeyboardInterrupt, SystemExit) as stop:
            pool.say("stopped, everything saved; the same command goes on.")
            return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    if result.status == "planned":
        pool.say("dry run: everything checked, nothing trained.")
        return DONE
    pool.finished(result)
    return DONE if result.status == "finished" else DIVERGED


class _Pool:
    """A hook that shows a pool; what concerns its preparation is left to the display of a run."""

    def __init__(self, display: Any) -> None:
        self._display = display

    def __call__(self, event: Any) -> None:
        show = getattr(self, f"_on_{event.kind}", None)
        if show is None:
            self._display(event)
        else:
            show(**event.values)

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line."""
        from rich.text import Text

        from hasten.errors import printable

        self._display.console.print(Text(printable(text), style=style or ""))

    def finished(self, result: Any) -> None:
        """Say what came out, what it cost, and where everything is."""
        from hasten.cli.display import count, duration

        values, folder = result.values, result.folder
        if result.already_finished:
            self.say("This pool is finished already.")
        cost = values["cost"]
        total, others, given_up = cost["total"], cost["others"], cost["given_up"]
        self.say("")
        if result.status == "failed":
            self.say(f"failed: {values['reason']}", "bold red")
            self.say(f"It cost {total['steps']:,} steps. Try a smaller lr or a longer schedule.warmup.")
            self.say(f"logs     {folder}/logs")
            return
        horizon = values["plan"]["horizon"]
        self.say(f"seed {result.survivor} is the survivor: {values['val_bpb']:.4f} held-out bits per byte", "bold")
        self.say(f"after {horizon:,} steps, its whole horizon (held-out loss {values['val_loss']:.4f} nats per token)")
        self.say("")
        self.say(
            f"cost     {total['steps']:,} steps, {count(total['tokens'])} tokens, {duration(total['seconds'])} of "
            f"training; planned: {values['plan']['steps']:,} steps"
        )
        share = others["steps"] / total["steps"]
        self.say(
            f"         {others['steps']:,} of the steps ({share:.0%}) went into the seeds that did not survive; "
            f"a single run could have had all {total['steps']:,}"
        )
        if given_up["steps"]:
            self.say(f"         {given_up['steps']:,} steps went into seeds that failed to converge")
        self.say("whether that paid only a comparison can tell: hasten compare, or one run of the whole budget", "dim")
        self.say("")
        self.say(f"run      {result.run}")
        self.say(f"model    {result.run}/final")
        self.say(f"numbers  {folder}/result.json")

    # --- events ------------------------------------------------------------------------------------------------

    def _on_pool(self, plan: Any, pool: Any, workers: int) -> None:
        from rich.table import Table

        from hasten.cli.display import count

        last = pool.first_seed + pool.seeds - 1
        names = f"seeds {pool.first_seed} to {last}" if pool.seeds > 1 else f"seed {last}"
        if plan.says:
            self.say(plan.says)
        self.say("")
        self.say(f"{names}, {workers} side by side; the one that is left trains for {plan.horizon:,} steps", "bold")
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("stage")
        for name in ("seeds", "steps each", "steps in all", "tokens"):
            table.add_column(name, justify="right")
        for stage, tokens in zip(plan.stages, plan.tokens):
            name = "to the end" if stage.rung is None else f"to {stage.rung}, step {stage.end:,}"
            table.add_row(name, str(stage.seeds), f"{stage.end - stage.begin:,}", f"{stage.steps:,}", count(tokens))
        table.add_row("in all", "", "", f"{plan.steps:,}", count(sum(plan.tokens)))
        self._display.console.print(table)
        if pool.fixed_horizon:
            more = plan.steps - plan.budget
            self.say(f"the horizon is fixed: the pool costs {more:,} steps on top of the budget of {plan.budget:,}")
        elif plan.steps < plan.budget:
            self.say(
                f"{plan.budget - plan.steps:,} of the {plan.budget:,} steps of the budget are left over by rounding"
            )
        if pool.tries is not None:
            extra = pool.tries - pool.seeds
            self.say(
                f"a seed that diverges, or whose held-out loss falls by less than {100 * pool.least_gain:g} % from one "
                f"rung to the next, is replaced, up to {extra} time{'s' if extra != 1 else ''}; that comes on top: at "
                f"most {extra * plan.horizon:,} steps"
            )

    def _on_wave(self, jobs: Any, logs: Path) -> None:
        self.say("")
        goals = set(jobs.values())
        where = "to the end" if goals == {None} else f"to step {', '.join(f'{step:,}' for step in sorted(goals))}"
        names = ", ".join(map(str, jobs))
        self.say(f"training seed{'s' if len(jobs) > 1 else ''} {names} {where}; what they print is in {logs}")

    def _on_run(self, seed: int, course: Any, step: int | None, seconds: float) -> None:
        from hasten.cli.display import duration

        if course.diverged:
            how = "diverged"
        elif step is None:
            how = "finished"
        else:
            how = f"held-out loss {course.losses[step]:.4f}"
        self.say(f"  seed {seed}: {how} ({duration(seconds)})", "dim")

    def _on_given_up(self, seed: int, reason: str, heir: int | None) -> None:
        then = f"; seed {heir} takes its place" if heir is not None else ""
        self.say(f"! seed {seed} is given up, because {reason}{then}", "yellow")

    def _on_rung(self, number: int, rungs: Any) -> None:
        from rich.table import Table

        from hasten.restarts.judging import ranking
        from hasten.restarts.outcome import agreements, lead_in_words

        rung = rungs[-1]
        self.say("")
        self.say(f"rung {number + 1}: at {rung.stage.rung} (step {rung.stage.end:,})", "bold")
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("rank", "seed", "held-out loss"):
            table.add_column(name, justify="right")
        table.add_column("")
        for rank, seed in enumerate(ranking(rung.losses), 1):
            table.add_row(str(rank), str(seed), f"{rung.losses[seed]:.4f}", "goes on" if seed in rung.kept else "stops")
        self._display.console.print(table)
        if words := lead_in_words(rung):
            self.say(words)
        for found in agreements(rungs)[-1:]:
            if found["spearman"] is not None:
                self.say(
                    f"The order of these {found['n']} at {found['from']} and at {found['to']} agrees to "
                    f"{found['spearman']:.2f} (Spearman's rank correlation: 1 the same order, 0 unrelated)."
                )

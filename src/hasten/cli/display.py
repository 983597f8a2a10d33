"""What a person sees of a run: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hasten.errors import printable

# Seconds between two plain lines where there is no terminal to redraw.
PLAIN_EVERY = 10.0


class Output:
    """A stream that a run outlives: once it cannot be written any more, what is printed is lost and nothing else.

    A closed terminal, a pipe that nobody reads, a log on a full disk: the record in the run folder is whole without it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        """Write `text`, or give the stream up."""
        return self._try(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        """Pass on what was written, or give the stream up."""
        self._try(self._stream.flush, None)

    def isatty(self) -> bool:
        """Say whether a person sits before it."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return its file descriptor."""
        return self._stream.fileno()

    def _try(self, work: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return work()
        except OSError:
            # Python writes what is left in the stream when it ends, and would fail then.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            return otherwise


def _stdout() -> Output | None:
    """Return standard output; None where the command was begun with it closed."""
    return Output(sys.stdout) if sys.stdout is not None else None


class Display:
    """A hook that shows a run. Use it as a context manager, so that a live line is always taken down."""

    def __init__(self, console: Console | None = None) -> None:
        # No markup: the names of files and corpora are shown as they are, brackets, colons and all.
        self.console = console or Console(file=_stdout(), highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._live: Live | None = None
        self._printed = time.monotonic()
        self._validation = ""
        self._pace: tuple[float, float] | None = None
        self._budget: float | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_line()

    def __call__(self, event: Any) -> None:
        """Show one event; kinds that say nothing to a person are passed over."""
        show = getattr(self, f"_on_{event.kind}", None)
        if show is not None:
            show(event.step, event.values)

    def note(self, message: str) -> None:
        """Print a remark."""
        self._print(Text(f"  {printable(message)}", style="dim"))

    # --- events ------------------------------------------------------------------------------------------------

    def _on_note(self, step: int, values: dict[str, Any]) -> None:
        self.note(values["message"])

    def _on_warning(self, step: int, values: dict[str, Any]) -> None:
        self._print(Text(f"! {printable(values['message'])}", style="yellow"))

    def _on_prepare(self, step: int, values: dict[str, Any]) -> None:
        self._line(Text(f"preparing: {describe_preparation(values['progress'])}"))

    def _on_prepared(self, step: int, values: dict[str, Any]) -> None:
        self._end_line()
        data, state = values["data"], values["state"]
        facts = Table.grid(padding=(0, 2))
        facts.add_column(no_wrap=True)
        facts.add_column(overflow="fold")
        facts.add_row("corpus", describe_corpus(data))
        facts.add_row("model", describe_model(state))
        facts.add_row("rows", describe_packing(state, values["packing"]))
        facts.add_row("batch", describe_batch(state))
        self._budget = state.recipe.budget.value if state.recipe.budget.unit == "seconds" else None
        budget = state.recipe.budget
        facts.add_row("budget", f"{budget} steps" if budget.unit == "steps" else str(budget))
        self._print(facts)
        for note in data.manifest["notes"]:
            self.note(note)

    def _on_resume(self, step: int, values: dict[str, Any]) -> None:
        self._print(Text(f"resuming at step {step:,}"))

    def _on_branch(self, step: int, values: dict[str, Any]) -> None:
        self.note(f"branched from {printable(values['run'])} at step {values['run_step']:,}")

    def _on_untrained(self, step: int, values: dict[str, Any]) -> None:
        self._print(Text(f"untrained: {values['val_bpb']:.3f} bits per byte"))

    def _on_compile(self, step: int, values: dict[str, Any]) -> None:
        self.note(f"compile {'on' if values['on'] else 'off'}: {values['reason']}")

    def _on_plan(self, step: int, values: dict[str, Any]) -> None:
        self.note(f"planned {values['total_steps']:,} steps for the budget")

    def _on_bad_step(self, step: int, values: dict[str, Any]) -> None:
        if values["action"] == "diverged":  # said at the end
            return
        what = "goes on" if values["action"] == "go" else "is left out"
        self._print(Text(f"! step {step:,} {what}: {printable(values['reason'])}", style="yellow"))

    def _on_rollback(self, step: int, values: dict[str, Any]) -> None:
        rate = f", at {values['rate_factor']:g} of the learning rate" if values["rate_factor"] != 1 else ""
        self._print(
            Text(
                f"! back from step {values['failed_at']:,} to step {step:,}{rate}, leaving out the data read since "
                f"(rollback {values['number']}): {printable(values['reason'])}",
                style="yellow",
            )
        )

    def _on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        self._validation = f"val {values['val_bpb']:.3f} bpb"
        if not self.console.is_terminal:
            self._print(Text(f"step {step:,}  validation {values['val_bpb']:.4f} bits per byte"))

    def _on_step(self, step: int, values: dict[str, Any]) -> None:
        is_due = time.monotonic() - self._printed >= PLAIN_EVERY
        if self.console.is_terminal or is_due or step == 1:
            self._line(Text(self._describe_step(step, values)), is_first=step == 1)

    def _describe_step(self, step: int, values: dict[str, Any]) -> str:
        parts = [
            f"step {step:,} {values['progress']:4.0%}",
            self._left(values),
            f"loss {values['loss']:.3f}",
            self._validation,
            f"lr {values['lr']:.1e}",
            f"grad {values['grad_norm']:.2f}",
            f"{count(values['tokens_per_second'])} tok/s",
        ]
        return "  ".join(part for part in parts if part)

    def _left(self, values: dict[str, Any]) -> str:
        if self._budget is not None:
            return f"{duration(max(0.0, self._budget - values['seconds']))} left"
        here = (values["seconds"], values["progress"])
        self._pace = self._pace or here
        gone, moved = here[0] - self._pace[0], here[1] - self._pace[1]
        return f"{duration(gone / moved * (1.0 - here[1]))} left" if moved > 0 else ""

    # --- how it ended ------------------------------------------------------------------------------------------

    def dry(self, recipe: Any) -> None:
        """Print the resolved recipe of a dry run."""
        self._print(Text(printable(recipe.to_toml()).rstrip(), style="dim"))
        self._print(Text("dry run: everything checked, nothing trained."))

    def stopped(self, result: Any) -> None:
        """Say where a stopped run can go on."""
        self._print(
            Text(
                f"stopped by {printable(result.reason)}, saved in {printable(str(result.folder))}; "
                "the same command goes on."
            )
        )

    def paused(self, result: Any) -> None:
        """Say how good a paused run is and where it can go on."""
        done = f"paused at step {result.values['steps']:,} of {result.values['total_steps']:,}"
        bits = f"{result.values['val_bpb']:.4f} held-out bits per byte"
        self._print(Text(f"{done}: {bits}; saved in {printable(str(result.folder))}; without --until it goes on."))

    def finished(self, result: Any, page: Path | None) -> None:
        """Print what the run reached, a sample, and where everything is."""
        values = result.values
        if result.already_finished:
            self._print(Text("This run is finished already; its newest checkpoint was read and verified."))
        if result.status == "diverged":
            self._print(Text(f"diverged: {printable(result.reason)}", style="bold red"))
            self._print(Text("Try a smaller lr, a longer schedule.warmup, or another seed.", style="dim"))
        else:
            self._result_table(values)
        folder = printable(str(result.folder))
        where = Table.grid(padding=(0, 2))
        where.add_row("run", folder)
        if result.status != "diverged":
            where.add_row("model", f"{folder}/final")
            where.add_row("sample more", f"hasten generate {folder}")
        if page is not None:
            where.add_row("report", printable(str(page)))
        self._print(where)

    def _result_table(self, values: dict[str, Any]) -> None:
        steps, tokens = f"{values['steps']:,} steps", f"{count(values['tokens'])} tokens"
        speed = f"{count(values['tokens_per_second'])} tokens/s" if values["tokens_per_second"] else ""
        ending = f" ({printable(values['reason'])})" if values["reason"] else ""
        self._print(Text(f"\ndone in {duration(values['seconds'])}: {steps}, {tokens}, {speed}{ending}"))
        table = Table.grid(padding=(0, 2))
        table.add_row(Text("held-out bits per byte", style="bold"), Text(f"{values['val_bpb']:.3f}", style="bold"))
        rivals = {
            "xz_bpb": "  xz -9",
            "unigram_bpb": "  byte unigram",
            "untrained_val_bpb": "  untrained model",
        }
        for key, name in rivals.items():
            if values.get(key) is not None:
                table.add_row(Text(name, style="dim"), Text(f"{values[key]:.3f}", style="dim"))
        self._print(table)

    def _on_sample(self, step: int, values: dict[str, Any]) -> None:
        self._end_line()
        self._print(Text("\nA sample:", style="bold"))
        self._print(Text(printable(values["text"]).rstrip(), style="italic"))

    # --- the line ----------------------------------------------------------------------------------------------

    def _line(self, text: Text, *, is_first: bool = False) -> None:
        """Redraw the live line in a terminal; elsewhere print a line now and then."""
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, auto_refresh=False, transient=True)
                self._live.start()
            text.no_wrap, text.overflow = True, "ellipsis"
            if time.monotonic() - self._printed >= 0.1:
                self._live.update(text, refresh=True)
                self._printed = time.monotonic()
        elif is_first or time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            self._print(text)

    def _end_line(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, what: Any) -> None:
        self.console.print(what)


def describe_corpus(data: Any) -> str:
    """Return a line on prepared data: name, size, documents, tokens, hash, whether it was reused."""
    train, val = data.train_size, data.val
    return (
        f"{printable(data.manifest['corpus'])}: {size(train.source_bytes)} train, {size(val.source_bytes)} held out, "
        f"{train.num_documents + val.num_documents:,} documents, {count(train.num_tokens)} tokens of "
        f"{data.vocab_size:,} kinds, sha256 {data.corpus_sha256[:12]}"
    )


def describe_model(state: Any) -> str:
    """Return a line on the model: preset, shape, parameters, precision, device."""
    config, recipe = state.config, state.recipe
    return (
        f"{recipe.model.name}: {config.num_layers} layers of {config.width}, "
        f"{count(sum(p.numel() for p in state.model.parameters()))} parameters, "
        f"{recipe.precision.name} on {state.device}{_processes(state)}"
    )


def _processes(state: Any) -> str:
    """Return how many processes share the run, and how; nothing where one is alone."""
    size = state.company.ranks.size
    return f", {size} processes ({state.recipe.parallel.name})" if size > 1 else ""


def describe_packing(state: Any, reports: list[dict[str, Any]]) -> str:
    """Return a line on how documents became rows: how many, how full, what was cut or left out."""
    rows, room, targets, cuts = (sum(report[key] for report in reports) for key in ("rows", "room", "targets", "cuts"))
    lost: dict[str, int] = {}
    for report in reports:
        for cause, tokens in report["lost"].items():
            lost[cause] = lost.get(cause, 0) + tokens
    parts = [
        f"{rows:,} of up to {state.recipe.lengths.seq_len} tokens by {state.recipe.data.packing}",
        f"{targets / room:.2%} full",
    ]
    if cuts:
        parts.append(f"{count(cuts)} documents cut that would fit a row")
    parts += [f"{count(tokens)} tokens {cause}" for cause, tokens in lost.items() if cause != "last"]
    return ", ".join(parts)


def describe_batch(state: Any) -> str:
    """Return a line on the batch: tokens, rows, micro-batches, steps in an epoch, and what grows."""
    sizes, lengths = state.batch_sizes, state.recipe.lengths
    micro = sizes.rows // sizes.micro_rows
    grows = ""
    if lengths.name == "window":
        grows = f"; attention looks {lengths.start} tokens back, and further over {lengths.over}"
    elif lengths.name != "constant":
        grows = f"; rows grow from {lengths.row_lengths[0]} tokens over {lengths.over}"
    if sizes.growth is not None:
        grows += f"; steps have {count(sizes(0.0) * lengths.seq_len)} tokens at first"
    return (
        f"{count(sizes.rows * lengths.seq_len)} tokens a step: {sizes.rows} rows of {lengths.seq_len}"
        f"{f' in {micro} micro-batches' if micro > 1 else ''}; an epoch is {state.steps_per_epoch:,.0f} steps{grows}"
    )


def describe_preparation(progress: Any) -> str:
    """Return a line on how far preparing a corpus is."""
    parts = [printable(str(progress.stage)), f"{size(progress.done_bytes)} of {size(progress.total_bytes)}"]
    if progress.megabytes_per_second:
        parts.append(f"{progress.megabytes_per_second:.1f} MB/s")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    return "  ".join(parts)


def count(number: float) -> str:
    """Return a count in at most four characters and a unit: ``912``, ``23.4k``, ``4.1M``.

    Example:
        >>> count(912), count(23_400), count(4_100_000)
        ('912', '23.4k', '4.1M')
    """
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.0f}"


def size(num_bytes: float) -> str:
    """Return a number of bytes with its unit.

    Example:
        >>> size(12_118_641)
        '12.1 MB'
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Return a span of time as a person says it.

    Example:
        >>> duration(42.3), duration(181), duration(7300)
        ('42 s', '3 min 1 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

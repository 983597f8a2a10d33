"""A plan in words: the lines that the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.planning.outlook import counted
from hasten.planning.plans import Plan

Line = tuple[str, str]
NAMES = {"best_fit": "best fit", "chunk": "chunks", "pad": "padded", "bucket": "buckets"}


def sections(plan: Plan) -> list[tuple[str, list[Line]]]:
    """Return what a plan says, as titles with lines of a name and a text."""
    return [
        ("run", list(_run(plan))),
        ("model", list(_model(plan))),
        ("memory", list(_memory(plan))),
        ("speed", list(_speed(plan))),
        ("time", list(_time(plan))),
        ("packing", list(_packing(plan))),
    ]


def headline(plan: Plan) -> str:
    """Return the plan in one sentence."""
    steps = "as many steps as fit the time" if plan.steps is None else counted(plan.steps, "step")
    time = "" if plan.times is None else f", about {span(plan.times.total)}"
    cost = "" if plan.cost is None else f" for {plan.cost}"
    return f"{steps}{time}{cost}, {'' if plan.memory.is_measured else 'at least '}{size(plan.memory.total)} of memory"


def _run(plan: Plan) -> Iterator[Line]:
    yield "budget", plan.budget
    if plan.steps is None:
        yield "steps", "as many as fit the time; without a measurement nobody knows"
    else:
        yield "steps", f"{plan.steps:,}" + (" fit the time" if _is_time(plan) else "")
        padding = 1 - plan.tokens / plan.positions if plan.positions else 0.0
        yield "tokens", f"{plan.tokens:,}" + (f" and {padding:.1%} padding" if padding >= 0.0005 else "")
    rows = f"{counted(plan.rows_per_step, 'row')} of {counted(plan.seq_len, 'token')} a step"
    yield "batch", rows + (f", {plan.micro_rows:,} at a time" if plan.micro_rows != plan.rows_per_step else "")
    where = counted(plan.documents, "document")
    yield "data", f"{counted(plan.train_tokens, 'token')} in {where}; {plan.val_tokens:,} held out"
    if plan.epochs is not None:
        yield "epochs", f"{plan.epochs:.3g}"
    for name, times in plan.source_epochs.items():
        yield f"  {name}", f"{times:.3g}"
    yield "row lengths", ", ".join(f"{length:,} ({share:.0%})" for length, share in plan.lengths.items())
    rate = next((curve for curve in plan.curves if curve.name == "learning rate"), None)
    if rate is not None:
        first, *_, last = rate.values
        yield "learning rate", f"{first:.3g} at first, {max(rate.values):.3g} at most, {last:.3g} at the end"


def _model(plan: Plan) -> Iterator[Line]:
    found, costs = plan.parameters, plan.flops
    yield "parameters", f"{found.total:,}: {found.embedding:,} in the embedding, {found.other:,} elsewhere"
    total = "" if costs.total is None else f"{operations(costs.total)} in all, "
    yield "training", f"{total}{operations(costs.per_token)} for a token"
    yield "counted as", costs.formula
    shares = ", ".join(f"{share:.1%} at {length:,}" for length, share in sorted(costs.attention_share.items()))
    yield "attention", f"{shares} tokens a row"
    if costs.optimizer_per_step:
        yield "update", f"{operations(costs.optimizer_per_step)}, {costs.optimizer_share:.0%} of the model's in a step"


def _memory(plan: Plan) -> Iterator[Line]:
    found = plan.memory
    how = "measured" if found.is_measured else "counted without measuring, so at least that"
    there = f" of {size(found.machine)}" if found.machine else ""
    whose = "this GPU's" if plan.device == "cuda" else "the whole process"
    yield "at most", f"{'about ' if found.is_measured else ''}{size(found.total)}{there} ({whose}; {how})"
    for name in ("weights", "gradients", "optimizer_state", "snapshot", "activations", "logits", "other"):
        yield f"  {name.replace('_', ' ')}", size(getattr(found, name))


def _speed(plan: Plan) -> Iterator[Line]:
    if not plan.speed:
        yield "not measured", "leave --no-measure out for the time, the cost and the peak of memory"
        return
    for speed in plan.speed:
        rate, timed = speed.tokens_per_second, counted(speed.steps_timed, "step")
        yield (
            f"rows of {speed.length:,}",
            f"{speed.seconds_per_step:.3g} s a step, {rate:,.0f} tokens/s ({timed} timed)",
        )
    if plan.threads:
        yield "threads", str(plan.threads)


def _time(plan: Plan) -> Iterator[Line]:
    found = plan.times
    if found is None:
        return
    yield "training", span(found.training)
    if found.compiling:
        yield "compiling", f"{span(found.compiling)} (assumed; the steps then take 20 to 25 % less)"
    yield "evaluations", f"{span(found.evaluations)} for {found.num_evaluations}"
    yield "checkpoints", f"{span(found.checkpoints)} for {found.num_checkpoints}"
    yield "at the end", f"{span(found.ending)} for the whole held-out text and what simpler coders make of it"
    yield "in all", span(found.total) + ("" if plan.cost is None else f" for {plan.cost}")


def _packing(plan: Plan) -> Iterator[Line]:
    for packed in plan.packing:
        name = NAMES.get(packed.packing, packed.packing)
        lost = f", {packed.lost:,} tokens left out" if packed.lost > len(plan.source_epochs) + 1 else ""
        cut = f"{packed.cut:,} of {counted(packed.documents, 'document')} cut"
        rows = f"{counted(packed.rows, 'row')}, {packed.padding:.2%} padding, {cut}{lost}"
        yield f"{name}{'' if packed.is_chosen else ' instead'}", rows


def _is_time(plan: Plan) -> bool:
    return plan.budget[-1] in "sinhd" and not plan.budget.endswith(("step", "steps"))


def size(count: float) -> str:
    """Return bytes as a person says them.

    Example:
        >>> size(531), size(551_886_848)
        ('531 B', '552 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def span(seconds: float) -> str:
    """Return seconds as a person says them.

    Example:
        >>> span(0.25), span(75), span(5400)
        ('0.25 s', '1 min 15 s', '1 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 86400:.3g} days"


def operations(number: float) -> str:
    """Return floating-point operations as a person says them.

    Example:
        >>> operations(9_736_738), operations(5.18e12)
        ('9.74 MFLOP', '5.18 TFLOP')
    """
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} EFLOP"

"""What is worth it here and what is not, and the mistakes that only a measurement shows."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.checks import Finding
from hasten.checks.findings import error, warning
from hasten.checks.run import ATTENTION_SHARE
from hasten.planning.costs import Flops
from hasten.planning.measurement import Measured
from hasten.planning.outline import Outline
from hasten.planning.times import Compiling, Times

# A step this much slower than in float32 is told; a length schedule that saves less of the training time is not worth
# it; an optimizer whose own products take more than this, beside those of the model, wants larger steps.
SLOWER, WORTH_SAVING, OWN_SHARE = 1.05, 0.03, 1 / 3
# Seconds on the clock for a CPU-second, above which other work is in the way.
BUSY = 1.3
# Attention's share of the work from which shorter rows at first are worth a try.
WORTH_TRYING = 0.15


def mistakes(found: Outline, measured: Measured | None, choice: Compiling | None) -> Iterator[Finding]:
    """Yield what is wrong or doubtful about a run, as measured steps show it."""
    if measured is None:
        return
    if measured.failure:
        say = warning if measured.is_slow else error
        doing = "timed" if measured.is_slow else "done"
        yield say(
            f"Steps of this run could not be {doing} here, because {measured.failure.rstrip('.')}: give a smaller "
            "model or batch, or a larger machine."
        )
        return
    yield from _precision(found, measured.float32_ratio)
    yield from _compile(found, choice)


def _precision(found: Outline, ratio: float | None) -> Iterator[Finding]:
    if ratio is not None and ratio > SLOWER:
        yield warning(
            f"A step in {found.recipe.precision.name} takes {ratio:.3g} times as long as in float32 here: give "
            "precision=float32 unless memory forces you."
        )


def _compile(found: Outline, choice: Compiling | None) -> Iterator[Finding]:
    if choice is None or not choice.is_on or found.recipe.compile != "on":
        return
    training = choice.training_seconds
    if training * choice.saved_share < choice.cost:
        yield warning(
            f"compile=on never pays in this run: it saves about {training * choice.saved_share:.0f} s of "
            f"{training:.0f} s of training and costs about {choice.cost:.0f} s: give compile=off, or a larger budget."
        )


def answers(
    found: Outline, costs: Flops, measured: Measured | None, expected: Times | None, choice: Compiling | None,
    *, steps: int | None,
) -> tuple[str, ...]:  # fmt: skip
    """Return a sentence for every technique whose worth can be told before the run."""
    said = [*_lengths(found, costs, measured, steps), *_optimizer(found, costs)]
    if choice is not None:
        said.append(f"Compiling: {'yes' if choice.is_on else 'no'}, {choice.reason}.")
    ratio = None if measured is None else measured.float32_ratio
    if ratio is not None and ratio <= SLOWER:
        name = found.recipe.precision.name
        said.append(f"A step in {name} takes {ratio:.3g} of the time of one in float32.")
    if measured is not None and measured.points and found.device == "cpu":
        said += _pace(measured)
    if expected is not None and expected.num_evaluations > 1 and expected.evaluations > 0.05 * expected.training:
        said.append(
            f"Evaluating {expected.num_evaluations} times takes {expected.evaluations / expected.training:.0%} of the "
            "time that training takes."
        )
    return tuple(said)


def _pace(measured: Measured) -> Iterator[str]:
    """A step that takes longer on the clock than all threads compute for it waits for other work."""
    first = measured.points[0]
    if first.seconds > BUSY * first.cpu_seconds:
        yield (
            f"This machine is busy with other work: a step computes for {first.cpu_seconds:.3g} s and takes "
            f"{first.seconds:.3g} s on the clock. All times here are as long as that lasts."
        )


def _lengths(found: Outline, costs: Flops, measured: Measured | None, steps: int | None) -> Iterator[str]:
    lengths, seq_len = found.recipe.lengths, found.config.seq_len
    share = costs.attention_share[seq_len]
    part = f"attention is {share:.1%} of the work in rows of {seq_len} tokens"
    if lengths.name == "constant":
        if share < ATTENTION_SHARE:
            yield f"A length schedule is not worth it here, because {part}."
        elif share >= WORTH_TRYING:
            yield f"A length schedule may be worth it: {part} (lengths=linear)."
        return
    if measured is None or not measured.points:
        if share < ATTENTION_SHARE:
            yield f"lengths={lengths.name} is not worth it here, because {part}."
        return
    mean_rows = found.sizes.mean_rows / found.sizes.rows
    saved = 1.0 - found.course(steps).mean_seconds(measured) / measured.step_seconds(seq_len, mean_rows)
    if saved < WORTH_SAVING:
        yield (
            f"lengths={lengths.name} is not worth it here for time, because by the steps measured it saves "
            f"{max(saved, 0.0):.1%} of the training time; {part}."
        )
    else:
        yield f"lengths={lengths.name} saves about {saved:.0%} of the training time of rows of full length."


def _optimizer(found: Outline, costs: Flops) -> Iterator[str]:
    if not costs.optimizer_per_step:
        return
    name = found.recipe.optimizer.name
    share = f"{costs.optimizer_share:.0%} of what the model computes in a step"
    if costs.optimizer_share > OWN_SHARE:
        needed = found.tokens_per_step * costs.optimizer_share / OWN_SHARE
        yield (
            f"optimizer={name} is hardly worth it in steps of {found.tokens_per_step:,} tokens, because its own "
            f"products are {share}; from about {needed:,.0f} tokens a step they are below a third."
        )
    else:
        yield f"optimizer={name}'s own products are {share}."

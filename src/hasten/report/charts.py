"""What each chart of one run shows, and the sentence under it; nothing here draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.report.curves import smooth, smoothing_window, thin
from hasten.report.runs import Run, left_out_steps
from hasten.report.wording import fixed, is_finite, number, percent, short

NUM_COLOURS = 8
CHART_NAMES = (
    "loss",
    "validation",
    "validation_time",
    "learning_rate",
    "gradient_norm",
    "row_length",
    "throughput",
    "loss_scale",
)


@dataclass(frozen=True)
class Curve:
    """One series of a chart.

    Args:
        label: its name in the legend; an empty one stays out of it.
        colour: index into the palette; its dash pattern follows from it where `many` runs share a chart.
        kind: ``line``, ``faint`` (a pale line under another), ``band`` (from `y` to `high`), ``points`` or ``steps``.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    kind: str = "line"
    colour: int = 0
    high: np.ndarray | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture with its words. `references` are labelled horizontal lines, `marks` vertical ones at a step."""

    name: str
    title: str
    unit: str
    caption: str
    curves: Sequence[Curve]
    references: Sequence[tuple[str, float]] = ()
    marks: Sequence[float] = ()
    x_label: str = "step"
    log: bool = False
    from_zero: bool = False


def run_charts(run: Run) -> list[Chart]:
    """Return the charts of one run, the most telling first; what was never recorded has none."""
    makers = (_loss, _held_out, _learning_rate, _gradient_norm, _row_length, _speed, _loss_scale)
    return [chart for chart in (make(run) for make in makers) if chart is not None]


def has_series(run: Run, name: str) -> bool:
    """Say whether a run recorded any value of a series."""
    return bool(np.isfinite(run.series[name]).any())


def noisy_curves(x: np.ndarray, y: np.ndarray, each: str = "each step") -> tuple[list[Curve], str]:
    """Return a noisy series as a pale background and a clear mean, with a sentence that says what they are."""
    thinned = thin(x, y)
    window = smoothing_window(len(thinned.x))
    mean = smooth(thinned.mean, window)
    if thinned.low is not None:
        band = Curve(
            f"lowest to highest of {thinned.per_bin:,} steps", thinned.x, thinned.low, "band", high=thinned.high
        )
        said = f"{len(x):,} steps are drawn as {len(thinned.x)} groups of about {thinned.per_bin:,}."
        return [band, Curve(f"mean of {window * thinned.per_bin:,} steps", thinned.x, mean)], said
    if window == 1:
        return [Curve(each, x, thinned.mean, "line" if len(x) > 1 else "points")], ""
    return [Curve(each, x, thinned.mean, "faint"), Curve(f"mean of {window} steps", x, mean)], ""


def _sentences(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _loss(run: Run) -> Chart | None:
    if not run.num_steps:
        return None
    steps, loss = run.series["step"], run.series["loss"]
    is_broken = ~np.isfinite(loss)
    broken = steps[is_broken]
    breaks = steps[is_broken & ~np.concatenate([[False], is_broken[:-1]])]
    finite = loss[np.isfinite(loss)]
    if not len(finite):
        said = f"None of the {len(loss):,} recorded losses is a finite number."
        return Chart("loss", "Training loss", "nats per token", said, ())
    curves, drawn = noisy_curves(steps, loss)
    last = min(len(finite), smoothing_window(len(finite)))
    end = float(np.mean(finite[-last:]))
    return Chart(
        "loss",
        "Training loss",
        "nats per token" + (", log scale" if spans(finite, 2.0) else ""),
        _sentences(
            f"From {fixed(float(finite[0]), 2)} to {fixed(end)}"
            + (f" (mean of the last {last:,} steps)." if last > 1 else ".")
            if len(finite) > 1
            else f"One step so far: {fixed(float(finite[0]))}.",
            drawn,
            f"At {len(broken):,} steps the loss was not finite, first at step {int(broken[0]):,} (upright line)."
            if len(broken)
            else "",
        ),
        curves,
        marks=tuple(breaks[:12]),
        log=spans(finite, 2.0),
    )


def spans(values: np.ndarray, ratio: float) -> bool:
    """Say whether positive values lie so far apart that a logarithmic axis shows them better."""
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and values.max() / values.min() > ratio


def evaluations(run: Run, name: str = "val_bpb") -> tuple[np.ndarray, np.ndarray]:
    """Return steps and held-out values of a run, the untrained model first and the final one last."""
    found: dict[float, float] = {}
    untrained = run.latest("untrained").get(name)
    if name == "val_bpb" and untrained is None:
        untrained = run.result.get("untrained_val_bpb")
    for step, value in [
        (0, untrained),
        *((event.get("step") or 0, event.get(name)) for event in run.of_kind("evaluation")),
        (run.result.get("steps") or run.last_step, run.result.get(name)),
    ]:
        if isinstance(value, (int, float)) and isinstance(step, (int, float)):
            found[float(step)] = float(value)
    steps = sorted(found)
    values = np.array([found[step] for step in steps])
    return np.array(steps), np.where(np.isfinite(values), values, np.nan)


def baselines(run: Run) -> list[tuple[str, float]]:
    """Return the named bits per byte that a held-out figure is compared with; what was not measured is left out."""
    named = (("byte unigram", "unigram_bpb"), ("xz -9", "xz_bpb"))
    return [(label, float(run.result[key])) for label, key in named if is_finite(run.result.get(key))]


def _held_out(run: Run) -> Chart | None:
    steps, values = evaluations(run)
    known = np.isfinite(values)
    if not known[steps > 0].any():
        return None
    curves = [Curve("", steps, values, "line", 1), Curve("held-out text", steps, values, "points", 1)]
    first, last = float(values[known][0]), float(values[known][-1])
    whole = any(event.get("whole") for event in run.of_kind("evaluation")) or run.result.get("val_bpb") is not None
    said = f"From {fixed(first, 2)} {'untrained ' if steps[known][0] == 0 else ''}to {fixed(last)}."
    return Chart(
        "validation",
        "Held-out text",
        "bits per byte",
        _sentences(
            said if known.sum() > 1 else f"One measurement so far: {fixed(last)}.",
            "Points during the run use a sample, the last one all of the held-out text."
            if whole and known.sum() > 2
            else "",
        ),
        curves,
        references=baselines(run),
        from_zero=True,
    )


def _replans(run: Run) -> list[float]:
    return [float(event.get("step") or 0) for event in run.of_kind("replan")]


def _learning_rate(run: Run) -> Chart | None:
    if not has_series(run, "lr"):
        return None
    thinned = thin(run.series["step"], run.series["lr"])
    lr = run.series["lr"][np.isfinite(run.series["lr"])]
    peak = int(run.series["step"][int(np.nanargmax(run.series["lr"]))])
    replans = _replans(run)
    shape = f"{run.setting('schedule.name')} schedule" if run.setting("schedule.name") else "Schedule"
    return Chart(
        "learning_rate",
        "Learning rate",
        "",
        _sentences(
            f"{shape[0].upper()}{shape[1:]}: peak {number(float(lr.max()))} at step {peak:,}, "
            f"last {number(float(lr[-1]))}.",
            f"The number of steps was planned again {len(replans)} times to end on time (upright lines)."
            if len(replans) > 1
            else "The number of steps was planned again once to end on time (upright line)."
            if replans
            else "",
        ),
        [Curve("", thinned.x, thinned.mean, "line" if len(lr) > 1 else "points")],
        marks=tuple(replans),
        from_zero=True,
    )


def _row_length(run: Run) -> Chart | None:
    if not has_series(run, "seq_len"):
        return None
    lengths = run.series["seq_len"][np.isfinite(run.series["seq_len"])]
    if lengths.min() == lengths.max():
        said = f"{lengths[0]:,.0f} tokens in every row, from the first step to the last."
    else:
        said = f"From {lengths[0]:,.0f} to {lengths[-1]:,.0f} tokens; {len(np.unique(lengths))} lengths were used."
    thinned = thin(run.series["step"], run.series["seq_len"])
    kind = "steps" if len(lengths) > 1 else "points"
    curves = [Curve("", thinned.x, thinned.mean, kind)]
    return Chart("row_length", "Row length", "tokens", said, curves, from_zero=True)


def clipped_steps(run: Run) -> tuple[int, int]:
    """Return on how many steps clipping acted, and of how many."""
    clipped = run.series["clipped"]
    known = clipped[np.isfinite(clipped)]
    return int((known > 0).sum()), len(known)


def clip_limits(run: Run) -> list[tuple[str, float]]:
    """Return the norm that the run clips at, as a reference line; none where clipping is off or by value."""
    limit = run.setting("clip.max_norm")
    uses_norm = run.setting("clip.name") in ("norm", "norm_and_value")
    return [("clipped above", float(limit))] if uses_norm and isinstance(limit, (int, float)) else []


def _gradient_norm(run: Run) -> Chart | None:
    if not has_series(run, "grad_norm"):
        return None
    norm = run.series["grad_norm"]
    finite = norm[np.isfinite(norm)]
    curves, _ = noisy_curves(run.series["step"], norm)
    acted, of = clipped_steps(run)
    name = run.setting("clip.name")
    broken = len(norm) - len(finite)
    log = spans(finite, 4.0)
    return Chart(
        "gradient_norm",
        "Gradient norm",
        "before clipping" + (", log scale" if log else ""),
        _sentences(
            f"Median {number(float(np.median(finite)), 3)}.",
            f"Clipped on {acted:,} of {of:,} steps ({percent(acted / of)})."
            if of and name != "none"
            else "Clipping is off.",
            f"{broken:,} norms were not finite." if broken else "",
        ),
        curves,
        references=clip_limits(run),
        log=log,
        from_zero=not log,
    )


def _speed(run: Run) -> Chart | None:
    if not has_series(run, "tokens_per_second"):
        return None
    speed = run.series["tokens_per_second"]
    curves, _ = noisy_curves(run.series["step"], speed)
    return Chart(
        "throughput",
        "Throughput",
        "tokens per second",
        f"Median {short(float(np.nanmedian(speed)))} tokens that carry loss per second of training; "
        "evaluating and saving are not in it.",
        curves,
        from_zero=True,
    )


def _loss_scale(run: Run) -> Chart | None:
    scale = run.series["loss_scale"]
    if run.setting("precision.name") != "fp16" or not has_series(run, "loss_scale"):
        return None
    skipped = left_out_steps(run)[1]
    thinned = thin(run.series["step"], scale)
    said = f"{skipped:,} of {len(scale):,} steps overflowed and were skipped, each halving the scale."
    log = spans(scale, 2.0)
    curves = [Curve("", thinned.x, thinned.mean, "steps" if len(scale) > 1 else "points")]
    unit = "for fp16" + (", log scale" if log else "")
    return Chart("loss_scale", "Loss scale", unit, said, curves, log=log, from_zero=not log)

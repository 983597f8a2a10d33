"""What the report says in words and tables: the headline, the warnings, the facts, what differs between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hasten.report.charts import baselines, clipped_steps
from hasten.report.overlays import colours
from hasten.report.proof import proven_warnings
from hasten.report.runs import Run, flat, left_out_steps
from hasten.report.wording import UNKNOWN, byte_size, fixed, is_finite, number, percent, seconds, short

Rows = list[tuple[str, str]]
STATUS_WORDS = {
    "finished": "Finished",
    "diverged": "Diverged",
    "stopped": "Stopped before the end",
    "unfinished": "Not finished: no result was written",
}
PHASES = {
    "train": "Training",
    "data": "Reading data",
    "evaluation": "Evaluating",
    "checkpoint": "Saving checkpoints",
    "compile": "Compiling",
    "probe": "Probing the speed",
}
FACT_NAMES = {
    "corpus": "Corpus",
    "corpus_sha256": "Corpus SHA-256",
    "tokenizer_sha256": "Tokenizer SHA-256",
    "vocab_size": "Vocabulary",
    "train_num_documents": "Training documents",
    "train_num_tokens": "Training tokens",
    "train_source_bytes": "Training text",
    "val_num_documents": "Held-out documents",
    "val_num_tokens": "Held-out tokens",
    "val_source_bytes": "Held-out text",
}
LABELS = {
    "torch": "PyTorch",
    "numpy": "NumPy",
    "cpu": "CPU",
    "cpu_capability": "CPU instructions",
    "cuda": "CUDA",
    "vocab_size": "Vocabulary",
    "num_kv_heads": "Key-value heads",
    "seq_len": "Row length",
    "norm_eps": "Norm epsilon",
    "rope_theta": "Rotary base",
    "mlp_width": "MLP width",
    "tied": "Tied head",
}
MAX_SAMPLE = 20_000
# Parts of events that the list of what happened leaves out: shown elsewhere on the page, or too long.
UNTOLD = frozenset({"kind", "step", "time", "attempt", "text", "knots", "facts", "warnings"})


def title(run: Run) -> str:
    """Return what was trained on what, as a heading."""
    model = run.setting("model.name") or "Model"
    return f"{model} on {corpus_name(run)}" if corpus_name(run) else f"{model}"


def corpus_name(run: Run) -> str:
    """Return the name of the corpus that was trained on; empty where nobody noted it."""
    data = run.latest("start").get("data")
    known = data if isinstance(data, Mapping) else {}
    name = known.get("corpus") or run.result.get("corpus") or run.setting("data.train") or ""
    return ", ".join(map(str, name)) if isinstance(name, (list, tuple)) else str(name)


def status_words(run: Run) -> str:
    """Return how the run ended, and why where that is known."""
    reason = run.result.get("reason") or run.latest("stop").get("reason") or ""
    words = STATUS_WORDS.get(run.status, run.status)
    if run.status == "unfinished" or run.status == "stopped":
        planned = next((v for v in (run.result, run.latest("replan"), run.latest("plan")) if "total_steps" in v), {})
        planned = planned.get("total_steps")
        words += f", at step {run.last_step:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    return f"{words} ({reason})" if reason else words


def verdict(run: Run) -> str:
    """Return in one sentence what the run achieved, against what one would have without it."""
    value, untrained = run.measured("val_bpb"), run.measured("untrained_val_bpb")
    if not is_finite(value) and run.status == "diverged":
        return "The run diverged, so there is no held-out measurement to show."
    if not is_finite(value):
        before = f"; before training the model needs {fixed(untrained)} bits per byte" if is_finite(untrained) else ""
        return f"There is no held-out measurement yet{before}."
    others = [
        ("the model before training", untrained),
        *(((f"a {name}" if "unigram" in name else name), figure) for name, figure in reversed(baselines(run))),
    ]
    compared = []
    for name, other in others:
        if is_finite(other) and other > 0 and other != value:
            share = abs(1 - value / other)
            compared.append(f"{percent(share)} {'less' if value < other else 'more'} than {name}")
    measured = run.latest("evaluation").get("step")
    is_final = run.result.get("val_bpb") is not None or measured is None
    said = "It needs" if is_final else f"At step {number(measured)} it needed"
    sentence = f"{said} {fixed(value)} bits for each byte of text it was not trained on"
    return f"{sentence}: {_listed(compared)}." if compared else f"{sentence}."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def bars(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the held-out bits per byte of the runs and of what they are compared with, most first."""
    found = [
        {"name": run.name if len(runs) > 1 else "this model", "value": run.measured("val_bpb"), "colour": colour}
        for run, colour in zip(runs, colours(runs), strict=True)
    ]
    if len({str(run.result.get("corpus_sha256")) for run in runs}) == 1:
        named = [("untrained", runs[0].measured("untrained_val_bpb")), *baselines(runs[0])]
        found += [{"name": name, "value": value, "colour": None} for name, value in named]
    found = sorted((bar for bar in found if is_finite(bar["value"])), key=lambda bar: -bar["value"])
    longest = max((bar["value"] for bar in found), default=0) or 1
    return [bar | {"text": fixed(bar["value"]), "width": f"{100 * bar['value'] / longest:.1f}"} for bar in found]


def key_figures(run: Run) -> Rows:
    """Return the few numbers that sum up a run."""
    return [
        ("Time", seconds(run.measured("seconds"))),
        ("Tokens", short(run.measured("tokens"))),
        ("Tokens per second", short(run.measured("tokens_per_second"))),
        ("Parameters", short(run.measured("params"))),
        ("Steps", number(run.measured("steps"))),
        ("Held-out loss", fixed(run.measured("val_loss"))),
    ]


def warnings(run: Run) -> list[str]:
    """Return what the run or its numbers warn of: each once, with how often it was said."""
    said: dict[str, int] = {}
    for event in run.of_kind("warning"):
        message = str(event.get("message", ""))
        said[message] = said.get(message, 0) + 1
    for message in proven_warnings(run):
        said.setdefault(message, 1)
    found = [message + (f" (said {times} times)" if times > 1 else "") for message, times in said.items() if message]
    # What the run said itself of a technique is not said again in other words.
    known = {message.partition(",")[0] for message in said}
    inferred = _without_effect(run) if not run.latest("proof") else []  # a run with a proof judged that itself
    inferred = [message for message in inferred if message.partition(",")[0] not in known]
    return [*run.problems, *found, *inferred, *_broken_numbers(run)]


def _without_effect(run: Run) -> list[str]:
    return [*_unclipped(run), *_never_short(run)]


def _never_short(run: Run) -> list[str]:
    name, full = run.setting("lengths.name"), run.setting("lengths.seq_len")
    lengths = run.series["seq_len"][np.isfinite(run.series["seq_len"])]
    if name in (None, "constant", "window") or not len(lengths) or (lengths != full).any():
        return []
    return [f"lengths={name} enabled, acted on 0 of {len(lengths):,} steps: every row had {full:,} tokens."]


def _unclipped(run: Run) -> list[str]:
    acted, of = clipped_steps(run)
    name = run.setting("clip.name")
    if of and acted == 0 and name not in (None, "none"):
        limits = " and ".join(
            f"{key} {number(run.setting(f'clip.{key}'))}"
            for key in ("max_norm", "max_value")
            if run.setting(f"clip.{key}") is not None
        )
        return [f"clip enabled, acted on 0 of {of:,} steps: {limits or name} was never reached."]
    return []


def _broken_numbers(run: Run) -> list[str]:
    found = []
    if not run.num_steps:
        found.append("No optimizer step is on record.")
    broken = int((~np.isfinite(run.series["loss"])).sum())
    if broken:
        found.append(f"The training loss was not a finite number on {broken:,} of {run.num_steps:,} steps.")
    guarded, overflowed = left_out_steps(run)
    if overflowed > 0.05 * max(run.num_steps, 1):
        found.append(f"{overflowed:,} of {run.num_steps:,} steps were skipped because their gradients overflowed.")
    if guarded:
        found.append(f"{guarded:,} of {run.num_steps:,} steps were left out by the guard; events.jsonl says why.")
    backs = run.of_kind("rollback")
    if backs:
        last = backs[-1]
        found.append(
            f"The run went back {'once' if len(backs) == 1 else f'{len(backs):,} times, the last time'} from step "
            f"{number(last.get('failed_at'))} to step {number(last.get('step'))}: {last.get('reason')}."
        )
    return found


def time_spent(run: Run) -> list[dict[str, str]]:
    """Return what the seconds of the run went into, the rest included."""
    phases = run.result.get("phases") or run.latest("phases")
    phases = phases if isinstance(phases, Mapping) else {}
    spent = {key: value for key, value in phases.items() if is_finite(value) and key not in ("step", "time", "attempt")}
    spent.pop("seconds", None)
    total = max(run.measured("seconds") or 0.0, sum(spent.values()))
    if total <= 0 or not spent:
        return []
    rest = total - sum(spent.values())
    named = {PHASES.get(key, key.capitalize()): value for key, value in spent.items() if value > 0}
    if rest > 0.002 * total:
        named["Everything else"] = rest
    return [
        {
            "name": name,
            "seconds": seconds(value),
            "share": percent(value / total),
            "width": f"{100 * value / total:.2f}",
        }
        for name, value in sorted(named.items(), key=lambda item: -item[1])
    ]


def samples(run: Run) -> list[dict[str, Any]]:
    """Return the texts that the model wrote, the newest first."""
    found = []
    for event in reversed(run.of_kind("sample")):
        text = str(event.get("text", ""))
        cut = f"\n… cut here; {len(text):,} characters in all" if len(text) > MAX_SAMPLE else ""
        found.append(
            {"step": event.get("step"), "prompt": str(event.get("prompt") or ""), "text": text[:MAX_SAMPLE] + cut}
        )
    return found


def data_facts(run: Run) -> Rows:
    """Return what the run was trained and judged on, with every replacement that reading it needed."""
    data = run.latest("start").get("data")
    known = dict(data) if isinstance(data, Mapping) else {}
    if not known and run.result.get("corpus_sha256"):
        known = {"corpus": corpus_name(run), "corpus_sha256": run.result["corpus_sha256"]}
    counts = known.pop("counts", None)
    order = [key for key in FACT_NAMES if key in known] + [key for key in known if key not in FACT_NAMES]
    rows = [
        (FACT_NAMES.get(key) or _label(key), byte_size(known[key]) if "bytes" in key else _plain(known[key]))
        for key in order
    ]
    if isinstance(counts, Mapping):
        rows += [(_label(kind), _counted(found)) for kind, found in counts.items() if found] or [
            ("Replaced", "nothing")
        ]
    return rows


def _counted(found: Any) -> str:
    """Return how often something was counted, and where first."""
    if not isinstance(found, Mapping):
        return _plain(found)
    places = found.get("places") or []
    return number(found.get("amount")) + (f" (first at {'; '.join(map(str, places))})" if places else "")


def model_facts(run: Run) -> Rows:
    """Return the shape of the model."""
    model = run.latest("start").get("model")
    leaves = flat(model) if isinstance(model, Mapping) else {}
    params = run.measured("params")
    rows = [("Parameters", number(params))] if params is not None else []
    return rows + [(_label(path), _plain(value)) for path, value in leaves.items() if path != "params"]


def environment_facts(run: Run) -> Rows:
    """Return the machine and the versions that the run had."""
    return [(_label(path), _plain(value)) for path, value in _environment(run).items()]


def _environment(run: Run) -> dict[str, Any]:
    environment = (run.latest("resume") or run.latest("start")).get("environment")
    return flat(environment) if isinstance(environment, Mapping) else {}


def _label(path: str) -> str:
    words = LABELS.get(path, path).removeprefix("num_").replace(".", " ").replace("_", " ")
    return words[:1].upper() + words[1:]


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    return number(value)


def replans(run: Run) -> list[dict[str, str]]:
    """Return how the number of steps was planned, and planned again, to end on a wall-clock budget."""
    return [
        {
            "step": number(event.get("step") or 0),
            "steps": number(event.get("total_steps")),
            "why": str(event.get("reason") or ("first plan" if event["kind"] == "plan" else "")),
        }
        for event in run.events
        if event.get("kind") in ("plan", "replan")
    ]


def compilation(run: Run) -> str:
    """Return whether the model was compiled, and why."""
    event = run.latest("compile")
    if not event:
        return ""
    return f"{'Compiled' if event.get('on') else 'Not compiled'}: {event.get('reason') or 'no reason noted'}."


def happenings(run: Run) -> Rows:
    """Return the story of the run in lines: what happened at which step."""
    lines = []
    for event in run.events:
        kind = str(event.get("kind", ""))
        if kind == "proof":  # a table of its own
            continue
        known = {k: v for k, v in event.items() if k not in UNTOLD}
        words = ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in known.items() if not isinstance(v, Mapping))
        step = event.get("step")
        step = f"step {step:,}" if isinstance(step, int) else ""
        lines.append((step, f"{kind}: {words[:300]}" if words else kind))
    return lines


def results_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row of results per run; the lowest held-out figure is marked."""
    values = [run.measured("val_bpb") for run in runs]
    best = min((v for v in values if is_finite(v)), default=None)
    return [
        {
            "name": run.name,
            "colour": colour,
            "status": run.status,
            "bpb": fixed(value),
            "is_best": value == best and is_finite(value),
            "loss": fixed(run.measured("val_loss")),
            "seconds": seconds(run.measured("seconds")),
            "tokens": short(run.measured("tokens")),
            "speed": short(run.measured("tokens_per_second")),
            "steps": number(run.measured("steps")),
            "params": short(run.measured("params")),
        }
        for run, value, colour in zip(runs, values, colours(runs), strict=True)
    ]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings and surroundings in which the runs are not alike, with each run's value."""
    columns = [
        {k: v for k, v in flat(run.recipe).items() if k != "out"}
        | {_label(k): v for k, v in _environment(run).items()}
        | {"Corpus SHA-256": run.result.get("corpus_sha256")}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return [
        (key, [_plain(column.get(key, UNKNOWN)) for column in columns])
        for key in keys
        if any(column.get(key) != columns[0].get(key) for column in columns)
    ]

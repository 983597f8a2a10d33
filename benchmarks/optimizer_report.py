"""The tables and verdicts that the optimizers' figures are read from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Figures = dict[str, Any]

TIME_BARS = {
    "Lion": 0.85,
    "Signum": 0.85,
    "AdEMAMix": 1.5,
    "ADOPT": 1.3,
    "ScheduleFreeAdamW": 1.3,
    "Sophia": 1.3,
    "MARS": 1.8,
    "Prodigy": 2.2,
}
STATE_BARS = {"Lion 8-bit": 1.1, "AdamW 8-bit": 2.1, "AdEMAMix 8-bit": 3.2}
TEMPORARY_BAR = 0.1
MATRIX_FAMILIES = ("Muon", "NorMuon", "SOAP", "SOAPMuon")
BARS_ARE_ON = "gpt"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table that also reads well in a terminal; the first column is aligned left, the rest right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def written(cells: list[str]) -> str:
        padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return "\n".join([written(header), rule, *(written(line) for line in lines[1:])])


def spread(found: Figures) -> str:
    """Return a ratio with its interval."""
    low, high = found["interval_95"]
    return f"{found['median']:.3g} ({low:.3g} to {high:.3g})"


def figures_table(rows: list[Figures]) -> str:
    """Return one list's figures; what could not be measured is named under the table."""
    header = ["optimizer", "x fused CPU (95 %)", "x fused wall", "CPU ms", "first step s", "state B/p", "temp B/p"]
    measured = [row for row in rows if row["status"] == "measured"]
    lines = [
        [
            f"{row['family']}: {row['label']}",
            spread(row["cpu_ratio"]),
            f"{row['wall_ratio']['median']:.3g}",
            f"{row['mean_cpu_ms']:.3g}",
            f"{row['first_step_s']:.2f}",
            f"{row['state_bytes_per_parameter']:.2f}",
            f"{row['temporary_bytes_per_parameter']:.2f}",
        ]
        for row in measured
    ]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            reasons.setdefault(row["status"], []).append(f"{row['family']}: {row['label']}")
    kept = [
        f"{row['family']}: {row['label']} {row['kept_outside_state_bytes_per_parameter']:.2f}"
        for row in measured
        if row["kept_outside_state_bytes_per_parameter"] > 0.05
    ]
    notes = [f"Not measured, {status} ({', '.join(names)})." for status, names in reasons.items()]
    worst = [
        f"{row['family']}: {row['label']} {row['worst_step_over_mean']:.2f}"
        for row in measured
        if "worst_step_over_mean" in row
    ]
    if worst:
        notes.append(f"Worst step over the mean: {', '.join(worst)}.")
    if kept:
        notes.append(f"Bytes per parameter kept after the first step outside the state: {', '.join(kept)}.")
    return "\n\n".join([table(header, lines), *notes])


def best_peers(against: list[Figures], list_name: str) -> list[Figures]:
    """Return, for each family of ours on a list, the comparison with the peer that does best against it."""
    best: dict[str, Figures] = {}
    for pair in against:
        if pair["list"] != list_name or pair["ours"] != "hasten" or not pair["peer"]:
            continue
        known = best.get(pair["family"])
        if known is None or pair["cpu_ratio"]["median"] > known["cpu_ratio"]["median"]:
            best[pair["family"]] = pair
    return list(best.values())


def judged(found: Figures | None, bar: float, *, between: str = "undecided") -> str:
    """Return ``pass``, ``fail``, ``missing``, or `between` where the interval spans the bar."""
    if found is None:
        return "missing"
    low, high = found["interval_95"]
    return "pass" if high <= bar else "fail" if low > bar else between


def judged_number(found: float | None, bar: float) -> str:
    """Return ``pass``, ``fail`` or ``missing`` for a figure without an interval."""
    return "missing" if found is None else "pass" if found <= bar else "fail"


def verdicts(result: Figures) -> list[Figures]:
    """Return one line per bar: what was asked, what was found, and whether it holds; none on families not measured."""
    families = {row["family"] for row in result["rows"]}
    broken = [row for row in result["rows"] if row["ours"] and row["status"].startswith("failed")]
    rows = [row for row in result["rows"] if row["ours"] and row["status"] == "measured"]
    plain = {row["family"]: row for row in rows if row["label"] == "hasten" and row["list"] == BARS_ARE_ON}
    lines = [
        _line(f"{family} <= {bar} x fused AdamW", (plain.get(family) or {}).get("cpu_ratio"), bar)
        for family, bar in TIME_BARS.items()
        if family in families
    ]
    if families.difference(MATRIX_FAMILIES):
        lines.append(_temporaries({family: row for family, row in plain.items() if family not in MATRIX_FAMILIES}))
    for name in dict.fromkeys(row["list"] for row in result["rows"]):
        lines.append(_no_slower(name, best_peers(result["against"], name)))
    pairs = {
        (pair["family"], pair["ours"], pair["other"]): pair["cpu_ratio"]
        for pair in result["against"]
        if pair["list"] == BARS_ARE_ON
    }
    for family, ours, other, bar in (
        ("Muon", "hasten", "torch", 0.8),
        ("Muon", "hasten", "torch, patched to float32", 0.8),
        ("SOAP", "hasten", "pytorch_optimizer", 0.55),
        ("SOAP", "hasten one-sided", "pytorch_optimizer", 0.2),
        ("SOAP", "hasten", "authors", 0.55),
        ("SOAP", "hasten one-sided", "authors", 0.2),
    ):
        if family not in families or (other == "authors" and (family, ours, other) not in pairs):
            continue
        name = family + ours.removeprefix("hasten").replace(" one-sided", " (one-sided)")
        lines.append(_line(f"{name} <= {bar} x {other}", pairs.get((family, ours, other)), bar))
    if "Muon" in families:
        lines.append(_singular_values(result["singular_values"]))
    soap = [row for row in rows if row["family"] == "SOAP" and row["list"] == BARS_ARE_ON]
    worst = {row["label"]: row["worst_step_over_mean"] for row in soap}
    for label in ("hasten", "hasten one-sided") if "SOAP" in families else ():
        found = worst.get(label)
        text = "-" if found is None else f"{found:.2f}"
        lines.append(
            {"bar": f"SOAP ({label}): worst step <= 2 x mean", "found": text, "verdict": judged_number(found, 2)}
        )
    for family, bar in STATE_BARS.items():
        if family not in families:
            continue
        found = (plain.get(family) or {}).get("state_bytes_per_parameter")
        text = "-" if found is None else f"{found:.3f}"
        lines.append(
            {"bar": f"{family}: state <= {bar} B/parameter", "found": text, "verdict": judged_number(found, bar)}
        )
    texts = dict.fromkeys(f"{row['family']} ({row['label']}, {row['list']})" for row in broken)
    done = "missing" if not rows and not broken else "fail" if broken else "pass"
    found = f"{len(rows)} measured, {len(broken)} failed"
    lines.append({"bar": "none of ours fails", "found": found, "verdict": done, "over": list(texts)})
    return lines


def _line(bar_text: str, found: Figures | None, bar: float) -> Figures:
    return {"bar": bar_text, "found": spread(found) if found else "-", "verdict": judged(found, bar)}


def _temporaries(plain: dict[str, Figures]) -> Figures:
    sizes = {family: row["temporary_bytes_per_parameter"] for family, row in plain.items()}
    over = [f"{family} {size:.2f}" for family, size in sizes.items() if size > TEMPORARY_BAR]
    found = f"at most {max(sizes.values()):.3f} in {len(sizes)} optimizers" if sizes else "-"
    verdict = judged_number(max(sizes.values(), default=None), TEMPORARY_BAR)
    return {"bar": f"element-wise temporaries <= {TEMPORARY_BAR} B/parameter", "found": found, "verdict": verdict} | {
        "over": over
    }


def _no_slower(list_name: str, pairs: list[Figures]) -> Figures:
    states = {pair["family"]: judged(pair["cpu_ratio"], 1.0, between="even") for pair in pairs}
    slower = [
        f"{pair['family']} {pair['cpu_ratio']['median']:.2f} x {pair['other']}"
        for pair in pairs
        if states[pair["family"]] == "fail"
    ]
    counts = {word: list(states.values()).count(word) for word in ("pass", "even", "fail")}
    found = f"{counts['pass']} faster, {counts['even']} even, {counts['fail']} slower"
    verdict = "missing" if not pairs else "fail" if slower else "pass"
    return {"bar": f"{list_name}: none slower than its best peer", "found": found, "verdict": verdict, "over": slower}


def _singular_values(found: list[Figures]) -> Figures:
    by_label = {line["label"]: line for line in found}
    bar = "Muon: singular values within 0.95 to 1.05"
    if "hasten" not in by_label:
        return {"bar": bar, "found": "-", "verdict": "missing"}
    smallest, largest = by_label["hasten"]["smallest"], by_label["hasten"]["largest"]
    verdict = "pass" if smallest >= 0.95 and largest <= 1.05 else "fail"
    return {"bar": bar, "found": f"{smallest:.3f} to {largest:.3f}", "verdict": verdict}


def verdict_table(lines: list[Figures]) -> str:
    """Return the verdicts as a table, with what is over a bar that many have to keep named under it."""
    cells = table(["bar", "found", "verdict"], [[line["bar"], line["found"], line["verdict"]] for line in lines])
    return "\n\n".join(
        [cells, *(f"{line['bar']}: not {', '.join(line['over'])}." for line in lines if line.get("over"))]
    )


def _load(run: Figures) -> str:
    loads = f"load average {run['load_at_start']:.1f} at its start, {run['load_at_end']:.1f} at its end"
    return f"{run['threads']} threads, {loads}."


def readme(result: Figures) -> str:
    """Return the page that stands beside ``result.json``."""
    lists, rows = result["lists"], result["rows"]
    parts = [
        "# What an optimizer step costs",
        "Figures in `result.json`, from",
        "\n".join(
            f"- `{run['command']}` at commit {run['commit']}, {run['date']}: {_load(run)}" for run in result["runs"]
        ),
        "## Verdicts",
        verdict_table(result["verdicts"]),
    ]
    for name, size in lists.items():
        parts.append(f"## {name}: {size['parameters']:,} parameters in {size['tensors']} tensors")
        parts.append(figures_table([row for row in rows if row["list"] == name]))
        best = best_peers(result["against"], name)
        if best:
            lines = [[pair["family"], pair["other"], spread(pair["cpu_ratio"])] for pair in best]
            parts.append(table(["hasten against", "its best peer", "CPU ratio (95 %)"], lines))
    if result["singular_values"]:
        parts.append("## Singular values of the first Muon update, Gaussian 256x512 gradients")
        lines = [
            [line["label"], f"{line['smallest']:.3f}", f"{line['largest']:.3f}", f"{line['inside_0.95_to_1.05']:.1%}"]
            for line in result["singular_values"]
        ]
        parts.append(table(["implementation", "smallest", "largest", "within 0.95 to 1.05"], lines))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"]
    parts += [
        "## How",
        METHOD,
        f"Machine: {machine['cpu']}, {machine['cores']} cores, vector instructions {machine['capability']}, device "
        f"{machine['device']}; Python {machine['python']}. Seeds: weights and gradients 0, bootstrap 0, matrices for "
        "singular values 1.",
        f"Versions: {versions}.",
        NOT_CONTROLLED,
    ]
    return "\n\n".join(parts) + "\n"


METHOD = """\
Every block of a candidate's steps stands next to a block of torch fused AdamW's in the same process (20 steps a block
on tiny, 4 on small, 1 on gpt and for SOAP), the order flipping from round to round; all candidates of a family take
turns, so that ours against a peer is paired by round too. A ratio is the median of the paired ratios of CPU-seconds of
all threads (on CUDA: device time between two events), its interval a bootstrap of that median (no more than a hint
where a slow family's rounds are few, see `pairs` in the figures); SOAP's are of sums over whole periods of ten steps.
CPU ms is the mean of a step. Random weights and gradients, the same at every step (SOAP: others at every step, of the
same kind, or its statistics would have the rank of one); decay 0.1 on matrices, none on vectors. Muon and SOAP get the
hidden matrices and fused AdamW the rest (peers: two optimizers stepped together; ours: one). First step: from building
the optimizer to the end of its first step, wall time, whatever compiled caches there are. State: all tensors in the
optimizer's state and groups, each storage once. Temporaries: the profiler's record of torch's CPU allocator during the
second step (SOAP: over a period; of the first step, less the state, where that took over ten seconds), highest sum of
allocations less releases; what C code takes from the system directly is not seen. pytorch_optimizer and schedulefree
are measured in their default multi-tensor form and with `foreach=False`. The former's SignSGD has no Nesterov term, its
SophiaH another estimate of curvature, made outside the step as ours is. "Patched" rows are no peers: they show what a
package could do with one function replaced; nor are "short sides": the SOAP authors' code with `max_precond_dim` at the
longest short side, one basis a matrix and two a square. After its last step every candidate's weights are checked: all
finite, every tensor moved."""

NOT_CONTROLLED = """\
Not controlled: other work on the machine, clock, cache and page state. Gradients do not change, or are noise (SOAP), so
that branches that depend on data (Prodigy's growth, clipping in ADOPT and MARS) take one course only. heavyball's first
steps compile for about a minute each, so it takes part only with `--heavyball`."""

"""The results of a study as tables to paste: Markdown, LaTeX, and CSV with the raw numbers."""

from __future__ import annotations

import csv
import io
import re

from hasten.errors import printable
from hasten.report import verdicts
from hasten.report.study import Arm, Study
from hasten.report.verdicts import EFFECTS, MINUS, change, mean, p_value, plain_percent, verdict
from hasten.report.wording import SPACE, UNKNOWN, byte_size, fixed, seconds

HEADS = ("Arm", "Verdict", "Bits per byte", "Change", "Time to loss", "Tokens to loss", "Time", "Memory", "Seeds", "p")
RAW = (
    "study", "arm", "against", "verdict", "effect", "mean", "low", "high", "level", "n", "p", "method", "censored",
    "verdict_p", "verdict_p_corrected", "mean_bits_per_byte", "sd_bits_per_byte",
)  # fmt: skip
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    MINUS: "$-$",
    UNKNOWN: "--",
    SPACE: "~",
    "…": r"\ldots{}",
    "±": r"$\pm$",
}


def markdown(study: Study) -> str:
    """Return a Markdown table, a row per arm, the base first."""
    lines = [f"| {' | '.join(HEADS)} |", f"|{'|'.join(['---', '---', *['---:'] * (len(HEADS) - 2)])}|"]
    lines += [f"| {' | '.join(map(_markdown_text, row))} |" for row in _rows(study)]
    return "\n".join([*lines, "", _markdown_text(_note(study)), ""])


def latex(study: Study) -> str:
    r"""Return a LaTeX table of the package booktabs, every text escaped."""
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{ll{'r' * (len(HEADS) - 2)}}}",
        r"\toprule",
        " & ".join(HEADS) + r" \\",
        r"\midrule",
        # "{}": a row that began with a bracket would be taken for the spacing of the one above.
        *("{}" + " & ".join(map(_latex_text, row)) + r" \\" for row in _rows(study)),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_latex_text(_note(study))}}}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


def raw(study: Study) -> str:
    """Return CSV with the raw numbers, one row per arm and effect; effects are relative, -0.05 is 5 % less."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(RAW)
    for arm in study.everyone:
        ends = [_exact(value) for value in (arm.p_raw, arm.p, arm.mean_bits_per_byte, arm.sd_bits_per_byte)]
        words = [_cell(text) for text in (study.name, arm.name, arm.against, arm.verdict)]
        if not arm.effects:
            writer.writerow([*words, "", "", "", "", "", arm.n, "", "", "", *ends])
        for key, effect in arm.effects.items():
            numbers = [_exact(value) for value in (effect.mean, effect.low, effect.high, study.level)]
            rest = [effect.n, _exact(effect.p), _cell(effect.method), effect.censored]
            writer.writerow([*words, _cell(key), *numbers, *rest, *ends])
    return stream.getvalue()


def _rows(study: Study) -> list[list[str]]:
    return [_row(arm, study) for arm in study.everyone]


def _row(arm: Arm, study: Study) -> list[str]:
    finished = [run for run in arm.runs if run.status == "finished"]
    memory = mean([run.memory_bytes for run in finished])
    spread = "" if arm.sd_bits_per_byte is None else f" ± {fixed(arm.sd_bits_per_byte)}"
    said = verdict(arm, study)
    words = {"base": "base", "none": said.meaning, "diverged": f"{said.word} {said.meaning}"}.get(
        arm.verdict, said.word
    )
    return [
        f"{arm.name}{verdicts.beside(arm, study)}",
        words,
        f"{fixed(arm.mean_bits_per_byte)}{spread}",
        change(arm.effects.get("bits_per_byte")),
        change(arm.effects.get("seconds_to_loss")),
        change(arm.effects.get("tokens_to_loss")),
        seconds(mean([run.train_seconds for run in finished])),
        UNKNOWN if memory is None else byte_size(memory),
        str(arm.n),
        p_value(arm.p),
    ]


def _note(study: Study) -> str:
    parts = [
        f"{study.name}: changes against {study.base.name} with {plain_percent(study.level)} intervals",
        study.method,
        f"correction: {study.correction}" if study.correction else "",
        f"budget of a run: {verdicts.budget(study)}" if study.budget else "",
        "" if study.complete and not study.runs_missing else "the study is not complete",
    ]
    return f"{'; '.join(part for part in parts if part)}. {EFFECTS['bits_per_byte']}: lower is better."


def _line(text: str) -> str:
    return " ".join(printable(text).split(" ")).replace("\n", " ").replace("\t", " ")


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~$#&!])", r"\\\1", _line(text))


def _latex_text(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in _line(text))


def _cell(text: str) -> str:
    """Return a text for a cell that no spreadsheet takes for a formula."""
    line = _line(text)
    return f"'{line}" if line[:1] in ("=", "+", "-", "@") else line


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)

"""A run folder that looks like a real language model's run, and a strict reader of the page about it."""

from __future__ import annotations

import html.parser
import math
from pathlib import Path

import numpy as np

from hasten.record import Record, RunFolder, write_result

RECIPE = """\
budget = "600"
seed = 0

[data]
train = "python"
vocab_size = 4096

[model]
name = "nano"

[optimizer]
name = "adamw"
lr = 0.003

[schedule]
name = "cosine"
warmup = "5%"
floor = 0.01

[clip]
name = "norm"
max_norm = 1.0

[precision]
name = "float32"
"""
START = {
    "environment": {"python": "3.11.9", "torch": "2.13.0", "cpu": "A CPU", "threads": 2, "devices": []},
    "command": "hasten train data=python budget=600",
    "model": {"vocab_size": 4096, "num_layers": 4, "width": 192, "tied": True, "rope_theta": 10000.0},
    "params": 2_557_824,
    "data": {
        "corpus": "python",
        "corpus_sha256": "9f" * 32,
        "tokenizer_sha256": "1c" * 32,
        "vocab_size": 4096,
        "counts": {"invalid UTF-8 bytes replaced by U+FFFD": {"amount": 3, "places": ["encodings/x.py byte 12"]}},
        "train_num_tokens": 3_812_344,
        "train_num_documents": 1_204,
        "train_source_bytes": 11_734_120,
        "val_num_tokens": 201_344,
        "val_num_documents": 64,
        "val_source_bytes": 612_345,
    },
}
SAMPLE = 'def read(self, size=-1):\n    """Read up to size bytes."""\n    return self._buffer[:size]\n'


def make_run(
    folder: Path,
    *,
    steps: int = 600,
    seed: int = 0,
    lr: float = 0.003,
    recipe: str = RECIPE,
    finished: bool = True,
    start: dict | None = None,
    sample: str = SAMPLE,
    scale: float = 1.0,
    max_norm: float = 1.0,
    broken_from: int | None = None,
) -> Path:
    """Write a run folder that looks like a real language model's run, through the record that real runs use."""
    folder.mkdir(parents=True, exist_ok=True)
    where = RunFolder(folder)
    where.recipe_path.write_text(recipe, encoding="utf-8")
    random = np.random.default_rng(seed)
    record = Record(where, 1)
    record.event("start", step=0, **(START if start is None else start))
    record.event("compile", step=0, on=False, reason="saves about 9 s of 170 s and costs about 60 s")
    record.event("untrained", step=0, val_loss=8.35, val_bpb=3.96, tokens=65_536)
    seconds, tokens, loss = 0.0, 0, 8.35
    for step in range(1, steps + 1):
        progress = step / steps
        factor = (
            progress / 0.05 if progress < 0.05 else 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95)) / 2
        )
        tokens += 8192
        speed = random.normal(27_600, 500) * (0.5 if step == 1 else 1)
        seconds += 8192 / speed
        loss = 2.55 + 3.9 * math.exp(-step / 45) + 1.9 * math.exp(-step / 6) + 0.35 * (1 - progress) - 60 * (lr - 0.003)
        is_broken = broken_from is not None and step >= broken_from
        norm = math.nan if is_broken else scale * (0.35 + 2.5 * math.exp(-step / 30)) * random.lognormal(0, 0.25)
        record.metric(
            step=step, loss=math.nan if is_broken else loss + random.normal(0, 0.06), lr=lr * factor, grad_norm=norm,
            clipped=norm > max_norm, skipped=False, loss_scale=1.0, seq_len=256, progress=progress, tokens=tokens,
            seconds=seconds, tokens_per_second=speed,
        )  # fmt: skip
        if step % max(1, steps // 10) == 0 and step < steps:
            record.event("evaluation", step=step, val_loss=loss + 0.05, val_bpb=(loss + 0.05) * 0.474, tokens=65_536,
                         whole=False, seconds=1.1)  # fmt: skip
            record.event("checkpoint", step=step, path=f"step-{step:08d}", seconds=0.2)
    if finished:
        record.event(
            "evaluation", step=steps, val_loss=loss + 0.05, val_bpb=(loss + 0.05) * 0.474, tokens=201_343, whole=True
        )
        record.event("sample", step=steps, prompt="", text=sample)
        phases = {"train": seconds, "data": 0.8, "evaluation": 9.9, "checkpoint": 2.1}
        result = {
            "status": "finished", "reason": "", "val_loss": loss + 0.05, "val_bpb": (loss + 0.05) * 0.474,
            "untrained_val_bpb": 3.96, "xz_bpb": 1.93, "unigram_bpb": 4.61, "tokens": tokens, "steps": steps,
            "total_steps": steps, "seconds": seconds + 13.4, "phases": phases, "tokens_per_second": tokens / seconds,
            "params": 2_557_824, "corpus": "python", "corpus_sha256": "9f" * 32,
        }  # fmt: skip
        record.event("phases", step=steps, **phases)
        write_result(where, result)
        record.event("finish", step=steps, **result)
    record.close()
    return folder


class Page(html.parser.HTMLParser):
    """Reads a page strictly: unbalanced tags, scripts and anything that a browser would fetch are remembered."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.parts, self.open, self.faults, self.ids = "", [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.faults += [f"<{tag}> never closed" for tag in self.open]
        self.faults += [f"id {one} twice" for one in set(self.ids) if self.ids.count(one) > 1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.look_at(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.look_at(tag, attrs)

    def look_at(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "base", "form"):
            self.faults.append(f"<{tag}>")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name.startswith("on") or (name in ("src", "href") and not value.startswith(("#", "data:"))):
                self.faults.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> out of place")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            self.parts.append(data)

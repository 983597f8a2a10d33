"""hasten's parts in a loop of your own: growing rows, groups, schedule, clipping. Runs in seconds on a CPU."""

from __future__ import annotations

import tempfile
import textwrap
from pathlib import Path

import torch

from hasten import optimizer
from hasten.clip import ClipNorm
from hasten.data import PackedBatches
from hasten.data.corpus import CorpusSpec
from hasten.data.lengths import LengthSchedule
from hasten.data.preparation import prepare
from hasten.model import Decoder, loss_sum, preset
from hasten.schedules import as_lr_scheduler, cosine, warmup

STEPS = 60


def main() -> None:
    """Train a tiny byte model on this library's own source and see the loss fall."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(Path(textwrap.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        data = prepare(CorpusSpec(train=(str(text),)), tokenizer="bytes", cache=Path(folder) / "cache")
        lengths = LengthSchedule(64, (16, 32, 64), growth="linear", share=0.5)
        batches = PackedBatches(data.train, seq_len=64, batch_tokens=512, lengths=lengths, total_steps=STEPS)

        model = Decoder(preset("nano", vocab_size=data.vocab_size, seq_len=64, num_layers=2), seed=0)
        opt = optimizer(model, "adamw", lr=5e-3, weight_decay=0.1)
        scheduler = as_lr_scheduler(opt, warmup(0.1) | cosine(floor=0.01), total_steps=STEPS)
        clip = ClipNorm(1.0)

        losses = []
        for batch in batches:
            num_targets = (batch["labels"] != -100).sum()
            loss = loss_sum(model, batch["input_ids"], batch["labels"], batch["document_ids"]) / num_targets
            loss.backward()
            clip(list(model.parameters()))
            opt.step()
            opt.zero_grad()
            scheduler.step()
            losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {STEPS} steps")
    assert losses[-1] < 0.7 * losses[0]


if __name__ == "__main__":
    main()

"""Muon for hidden matrices and AdamW for the rest, as one optimizer in a loop of your own. Seconds on a CPU."""

from __future__ import annotations

import torch
from torch import nn

import hasten
from hasten.schedules import as_lr_scheduler, cosine, warmup

STEPS, VOCABULARY, WIDTH, LENGTH = 80, 32, 64, 16


class Model(nn.Module):
    """Guesses the next token from the ones before: an embedding, two layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        mixed_BTC, _ = self.mix(self.embed(tokens_BT))
        return self.head(torch.relu(self.up(mixed_BTC)))


def main() -> None:
    """Learn to count in steps of three, see what is where, save in the middle and go on from there."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Model()
    optimizer = hasten.optimizer(model, "muon", lr=1e-2, total_steps=STEPS)
    scheduler = as_lr_scheduler(optimizer, warmup(0.05) | cosine(floor=0.01), STEPS)
    print(optimizer.plan(tokens_per_step=32 * LENGTH))
    losses = []
    for step in range(STEPS):
        first_B1 = torch.randint(VOCABULARY, (32, 1))
        tokens_BT = (first_B1 + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
        logits_BTV = model(tokens_BT[:, :-1])
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if step == STEPS // 2:  # one state for both rules
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f} in {STEPS} steps")
    assert losses[-1] < 0.1 * losses[0]
    assert {group["rule"] for group in optimizer.param_groups} == {"muon", "adamw"}


if __name__ == "__main__":
    main()

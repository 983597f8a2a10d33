"""Ours walk the path of every published package that follows the paper; packages that are missing are skipped."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from optimizer_problems import MATRICES, SHAPES, STEPS, Shapes, distance, noisy_quadratic, parameters, weights
from torch import nn

import hasten.optim

# Of a peer that does the same in the same format; MARS adds eps elsewhere; Muon of the peers is in bfloat16.
SAME, SOAP, EPS, BFLOAT16 = 1e-6, 1e-4, 5e-5, 3e-2


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package and what makes ours equal to it.

    Args:
        package: to import.
        name: of the class there.
        ours: name of our class.
        common: settings that both have by the same name.
        theirs: settings, or values, that only theirs has.
        mine: settings, or values, that only ours has.
        bound: largest relative distance of the two paths.
        shapes: of the weights.
        start: largest size of the first weights.
        as_group: whether settings of theirs go into a group.
    """

    package: str
    name: str
    ours: str
    common: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    mine: dict[str, Any] = field(default_factory=dict)
    bound: float = SAME
    shapes: Shapes = SHAPES
    start: float = 0.1
    as_group: bool = False

    def __str__(self) -> str:
        return "-".join([f"{self.package}.{self.name}", *(f"{key}={value}" for key, value in self.common.items())])


def installed(package: str) -> ModuleType:
    """Import `package`, or skip the test with the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(package, reason=f"{package} is not installed; pip install it to compare with it")


def muon(package: str, name: str, *settings: dict[str, Any], **more: Any) -> Peer:
    return Peer(package, name, name, *settings, bound=BFLOAT16, shapes=WIDE, **more)


LR = {"lr": 1e-2}
DECAY = {"lr": 1e-2, "weight_decay": 0.1}
LOOP = {"foreach": False}
WARM = {"warmup_steps": 30, **DECAY}
DISTANCE = {"d0": 1e-3, "weight_decay": 0.1}
WIDE: Shapes = ((16, 24), (8, 16), (1, 9), (8, 8))
AT_ONCE = {"spread_refresh": False}
KELLER = {"orthogonalization": "quintic", "compute_dtype": "float32"}
ORIGINAL = {"adjust_lr": "original", **KELLER}

PEERS = [
    Peer("lion_pytorch", "Lion", "Lion", DECAY),
    Peer("optimi", "Lion", "Lion", DECAY, LOOP | {"triton": False}),
    Peer("optimi", "AdamW", "AdamW", DECAY, LOOP | {"triton": False, "eps": 1e-8, "betas": (0.9, 0.999)}),
    Peer("pytorch_optimizer", "Lion", "Lion", DECAY, LOOP),
    Peer("pytorch_optimizer", "AdEMAMix", "AdEMAMix", {"alpha": 5.0, **DECAY}, LOOP | {"weight_decouple": True}),
    Peer(
        "pytorch_optimizer",
        "AdEMAMix",
        "AdEMAMix",
        {"alpha": 8.0, **LR},
        LOOP | {"weight_decouple": True, "t_alpha_beta3": 60},
        {"alpha_warmup": 60, "beta3_warmup": 60},
    ),
    Peer("pytorch_optimizer", "MARS", "MARS", DECAY, LOOP, bound=EPS, shapes=MATRICES),
    Peer("schedulefree", "AdamWScheduleFree", "ScheduleFreeAdamW", LR, LOOP),
    Peer("schedulefree", "AdamWScheduleFree", "ScheduleFreeAdamW", WARM, LOOP),
    Peer("schedulefree", "AdamWScheduleFree", "ScheduleFreeAdamW", {"r": 1.0, "weight_lr_power": 1.0, **LR}, LOOP),
    Peer("pytorch_optimizer", "ScheduleFreeAdamW", "ScheduleFreeAdamW", WARM, LOOP),
    Peer("prodigyopt", "Prodigy", "Prodigy", DISTANCE, start=0.0),
    Peer("prodigyopt", "Prodigy", "Prodigy", {"use_bias_correction": True, **DISTANCE}, start=0.0),
    Peer("prodigyopt", "Prodigy", "Prodigy", {"safeguard_warmup": True, "lr": 0.5, **DISTANCE}, start=0.0),
    Peer("pytorch_optimizer", "Prodigy", "Prodigy", DISTANCE, LOOP, start=0.0),
    Peer("pytorch_optimizer", "SOAP", "SOAP", DECAY, {}, AT_ONCE, bound=SOAP, shapes=WIDE),
    Peer(
        "pytorch_optimizer",
        "SOAP",
        "SOAP",
        {"precondition_frequency": 3, "shampoo_beta": 0.9, "correct_bias": False, **DECAY},
        {},
        AT_ONCE,
        bound=SOAP,
        shapes=((16, 16), (16, 24), (8, 8)),
    ),
    muon("torch.optim", "Muon", DECAY, {"adjust_lr_fn": "match_rms_adamw"}, KELLER),
    muon("torch.optim", "Muon", DECAY, {"adjust_lr_fn": "original"}, ORIGINAL),
    muon("pytorch_optimizer", "NorMuon", {"beta2": 0.9, **DECAY}, {"use_muon": True}, ORIGINAL, as_group=True),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_path_is_that_of_the_peer(peer: Peer) -> None:
    package = installed(peer.package)
    first = weights(peer.shapes, scale=peer.start)
    mine, others = parameters(first), parameters(first)
    ours = getattr(hasten.optim, peer.ours)(mine, **peer.common, **peer.mine)
    theirs = _build(getattr(package, peer.name), others, peer)
    gradients = noisy_quadratic(peer.shapes)
    for step in range(1, STEPS + 1):
        for p, q, g in zip(mine, others, gradients(step, [p.detach() for p in mine]), strict=True):
            p.grad, q.grad = g, g.clone()
        ours.step()
        theirs.step()
    assert distance(mine, others, first) <= peer.bound
    if peer.ours == "ScheduleFreeAdamW":
        ours.eval()
        theirs.eval()
        assert distance(mine, others, first) <= peer.bound


def _build(build: type[torch.optim.Optimizer], params: list[nn.Parameter], peer: Peer) -> torch.optim.Optimizer:
    if peer.as_group:
        return build([{"params": params, **peer.common, **peer.theirs}])
    optimizer = build(params, **peer.common, **peer.theirs)
    if peer.ours == "ScheduleFreeAdamW":
        optimizer.train()
    return optimizer


def test_a_missing_peer_is_skipped_with_a_reason() -> None:
    with pytest.raises(pytest.skip.Exception, match="no_such_optimizers is not installed"):
        installed("no_such_optimizers")

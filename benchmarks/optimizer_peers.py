"""The optimizers that are measured: ours and every peer's, by family, over three parameter lists shaped like a GPT."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import _muon

LR, DECAY = 1e-3, 0.1
OURS = "hasten.optim"
# Under this name the file with the SOAP authors' code is imported: it is on GitHub (nikhilvyas/SOAP), not on PyPI.
SOAP_AUTHORS = "soap_authors"


class Missing(Exception):
    """A candidate cannot be measured because its package or class is not there."""


@dataclass(frozen=True)
class ListShape:
    """A parameter list in the order a GPT's modules would give it.

    Args:
        name: what the tables call it.
        layers: blocks of qkv, proj, up, down and two norms.
        width: of the residual stream; the feed-forward part is four times as wide.
        rows: of embedding and head.
        positions: rows of a position embedding, which brings a norm and a head bias along; 0 for none.
        head_bias: whether the head has a bias.
    """

    name: str
    layers: int
    width: int
    rows: int
    positions: int = 0
    head_bias: bool = False

    def shapes(self) -> list[tuple[bool, tuple[int, ...]]]:
        """Return whether each tensor is a hidden matrix, with its shape."""
        d, hidden = self.width, []
        for _ in range(self.layers):
            hidden += [(False, (d,)), (True, (3 * d, d)), (True, (d, d))]
            hidden += [(False, (d,)), (True, (4 * d, d)), (True, (d, 4 * d))]
        positions = [(False, (self.positions, d)), (False, (d,))] if self.positions else []
        bias = [(False, (self.rows,))] if self.head_bias else []
        return [(False, (self.rows, d)), *positions, *hidden, (False, (d,)), (False, (self.rows, d)), *bias]


LISTS = {
    shape.name: shape
    for shape in (
        ListShape("tiny", layers=1, width=8, rows=16, head_bias=True),
        ListShape("small", layers=9, width=80, rows=1920, positions=64, head_bias=True),
        ListShape("gpt", layers=12, width=384, rows=8192),
    )
}


class Weights:
    """One candidate's own copy of a parameter list, with gradients that stay the same until others are asked for."""

    def __init__(self, shape: ListShape, device: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = shape.shapes()
        self.params = [nn.Parameter((torch.randn(size, generator=generator) * 0.02).to(device)) for _, size in shapes]
        self.grads = [(torch.randn(size, generator=generator) * 0.01).to(device) for _, size in shapes]
        self.hidden = [p for p, (is_hidden, _) in zip(self.params, shapes) if is_hidden]
        self.rest = [p for p, (is_hidden, _) in zip(self.params, shapes) if not is_hidden]
        self.turns = 0
        self.give_gradients()

    def give_gradients(self) -> None:
        """Point every parameter at its gradient again: some peers drop it in their step."""
        for parameter, grad in zip(self.params, self.grads):
            parameter.grad = grad

    def give_other_gradients(self) -> None:
        """Point every parameter at a gradient it has not had: somewhere in one pool of random numbers."""
        sizes = [p.numel() for p in self.params]
        pool = _pool(2 * max(sizes) + 1_000_003, self.params[0].device)
        starts = torch.randint(
            1_000_003 + max(sizes), (len(sizes),), generator=torch.Generator().manual_seed(self.turns)
        )
        self.turns += 1
        self.grads = [
            pool[start : start + size].view(p.shape) for p, size, start in zip(self.params, sizes, starts.tolist())
        ]
        self.give_gradients()


@functools.lru_cache(1)
def _pool(size: int, device: torch.device) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(2)) * 0.01).to(device)


def decayed(params: list[nn.Parameter], **extra: Any) -> list[dict[str, Any]]:
    """Return two groups, matrices with decay and vectors without, as everybody trains."""
    matrices, vectors = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": DECAY, **extra},
        {"params": vectors, "weight_decay": 0.0, **extra},
    ]


def fused_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return what everything is compared with: torch's fused AdamW."""
    return torch.optim.AdamW(decayed(params), lr=LR, fused=True)


def _all(cls: Any, weights: Weights, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    return [cls(decayed(weights.params), **settings)]


def _hidden_beside_adamw(cls: Any, weights: Weights, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    hidden = cls([{"params": weights.hidden, "weight_decay": DECAY}], **settings)
    return [hidden, fused_adamw(weights.rest)]


def _use_muon(cls: Any, weights: Weights, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    hidden = cls([{"params": weights.hidden, "weight_decay": DECAY, "use_muon": True}], **settings)
    return [hidden, fused_adamw(weights.rest)]


def _short_sides_beside_adamw(cls: Any, weights: Weights, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    # The nearest that the authors' code has to one side only: none longer than the short one (squares keep both).
    longest = max(min(p.shape) for p in weights.hidden)
    return _hidden_beside_adamw(cls, weights, {**settings, "max_precond_dim": longest})


def _our_groups(cls: Any, weights: Weights, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    hidden = {"params": weights.hidden, "weight_decay": DECAY}
    return [cls([hidden, *decayed(weights.rest, rule="adamw")], **settings)]


def _our_matrices(cls: Any, weights: Weights, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    matrices, vectors = decayed(weights.params)
    return [cls([matrices, {**vectors, "rule": "adamw"}], **settings)]


def _train_mode(cls: Any, weights: Weights, settings: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    (built,) = _all(cls, weights, settings)
    built.train()
    return [built]


def _sophia_h_first(optimizers: list[torch.optim.Optimizer], weights: Weights) -> None:
    # Handed an estimate once, so that it does not ask for one by a second backward pass.
    in_order = [p.grad for group in optimizers[0].param_groups for p in group["params"]]
    optimizers[0].step(hessian=[grad * grad for grad in in_order])


class Float32Muon(torch.optim.Muon):
    """torch's Muon with float32 products: without bfloat16 instructions its own are 20 to 30 times slower."""

    def step(self, closure: Any = None) -> Any:
        """Step with the orthogonalisation replaced."""
        kept, _muon._zeropower_via_newtonschulz = _muon._zeropower_via_newtonschulz, _newton_schulz_float32
        try:
            return super().step(closure)
        finally:
            _muon._zeropower_via_newtonschulz = kept


def _newton_schulz_float32(grad: torch.Tensor, coefficients: tuple, steps: int, eps: float) -> torch.Tensor:
    a, b, c = coefficients
    is_tall = grad.size(0) > grad.size(1)
    x = grad.T if is_tall else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


@dataclass(frozen=True)
class Candidate:
    """One implementation of one optimizer.

    Args:
        family: the optimizer; candidates of one family are measured side by side.
        label: whose it is, and which variant.
        module: where the class is.
        cls: name of the class.
        settings: its keyword arguments.
        build: makes the optimizers, one or two stepped together.
        first_step: the first step where it is another one.
        drops_gradients: whether its step sets gradients to None.
        does_less: whether it leaves out part of what the family's others do, and so is no peer.
    """

    family: str
    label: str
    module: str
    cls: str
    settings: Mapping[str, Any] = field(default_factory=lambda: {"lr": LR})
    build: Callable[[Any, Weights, Mapping[str, Any]], list[torch.optim.Optimizer]] = _all
    first_step: Callable[[list[torch.optim.Optimizer], Weights], None] | None = None
    drops_gradients: bool = False
    does_less: bool = False

    @property
    def is_ours(self) -> bool:
        """Return whether it is hasten's."""
        return self.module == OURS

    @property
    def is_peer(self) -> bool:
        """Return whether a package offers it; one that is patched here only shows what the package could do."""
        return self.module not in (OURS, __name__) and not self.does_less

    def find(self) -> Any:
        """Return the class.

        Raises:
            Missing: the package is not installed, or has no such class.
        """
        try:
            return getattr(importlib.import_module(self.module), self.cls)
        except ModuleNotFoundError as error:
            if self.is_ours:
                raise
            raise Missing(f"{error.name} is not installed") from error
        except AttributeError as error:
            raise Missing(f"{self.module} has no {self.cls}") from error

    def make(self, weights: Weights) -> list[torch.optim.Optimizer]:
        """Return its optimizers over `weights`."""
        return self.build(self.find(), weights, self.settings)


def _torch(family: str, *, variants: tuple[str, ...], cls: str = "", **settings: Any) -> list[Candidate]:
    flags = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return [
        Candidate(family, f"torch {name}", "torch.optim", cls or family, {"lr": LR, **settings, **flags[name]})
        for name in variants
    ]


def _kozistr(family: str, *, cls: str = "", **settings: Any) -> list[Candidate]:
    # Its multi-tensor form is the default; the loop is measured too, as it may be the faster one on a CPU.
    decoupled = {} if family == "AdamW" else {"weight_decouple": True}
    settings = {"lr": LR, **decoupled, **settings}
    build = _train_mode if family == "ScheduleFreeAdamW" else _all
    first = _sophia_h_first if family == "Sophia" else None
    forms = {"pytorch_optimizer": settings, "pytorch_optimizer for-loop": {**settings, "foreach": False}}
    return [
        Candidate(family, label, "pytorch_optimizer", cls or family, its, build, first) for label, its in forms.items()
    ]


def _heavyball(family: str, *, cls: str = "", build: Callable[..., Any] = _all, **settings: Any) -> Candidate:
    return Candidate(
        family, "heavyball", "heavyball", cls or family, {"lr": LR, **settings}, build, drops_gradients=True
    )


def _ours(family: str, label: str = "hasten", **settings: Any) -> Candidate:
    name = family.removesuffix(" 8-bit")
    builds = {
        **dict.fromkeys(("Muon", "NorMuon", "SOAP", "SOAPMuon"), _our_groups),
        "MARS": _our_matrices,
        "ScheduleFreeAdamW": _train_mode,
    }
    return Candidate(family, label, OURS, name, {"lr": LR, **settings}, builds.get(name, _all))


_FOREACH, _FUSED = ("for-loop", "foreach"), ("for-loop", "foreach", "fused")
_SOAP_PEER = {"betas": (0.95, 0.95), "precondition_frequency": 10}
# Under gradients that never change d would grow without end.
_PRODIGY = {"lr": 1.0, "growth_rate": 1.001}
_MOMENTUM = {"momentum": 0.9}

CANDIDATES: tuple[Candidate, ...] = (
    _ours("AdamW"),
    *_torch("AdamW", variants=_FUSED),
    Candidate("AdamW", "optimi", "optimi", "AdamW"),
    *_kozistr("AdamW"),
    _heavyball("AdamW"),
    _ours("Adam"),
    *_torch("Adam", variants=_FUSED),
    Candidate("Adam", "optimi", "optimi", "Adam"),
    _ours("SGD", **_MOMENTUM),
    *_torch("SGD", variants=_FUSED, **_MOMENTUM),
    Candidate("SGD", "optimi", "optimi", "SGD", {"lr": LR, **_MOMENTUM}),
    _ours("RMSprop"),
    *_torch("RMSprop", variants=_FOREACH),
    _heavyball("RMSprop"),
    _ours("Adafactor"),
    *_torch("Adafactor", variants=_FOREACH),
    _ours("Lion"),
    Candidate("Lion", "lion_pytorch", "lion_pytorch", "Lion"),
    Candidate("Lion", "optimi", "optimi", "Lion"),
    *_kozistr("Lion"),
    Candidate("Lion", "timm", "timm.optim", "Lion"),
    _ours("Signum"),
    *_kozistr("Signum", cls="SignSGD", momentum=0.95),
    _ours("AdEMAMix", alpha_warmup=1000, beta3_warmup=1000),
    *_kozistr("AdEMAMix", alpha=8.0, t_alpha_beta3=1000),
    _heavyball("AdEMAMix", alpha=8.0, alpha_warmup=1000, beta3_warmup=1000),
    Candidate("AdEMAMix", "bitsandbytes", "bitsandbytes.optim", "AdEMAMix"),
    _ours("ADOPT"),
    *_kozistr("ADOPT"),
    Candidate("ADOPT", "timm", "timm.optim", "Adopt"),
    _heavyball("ADOPT"),
    _ours("MARS"),
    *_kozistr("MARS", weight_decay_1d=0.0),
    Candidate("MARS", "timm", "timm.optim", "Mars"),
    _ours("ScheduleFreeAdamW"),
    Candidate("ScheduleFreeAdamW", "schedulefree", "schedulefree", "AdamWScheduleFree", build=_train_mode),
    Candidate(
        *("ScheduleFreeAdamW", "schedulefree for-loop", "schedulefree", "AdamWScheduleFree"),
        {"lr": LR, "foreach": False},
        _train_mode,
    ),
    *_kozistr("ScheduleFreeAdamW"),
    _heavyball("ScheduleFreeAdamW", cls="SFAdamW"),
    _ours("Prodigy", **_PRODIGY),
    Candidate("Prodigy", "prodigyopt", "prodigyopt", "Prodigy", _PRODIGY),
    *_kozistr("Prodigy", **_PRODIGY),
    _ours("Sophia"),
    *_kozistr("Sophia", cls="SophiaH", update_period=10**9),
    _ours("AdamW 8-bit", state_format="8bit"),
    Candidate("AdamW 8-bit", "bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    Candidate("AdamW 8-bit", "torchao", "torchao.optim", "AdamW8bit"),
    _ours("Lion 8-bit", state_format="8bit"),
    Candidate("Lion 8-bit", "bitsandbytes", "bitsandbytes.optim", "Lion8bit"),
    _ours("AdEMAMix 8-bit", state_format="8bit", alpha_warmup=1000, beta3_warmup=1000),
    Candidate("AdEMAMix 8-bit", "bitsandbytes", "bitsandbytes.optim", "AdEMAMix8bit"),
    _ours("Muon"),
    _ours("Muon", "hasten quintic", orthogonalization="quintic"),
    Candidate("Muon", "torch", "torch.optim", "Muon", build=_hidden_beside_adamw),
    Candidate("Muon", "torch, patched to float32", __name__, "Float32Muon", build=_hidden_beside_adamw),
    Candidate("Muon", "pytorch_optimizer", "pytorch_optimizer", "Muon", build=_use_muon),
    Candidate("Muon", "timm", "timm.optim", "Muon", build=_hidden_beside_adamw),
    _heavyball("Muon", build=_hidden_beside_adamw),
    _ours("NorMuon"),
    Candidate("NorMuon", "pytorch_optimizer", "pytorch_optimizer", "NorMuon", build=_use_muon),
    _ours("SOAP", precondition_frequency=10),
    _ours("SOAP", "hasten one-sided", precondition_frequency=10, one_sided=True),
    Candidate(
        *("SOAP", "pytorch_optimizer", "pytorch_optimizer", "SOAP"), {"lr": LR, **_SOAP_PEER}, _hidden_beside_adamw
    ),
    _heavyball(
        "SOAP",
        build=_hidden_beside_adamw,
        **_SOAP_PEER,
        merge_dims=False,
        max_precond_dim=10_000,
        use_precond_schedule=False,
    ),
    _ours("SOAPMuon"),
)


def soap_authors(path: Path) -> tuple[Candidate, ...]:
    """Return the SOAP authors' code, imported from a file, as candidates: both sides, and short sides only."""
    spec = importlib.util.spec_from_file_location(SOAP_AUTHORS, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--soap-reference {path} is no Python file; give the soap.py of github.com/nikhilvyas/SOAP.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[SOAP_AUTHORS] = module
    settings = {"lr": LR, **_SOAP_PEER}
    return (
        Candidate("SOAP", "authors", SOAP_AUTHORS, "SOAP", settings, _hidden_beside_adamw),
        Candidate(
            *("SOAP", "authors, short sides", SOAP_AUTHORS, "SOAP", settings, _short_sides_beside_adamw), does_less=True
        ),
    )


FAMILIES = tuple(dict.fromkeys(candidate.family for candidate in CANDIDATES))

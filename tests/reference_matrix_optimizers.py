"""Plain references of the optimizers that see a weight as a matrix, and of the polynomials they use."""

from __future__ import annotations

import math
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from reference_optimizers import Reference, State, average
from torch import Tensor

Quintic = tuple[float, float, float]


class SOAP(Reference):
    """Vyas et al., arXiv:2409.11321, Algorithm 3 as its authors run it: no update at the first gradient.

    The first moment stays in the weight's own basis, which is the same as turning it with every change of basis. With
    `one_sided` only the shortest dimension (the first of equal ones) has a basis; bases change `early` steps too soon.
    With `kl` the statistics are those of Lin et al., arXiv:2509.03378, with the constants of its authors' code.
    """

    defaults = {
        "lr": 3e-3,
        "betas": (0.95, 0.95),
        "shampoo_beta": None,
        "eps": 1e-8,
        "precondition_frequency": 10,
        "max_precond_dim": 10000,
        "one_sided": False,
        "early": 0,
        "kl": False,
        "correct_bias": True,
        "weight_decay": 0.01,
    }

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        updates = t - 1  # done before and with this one: the first gradient only gives the bases
        if updates:
            self.move(p, g, state, updates, s)
        beta = s.betas[1] if s.shampoo_beta is None else s.shampoo_beta
        products = {dim: self.whitened_product(g, dim, state, s) for dim in self.dims(p, s)}
        for dim, product in products.items():
            average(state, f"GG{dim}", product, beta)
            if updates and s.kl:
                q, lowest = state[f"Q{dim}"], max(10, min(len(product), 4000)) ** -2
                average(state, f"eigenvalues{dim}", (q * (product @ q)).sum(0), beta).clamp_(min=lowest)
        if not updates:
            for dim in products:
                state[f"Q{dim}"] = torch.linalg.eigh(state[f"GG{dim}"]).eigenvectors.flip(1)
                state[f"eigenvalues{dim}"] = p.new_full((p.shape[dim],), 0.1)
        elif (updates + s.early) % s.precondition_frequency == 0:
            self.refresh(p, state, s)

    def move(self, p: Tensor, g: Tensor, state: State, updates: int, s: SimpleNamespace) -> None:
        """Adam in the bases; eps is added before the bias correction, decay comes last."""
        direction = self.direction(g, state, s)
        correction = math.sqrt(1 - s.betas[1] ** updates) / (1 - s.betas[0] ** updates) if s.correct_bias else 1.0
        p.sub_(s.lr * correction * direction)
        p.mul_(1 - s.lr * s.weight_decay)

    def direction(self, g: Tensor, state: State, s: SimpleNamespace) -> Tensor:
        """Return Adam's direction in the bases, turned back, without bias correction."""
        m = average(state, "m", g, s.betas[0])
        v = average(state, "v", self.turn(g, state, s) ** 2, s.betas[1])
        return self.turn(self.turn(m, state, s) / (v.sqrt() + s.eps), state, s, back=True)

    def refresh(self, p: Tensor, state: State, s: SimpleNamespace) -> None:
        """One step of orthogonal iteration from the bases, sorted by what they catch; KL-SOAP's authors do not sort."""
        for dim in self.dims(p, s):
            gg, q = state[f"GG{dim}"], state[f"Q{dim}"]
            if not s.kl:
                order = (q * (gg @ q)).sum(0).argsort(descending=True)
                q = q[:, order]
                if "v" in state:
                    state["v"] = state["v"].index_select(dim, order)
            state[f"Q{dim}"] = torch.linalg.qr(gg @ q).Q

    def whitened_product(self, g: Tensor, dim: int, state: State, s: SimpleNamespace) -> Tensor:
        """Return ``g g^T`` along `dim`; for KL-SOAP a mean, of g divided by the root of the other eigenvalues."""
        if not s.kl:
            return unfolded(g, dim) @ unfolded(g, dim).T
        scale = g.shape[dim] / g.numel()
        for other in self.dims(g, s):
            if other != dim and f"Q{other}" in state:
                turned = torch.tensordot(g, state[f"Q{other}"], dims=([other], [0]))
                g = (turned / state[f"eigenvalues{other}"].sqrt()).movedim(-1, other)
        return scale * unfolded(g, dim) @ unfolded(g, dim).T

    def dims(self, p: Tensor, s: SimpleNamespace) -> list[int]:
        """Return the dimensions that have a basis; a vector has none."""
        if p.ndim < 2:
            return []
        candidates = [min(range(p.ndim), key=lambda dim: p.shape[dim])] if s.one_sided else range(p.ndim)
        return [dim for dim in candidates if p.shape[dim] <= s.max_precond_dim]

    def turn(self, tensor: Tensor, state: State, s: SimpleNamespace, back: bool = False) -> Tensor:
        """Return `tensor` in the bases, or from them."""
        for dim in self.dims(tensor, s):
            q = state[f"Q{dim}"]
            tensor = torch.tensordot(tensor, q.T if back else q, dims=([dim], [0])).movedim(-1, dim)
        return tensor


class Muon(Reference):
    """Jordan et al. 2024, with the scalings of arXiv:2502.16982 and Bernstein 2025; over the last two dimensions."""

    defaults = {
        "lr": 1e-3,
        "momentum": 0.95,
        "nesterov": True,
        "adjust_lr": "match_rms_adamw",
        "orthogonalization": "minimax",
        "ns_steps": 5,
        "weight_decay": 0.1,
    }

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        p.mul_(1 - s.lr * s.weight_decay)
        p.sub_(s.lr * scaling(p, s.adjust_lr) * self.direction(g, state, s))

    def direction(self, g: Tensor, state: State, s: SimpleNamespace) -> Tensor:
        """Return the orthogonalised momentum."""
        buffer = average(state, "b", g, s.momentum)
        mixed = (1 - s.momentum) * g + s.momentum * buffer if s.nesterov else buffer
        stack = mixed.reshape(-1, *mixed.shape[-2:])
        return torch.stack([orthogonalized(matrix, s.orthogonalization, s.ns_steps) for matrix in stack]).view_as(g)


class NorMuon(Muon):
    """Li et al., arXiv:2510.05491, Algorithm 1; the update keeps the norm that orthogonalisation gave it."""

    defaults = {**Muon.defaults, "beta2": 0.95}

    def direction(self, g: Tensor, state: State, s: SimpleNamespace) -> Tensor:
        whole = super().direction(g, state, s)
        rows = average(state, "rows", whole.square().mean(-1, keepdim=True), s.beta2)
        normed = whole / (rows.sqrt() + 1e-10)
        norms = whole.norm(dim=(-2, -1), keepdim=True), normed.norm(dim=(-2, -1), keepdim=True)
        return normed * norms[0] / (norms[1] + 1e-10)


class SOAPMuon(SOAP):
    """Vyas et al., "Improving SOAP using iterative whitening and Muon": SOAP's direction is made orthogonal."""

    defaults = {
        **SOAP.defaults,
        **{key: Muon.defaults[key] for key in ("lr", "adjust_lr", "orthogonalization", "ns_steps", "weight_decay")},
    }

    def move(self, p: Tensor, g: Tensor, state: State, updates: int, s: SimpleNamespace) -> None:
        direction = orthogonalized(self.direction(g, state, s), s.orthogonalization, s.ns_steps)
        p.mul_(1 - s.lr * s.weight_decay)
        p.sub_(s.lr * scaling(p, s.adjust_lr) * direction)


def unfolded(tensor: Tensor, dim: int) -> Tensor:
    """Return `tensor` as a matrix whose rows run along `dim`."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


def scaling(p: Tensor, name: str) -> float:
    """Return what a direction of unit singular values is multiplied by."""
    rows, columns = p.shape[-2:]
    return {
        "original": math.sqrt(max(1.0, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "rms_to_rms": math.sqrt(rows / columns),
    }[name]


def orthogonalized(matrix: Tensor, method: str, steps: int) -> Tensor:
    """Return `matrix` with its singular values sent through the polynomials of `method`."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=1e-30)
    if method == "minimax":
        x = x / (x @ x.T).norm().sqrt().clamp(min=1e-30)
    elif method == "polar_express":
        x = x / 1.02
    for a, b, c in polynomials(method, steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@lru_cache
def polynomials(method: str, steps: int) -> tuple[Quintic, ...]:
    """Return ``(a, b, c)`` of each step: Keller Jordan's, those of arXiv:2505.16932, or the widest within 2 % of 1.

    The published five of Polar Express are its Algorithm 1 from 0.001 on, with a safety factor of 1.02 in all but the
    last, and no interval narrower than 0.02 of its end.
    """
    if method == "quintic":
        return ((3.4445, -4.7750, 2.0315),) * steps
    if method == "polar_express":
        return (composed(1e-3, 1.0, 5, cushion=0.02, safety=1.02)[0] + ((1.875, -1.25, 0.375),) * steps)[:steps]
    low, high = 1e-9, 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if composed(middle, 1.01, steps, widen=1.01)[1] <= 0.02 else (middle, high)
    return composed(high, 1.01, steps, widen=1.01)[0]


def composed(
    low: float, high: float, steps: int, *, cushion: float = 0.0, safety: float = 1.0, widen: float = 1.0
) -> tuple[tuple[Quintic, ...], float]:
    """Return greedy best quintics from the interval [low, high], and how far from 1 the last one ends."""
    chosen = []
    for number in range(steps):
        a, b, c = best_quintic(max(low, cushion * high), high)
        if low < cushion * high:
            centre = sum(a * x + b * x**3 + c * x**5 for x in (low, high)) / 2
            a, b, c = a / centre, b / centre, c / centre
        if number + 1 < steps:
            a, b, c = a / safety, b / safety**3, c / safety**5
        chosen.append((a, b, c))
        least = a * low + b * low**3 + c * low**5
        low, high = least / widen, (2 - least) * widen
    return tuple(chosen), 1 - least


def best_quintic(low: float, high: float) -> Quintic:
    """Return the odd quintic nearest to 1 on [low, high], by exchange of the points of largest error."""
    points = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high])
    for _ in range(100):
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        points[1:3] = np.sqrt([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)])
    return float(a), float(b), float(c)

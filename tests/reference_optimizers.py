"""Plain references of the element-wise optimizers: one tensor at a time, as their papers state them.

They know nothing of the package, so that a test can step both and compare. Parameters may be float32 or float64.
The matrix optimizers are in `reference_matrix_optimizers`.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

Tensors = list[Tensor]
State = dict[str, Tensor]


class Reference:
    """What all references share: copies of the weights, one state and one step counter for each.

    Args:
        params: start weights; `params` of the object are copies that `step` updates in place.
        **settings: replace those of `defaults`.
    """

    defaults: dict[str, object] = {}

    def __init__(self, params: Tensors, **settings: object) -> None:
        unknown = settings.keys() - self.defaults.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {sorted(unknown)}")
        self.params = [p.detach().clone() for p in params]
        self.states: list[State] = [{} for _ in params]
        self.steps = [0 for _ in params]
        self.settings = SimpleNamespace(**{**self.defaults, **settings})

    def step(self, grads: list[Tensor | None]) -> None:
        """Update every weight that has a gradient; a weight's own steps count from 1."""
        for index, (p, g) in enumerate(zip(self.params, grads)):
            if g is not None:
                self.steps[index] += 1
                self.update(p, g.to(p.dtype), self.states[index], self.steps[index], self.settings)

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        """Apply step number `t` to one weight `p` with gradient `g`."""
        raise NotImplementedError


def kept(state: State, name: str, like: Tensor) -> Tensor:
    """Return a state tensor, zeros at the first call."""
    return state.setdefault(name, torch.zeros_like(like))


def average(state: State, name: str, value: Tensor, beta: float) -> Tensor:
    """Return the moving average ``beta * old + (1 - beta) * value`` from zero, after storing it."""
    state[name] = beta * kept(state, name, value) + (1 - beta) * value
    return state[name]


def adam_direction(g: Tensor, state: State, t: int, betas: tuple[float, float], eps: float) -> Tensor:
    """Return ``m_hat / (sqrt(v_hat) + eps)`` (Kingma & Ba, Algorithm 1)."""
    m_hat = average(state, "m", g, betas[0]) / (1 - betas[0] ** t)
    v_hat = average(state, "v", g * g, betas[1]) / (1 - betas[1] ** t)
    return m_hat / (v_hat.sqrt() + eps)


class AdamW(Reference):
    """Loshchilov & Hutter, arXiv:1711.05101, with torch's decay ``lr * weight_decay``."""

    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        p.mul_(1 - s.lr * s.weight_decay)
        p.sub_(s.lr * adam_direction(g, state, t, s.betas, s.eps))


class Adam(Reference):
    """Kingma & Ba, arXiv:1412.6980; decay is added to the gradient."""

    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        p.sub_(s.lr * adam_direction(g + s.weight_decay * p, state, t, s.betas, s.eps))


class SGD(Reference):
    """Heavy-ball or Nesterov momentum as torch has it: the buffer starts as the gradient, undamped."""

    defaults = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        g = g + s.weight_decay * p
        if s.momentum:
            state["b"] = g.clone() if t == 1 else s.momentum * state["b"] + (1 - s.dampening) * g
            g = g + s.momentum * state["b"] if s.nesterov else state["b"]
        p.sub_(s.lr * g)


class RMSprop(Reference):
    """Hinton's RMSprop, optionally centered (Graves, arXiv:1308.0850, eq. 38-41); eps outside the root."""

    defaults = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False, "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        g = g + s.weight_decay * p
        variance = average(state, "v", g * g, s.alpha)
        if s.centered:
            variance = variance - average(state, "mean", g, s.alpha) ** 2
        direction = g / (variance.sqrt() + s.eps)
        if s.momentum:
            direction = state["b"] = s.momentum * kept(state, "b", p) + direction
        p.sub_(s.lr * direction)


class Adafactor(Reference):
    """Shazeer & Stern, arXiv:1804.04235, Algorithm 4, with the variations that torch documents."""

    defaults = {"lr": 1e-2, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        eps1 = torch.finfo(p.dtype).eps if s.eps[0] is None else s.eps[0]
        beta = 1 - t**s.beta2_decay
        alpha = max(s.eps[1], p.square().mean().sqrt().item()) * min(s.lr, 1 / math.sqrt(t))
        p.mul_(1 - s.lr * s.weight_decay)
        if p.ndim > 1:
            rows = average(state, "rows", g.square().mean(-1, keepdim=True), beta)
            columns = average(state, "columns", g.square().mean(-2, keepdim=True), beta)
            variance = rows * columns / rows.mean(-2, keepdim=True).clamp(min=eps1)
        else:
            variance = average(state, "v", g * g, beta)
        direction = g / variance.clamp(min=eps1**2).sqrt()
        p.sub_(alpha * direction / max(1.0, direction.square().mean().sqrt().item() / s.d))


class Lion(Reference):
    """Chen et al., arXiv:2302.06675, Algorithm 2."""

    defaults = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        m = kept(state, "m", p)
        p.mul_(1 - s.lr * s.weight_decay)
        p.sub_(s.lr * torch.sign(s.betas[0] * m + (1 - s.betas[0]) * g))
        average(state, "m", g, s.betas[1])


class Signum(Reference):
    """Bernstein et al., arXiv:1802.04434, with a heavy-ball buffer as arXiv:2509.01440 trains it."""

    defaults = {"lr": 1e-4, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        state["b"] = s.momentum * kept(state, "b", p) + g
        p.mul_(1 - s.lr * s.weight_decay)
        p.sub_(s.lr * torch.sign(g + s.momentum * state["b"] if s.nesterov else state["b"]))


class AdEMAMix(Reference):
    """Pagliardini et al., arXiv:2409.03137, Algorithm 1 and the two warm-ups of its appendix.

    The authors' code adds 1e-8 to decay rates before their logarithm: half-lives of 7000 steps come out 0.01 % longer.
    """

    defaults = {
        "lr": 1e-3,
        "betas": (0.9, 0.999, 0.9999),
        "alpha": 8.0,
        "alpha_warmup": None,
        "beta3_warmup": None,
        "eps": 1e-8,
        "weight_decay": 0.0,
    }

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        beta1, beta2, beta3 = s.betas
        alpha = s.alpha * min(1.0, t / s.alpha_warmup) if s.alpha_warmup else s.alpha
        if s.beta3_warmup and t < s.beta3_warmup:  # half-lives go linearly from that of beta1 to that of beta3
            first, last = (math.log(0.5) / math.log(beta) for beta in (beta1, beta3))
            share = t / s.beta3_warmup
            beta3 = 0.5 ** (1 / ((1 - share) * first + share * last))
        fast = average(state, "m1", g, beta1) / (1 - beta1**t)
        slow = average(state, "m2", g, beta3)
        v_hat = average(state, "v", g * g, beta2) / (1 - beta2**t)
        p.sub_(s.lr * ((fast + alpha * slow) / (v_hat.sqrt() + s.eps) + s.weight_decay * p))


class ADOPT(Reference):
    """Taniguchi et al., arXiv:2411.02853, Algorithm 2 with the clipping of its later version."""

    defaults = {"lr": 1e-3, "betas": (0.9, 0.9999), "eps": 1e-6, "clip_exponent": 0.25, "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        if t == 1:
            state["v"] = g * g
            return
        p.mul_(1 - s.lr * s.weight_decay)
        normed = g / state["v"].sqrt().clamp(min=s.eps)
        limit = (t - 1) ** s.clip_exponent
        p.sub_(s.lr * average(state, "m", normed.clamp(-limit, limit), s.betas[0]))
        average(state, "v", g * g, s.betas[1])


class MARS(Reference):
    """Yuan et al., arXiv:2411.10438, Algorithm 2 (MARS-AdamW), with the last gradient for its second term."""

    defaults = {"lr": 3e-3, "betas": (0.95, 0.99), "gamma": 0.025, "eps": 1e-8, "weight_decay": 0.0}

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        c = g + s.gamma * s.betas[0] / (1 - s.betas[0]) * (g - kept(state, "last", p))
        c = c / max(1.0, c.norm().item())
        state["last"] = g.clone()
        p.mul_(1 - s.lr * s.weight_decay)
        p.sub_(s.lr * adam_direction(c, state, t, s.betas, s.eps))


class ScheduleFreeAdamW(Reference):
    """Defazio et al., arXiv:2405.15682, Algorithm 1: `params` are y; x and z are kept beside them.

    The step number, the sum of weights and the largest learning rate belong to all parameters together, but the squared
    gradient of a weight is corrected for its own steps (the authors' code: for all, which counts some it never had).
    """

    defaults = {
        "lr": 2.5e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "warmup_steps": 0,
        "r": 0.0,
        "weight_lr_power": 2.0,
        "weight_decay": 0.0,
    }

    def __init__(self, params: Tensors, **settings: object) -> None:
        super().__init__(params, **settings)
        self.x = [p.clone() for p in self.params]
        self.z = [p.clone() for p in self.params]
        self.total_steps, self.weight_sum, self.max_lr = 0, 0.0, 0.0

    def step(self, grads: list[Tensor | None]) -> None:
        s = self.settings
        self.total_steps += 1
        k = self.total_steps
        lr = s.lr * min(1.0, k / s.warmup_steps) if s.warmup_steps else s.lr
        self.max_lr = max(lr, self.max_lr)
        weight = k**s.r * self.max_lr**s.weight_lr_power
        self.weight_sum += weight
        share = weight / self.weight_sum if self.weight_sum else 0.0
        for index, (y, g, x, z) in enumerate(zip(self.params, grads, self.x, self.z)):
            if g is None:
                continue
            self.steps[index] += 1
            g = g.to(y.dtype)
            v_hat = average(self.states[index], "v", g * g, s.betas[1]) / (1 - s.betas[1] ** self.steps[index])
            z.sub_(lr * (g / (v_hat.sqrt() + s.eps) + s.weight_decay * y))
            x.copy_((1 - share) * x + share * z)
            y.copy_((1 - s.betas[0]) * z + s.betas[0] * x)

    def averaged(self) -> Tensors:
        """Return x, the weights to evaluate."""
        return self.x


class Prodigy(Reference):
    """Mishchenko & Defazio, arXiv:2306.06101, Algorithm 4, with one distance `d` for all parameters."""

    defaults = {
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "beta3": None,
        "eps": 1e-8,
        "d0": 1e-6,
        "d_coef": 1.0,
        "growth_rate": math.inf,
        "use_bias_correction": False,
        "safeguard_warmup": False,
        "weight_decay": 0.0,
    }

    def __init__(self, params: Tensors, **settings: object) -> None:
        super().__init__(params, **settings)
        self.d = self.max_d = self.settings.d0
        self.numerator, self.total_steps = 0.0, 0

    def step(self, grads: list[Tensor | None]) -> None:
        s, d, d0 = self.settings, self.d, self.settings.d0
        beta1, beta2 = s.betas
        beta3 = math.sqrt(beta2) if s.beta3 is None else s.beta3
        self.total_steps += 1
        k = self.total_steps
        scale = math.sqrt(1 - beta2**k) / (1 - beta1**k) if s.use_bias_correction else 1.0
        lr = d * s.lr * scale
        self.numerator *= beta3
        denominator = 0.0
        for p, g, state in zip(self.params, grads, self.states):
            if g is None:
                continue
            g = g.to(p.dtype)
            start = state.setdefault("start", p.clone())
            self.numerator += d / d0 * lr * (g * (start - p)).sum(dtype=torch.float64).item()
            state["m"] = beta1 * kept(state, "m", p) + (1 - beta1) * d * g
            state["v"] = beta2 * kept(state, "v", p) + (1 - beta2) * d**2 * g * g
            state["s"] = beta3 * kept(state, "s", p) + d / d0 * (d if s.safeguard_warmup else lr) * g
            denominator += state["s"].abs().sum(dtype=torch.float64).item()
        if not denominator:
            return
        estimate = s.d_coef * self.numerator / denominator
        self.max_d = max(self.max_d, estimate)
        self.d = min(self.max_d, max(d, estimate if d == d0 else d) * s.growth_rate)
        for p, g, state in zip(self.params, grads, self.states):
            if g is not None:
                p.mul_(1 - lr * s.weight_decay)
                p.sub_(lr * state["m"] / (state["v"].sqrt() + self.d * s.eps))


class Sophia(Reference):
    """Liu et al., arXiv:2305.14342, Algorithm 3 with the Gauss-Newton-Bartlett estimate (Sophia-G)."""

    defaults = {
        "lr": 1e-4,
        "betas": (0.965, 0.99),
        "rho": 0.04,
        "batch_tokens": 5120,
        "estimate_every": 10,
        "weight_decay": 0.1,
    }

    def update(self, p: Tensor, g: Tensor, state: State, t: int, s: SimpleNamespace) -> None:
        m = average(state, "m", g, s.betas[0])
        curvature = s.rho * s.batch_tokens * kept(state, "h", p) + 1e-15
        p.mul_(1 - s.lr * s.weight_decay)
        p.sub_(s.lr * torch.sign(m) * (m.abs() / curvature).clamp(max=1.0))

    def estimate(self, grads: list[Tensor | None]) -> None:
        """Take the gradients of the loss over labels sampled from the model into the curvature."""
        for state, g, p in zip(self.states, grads, self.params):
            if g is not None:
                average(state, "h", g.to(p.dtype) ** 2, self.settings.betas[1])

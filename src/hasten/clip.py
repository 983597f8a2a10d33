"""Gradient clipping as values: by global norm, by value, by what is usual, or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.sharding import anywhere, local_parts, total_norm, unit_norms

# What a norm may be above its limit by and still count as held: rounding, in whatever format the gradients are.
SLACK = 1.001
# What a deviation of norms counts as at least, relative to their mean: more than float32 rounds.
RELATIVE_EPS = 1e-6


@dataclass(frozen=True)
class ClipReport:
    """What a clip saw and did; both tensors are 0-d and stay on the device, so nothing waits for it.

    `norm` is the global norm before anything was changed; `clipped` says whether anything was.
    """

    norm: Tensor
    clipped: Tensor


class Clip(Protocol):
    """Changes the ``.grad`` of parameters in place and reports; parameters without a gradient are left alone."""

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport: ...

    @property
    def limit(self) -> float:
        """The largest global norm that is left as it is; infinite where the norm is not what counts."""
        ...

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return whether the gradients are within what the clip allows, to a thousandth: 0-d, on their device."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Return what the clip remembers of the steps before, for a checkpoint; empty where it remembers nothing."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        ...


class _Forgetful:
    """The state of a clip that looks at one step alone: none."""

    def state_dict(self) -> dict[str, float]:
        """Return nothing: every step is clipped by itself."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take nothing."""


@dataclass(frozen=True)
class NoClip(_Forgetful):
    """Leaves gradients as they are and still reports their norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> NoClip()([weight]).norm.item(), weight.grad.tolist()
        (5.0, [3.0, 4.0])
    """

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        norm = total_norm(_gradients(parameters))
        return ClipReport(norm, torch.zeros((), dtype=torch.bool, device=norm.device))

    @property
    def limit(self) -> float:
        """Infinite: nothing is too large."""
        return math.inf

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return true: everything is allowed."""
        gradients = _gradients(parameters)
        return torch.ones((), dtype=torch.bool, device=gradients[0].device if gradients else None)


@dataclass(frozen=True)
class ClipNorm(_Forgetful):
    """Scales all gradients by ``min(1, max_norm / norm)``, where norm is over all of them together.

    Equal to `torch.nn.utils.clip_grad_norm_`. A norm that is not finite spreads to every gradient: the guard, not the
    clip, decides what to do with such a step. Source: Pascanu et al., arXiv:1211.5063.

    Args:
        max_norm: largest global 2-norm, finite, above 0.

    Raises:
        RecipeError: out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> report = ClipNorm(1.0)([weight])
        >>> report.norm.item(), report.clipped.item(), round(weight.grad.norm().item(), 4)
        (5.0, True, 1.0)
    """

    max_norm: float

    def __post_init__(self) -> None:
        _check("max_norm", self.max_norm)

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        gradients = _gradients(parameters)
        norm = total_norm(gradients)
        _scale(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))  # the 1e-6 is torch's
        return ClipReport(norm, norm > self.max_norm)

    @property
    def limit(self) -> float:
        """`max_norm`."""
        return self.max_norm

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return whether the norm is at most `max_norm`, to a thousandth."""
        return total_norm(_gradients(parameters)) <= self.max_norm * SLACK


@dataclass(frozen=True)
class ClipValue(_Forgetful):
    """Clamps every element of every gradient to [-max_value, max_value].

    Equal to `torch.nn.utils.clip_grad_value_`: an infinite element becomes `max_value`, one that is not a number stays.

    Args:
        max_value: largest absolute value of an element, finite, above 0.

    Raises:
        RecipeError: out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([-3.0, 0.5])
        >>> ClipValue(1.0)([weight]).clipped.item(), weight.grad.tolist()
        (True, [-1.0, 0.5])
    """

    max_value: float

    def __post_init__(self) -> None:
        _check("max_value", self.max_value)

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        gradients = _gradients(parameters)
        norm = total_norm(gradients)
        largest = total_norm(gradients, norm_type=float("inf"))
        for gradient in local_parts(gradients):
            gradient.clamp_(-self.max_value, self.max_value)
        return ClipReport(norm, largest > self.max_value)

    @property
    def limit(self) -> float:
        """Infinite: elements count, and not the norm."""
        return math.inf

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return whether every element is at most `max_value`, to a thousandth."""
        largest = total_norm(_gradients(parameters), norm_type=float("inf"))
        return largest <= self.max_value * SLACK


@dataclass(frozen=True)
class ClipBoth(_Forgetful):
    """Clamps elements first, then scales what is left to the norm: `ClipValue`, then `ClipNorm`.

    Args:
        max_norm: largest global 2-norm after clamping, finite, above 0.
        max_value: largest absolute value of an element, finite, above 0.

    Raises:
        RecipeError: out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([-9.0, 4.0])
        >>> report = ClipBoth(max_norm=1.0, max_value=4.0)([weight])
        >>> [round(g, 4) for g in weight.grad.tolist()]  # clamped to (-4, 4), then to length 1
        [-0.7071, 0.7071]
    """

    max_norm: float
    max_value: float

    def __post_init__(self) -> None:
        _check("max_norm", self.max_norm)
        _check("max_value", self.max_value)

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        by_value = ClipValue(self.max_value)(parameters)
        by_norm = ClipNorm(self.max_norm)(parameters)
        return ClipReport(by_value.norm, by_value.clipped | by_norm.clipped)

    @property
    def limit(self) -> float:
        """`max_norm`; a norm above it is clipped, by value if not by norm."""
        return self.max_norm

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return whether norm and elements are within both limits, to a thousandth."""
        return ClipValue(self.max_value).holds(parameters) & ClipNorm(self.max_norm).holds(parameters)


@dataclass(frozen=True)
class AGC(_Forgetful):
    """Scales the gradient of every unit by ``min(1, clipping * max(|w|, eps) / |g|)``, w being its weights: adaptive.

    A unit is a row of a matrix (all that leads to one output; of an embedding one token), the first index of a tensor
    of more dimensions, and the whole of a vector. The gradients of other units stay as they are, so the direction of
    the whole changes. A unit that is not finite stays as it is: the guard, not the clip, judges such a step.

    Source: Brock et al., arXiv:2102.06171, section 4. There the last layer is left out; here the head is clipped too,
    because a clip is given parameters and not their names.

    Args:
        clipping: largest norm of a unit's gradient relative to its weights', finite, above 0.
        eps: what the norm of weights counts as at least, so that weights of zero can move; finite, above 0.

    Raises:
        RecipeError: out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        >>> weight.grad = torch.tensor([[0.0, 1.0], [0.01, 0.0]])
        >>> AGC(clipping=0.1, eps=1e-3)([weight]).clipped.item(), weight.grad.tolist()
        (True, [[0.0, 0.5], [0.009999999776482582, 0.0]])
    """

    clipping: float
    eps: float

    def __post_init__(self) -> None:
        _check("clipping", self.clipping)
        _check("eps", self.eps)

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        gradients = _gradients(parameters)
        norm = total_norm(gradients)
        clipped = torch.zeros((), dtype=torch.bool, device=norm.device)
        for gradient, size, most in self._limits(parameters):
            is_above = (size > most) & size.isfinite()
            gradient.mul_(torch.where(is_above, most / size, 1.0))
            clipped = clipped | is_above.any().to(norm.device)
        return ClipReport(norm, anywhere(clipped, gradients))

    @property
    def limit(self) -> float:
        """Infinite: units count, and not the norm of all."""
        return math.inf

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return whether every unit is within its limit, to a thousandth."""
        beyond = [(size > most * SLACK).any() for _, size, most in self._limits(parameters)]
        if not beyond:
            return torch.ones((), dtype=torch.bool)
        return ~anywhere(torch.stack([held.to(beyond[0].device) for held in beyond]).any(), _gradients(parameters))

    def _limits(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what this process holds of every gradient, how long it is in each unit, and how long it may be."""
        moved = [parameter for parameter in parameters if parameter.grad is not None]
        gradients, weights = _gradients(moved), [parameter.detach() for parameter in moved]
        for gradient, size, weight in zip(local_parts(gradients), unit_norms(gradients), unit_norms(weights)):
            yield gradient, size, self.clipping * weight.clamp(min=self.eps)


class ZClip:
    """Scales all gradients down to what is usual where their norm is not: its mean and variance are remembered.

    With mean m and standard deviation s of the norms before, a norm g of ``z = (g - m) / s > threshold`` becomes
    ``m + s * threshold**2 / z``: the further away it is, the closer it comes to the mean. Then
    ``m = alpha * m + (1 - alpha) * g`` with the new g, and so the variance, of ``(g - m)**2`` with the new m. The first
    `warmup_steps` norms are taken as they come, for the first m and s. A norm that is not finite is neither clipped nor
    remembered: the guard, not the clip, decides what to do with such a step.

    Source: Kumar et al., arXiv:2504.02507, section 3 (reciprocal clipping). Here s counts as a millionth of m more, so
    that rounding is no spike where all norms are equal; the authors' code adds 1e-6, and clips to a norm of 1 besides.

    Args:
        threshold: deviations above the mean that are left as they are, finite, above 0.
        alpha: share of mean and variance that is kept at each step, in (0, 1).
        warmup_steps: steps before the first that may be clipped, at least 2.

    Raises:
        RecipeError: out of range.

    Example:
        >>> clip, weight = ZClip(threshold=2.5, alpha=0.97, warmup_steps=4), torch.nn.Parameter(torch.zeros(1))
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 100.0):
        ...     weight.grad = torch.tensor([norm])
        ...     report = clip([weight])
        >>> report.clipped.item(), round(weight.grad.item(), 2)
        (True, 1.0)
    """

    def __init__(self, threshold: float, alpha: float, warmup_steps: int) -> None:
        _check("threshold", threshold)
        if not 0 < alpha < 1:
            raise RecipeError(f"clip.alpha={alpha} is no share to keep; give a number above 0 and below 1.")
        if warmup_steps < 2:
            raise RecipeError(f"clip.warmup_steps={warmup_steps} shows no deviation; give at least 2.")
        self.threshold, self.alpha, self.warmup_steps = threshold, alpha, warmup_steps
        self.load_state_dict({"seen": 0.0, "mean": 0.0, "variance": 0.0})

    def __repr__(self) -> str:
        return f"ZClip(threshold={self.threshold}, alpha={self.alpha}, warmup_steps={self.warmup_steps})"

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        gradients = _gradients(parameters)
        norm = total_norm(gradients)
        self._move(norm.device)
        size = norm.float()
        deviation = self._variance.sqrt() + RELATIVE_EPS * self._mean
        z = (size - self._mean) / deviation
        clipped = size.isfinite() & (self._seen >= self.warmup_steps) & (z > self.threshold)
        usual = torch.where(clipped, self._mean + deviation * self.threshold**2 / z, size)
        self._allowed = torch.where(clipped, usual, math.inf)
        scale = torch.where(clipped, usual / size, 1.0)
        _scale(gradients, scale)
        self._remember(usual)
        return ClipReport(norm, clipped)

    @property
    def limit(self) -> float:
        """Infinite: the limit of a step depends on the steps before, and is on the device."""
        return math.inf

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return whether the norm is at most what the last step was allowed, to a thousandth."""
        norm = total_norm(_gradients(parameters))
        return norm <= self._allowed.to(norm.device) * SLACK

    def state_dict(self) -> dict[str, float]:
        """Return how many norms were remembered, their mean and their variance; reading them waits for the device."""
        return {"seen": float(self._seen), "mean": float(self._mean), "variance": float(self._variance)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self._seen, self._mean, self._variance = (torch.tensor(state[name]) for name in ("seen", "mean", "variance"))
        self._allowed = torch.tensor(math.inf)

    def _move(self, device: torch.device) -> None:
        """Bring the state to where the norms are; that waits, once."""
        if self._mean.device != device:
            self._seen, self._mean, self._variance = (x.to(device) for x in (self._seen, self._mean, self._variance))

    def _remember(self, size: Tensor) -> None:
        """Take a norm into mean and variance: into plain ones (Welford's way) in the warm-up, then into moving ones."""
        is_known = size.isfinite()
        is_warm = self._seen >= self.warmup_steps
        seen = self._seen + 1
        kept = torch.where(is_warm, self.alpha, 1 - 1 / seen)
        mean = kept * self._mean + (1 - kept) * size
        warming = self._variance + ((size - self._mean) * (size - mean) - self._variance) / seen
        moving = self.alpha * self._variance + (1 - self.alpha) * (size - mean) ** 2
        self._variance = torch.where(is_known, torch.where(is_warm, moving, warming), self._variance)
        self._mean = torch.where(is_known, mean, self._mean)
        self._seen = torch.where(is_known, seen, self._seen)


def _scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in local_parts(list(gradients)):
        by_device.setdefault(gradient.device, []).append(gradient)
    for device, held in by_device.items():
        torch._foreach_mul_(held, factor.to(device))


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _check(name: str, value: float) -> None:
    if not value > 0 or value == float("inf"):
        raise RecipeError(f"clip.{name}={value} cannot clip; give a finite number above 0, or clip=none.")


CLIPS: dict[str, type] = {
    "agc": AGC,
    "none": NoClip,
    "norm": ClipNorm,
    "norm_and_value": ClipBoth,
    "value": ClipValue,
    "zclip": ZClip,
}

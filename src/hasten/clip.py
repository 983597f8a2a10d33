"""Gradient clipping as values: by global norm, by value, both, or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hasten.errors import RecipeError

# What a norm may be above its limit by and still count as held: rounding, in whatever format the gradients are.
SLACK = 1.001


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


@dataclass(frozen=True)
class NoClip:
    """Leaves gradients as they are and still reports their norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> NoClip()([weight]).norm.item(), weight.grad.tolist()
        (5.0, [3.0, 4.0])
    """

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        norm = torch.nn.utils.get_total_norm(_gradients(parameters))
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
class ClipNorm:
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
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        return ClipReport(norm, norm > self.max_norm)

    @property
    def limit(self) -> float:
        """`max_norm`."""
        return self.max_norm

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return whether the norm is at most `max_norm`, to a thousandth."""
        return torch.nn.utils.get_total_norm(_gradients(parameters)) <= self.max_norm * SLACK


@dataclass(frozen=True)
class ClipValue:
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
        norm = torch.nn.utils.get_total_norm(gradients)
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        if gradients:  # torch's own fails where there is none
            torch.nn.utils.clip_grad_value_(parameters, self.max_value)
        return ClipReport(norm, largest > self.max_value)

    @property
    def limit(self) -> float:
        """Infinite: elements count, and not the norm."""
        return math.inf

    def holds(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return whether every element is at most `max_value`, to a thousandth."""
        largest = torch.nn.utils.get_total_norm(_gradients(parameters), norm_type=float("inf"))
        return largest <= self.max_value * SLACK


@dataclass(frozen=True)
class ClipBoth:
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


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _check(name: str, value: float) -> None:
    if not value > 0 or value == float("inf"):
        raise RecipeError(f"clip.{name}={value} cannot clip; give a finite number above 0, or clip=none.")


CLIPS: dict[str, type] = {"none": NoClip, "norm": ClipNorm, "norm_and_value": ClipBoth, "value": ClipValue}

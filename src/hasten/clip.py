"""Gradient clipping as values: by global norm, by value, both, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hasten.errors import RecipeError


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


@dataclass(frozen=True)
class NoClip:
    """Leaves gradients as they are and still reports their norm."""

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        norm = torch.nn.utils.get_total_norm(_gradients(parameters))
        return ClipReport(norm, torch.zeros((), dtype=torch.bool, device=norm.device))


@dataclass(frozen=True)
class ClipNorm:
    """Scales all gradients by ``min(1, max_norm / norm)``, where norm is over all of them together.

    Equal to `torch.nn.utils.clip_grad_norm_`. A norm that is not finite spreads to every gradient: the guard, not the
    clip, decides what to do with such a step. Source: Pascanu et al., arXiv:1211.5063.

    Args:
        max_norm: largest global 2-norm, above 0.
    """

    max_norm: float

    def __post_init__(self) -> None:
        _check("max_norm", self.max_norm)

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        return ClipReport(norm, norm > self.max_norm)


@dataclass(frozen=True)
class ClipValue:
    """Clamps every element of every gradient to [-max_value, max_value].

    Equal to `torch.nn.utils.clip_grad_value_`.

    Args:
        max_value: largest absolute value of an element, above 0.
    """

    max_value: float

    def __post_init__(self) -> None:
        _check("max_value", self.max_value)

    def __call__(self, parameters: Sequence[Tensor]) -> ClipReport:
        gradients = _gradients(parameters)
        norm = torch.nn.utils.get_total_norm(gradients)
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        torch.nn.utils.clip_grad_value_(parameters, self.max_value)
        return ClipReport(norm, largest > self.max_value)


@dataclass(frozen=True)
class ClipBoth:
    """Clamps elements first, then scales to the norm.

    Args:
        max_norm: largest global 2-norm after clamping, above 0.
        max_value: largest absolute value of an element, above 0.
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


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _check(name: str, value: float) -> None:
    if not value > 0 or value == float("inf"):
        raise RecipeError(f"clip.{name}={value} cannot clip; give a finite number above 0, or clip=none.")


CLIPS: dict[str, type] = {"none": NoClip, "norm": ClipNorm, "norm_and_value": ClipBoth, "value": ClipValue}

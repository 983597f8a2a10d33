"""Small problems on which two optimizers take the same gradients, and how far apart they end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from reference_optimizers import Reference
from torch import Tensor, nn

Shapes = Sequence[tuple[int, ...]]
Gradients = Callable[[int, Sequence[Tensor]], list["Tensor | None"]]

SHAPES: Shapes = ((24, 16), (16,), (7, 5, 3), (1, 9))
MATRICES: Shapes = ((24, 16), (7, 5, 3), (1, 9), (8, 8))
STEPS = 100


def weights(shapes: Shapes, *, scale: float = 0.1, seed: int = 0) -> list[Tensor]:
    """Return normal float32 weights, the same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


def sequence(shapes: Shapes, *, seed: int = 1) -> Gradients:
    """Return gradients that depend on the step alone; sizes differ between elements by up to 1000."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [10 ** (3 * torch.rand(shape, generator=generator) - 3) for shape in shapes]
    drifts = [torch.randn(shape, generator=generator) for shape in shapes]
    noises = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(STEPS)]
    return lambda step, params: [
        size * (drift + noise) for size, drift, noise in zip(sizes, drifts, noises[step - 1], strict=True)
    ]


def noisy_quadratic(shapes: Shapes, *, seed: int = 2) -> Gradients:
    """Return gradients of ``sum(curvature * (p - minimum)^2) / 2`` plus noise, at the weights."""
    generator = torch.Generator().manual_seed(seed)
    minima = [torch.randn(shape, generator=generator) for shape in shapes]
    curvatures = [0.5 + torch.rand(shape, generator=generator) for shape in shapes]
    noises = [[0.3 * torch.randn(shape, generator=generator) for shape in shapes] for _ in range(STEPS)]
    return lambda step, params: [
        (curvature * (p.double() - minimum) + noise).float()
        for p, minimum, curvature, noise in zip(params, minima, curvatures, noises[step - 1], strict=True)
    ]


def now_and_then(gradients: Gradients) -> Gradients:
    """Return the same gradients, but weight number i has one only at every (i + 1)th step, the last from step 20 on."""

    def sparse(step: int, params: Sequence[Tensor]) -> list[Tensor | None]:
        grads = gradients(step, params)
        last = len(grads) - 1
        return [
            g if (step % (index + 1) == 0 if index < last else step >= 20) else None for index, g in enumerate(grads)
        ]

    return sparse


def parameters(start: Sequence[Tensor]) -> list[nn.Parameter]:
    """Return parameters that start at these weights."""
    return [nn.Parameter(p.clone()) for p in start]


def follow(
    optimizer: torch.optim.Optimizer,
    params: Sequence[nn.Parameter],
    reference: Reference,
    gradients: Gradients,
    *,
    lr: Callable[[int], float] | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Step `optimizer` and `reference` with the gradients at the weights of the reference.

    Args:
        optimizer: over `params`.
        params: with weights equal to those of the reference.
        reference: the plain form.
        gradients: of a step, counted from 1, at weights.
        lr: learning rate of a step, for both; None leaves it alone.
        after: called with the number of each step that was made.
    """
    for step in range(1, STEPS + 1):
        grads = gradients(step, reference.params)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        if lr is not None:
            reference.settings.lr = lr(step)
            for group in optimizer.param_groups:
                group["lr"] = lr(step)
        reference.step(grads)
        optimizer.step()
        after(step)


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """Return the norm of what two runs differ by, relative to what the second one moved from `start`."""
    pairs = list(zip(ours, theirs, start, strict=True))
    difference = math.sqrt(sum((a.detach().double() - b.detach().double()).square().sum().item() for a, b, _ in pairs))
    moved = math.sqrt(sum((b.detach().double() - c.double()).square().sum().item() for _, b, c in pairs))
    return difference / moved

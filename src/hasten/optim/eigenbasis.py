"""Eigenbases of symmetric statistics that change slowly."""

from __future__ import annotations

import torch
from torch import Tensor

# From this size on, a statistic is moved in four bands of its lower triangle: 10 of 16 blocks, 0.75x of the time.
BANDED = 256
_BANDS = 4


def add_outer_(statistic: Tensor, factor: Tensor, *, beta: float) -> None:
    """``statistic <- lerp(statistic, factor factor^T, 1 - beta)``, in the blocks of the lower triangle.

    What lies above the blocks is stale until `complete_`. Small statistics are whole, and moved by the authors'
    operations to the last bit: a statistic of few gradients has a null space, and which basis of it comes out hangs on
    rounding.

    Args:
        statistic: [..., n, n].
        factor: [..., n, k], in the same dtype.
        beta: what is left of the old, 0 to 1.
    """
    bands = _bands(statistic.shape[-1])
    if len(bands) == 1:
        statistic.lerp_(factor @ factor.mT, 1.0 - beta)
        return
    add_product = Tensor.addmm_ if statistic.ndim == 2 else Tensor.baddbmm_
    for start, stop in bands:
        rows = statistic[..., start:stop, :stop]
        add_product(rows, factor[..., start:stop, :], factor[..., :stop, :].mT, beta=beta, alpha=1.0 - beta)


def complete_(statistic: Tensor) -> Tensor:
    """Copy the blocks below the diagonal to above it; return `statistic`."""
    for start, stop in _bands(statistic.shape[-1])[1:]:
        statistic[..., :start, start:stop] = statistic[..., start:stop, :start].mT
    return statistic


def first_basis(statistic: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as columns, that of the largest eigenvalue first.

    Args:
        statistic: [..., n, n], complete, float32 or float64.
    """
    try:
        vectors = torch.linalg.eigh(statistic).eigenvectors
    except torch.linalg.LinAlgError:  # float32 does not converge on some ill-conditioned matrices
        vectors = torch.linalg.eigh(statistic.double()).eigenvectors.to(statistic.dtype)
    return vectors.flip(-1).contiguous()


def next_basis(statistic: Tensor, basis: Tensor, *, is_sorted: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the basis after one step of orthogonal iteration, and the order its columns came from.

    Columns are sorted by ``diag(Q^T S Q)``, largest first, and ``S Q`` is orthonormalised by Householder reflections:
    ``geqrf`` and ``householder_product`` take 0.85x of `torch.linalg.qr`, whose second result is not needed. Cholesky's
    way would take 0.65x, but squares the condition of columns that nearly coincide where eigenvalues span orders.

    Args:
        statistic: [..., n, n], complete.
        basis: [..., n, n], orthonormal columns.
        is_sorted: False leaves the columns where they are.

    Returns:
        The new basis [..., n, n], and indices [..., n] into the columns of `basis` (None where they stay).
    """
    product, order = statistic @ basis, None
    if is_sorted:
        order = (basis * product).sum(-2).argsort(dim=-1, descending=True)
        product = product.gather(-1, order.unsqueeze(-2).expand_as(product))
    return torch.linalg.householder_product(*torch.geqrf(product)), order


def _bands(size: int) -> list[tuple[int, int]]:
    bands = _BANDS if size >= BANDED else 1
    width = -(-size // bands)
    return [(start, min(start + width, size)) for start in range(0, size, width)]

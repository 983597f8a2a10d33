"""Eigenbases of symmetric statistics that change slowly."""

from __future__ import annotations

import torch
from torch import Tensor

# From this size on, a statistic is moved in bands of its lower triangle: in four, 10 of 16 blocks, 0.73x of the time;
# the largest in up to eight (1536 rows in six: 0.63x).
BANDED = 256
_FEWEST_BANDS, _MOST_BANDS = 4, 8
# Rows that are made orthonormal by one Cholesky factor; of 64 to 192, the fastest for 384 to 1536.
_LEAF = 96
# What has to remain of a row of length 1 for the rounding errors of one pass to stay below about 1e-5, and for a
# Cholesky factor to be of use at all.
_ENOUGH, _LEAST = 0.1, 0.01


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

    Columns are sorted by ``diag(Q^T S Q)``, largest first, and ``S Q`` is orthonormalised. Large matrices on a CPU go
    through `orthonormalize_rows_`; others, and those where that fails, are reflected: ``geqrf`` and
    ``householder_product`` take 0.85x of `torch.linalg.qr`, whose second result is not needed. Signs of columns are
    not those of another method; nothing that follows depends on them.

    Args:
        statistic: [..., n, n], complete.
        basis: [..., n, n], orthonormal columns.
        is_sorted: False leaves the columns where they are.

    Returns:
        The new basis [..., n, n], and indices [..., n] into the columns of `basis` (None where they stay).
    """
    if statistic.ndim == 2 and statistic.shape[-1] >= BANDED and statistic.device.type == "cpu":
        rows, order = basis.mT @ statistic, None
        if is_sorted:
            order = torch.linalg.vecdot(rows, basis.mT).argsort(descending=True)
            rows = rows.index_select(0, order)
        if orthonormalize_rows_(rows):
            return rows.mT, order
    product, order = statistic @ basis, None
    if is_sorted:
        order = (basis * product).sum(-2).argsort(dim=-1, descending=True)
        product = reordered(product, order, -1)
    return _reflected(product), order


def reordered(matrices: Tensor, order: Tensor, dim: int) -> Tensor:
    """Return rows (`dim` -2) or columns (-1) of `matrices` in the `order` [..., n] of each."""
    if order.ndim == 1:
        return matrices.index_select(dim, order)
    return matrices.gather(dim, order.unsqueeze(-3 - dim).expand_as(matrices))


def orthonormalize_rows_(rows: Tensor) -> bool:
    """Make the rows of a matrix orthonormal by Gram and Schmidt in blocks: nearly all of it matrix products.

    Half as long as reflections where rows are nearly orthogonal, once each has length 1. Blocks that lose most of a row
    to the rows before are treated twice, at worst as long as reflections in all. Over the statistics of a training run,
    whose eigenvalues spanned up to seven orders, bases are orthonormal to 1e-6 (in part 3e-5), and as near to those of
    float64 as by reflections.

    Args:
        rows: [n, m] with n <= m, overwritten.

    Returns:
        Whether it succeeded: not where a row is zero, not finite, or a combination of others up to rounding.
    """
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    return _orthonormalize_from(rows, 0, rows.shape[0])


def _orthonormalize_from(rows: Tensor, start: int, stop: int) -> bool:
    # Rows from `start` on are orthogonal to all before.
    leaves = -(-(stop - start) // _LEAF)
    if leaves == 1:
        return _orthonormalize_leaf(rows[start:stop], rows[:start])
    middle = start + leaves // 2 * _LEAF
    if not _orthonormalize_from(rows, start, middle):
        return False
    upper, lower = rows[start:middle], rows[middle:stop]
    lower.addmm_(lower @ upper.mT, upper, alpha=-1.0)
    return _orthonormalize_from(rows, middle, stop)


def _orthonormalize_leaf(rows: Tensor, before: Tensor) -> bool:
    left = _divide_by_cholesky_(rows)
    if left >= _ENOUGH:
        return True
    if left == 0.0:
        rows.copy_(_reflected(rows.mT).mT)
    if before.shape[0]:
        rows.addmm_(rows @ before.mT, before, alpha=-1.0)
    return _divide_by_cholesky_(rows) >= 0.5


def _divide_by_cholesky_(rows: Tensor) -> float:
    """Orthonormalise rows of length at most 1; return the least that is left of one, 0 where nothing was done."""
    factor, failed = torch.linalg.cholesky_ex(rows @ rows.mT)
    least = float(factor.diagonal().min())
    if int(failed) or not least >= _LEAST:
        return 0.0
    unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    rows.copy_(torch.linalg.solve_triangular(factor, unit, upper=False) @ rows)
    return least


def _reflected(columns: Tensor) -> Tensor:
    return torch.linalg.householder_product(*torch.geqrf(columns))


def _bands(size: int) -> list[tuple[int, int]]:
    bands = max(_FEWEST_BANDS, min(size // BANDED, _MOST_BANDS)) if size >= BANDED else 1
    width = -(-size // bands)
    return [(start, min(start + width, size)) for start in range(0, size, width)]

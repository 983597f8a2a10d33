"""Eigenbases of symmetric statistics that change slowly."""

from __future__ import annotations

import torch
from torch import Tensor

# From this size on, a statistic is moved in bands of its lower triangle: in four, 10 of 16 blocks, 0.73x of the time;
# the largest in up to eight (1536 rows in six: 0.63x).
BANDED = 256
_FEWEST_BANDS, _MOST_BANDS = 4, 8
# Rows that are made orthonormal at a time, by one Cholesky factor: the fastest of 64 to 192 for 384 and 1536 rows.
_TOGETHER = 96
# A row of length 1 of which less remains is projected once more: what rounding leaves of the other rows grows with the
# inverse of what remains. Below `_LEAST`, a Cholesky factor is of no use.
_REMAINDER, _LEAST = 0.2, 0.01


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

    0.55x of reflections, 0.75x early in a training run: rows ``q^T S`` of small eigenvalues then mostly point along
    those of large ones, and an inexact projection of a long vector leaves a short one askew, so that rows that lose
    most of their length to a block are projected on it twice. Over statistics of 1536 rows whose eigenvalues spanned
    seven orders, the basis was orthonormal to 6e-5 (later in the run to 5e-6) and nearer to that of float64 than by
    reflections, whose own error was 9e-4 (1e-5).

    Args:
        rows: [n, m] with n <= m, overwritten.

    Returns:
        Whether it succeeded: not where a row is zero, not finite, or a combination of others up to rounding.
    """
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    for start in range(0, rows.shape[0], _TOGETHER):
        block, after = rows[start : start + _TOGETHER], rows[start + _TOGETHER :]
        if not _orthonormalize_block_(block, rows[:start]):
            return False
        if after.shape[0]:
            after.addmm_(after @ block.mT, block, alpha=-1.0)
            lengths = torch.linalg.vector_norm(after, dim=1, keepdim=True)
            if float(lengths.min()) < _REMAINDER:
                after.div_(lengths)
                after.addmm_(after @ block.mT, block, alpha=-1.0)
    return True


def _orthonormalize_block_(rows: Tensor, before: Tensor) -> bool:
    left = _divide_by_cholesky_(rows)
    if left >= _REMAINDER:
        return True
    # Again, and once more where rounding alone decided about a row: one that is a combination of others.
    for _ in range(2):
        if left == 0.0:
            rows.copy_(_reflected(rows.mT).mT)
        rows.addmm_(rows @ before.mT, before, alpha=-1.0)
        left = _divide_by_cholesky_(rows)
        if left >= 0.5:
            return True
    return False


def _divide_by_cholesky_(rows: Tensor) -> float:
    """Orthonormalise rows of length at most 1; return the least that was left of one, 0 where nothing was done."""
    factor, failed = torch.linalg.cholesky_ex(rows @ rows.mT)
    left = float(factor.diagonal().min())
    if int(failed) or not left >= _LEAST:
        return 0.0
    unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    rows.copy_(torch.linalg.solve_triangular(factor, unit, upper=False) @ rows)
    return left


def _reflected(columns: Tensor) -> Tensor:
    return torch.linalg.householder_product(*torch.geqrf(columns))


def _bands(size: int) -> list[tuple[int, int]]:
    bands = max(_FEWEST_BANDS, min(size // BANDED, _MOST_BANDS)) if size >= BANDED else 1
    width = -(-size // bands)
    return [(start, min(start + width, size)) for start in range(0, size, width)]

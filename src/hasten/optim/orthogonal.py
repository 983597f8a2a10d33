"""The nearest matrix with orthonormal rows or columns, by matrix products alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hasten.errors import RecipeError, nearest

Coefficients = tuple[tuple[float, float, float], ...]

QUINTIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_TAIL = (1.875, -1.25, 0.375)
METHODS = ("minimax", "polar_express", "quintic")
DTYPES = {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}

# A batch of equal shapes on a GPU takes at most this many elements at a time, so that temporaries stay small.
BATCH_ELEMENTS = 1 << 27
# On a CPU, matrices of at most this short side and size go through together: nine of 8 x 32 in 0.14 of the time of one
# after another, nine of 64 x 256 in 0.9 of it.
SMALL, SMALL_ELEMENTS = 64, 1 << 15
# Multiplications of a batched product up to which one thread makes it.
ONE_THREAD = 1 << 20
# In bfloat16 five steps on one Gram matrix diverge where singular values span 100:1 (largest 1e7 instead of 1), two and
# then three end in 0.91 to 1.11; two, two and one are as good as the plain form.
BF16_STRETCH = 2
# Least norm that is divided by: below it the squares of float32 underflow, and dividing by too little would diverge.
_SMALLEST = 1e-15


def orthogonalize(
    matrices: Tensor, *, coefficients: str = "minimax", steps: int = 5, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``U V^T`` of ``matrices = U S V^T``, up to what `steps` products of polynomials leave of ``S``.

    ``X <- (a I + b X X^T + c (X X^T)^2) X`` on the short side. With the default, every singular value above 0.002 of
    the bound that the matrix is divided by ends in 0.97 to 1.03 (in float32: 0.98 to 1.02); ``polar_express`` ends in
    0.86 to 1.14, ``quintic`` in 0.68 to 1.14 on a Gaussian matrix. Smaller ones are multiplied by about 670 (970, 480)
    and stay below 1.

    Long matrices iterate on the Gram matrix ``X X^T`` and meet ``X`` once at the end: the same polynomial with fewer
    products (0.56x of them at 4:1; in bfloat16, which loses small singular values of the Gram matrix, it returns to
    ``X`` after every second step: 0.78x).

    Args:
        matrices: [..., rows, columns]; each one on its own. Not written to.
        coefficients: ``minimax`` (see `minimax`; divided by the Schatten-4 norm, which is at most the Frobenius norm),
            ``polar_express`` (arXiv:2505.16932, the five tuples that modded-nanogpt uses, divided by 1.02 times the
            Frobenius norm; from the sixth step on their limit) or ``quintic`` (Keller Jordan's, divided by the
            Frobenius norm).
        steps: polynomials, at least 1.
        dtype: of the products; None for what is fastest on this device (see `fastest_dtype`).

    Returns:
        A new tensor of the shape of `matrices`, in the dtype of the products.

    Raises:
        RecipeError: no such coefficients, or fewer than one step.
    """
    dtype = dtype or fastest_dtype(matrices.device)
    wanted = tuples(coefficients, steps)
    if not matrices.numel():
        return matrices.to(dtype)
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if is_tall else matrices
    precise = torch.promote_types(wide.dtype, torch.float32)
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True, dtype=precise).clamp_min_(_SMALLEST)
    norm = norm * (1.02 if coefficients == "polar_express" else 1.0)
    unit = (wide / norm).to(dtype)
    flat = unit if unit.ndim == 2 else unit.reshape(-1, *unit.shape[-2:])
    aspect = flat.shape[-1] / flat.shape[-2]
    stretch = BF16_STRETCH if dtype == torch.bfloat16 else steps
    for start in range(0, steps, stretch):
        some = wanted[start : start + stretch]
        iterate = _gram if gram_is_cheaper(aspect, len(some)) else _plain
        flat = iterate(flat, some, tighten=coefficients == "minimax" and start == 0)
    result = flat.view(wide.shape)
    return result.mT if is_tall else result


def orthogonalize_all_(
    pieces: Sequence[Tensor], *, coefficients: str, steps: int, dtype: torch.dtype | None = None
) -> None:
    """Orthogonalise each of `pieces` in place; those for which a call costs more than its work go through together.

    On a GPU these are equal shapes. On a CPU stacking large matrices gained nothing (33, 11 and 23 ms a matrix, stacked
    or not). Small ones with equal short sides share the products of their Gram matrices, in float64: what rounding does
    to a Gram matrix grows with the square of the slope, and float32 left nearly square matrices 5e-5 from their place.

    Args:
        pieces: [..., rows, columns] each; views are written through.
        coefficients: as `orthogonalize`.
        steps: as `orthogonalize`.
        dtype: as `orthogonalize`; not of small ones on a CPU.
    """
    by_side: dict[int, list[Tensor]] = {}
    others = []
    for piece in pieces:
        if _is_small(piece):
            by_side.setdefault(min(piece.shape), []).append(piece)
        else:
            others.append(piece)
    for small in by_side.values():
        _orthogonalize_small_(small, coefficients, steps)
    for batch in _batches(others):
        if len(batch) == 1:
            batch[0].copy_(orthogonalize(batch[0], coefficients=coefficients, steps=steps, dtype=dtype))
            continue
        results = orthogonalize(torch.stack(batch), coefficients=coefficients, steps=steps, dtype=dtype)
        for piece, result in zip(batch, results.unbind(0)):
            piece.copy_(result)


def _is_small(matrix: Tensor) -> bool:
    return matrix.is_cpu and matrix.ndim == 2 and min(matrix.shape) <= SMALL and 0 < matrix.numel() <= SMALL_ELEMENTS


def _orthogonalize_small_(pieces: Sequence[Tensor], coefficients: str, steps: int) -> None:
    """Orthogonalise matrices of one short side in place, by one chain of products of their Gram matrices."""
    wides = [piece.double() if piece.shape[0] <= piece.shape[1] else piece.double().mT for piece in pieces]
    side = wides[0].shape[0]
    gram = wides[0].new_empty(len(wides), side, side)
    # A second thread would cost ten times what there is to multiply: 25 products of four 8 x 8 take 311 us, not 48.
    threads = torch.get_num_threads()
    if len(wides) * side**3 <= ONE_THREAD:
        torch.set_num_threads(1)
    try:
        for wide, place in zip(wides, gram.unbind()):
            torch.mm(wide, wide.mT, out=place)
        square = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min_(_SMALLEST**2)[:, None, None]
        if coefficients == "polar_express":
            square.mul_(1.02**2)
        gram.div_(square)
        scale = square.rsqrt_()
        if coefficients == "minimax":
            scale.mul_(_tighten(gram))
        factors = _composed(gram, tuples(coefficients, steps)).mul_(scale).unbind()
        for piece, wide, factor in zip(pieces, wides, factors):
            result = torch.mm(factor, wide)
            piece.copy_(result if piece.shape[0] <= piece.shape[1] else result.mT)
    finally:
        torch.set_num_threads(threads)


def tuples(coefficients: str, steps: int) -> Coefficients:
    """Return the polynomial of each step, ``(a, b, c)`` of ``a x + b x^3 + c x^5``.

    Raises:
        RecipeError: no such coefficients, or fewer than one step.
    """
    if steps < 1:
        raise RecipeError(f"ns_steps is {steps}; at least 1 is needed, 5 is usual.")
    if coefficients == "minimax":
        return minimax(steps)
    if coefficients == "polar_express":
        return (POLAR_EXPRESS + (POLAR_EXPRESS_TAIL,) * steps)[:steps]
    if coefficients == "quintic":
        return (QUINTIC,) * steps
    known = ", ".join(METHODS)
    raise RecipeError(
        f"orthogonalization is {coefficients!r}{nearest(str(coefficients), METHODS)}; choose one of {known}."
    )


@lru_cache
def minimax(steps: int, error: float = 0.02) -> Coefficients:
    """Return the odd quintics whose composition stays within `error` of 1 over the widest interval ``[lower, 1]``.

    Each is the best uniform approximation of 1 over what the one before leaves (Remez exchange; this greedy choice is
    optimal: Polar Express, arXiv:2505.16932), each interval widened by 1 % for the rounding of bfloat16. ``lower``
    follows by bisection. Slopes at 0 for 4, 5 and 6 steps at an error of 0.02: 158, 666 and 2806.

    Args:
        steps: polynomials, at least 1.
        error: largest distance from 1 after the last, in (0, 1).

    Example:
        >>> [round(a, 2) for a, b, c in minimax(5)]  # doctest: +SKIP
    """
    low, high = 1e-9, 1.0
    for _ in range(60):
        lower = math.sqrt(low * high)
        low, high = (low, lower) if _compose(lower, steps)[1] <= error else (lower, high)
    return _compose(high, steps)[0]


def _compose(lower: float, steps: int) -> tuple[Coefficients, float]:
    upper, chosen = 1.01, []
    for _ in range(steps):
        a, b, c = _best_quintic(lower, upper)
        chosen.append((a, b, c))
        least = a * lower + b * lower**3 + c * lower**5
        lower, upper = least / 1.01, (2.0 - least) * 1.01
    return tuple(chosen), 1.0 - least


def _best_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """Of all ``a x + b x^3 + c x^5`` the one nearest to 1 on [lower, upper]."""
    first, second = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    for _ in range(100):
        points = torch.tensor([lower, first, second, upper], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        moved = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        if abs(moved[0] - first) + abs(moved[1] - second) < 1e-12:
            break
        first, second = moved
    return a, b, c


def gram_is_cheaper(aspect: float, steps: int) -> bool:
    """Whether iterating on the Gram matrix takes fewer products, for matrices `aspect` times as long as wide.

    In units of one product of two short sides: plain ``steps (2 aspect + 1)``, Gram ``4 steps - 3 + 2 aspect``.
    """
    return steps > 1 and 4 * steps - 3 + 2 * aspect < steps * (2 * aspect + 1)


@lru_cache
def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where its matrix products beat float32 on `device`, else float32.

    On a CPU two products of 256 x 256 are timed once: bfloat16 is 2.3 times as fast with its AVX-512 instructions and
    70 times slower without. A GPU of compute capability 8 or more takes bfloat16.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    if device.type != "cpu":
        return torch.float32
    return min((torch.float32, torch.bfloat16), key=_seconds_of_a_product)


def _seconds_of_a_product(dtype: torch.dtype) -> float:
    matrix = torch.ones(256, 256, dtype=dtype)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return best


def _product(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    # Two dimensions stay two: the batched product of a CPU splits its threads over the batch.
    return torch.mm(left, right, out=out) if left.ndim == 2 else torch.bmm(left, right, out=out)


def _polynomial(gram: Tensor, coefficients: tuple[float, float, float], out: Tensor) -> Tensor:
    """Write ``a I + b G + c G^2`` to `out`."""
    a, b, c = coefficients
    add_product = torch.addmm if gram.ndim == 2 else torch.baddbmm
    add_product(gram, gram, gram, beta=b, alpha=c, out=out)
    out.diagonal(0, -2, -1).add_(a)
    return out


def _tighten(gram: Tensor) -> Tensor:
    """Divide a Gram matrix by its Frobenius norm; return what its factor has to be multiplied by."""
    precise = torch.promote_types(gram.dtype, torch.float32)
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=precise).clamp_min_(_SMALLEST)
    gram.div_(norm)
    return norm.rsqrt_()


def _plain(unit: Tensor, coefficients: Coefficients, *, tighten: bool) -> Tensor:
    # `unit` is overwritten: it is one of the two buffers that take turns.
    current, following = unit, torch.empty_like(unit, memory_format=torch.contiguous_format)
    square = (*unit.shape[:-1], unit.shape[-2])
    gram, polynomial = unit.new_empty(square), unit.new_empty(square)
    for step, terms in enumerate(coefficients):
        _product(current, current.mT, out=gram)
        scale = _tighten(gram) if tighten and step == 0 else None
        _polynomial(gram, terms, polynomial)
        if scale is not None:
            polynomial.mul_(scale)
        _product(polynomial, current, out=following)
        current, following = following, current
    return current


def _gram(unit: Tensor, coefficients: Coefficients, *, tighten: bool) -> Tensor:
    gram = unit.new_empty((*unit.shape[:-1], unit.shape[-2]))
    _product(unit, unit.mT, out=gram)
    scale = _tighten(gram) if tighten else None
    total = _composed(gram, coefficients)
    if scale is not None:
        total.mul_(scale)
    return _product(total, unit, out=torch.empty_like(unit, memory_format=torch.contiguous_format))


def _composed(gram: Tensor, coefficients: Coefficients) -> Tensor:
    """Return what the polynomials together multiply a matrix of this Gram matrix by; `gram` is overwritten."""
    polynomial, spare, total, other = (torch.empty_like(gram) for _ in range(4))
    for step, terms in enumerate(coefficients):
        current = _polynomial(gram, terms, polynomial if step else total)
        if step:
            _product(current, total, out=other)
            total, other = other, total
        if step + 1 < len(coefficients):
            _product(current, gram, out=spare)
            _product(spare, current, out=gram)
    return total


def _batches(pieces: Iterable[Tensor]) -> list[list[Tensor]]:
    batches: dict[tuple, list[list[Tensor]]] = {}
    for number, piece in enumerate(pieces):
        if not piece.numel():
            continue
        key = (piece.shape, piece.dtype, piece.device) if piece.device.type == "cuda" else (number,)
        groups = batches.setdefault(key, [[]])
        if groups[-1] and (len(groups[-1]) + 1) * piece.numel() > BATCH_ELEMENTS:
            groups.append([])
        groups[-1].append(piece)
    return [group for groups in batches.values() for group in groups]

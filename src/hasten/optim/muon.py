"""Muon, momentum that is orthogonalised, for matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import decay_rate, remainder, wide_zeros
from hasten.optim.exchange import Exchange, rounds
from hasten.optim.matrices import SETTINGS as MATRIX_SETTINGS
from hasten.optim.matrices import Part, Piece, apply_all, matrix_shape, parts, pieces_of, step_scale
from hasten.optim.orthogonal import BATCH_ELEMENTS, DTYPES, fastest_dtype, orthogonalize_all_, tuples
from hasten.optim.rule import Group, Rule, Work, check_number
from hasten.optim.shell import Params, RuledOptimizer
from hasten.sharding import local

ADJUSTMENTS = ("match_rms_adamw", "original", "rms_to_rms")
SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "momentum": 0.95,
    "nesterov": True,
    "adjust_lr": "match_rms_adamw",
    "orthogonalization": "minimax",
    "ns_steps": 5,
    "weight_decay": 0.1,
    "compute_dtype": "auto",
    **MATRIX_SETTINGS,
}
_EPS = 1e-10
# Updates that a CPU holds at a time: 1 MB.
CPU_BATCH_ELEMENTS = 1 << 18


def init(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    """Return ``momentum_buffer``, zero.

    Raises:
        RecipeError: `split_sizes` do not fit the shape.
    """
    parts(matrix_shape(parameter, group), group)
    return {"momentum_buffer": wide_zeros(parameter)} | remainder(parameter, group)


def init_normalized(parameter: Tensor, group: Group) -> dict[str, Tensor]:
    """Return ``momentum_buffer`` and ``second_momentum_buffer``, one number per row (and split of columns)."""
    shape = matrix_shape(parameter, group)
    bands = 1 + max(part.band for part in parts(shape, group))
    state = init(parameter, group)
    rows = state["momentum_buffer"] if parameter.ndim == len(shape) else state["momentum_buffer"].flatten(1)
    statistic = torch.zeros_like(rows.narrow(-1, 0, bands), memory_format=torch.contiguous_format)
    return state | {"second_momentum_buffer": statistic}


def check(group: Group) -> None:
    """Refuse settings that are out of range.

    Raises:
        RecipeError: names the setting.
    """
    check_number(group, "momentum", high=1.0)
    check_orthogonal(group)


def check_orthogonal(group: Group) -> None:
    """Refuse settings of the orthogonalisation and of what follows it that are out of range.

    Raises:
        RecipeError: names the setting.
    """
    if group["adjust_lr"] not in ADJUSTMENTS:
        raise RecipeError(
            f"optimizer.adjust_lr={group['adjust_lr']!r} is unknown; choose one of {', '.join(ADJUSTMENTS)}."
        )
    if group["compute_dtype"] not in DTYPES:
        raise RecipeError(
            f"optimizer.compute_dtype={group['compute_dtype']!r} is unknown; choose one of {', '.join(DTYPES)}."
        )
    if group["as_matrix"] not in (None, "flatten"):
        raise RecipeError(f"optimizer.as_matrix={group['as_matrix']!r} is unknown; give 'flatten' or leave it out.")
    tuples(group["orthogonalization"], group["ns_steps"])


def _check_normalized(group: Group) -> None:
    check(group)
    check_number(group, "beta2", high=1.0)


def update(works: list[Work]) -> None:
    """Apply one step of Muon.

    ``m <- lerp(m, g, 1 - momentum)``; ``u = lerp(g, m, momentum)`` (Nesterov) or ``m``; ``p <- p (1 - lr wd) - lr s O``
    with `orthogonalize` of u as O and `step_scale` as s. Decay is not scaled. Source: Keller Jordan 2024; decay and
    scale of D-Muon, arXiv:2502.16982. The momentum is an average, not a sum: O does not see the difference.

    A matrix sharded by rows goes whole to one process and back, once each in a step; see `Exchange`.

    Raises:
        RecipeError: a parameter is sharded in another way.
    """
    _update(works, is_normalized=False)


def update_normalized(works: list[Work]) -> None:
    """Apply one step of NorMuon: as Muon, but each row of ``O(u)`` is divided by its own root mean square over time.

    ``v <- lerp(v, mean over the row of O(u)^2, 1 - beta2)``; ``O(u) / (sqrt(v) + 1e-10)`` is scaled back to the
    Frobenius norm of ``O(u)``. Rows are outputs, as in arXiv:2510.05491, algorithm 1; its step ``0.2 sqrt(m n) / |.|``
    is this one with ``match_rms_adamw`` where O is exact. Each part of a split weight has its own norm.
    """
    _update(works, is_normalized=True)


def settle_dtype(work: Work) -> None:
    """Write what ``compute_dtype="auto"`` stands for into the group, so that it is saved and resumed with it.

    What is fastest on the device (see `fastest_dtype`); float32 on the CPUs of several processes, whose clocks may
    disagree.
    """
    if work.group["compute_dtype"] != "auto":
        return
    device = local(work.params[0]).device
    is_one = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    chosen = fastest_dtype(device) if is_one or device.type != "cpu" else torch.float32
    work.group["compute_dtype"] = "bf16" if chosen == torch.bfloat16 else "float32"


def _update(works: list[Work], *, is_normalized: bool) -> None:
    for work in works:
        settle_dtype(work)
    pieces = [piece for work in works for piece in pieces_of(work)]
    for batch in _batches([piece for piece in pieces if piece.processes is None]):
        updates = directions(batch)
        orthogonalize_pieces(batch, updates)
        _finish(batch, updates, is_normalized)
    for processes in {id(p.processes): p.processes for p in pieces if p.processes is not None}.values():
        sharded = [piece for piece in pieces if piece.processes is processes]
        sizes, costs = [math.prod(piece.shape) for piece in sharded], [piece.cost for piece in sharded]
        for numbers in rounds(sizes, costs, processes.size()):
            _step_sharded([sharded[number] for number in numbers], processes, is_normalized)


def _step_sharded(pieces: Sequence[Piece], processes: Any, is_normalized: bool) -> None:
    device = pieces[0].weight.device
    # Numbers travel in the format that a GPU multiplies in.
    chosen = {DTYPES[piece.group["compute_dtype"]] for piece in pieces}
    wire = torch.float64 if torch.float64 in chosen else torch.float32
    if device.type == "cuda" and chosen == {torch.bfloat16}:
        wire = torch.bfloat16
    exchange = Exchange(
        [piece.shape for piece in pieces],  # type: ignore[misc]
        [piece.cost for piece in pieces],
        group=processes,
        dtype=wire,
        device=device,
    )
    for place, part in enumerate(exchange.parts):
        part.copy_(directions(pieces[place : place + 1])[0])
    matrices = exchange.collect()
    orthogonalize_pieces([pieces[number] for number in exchange.owned], matrices)
    exchange.give_back(matrices)
    del matrices
    _finish(pieces, exchange.parts, is_normalized)


def directions(pieces: Sequence[Piece]) -> list[Tensor]:
    """Move the momentum of `pieces`; return new tensors that are to be orthogonalised."""
    buffers = [piece.state["momentum_buffer"] for piece in pieces]
    gradients = [piece.gradient.to(buffer.dtype) for piece, buffer in zip(pieces, buffers)]
    momenta = [piece.group["momentum"] for piece in pieces]
    torch._foreach_lerp_(buffers, gradients, [1.0 - momentum for momentum in momenta])
    # Without Nesterov's step ahead it is the momentum itself.
    weights = [momentum if piece.group["nesterov"] else 1.0 for piece, momentum in zip(pieces, momenta)]
    mixed = torch._foreach_lerp(gradients, buffers, weights)
    return [update.reshape(piece.local_shape) for piece, update in zip(pieces, mixed)]


def orthogonalize_pieces(pieces: Sequence[Piece], matrices: Sequence[Tensor]) -> None:
    """Orthogonalise the whole `matrices` of `pieces` in place, part by part."""
    by_settings: dict[tuple, list[Tensor]] = {}
    for piece, matrix in zip(pieces, matrices):
        group = piece.group
        key = group["orthogonalization"], group["ns_steps"], DTYPES[group["compute_dtype"]]
        by_settings.setdefault(key, []).extend(part.of(matrix) for part in parts(piece.shape, group))
    for (coefficients, steps, dtype), blocks in by_settings.items():
        orthogonalize_all_(blocks, coefficients=coefficients, steps=steps, dtype=dtype)


def _finish(pieces: Sequence[Piece], updates: Sequence[Tensor], is_normalized: bool) -> None:
    split = [parts(piece.shape, piece.group) for piece in pieces]
    scales = [[step_scale(part, piece.group["adjust_lr"]) for part in own] for piece, own in zip(pieces, split)]
    wide = [update.to(piece.state["momentum_buffer"].dtype) for piece, update in zip(pieces, updates)]
    views = [[part.of(update, piece.first_row) for part in own] for piece, own, update in zip(pieces, split, wide)]
    if is_normalized:
        _normalize_rows_(pieces, split, views)
    for own, mine in zip(views, scales):
        for view, scale in zip(own[1:], mine[1:]):
            if scale != mine[0]:
                view.mul_(scale / mine[0])
    apply_all(
        [piece.weight for piece in pieces],
        wide,
        keep=[1.0 - decay_rate(piece.group) for piece in pieces],
        step_size=[float(piece.group["lr"]) * mine[0] for piece, mine in zip(pieces, scales)],
    )


def _normalize_rows_(pieces: Sequence[Piece], split: list[list[Part]], views: list[list[Tensor]]) -> None:
    """Move the row statistics; divide each row of each part by the root of its own, at the same norm of the part."""
    flat, moments, rests = [], [], []
    for piece, own, its in zip(pieces, split, views):
        statistic = piece.state["second_momentum_buffer"]
        for part, view in zip(own, its):
            start, stop = (min(max(row - piece.first_row, 0), statistic.shape[-2]) for row in part.rows)
            flat.append(view)
            moments.append(statistic[..., start:stop, part.band : part.band + 1])
            rests.append(1.0 - piece.group["beta2"])
    squares = [torch.linalg.vector_norm(view, dim=-1, keepdim=True) for view in flat]
    torch._foreach_mul_(squares, squares)
    torch._foreach_lerp_(moments, torch._foreach_div(squares, [float(view.shape[-1]) for view in flat]), rests)
    factors = torch._foreach_sqrt(moments)
    torch._foreach_add_(factors, _EPS)
    torch._foreach_reciprocal_(factors)
    before = [square.sum(-2, keepdim=True) for square in squares]
    torch._foreach_mul_(squares, factors)
    torch._foreach_mul_(squares, factors)
    after = [square.sum(-2, keepdim=True) for square in squares]
    if pieces[0].processes is not None:
        together = torch.stack([*before, *after])
        dist.all_reduce(together, group=pieces[0].processes)
        before, after = list(together[: len(flat)]), list(together[len(flat) :])
    torch._foreach_clamp_min_(after, _EPS)
    torch._foreach_div_(before, after)
    torch._foreach_sqrt_(before)
    torch._foreach_mul_(factors, before)
    torch._foreach_mul_(flat, factors)


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces to be worked on together, in the order of their shapes: on a CPU large ones each alone."""
    batch: list[Piece] = []
    held = 0
    for piece in sorted(pieces, key=lambda p: p.shape):
        size = piece.weight.numel()
        limit = CPU_BATCH_ELEMENTS if piece.weight.is_cpu else BATCH_ELEMENTS
        if batch and held + size > limit:
            yield batch
            batch, held = [], 0
        if size:
            batch.append(piece)
            held += size
    if batch:
        yield batch


RULE = Rule(
    name="muon",
    settings=SETTINGS,
    init=init,
    update=update,
    check=check,
    only_matrices=True,
    is_elementwise=False,
)
NORMUON = Rule(
    name="normuon",
    settings=SETTINGS | {"beta2": 0.95},
    init=init_normalized,
    update=update_normalized,
    check=_check_normalized,
    only_matrices=True,
    is_elementwise=False,
)


class Muon(RuledOptimizer):
    """Muon: the momentum of a matrix, made orthogonal, is its step; everything that is no matrix goes to AdamW.

    ``m = momentum * m + (1 - momentum) * g``, ``u = orthogonal(momentum * m + (1 - momentum) * g)``,
    ``p -= lr * (scale * u + weight_decay * p)``. Decay on matrices and the scale ``0.2 * sqrt(max(rows, columns))``,
    with which AdamW's learning rate fits, make it D-Muon (Liu et al., arXiv:2502.16982). Give embeddings and the head
    to AdamW: `hasten.optimizer` does. Source: Jordan et al., kellerjordan.github.io/posts/muon.

    Args:
        params: parameters, or groups of them; vectors go to AdamW by themselves.
        lr: learning rate, at least 0.
        momentum: in [0, 1).
        nesterov: whether the step looks ahead.
        weight_decay: decoupled, times the learning rate, at least 0.
        adjust_lr: ``match_rms_adamw``; ``original``: ``sqrt(max(1, rows / columns))``, for rates about 0.02; or
            ``rms_to_rms``: ``sqrt(rows / columns)``.
        orthogonalization, ns_steps: see `hasten.optim.orthogonal.orthogonalize`.
        betas, eps: of AdamW.
        **more: ``compute_dtype`` (``float32``, ``bf16``, or ``auto`` for the faster of both, which the first step
            settles), and see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust_lr: str = "match_rms_adamw",
        orthogonalization: str = "minimax",
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **more: Any,
    ) -> None:
        given = {"momentum": momentum, "nesterov": nesterov, "adjust_lr": adjust_lr, "weight_decay": weight_decay}
        form = {"orthogonalization": orthogonalization, "ns_steps": ns_steps}
        super().__init__(params, RULE, lr=lr, betas=betas, eps=eps, **given, **form, **more)


class NorMuon(RuledOptimizer):
    """NorMuon: Muon whose rows are divided by the root of their running mean square, at the same norm.

    Source: Li et al., arXiv:2510.05491 (11 % fewer tokens than Muon at 1.1B parameters).

    Args:
        params: parameters, or groups of them; vectors go to AdamW by themselves.
        lr: learning rate, at least 0.
        momentum: in [0, 1).
        beta2: decay rate of the rows' mean squares, in [0, 1).
        nesterov: whether the step looks ahead.
        weight_decay: decoupled, times the learning rate, at least 0.
        adjust_lr: as for `Muon`.
        betas, eps: of AdamW.
        **more: ``orthogonalization``, ``ns_steps``, ``compute_dtype``, and see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust_lr: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **more: Any,
    ) -> None:
        given = {"momentum": momentum, "beta2": beta2, "nesterov": nesterov, "adjust_lr": adjust_lr}
        super().__init__(params, NORMUON, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, **given, **more)

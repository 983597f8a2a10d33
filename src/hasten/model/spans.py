"""Attention of packed rows on a CPU, document by document: what nobody sees is not computed.

A row is cut into spans of queries, each with the keys that some of them see, and PyTorch's CPU kernel runs over one
span after the other. To a compiler all of it is one operation, of shapes that do not depend on where documents end.

Dimensions: B rows, T positions, H heads, D head dimension, P places of the plan, L queries and S keys of one span.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Short documents share a span of at most so many positions: a call of the kernel costs as much as 64 positions do.
SHARED = 64

# Under a short window the queries of a document are taken so many at a time, with the keys that they see.
BLOCK = 128


def plan_spans(document_ids_BT: Tensor, window: int) -> Tensor:
    """Return the spans of a micro-batch: int32 (P, 5) of row, first query, end of the queries, first key, masked.

    The keys of a span end with its queries. `masked` is 0 where the queries see all keys up to their own position. P
    depends on B and T alone, and is filled up with zeros.

    Args:
        document_ids_BT: on the CPU, rising in every row.
        window: how many positions are seen, the own one included; T or more for all.
    """
    rows, length = document_ids_BT.shape
    is_first_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    firsts = is_first_BT.flatten().nonzero()[:, 0].tolist()
    spans: list[tuple[int, int, int, int, int]] = []
    for first, following in zip(firsts, [*firsts[1:], rows * length], strict=True):
        row, start = divmod(first, length)
        stop = start + following - first
        if start and stop - spans[-1][1] <= SHARED:
            spans[-1] = (row, spans[-1][1], stop, spans[-1][3], 1)
        elif stop - start <= window:
            spans.append((row, start, stop, start, 0))
        else:
            for begin in range(start, stop, BLOCK):
                end, first_key = min(begin + BLOCK, stop), max(start, begin - window + 1)
                spans.append((row, begin, end, first_key, int(first_key < begin or window < end - begin)))
    # Two neighbours have more than SHARED positions together; blocks come on top.
    room = rows * (2 * length // SHARED + length // BLOCK + 2)
    return F.pad(torch.tensor(spans, dtype=torch.int32), (0, 0, 0, room - len(spans)))


@torch.library.custom_op("hasten::attend_by_spans", mutates_args=())
def attend_by_spans(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_ids_BT: Tensor, window: Tensor, plan_P5: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the queries gather (B, H, T, D), and the logarithm of every query's sum (B, H, T)."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out_BHTD, sums_BHT = _empty_outputs(q_BHTD)
    added = _Added(document_ids_BT, window, q_BHTD.dtype)
    for row, start, stop, first_key, masked in plan_P5.tolist():
        if start == stop:
            break
        q, k = _part(row, start, stop), _part(row, first_key, stop)
        mask = added(row, start, stop, first_key) if masked else None
        out, sums = attend(q_BHTD[q], k_BHTD[k], v_BHTD[k], 0.0, start == first_key, attn_mask=mask)
        out_BHTD[q] = out
        sums_BHT[q] = sums
    return out_BHTD, sums_BHT


@attend_by_spans.register_fake
def _(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_ids_BT: Tensor, window: Tensor, plan_P5: Tensor
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q_BHTD)


@torch.library.custom_op("hasten::attend_by_spans_backward", mutates_args=())
def _backward_by_spans(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    out_BHTD: Tensor,
    sums_BHT: Tensor,
    document_ids_BT: Tensor,
    window: Tensor,
    plan_P5: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    grad_q_BHTD, grad_k_BHTD, grad_v_BHTD = _like(q_BHTD), _like(k_BHTD).zero_(), _like(v_BHTD).zero_()
    added = _Added(document_ids_BT, window, q_BHTD.dtype)
    for row, start, stop, first_key, masked in plan_P5.tolist():
        if start == stop:
            break
        q, k = _part(row, start, stop), _part(row, first_key, stop)
        mask = added(row, start, stop, first_key) if masked else None
        known = (grad_BHTD[q], q_BHTD[q], k_BHTD[k], v_BHTD[k], out_BHTD[q], sums_BHT[q])
        grad_q, grad_k, grad_v = differentiate(*known, 0.0, start == first_key, attn_mask=mask)
        grad_q_BHTD[q] = grad_q
        grad_k_BHTD[k] += grad_k
        grad_v_BHTD[k] += grad_v
    return grad_q_BHTD, grad_k_BHTD, grad_v_BHTD


@_backward_by_spans.register_fake
def _(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    out_BHTD: Tensor,
    sums_BHT: Tensor,
    document_ids_BT: Tensor,
    window: Tensor,
    plan_P5: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q_BHTD), _like(k_BHTD), _like(v_BHTD)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BHTD, k_BHTD, v_BHTD, *rest = inputs
    ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD, *output, *rest)


def _differentiate(ctx: Any, grad_BHTD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_backward_by_spans(grad_BHTD, *ctx.saved_tensors), None, None, None)


attend_by_spans.register_autograd(_differentiate, setup_context=_keep)


class _Added:
    """What is added to the scores of a span: 0 where a key is seen, -inf where not.

    Blocks inside one document look alike, and are made once.
    """

    def __init__(self, document_ids_BT: Tensor, window: Tensor, dtype: torch.dtype) -> None:
        self.document_ids_BT, self.window, self.dtype = document_ids_BT, int(window), dtype
        self.known: dict[tuple[int, int], Tensor] = {}

    def __call__(self, row: int, start: int, stop: int, first_key: int) -> Tensor:
        ids_S = self.document_ids_BT[row, first_key:stop]
        if ids_S[0] != ids_S[-1]:
            return self._make(start - first_key, ids_S)
        shape = (start - first_key, len(ids_S))
        if shape not in self.known:
            self.known[shape] = self._make(start - first_key, ids_S)
        return self.known[shape]

    def _make(self, before: int, ids_S: Tensor) -> Tensor:
        s_S = torch.arange(len(ids_S))
        distance_LS = s_S[before:, None] - s_S
        seen_LS = (distance_LS >= 0) & (distance_LS < self.window) & (ids_S[before:, None] == ids_S)
        return torch.zeros(seen_LS.shape, dtype=self.dtype).masked_fill_(~seen_LS, float("-inf"))[None, None]


def _part(row: int, start: int, stop: int) -> tuple[slice, slice, slice]:
    return slice(row, row + 1), slice(None), slice(start, stop)


def _like(x_BHTD: Tensor) -> Tensor:
    """Return room for `x_BHTD` with the heads of a position side by side, as its projection wants them."""
    rows, heads, length, size = x_BHTD.shape
    return x_BHTD.new_empty(rows, length, heads, size).transpose(1, 2)


def _empty_outputs(q_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = q_BHTD.shape
    dtype = q_BHTD.dtype if q_BHTD.dtype.itemsize >= 4 else torch.float32
    return _like(q_BHTD), q_BHTD.new_empty(rows, length, heads, dtype=dtype).transpose(1, 2)

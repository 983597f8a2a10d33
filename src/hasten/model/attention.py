"""Attention of packed rows: who sees whom, in the form that the fastest kernel of the device takes.

A position sees itself and earlier positions of its own document, or only the last `window` of them. What may be seen
is worked out once for all layers of a micro-batch, outside compiled code, in shapes that do not change from one batch
to the next; a layer calls `attend`.

Dimensions: B rows, T positions, S positions seen (cached ones included), H query heads, G key/value heads, D head
dimension, N = B * T.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import RecipeError, nearest
from hasten.model.spans import attend_by_spans, plan_spans

Backend = Literal["varlen", "flex", "dense"]

# `varlen` kernels start a block of threads for every document that a list has room for, whether it is there or not:
# room for one document per 64 tokens; more documents double it.
TOKENS_PER_DOCUMENT = 64


# Row length from which a CPU goes document by document, on one thread and on more. A call per document costs more than
# it saves in short rows: 1.3 to 1.6 times plain causal attention at 64 positions, 1.1 to 1.2 at 128, 0.9 to 1.0 at 256,
# 0.73 at 512. Threads wait for each other at the end of every call, which hurts where other work holds a core: whole
# steps of `nano` at 512 then took 1.5 times as long as with plain causal attention; on free cores attention alone took
# 0.80 times as long at 512 and 0.37 times at 2048.
DOCUMENTS_FROM = {"one thread": 512, "threads": 1024}


@dataclass(frozen=True)
class Choice:
    """A back end and the reason for it, to be recorded."""

    backend: Backend
    reason: str


@dataclass(frozen=True)
class Work:
    """What a back end has to cope with.

    Args:
        device: where the model is.  dtype: of the activations.  head_dim: size of a head.  length: of a row.
        windowed: whether the window is limited, to a number that changes while training.
        compiling: whether the mask is made inside compiled code, where documents cannot be counted.
        threads: that PyTorch uses on a CPU.  capability: compute capability of a CUDA device.
        has_varlen: whether this PyTorch has `torch.nn.attention.varlen`.  has_triton: whether triton is installed.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    length: int
    windowed: bool = False
    compiling: bool = False
    threads: int = 1
    capability: tuple[int, int] = (0, 0)
    has_varlen: bool = False
    has_triton: bool = False


def work_on(device: torch.device, dtype: torch.dtype, head_dim: int, length: int, *, windowed: bool) -> Work:
    """Return the work of a model on `device`, with what is installed here."""
    compiling = torch.compiler.is_compiling()
    known: dict[str, Any] = {"windowed": windowed, "compiling": compiling}
    if device.type == "cpu" and not compiling:  # a compiler cannot ask for it, and it makes no difference then
        known["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        known["capability"] = torch.cuda.get_device_capability(device)
        known["has_varlen"], known["has_triton"] = _is_installed("torch.nn.attention.varlen"), _is_installed("triton")
    return Work(device.type, dtype, head_dim, length, **known)


def choose(work: Work, wish: str = "auto") -> Choice:
    """Return how packed or windowed rows are attended to: the first that works of varlen, flex, dense.

    `varlen` computes nothing but documents, `flex` skips the blocks of a row in which nobody sees anybody, `dense`
    reads a number for every pair of positions. Rows without documents and window need none of them.

    Raises:
        RecipeError: `wish` is neither ``auto`` nor a back end, or one that cannot train here.

    Example:
        >>> choose(Work("cpu", torch.float32, head_dim=64, length=512)).backend
        'varlen'
    """
    known = ("auto", *get_args(Backend))
    if wish not in known:
        raise RecipeError(f"attention is {wish!r}; it is one of {', '.join(known)}{nearest(wish, known)}")
    obstacles: dict[Backend, str] = {"varlen": _obstacle_to_varlen(work), "flex": _obstacle_to_flex(work), "dense": ""}
    if wish != "auto":
        name = next(name for name in obstacles if name == wish)
        if obstacles[name]:
            raise RecipeError(f"attention={name} cannot train here, because {obstacles[name]}; choose attention=auto")
        return Choice(name, "as asked")
    least = DOCUMENTS_FROM["one thread" if work.threads == 1 else "threads"]
    if work.device == "cpu" and work.length < least:
        obstacles["varlen"] = f"rows of {work.length} are too short for it to pay on a CPU, below {least}"
    name = next(name for name, obstacle in obstacles.items() if not obstacle)
    passed_over = list(obstacles)[: list(obstacles).index(name)]
    return Choice(name, "; ".join(f"not {other}: {obstacles[other]}" for other in passed_over) or "the fastest")


def _obstacle_to_varlen(work: Work) -> str:
    if work.compiling:
        return "documents cannot be counted inside compiled code; give `mask` to the compiled model"
    if work.device == "cpu":
        return ""
    if work.device != "cuda":
        return f"it has no kernel for {work.device}"
    if work.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bf16 and fp16, not {str(work.dtype).removeprefix('torch.')}"
    if work.capability < (8, 0):
        return f"its kernels need compute capability 8.0, and this GPU has {work.capability[0]}.{work.capability[1]}"
    if work.head_dim % 8 or work.head_dim > 256:
        return f"its kernels take heads of a multiple of 8 up to 256, not {work.head_dim}"
    if work.windowed:
        return "its kernels take the window as a constant, and the model would be compiled anew for each"
    return "" if work.has_varlen else f"torch {torch.__version__} has none"


def _obstacle_to_flex(work: Work) -> str:
    if work.device != "cuda":
        return f"it cannot train on {work.device}"
    if work.capability < (7, 0):
        return f"its kernels need compute capability 7.0, and this GPU has {work.capability[0]}.{work.capability[1]}"
    if work.head_dim < 16:
        return f"its kernels take heads of at least 16, not {work.head_dim}"
    return "" if work.has_triton else "triton is not installed"


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclass(frozen=True, eq=False)
class Causal:
    """Every position sees itself and all earlier ones of its row."""

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return what the queries gather: (B, H, T, D)."""
        is_grouped = q_BHTD.shape[1] != k_BGTD.shape[1]
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=is_grouped)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Position s is seen by t where `seen` is true; None: everything is. The plain form of every other mask."""

    seen: Tensor | None  # bool, broadcastable to (B, H, T, S)

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Return what the queries gather: (B, H, T, D)."""
        is_grouped = q_BHTD.shape[1] != k_BGSD.shape[1]
        return F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, attn_mask=self.seen, enable_gqa=is_grouped)


@dataclass(frozen=True, eq=False)
class Scores:
    """What a CPU adds to the score of every pair: 0 where it is seen, -inf where not.

    PyTorch's public function makes such a tensor from a boolean one in every layer and keeps it for the way back, and
    it cannot be told that the upper half is masked anyway. Its CPU kernel can: with both, forward and backward took
    1.03, 1.07 and 1.11 times as long as plain causal attention at 512, 1024 and 2048 positions, with the boolean mask
    1.05, 1.43 and 1.84 times (float32, 6 heads of 64, one thread, medians of 6 to 8 interleaved passes).
    """

    added_B1TT: Tensor

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return what the queries gather: (B, H, T, D)."""
        k_BHTD, v_BHTD = _one_per_query_head(q_BHTD, k_BGTD, v_BGTD)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        added_B1TT = self.added_B1TT.to(q_BHTD.dtype)  # the kernel misreads float32 beside float64
        return attend(q_BHTD, k_BHTD, v_BHTD, 0.0, True, attn_mask=added_B1TT)[0]


@dataclass(frozen=True, eq=False)
class Blocks:
    """FlexAttention: the blocks of a row in which somebody sees somebody, and a function for the rest."""

    blocks: Any  # torch.nn.attention.flex_attention.BlockMask

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return what the queries gather: (B, H, T, D)."""
        from torch.nn.attention.flex_attention import flex_attention

        is_grouped = q_BHTD.shape[1] != k_BGTD.shape[1]
        # Uncompiled, it writes out all scores; inside a compiled model it is compiled with it.
        is_plain = q_BHTD.device.type != "cuda" or torch.compiler.is_compiling()
        attend = flex_attention if is_plain else _compiled_flex_attention()
        return attend(q_BHTD, k_BGTD, v_BGTD, block_mask=self.blocks, enable_gqa=is_grouped)


@dataclass(frozen=True, eq=False)
class Spans:
    """The documents of a micro-batch for a CPU, which computes nothing else (`hasten.model.spans`)."""

    document_ids_BT: Tensor
    window: Tensor
    plan_P5: Tensor

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return what the queries gather: (B, H, T, D)."""
        k_BHTD, v_BHTD = _one_per_query_head(q_BHTD, k_BGTD, v_BGTD)
        return attend_by_spans(q_BHTD, k_BHTD, v_BHTD, self.document_ids_BT, self.window, self.plan_P5)[0]


@dataclass(frozen=True, eq=False)
class Bounds:
    """The documents of a micro-batch end to end, for flash kernels of a GPU that visit nothing else.

    `bounds` are the places where documents begin, then N as often as the list is long: a fixed number.
    """

    bounds: Tensor  # int32, rising, from 0 to N
    length: int  # of a row: no document is longer
    keywords: Mapping[str, Any]  # how this version of torch is told what to do
    takes_groups: bool  # whether it takes fewer key/value heads than query heads

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return what the queries gather: (B, H, T, D)."""
        from torch.nn.attention.varlen import varlen_attn

        if not self.takes_groups:
            k_BGTD, v_BGTD = _one_per_query_head(q_BHTD, k_BGTD, v_BGTD)
        q_NHD, k_NGD, v_NGD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BGTD, v_BGTD))
        ends = (self.bounds, self.bounds, self.length, self.length)
        out_NHD = varlen_attn(q_NHD, k_NGD, v_NGD, *ends, **self.keywords)
        return out_NHD.view(-1, self.length, *out_NHD.shape[1:]).transpose(1, 2)


Mask = Causal | Pairs | Scores | Blocks | Spans | Bounds


def mask_for(
    backend: Backend,
    document_ids_BT: Tensor | None,
    window: Tensor | None,
    *,
    rows: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Mask:
    """Return the mask of `rows` rows of `length` positions for a back end that `choose` named.

    Args:
        backend: how; unimportant where neither documents nor a window limit the view.
        document_ids_BT: a number per position that rises with every document of a row, padding with a number of its
            own; None: a row is one document. For `varlen` documents are counted, which waits for the device that holds
            them: leave them on the CPU if you can.
        window: 0-d integer tensor, at least 1: how many positions are seen, the own one included; None: all.
        rows, length, device, dtype: of the tokens, the model and its activations.
    """
    if document_ids_BT is None and window is None:
        return Causal()
    if backend == "varlen" and device.type == "cpu":
        ids_BT = torch.zeros(rows, length, dtype=torch.int32) if document_ids_BT is None else document_ids_BT
        window = torch.tensor(length) if window is None else window
        return Spans(ids_BT, window, plan_spans(ids_BT, int(window)))
    if backend == "varlen":
        assert window is None, "`choose` gives windows to another back end"
        return _bounds(document_ids_BT, device)
    if document_ids_BT is not None:
        document_ids_BT = document_ids_BT.to(device, non_blocking=True)
    if window is not None:
        window = window.to(device, non_blocking=True)
    if backend == "flex":
        return _blocks(document_ids_BT, window, rows, length, device)
    return _pairs(document_ids_BT, window, length, device, dtype)


def _pairs(
    document_ids_BT: Tensor | None, window: Tensor | None, length: int, device: torch.device, dtype: torch.dtype
) -> Pairs | Scores:
    """Return the mask as a number per pair; for a CPU without the causal part, which its kernel knows of."""
    t_T1, s_T = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    limits = []
    if document_ids_BT is not None:
        limits.append(document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :])
    if window is not None:
        limits.append((t_T1 - s_T < window)[None, None])
    seen = limits[0] if len(limits) == 1 else limits[0] & limits[1]
    if device.type != "cpu":
        return Pairs(seen & (s_T <= t_T1))
    nothing, never = torch.zeros((), dtype=dtype), torch.full((), float("-inf"), dtype=dtype)
    return Scores(torch.where(seen, nothing, never))


def _blocks(
    document_ids_BT: Tensor | None, window: Tensor | None, rows: int, length: int, device: torch.device
) -> Blocks:
    is_plain = device.type != "cuda" or torch.compiler.is_compiling()
    make = _block_mask_function() if is_plain else _compiled_block_mask()
    num_rows = None if document_ids_BT is None else rows
    return Blocks(make(_sees(document_ids_BT, window), num_rows, None, length, length, device=str(device)))


def _bounds(document_ids_BT: Tensor, device: torch.device) -> Bounds:
    is_first_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first_places = is_first_BT.flatten().nonzero()[:, 0].int()
    room = max(len(document_ids_BT), document_ids_BT.numel() // TOKENS_PER_DOCUMENT)
    while room < len(first_places):
        room *= 2
    bounds = F.pad(first_places, (0, room + 1 - len(first_places)), value=document_ids_BT.numel())
    keywords, takes_groups = _varlen_keywords()
    return Bounds(bounds.to(device, non_blocking=True), document_ids_BT.shape[1], keywords, takes_groups)


def _sees(document_ids_BT: Tensor | None, window: Tensor | None) -> Callable[..., Tensor]:
    """Return the rule as FlexAttention asks for it; its window is a tensor, so a new value is no new kernel."""

    def is_near(row: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & (t - s < window)

    def is_own(row: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & (document_ids_BT[row, t] == document_ids_BT[row, s])

    def is_both(row: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return is_near(row, head, t, s) & (document_ids_BT[row, t] == document_ids_BT[row, s])

    if window is None:
        return is_own
    return is_near if document_ids_BT is None else is_both


def _one_per_query_head(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
    repeats = q_BHTD.shape[1] // k_BGTD.shape[1]
    if repeats == 1:
        return k_BGTD, v_BGTD
    return k_BGTD.repeat_interleave(repeats, 1), v_BGTD.repeat_interleave(repeats, 1)


def _block_mask_function() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask


@cache
def _compiled_block_mask() -> Callable[..., Any]:
    """Uncompiled, it would write out all pairs of a row."""
    return torch.compile(_block_mask_function())


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _varlen_keywords() -> tuple[Mapping[str, Any], bool]:
    """Return what makes varlen attention causal, and whether it takes fewer key/value heads than query heads.

    torch 2.10 says `is_causal=True`, later versions `window_size=(-1, 0)`; `enable_gqa` came later still.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    keywords: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    takes_groups = "enable_gqa" in known
    return ({**keywords, "enable_gqa": True} if takes_groups else keywords), takes_groups

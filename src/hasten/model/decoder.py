"""The decoder: a transformer whose weights are a Hugging Face Qwen3 checkpoint.

Pre-norm blocks of grouped-query attention (QK-norm, rotary positions) and SwiGLU, RMSNorm throughout, no biases,
head tied to the embedding or not. Names and shapes of `state_dict()` are those of `Qwen3ForCausalLM`.

Dimensions: B rows, T positions, S positions seen (cached ones included), C width, H query heads, G key/value heads,
D head dimension, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.model.attention import Causal, Choice, Mask, Pairs, choose, mask_for, work_on
from hasten.model.loss import summed_loss
from hasten.model.recompute import Run, keep_all
from hasten.model.shape import ModelConfig


class Decoder(nn.Module):
    """A language model: token ids in, logits of the next token out.

    `forward` runs in the type of the matrices; when they are bf16 or fp16 and the vectors float32, activations are
    in that low precision while norms, rotary positions and the loss are computed in float32.

    Args:
        config: the shape.
        seed: of the initial weights, which depend on it alone and not on the global random state. None leaves the
            parameters without storage (`meta` device), to be assigned from a checkpoint.
        attention: how packed rows are attended to: ``auto``, or a back end of `hasten.model.attention` by name. It
            changes speed and the last bits, and is no part of the shape.

    Example:
        >>> from hasten.model import SIZES
        >>> model = Decoder(ModelConfig(**SIZES["nano"], vocab_size=256, seq_len=64), seed=0)
        >>> model(torch.zeros(2, 64, dtype=torch.long)).shape
        torch.Size([2, 64, 256])
    """

    def __init__(self, config: ModelConfig, *, seed: int | None, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.run_block: Run = keep_all
        self.compute_dtype: torch.dtype | None = None  # of the forward pass, where the weights are kept in another
        with torch.device("meta"):  # the constructors of nn.Linear and nn.Embedding would draw global random numbers
            self.model = Trunk(config)
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if seed is not None:
            self.to_empty(device="cpu")
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        # The length of a model from a file is only claimed: beyond a measure the angles are computed as rows come.
        length = config.seq_len if seed is not None else min(config.seq_len, 1 << 15)
        cosine_TD, sine_TD = _rotary_tables(config, length)
        self.register_buffer("cosine_TD", cosine_TD, persistent=False)
        self.register_buffer("sine_TD", sine_TD, persistent=False)
        if seed is not None:
            _initialise(self, seed)

    def forward(
        self,
        tokens_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        labels_BT: Tensor | None = None,
        window: Tensor | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """Return logits (B, T, V), or with `labels_BT` the summed loss of the positions that carry one.

        Args:
            tokens_BT: token ids.
            document_ids_BT: a number per position that rises with every document of a row; positions see earlier
                ones of the same number only. None: all earlier ones. Positions count from the start of the row, not of
                the document: rotary attention depends on distances alone.
            cache: of `new_cache`; the tokens continue what it holds, and are added to it.
            labels_BT: the token to predict at every position, `NO_TARGET` (-100) for none.
            window: 0-d integer tensor, at least 1: how many positions each one sees, itself included. None: all that
                the documents allow; so does any window of T or more.
            mask: what `mask` made of documents and window beforehand, in place of both.
        """
        start = 0 if cache is None else cache.length
        stop = start + tokens_BT.shape[1]
        rotary = self._rotary(start, stop)
        if cache is not None:
            assert document_ids_BT is window is mask is None, "a cache holds one document per row, seen whole"
            mask = _cached_mask(start, stop, tokens_BT.device)
        elif mask is None:
            mask = self.mask(tokens_BT, document_ids_BT, window)
        x_BTC = self.model.embed_tokens(tokens_BT)
        run_block = self.run_block if torch.is_grad_enabled() else keep_all
        for number, block in enumerate(self.model.layers):
            x_BTC = run_block(block, x_BTC, rotary, mask, None if cache is None else cache.layer(number, stop))
        if cache is not None:
            cache.length = stop
        x_BTC = self.model.norm(x_BTC)
        if labels_BT is None:
            return self.lm_head(x_BTC)
        return summed_loss(x_BTC.flatten(0, 1), self.lm_head.weight, labels_BT.flatten())

    def mask(self, tokens_BT: Tensor, document_ids_BT: Tensor | None = None, window: Tensor | None = None) -> Mask:
        """Return who sees whom in `tokens_BT`, for `forward`: worked out once, and outside compiled code.

        `document_ids_BT` and `window` may be on the CPU while the tokens are on a GPU.
        """
        if document_ids_BT is None and window is None:
            return Causal()
        rows, length = tokens_BT.shape
        dtype = self.compute_dtype or self.lm_head.weight.dtype
        shape = {"rows": rows, "length": length, "device": tokens_BT.device, "dtype": dtype}
        backend = self.attention_choice(length, windowed=window is not None).backend
        return mask_for(backend, document_ids_BT, window, **shape)

    def attention_choice(self, length: int, *, windowed: bool = False) -> Choice:
        """Return how packed (or windowed) rows of `length` are attended to and why, where the model is now.

        Raises:
            RecipeError: `attention` names a back end that does not exist or cannot train here.
        """
        matrix = self.lm_head.weight
        dtype = self.compute_dtype or matrix.dtype
        work = work_on(matrix.device, dtype, self.config.head_dim, length, windowed=windowed)
        return choose(work, self.attention)

    def new_cache(self, *, rows: int = 1, capacity: int | None = None) -> Cache:
        """Return an empty cache for `rows` rows of at most `capacity` tokens (default: the trained length)."""
        config = self.config
        shape = (config.num_layers, rows, config.num_kv_heads, capacity or config.seq_len, config.head_dim)
        return Cache(self.lm_head.weight.new_empty(shape), self.lm_head.weight.new_empty(shape))

    def _rotary(self, start: int, stop: int) -> Rotary:
        if stop <= len(self.cosine_TD):
            return Rotary(self.cosine_TD[start:stop], self.sine_TD[start:stop])
        cosine_TD, sine_TD = _rotary_tables(self.config, stop)
        return Rotary(cosine_TD[start:].to(self.cosine_TD), sine_TD[start:].to(self.sine_TD))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension, in float32 whatever the input's type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.widened(x).to(x.dtype)

    def widened(self, x: Tensor) -> Tensor:
        """Return the norm without rounding it back to the type of `x`."""
        if x.dtype.itemsize < 4:
            return _WideningNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class _WideningNorm(torch.autograd.Function):
    """The float32 norm of a low-precision input, which is all that is kept for the backward pass.

    Autograd would keep the widened copy: a bf16 model's activations took 0.66 of the float32 bytes with it, 0.43
    without. The plain form is `F.rms_norm(x.float(), ...)`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        unit, grad_unit = wide * scale, grad * weight.float()
        grad_x = scale * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class Attention(nn.Module):
    """Causal grouped-query attention over normalised, rotated queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, query_width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_BTC: Tensor, rotary: Rotary, mask: Mask, cache: LayerCache | None) -> Tensor:
        by_head = (*x_BTC.shape[:2], -1, self.head_dim)
        q_BHTD = rotary.turn(self.q_norm.widened(self.q_proj(x_BTC).view(by_head)), x_BTC.dtype).transpose(1, 2)
        k_BGSD = rotary.turn(self.k_norm.widened(self.k_proj(x_BTC).view(by_head)), x_BTC.dtype).transpose(1, 2)
        v_BGSD = self.v_proj(x_BTC).view(by_head).transpose(1, 2)
        if cache is not None:
            k_BGSD, v_BGSD = cache.extend(k_BGSD, v_BGSD)
        out_BHTD = mask.attend(q_BHTD, k_BGSD, v_BGSD)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class Block(nn.Module):
    """Attention, then SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x_BTC: Tensor, rotary: Rotary, mask: Mask, cache: LayerCache | None) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), rotary, mask, cache)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Trunk(nn.Module):
    """Everything below the head; a module of its own only because the checkpoint's names say so."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Its own constructor would draw numbers, which without storage costs 2.3 s: it imports torch's compiler.
        empty_VC = torch.empty(config.vocab_size, config.width)
        self.embed_tokens = nn.Embedding.from_pretrained(empty_VC, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


@dataclass(frozen=True)
class Rotary:
    """Cosine and (signed) sine of every position and channel, for T positions."""

    cosine_TD: Tensor
    sine_TD: Tensor

    def turn(self, x_BTHD: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate channel i with channel i + D/2 by its position's angle; return it as `dtype`."""
        swapped = x_BTHD.roll(x_BTHD.shape[-1] // 2, dims=-1)
        return torch.addcmul(x_BTHD * self.cosine_TD[:, None], swapped, self.sine_TD[:, None]).to(dtype)


@dataclass
class Cache:
    """Keys and values of the tokens already seen, for generation."""

    keys: Tensor  # (layers, B, G, capacity, D)
    values: Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def layer(self, number: int, stop: int) -> LayerCache:
        assert stop <= self.capacity, f"the cache holds {self.capacity} tokens, {stop} are needed"
        return LayerCache(self.keys[number, :, :, :stop], self.values[number, :, :, :stop], self.length)


@dataclass(frozen=True)
class LayerCache:
    """One block's part of a `Cache`: room for all positions up to the last new one."""

    keys_BGSD: Tensor
    values_BGSD: Tensor
    start: int

    def extend(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        self.keys_BGSD[:, :, self.start :] = k_BGTD
        self.values_BGSD[:, :, self.start :] = v_BGTD
        return self.keys_BGSD, self.values_BGSD


def loss_sum(
    model: nn.Module,
    tokens_BT: Tensor,
    labels_BT: Tensor,
    document_ids_BT: Tensor | None = None,
    window: Tensor | None = None,
) -> Tensor:
    """Return the sum of -log p(label) over the positions that carry one.

    A scalar in float32, or float64 for a float64 model. Who sees whom is worked out here, outside of what is compiled.

    Args:
        model: a `Decoder`, compiled or wrapped or not.
        tokens_BT: inputs.  labels_BT: targets, -100 for none.  document_ids_BT, window: as in `Decoder.forward`.
    """
    decoder = next(module for module in model.modules() if isinstance(module, Decoder))
    return model(tokens_BT, labels_BT=labels_BT, mask=decoder.mask(tokens_BT, document_ids_BT, window))


def _cached_mask(start: int, stop: int, device: torch.device) -> Mask:
    if start == 0:
        return Causal()
    if stop - start == 1:
        return Pairs(None)
    return Pairs(torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start))


def _rotary_tables(config: ModelConfig, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine of every position and channel.

    Frequencies are transformers' float32 numbers; angles are not rounded. Rounded to float32, a document's gradients
    were off by 1.2e-5 of the largest where it began at position 7,592 of 8,192 and not at 0; so, by 1e-6.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, dtype=torch.float64)[:, None] * (1.0 / config.rope_theta**exponents)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    return cosine.repeat(1, 2), torch.cat([-sine, sine], dim=1)


@torch.no_grad()
def _initialise(model: Decoder, seed: int) -> None:
    """Draw the initial weights from `seed`, in the order of `named_parameters()`.

    Matrices are normal with deviation `1 / sqrt(inputs)`, so that activations keep their size; those that write to the
    residual stream are zero, so that every block begins as the identity (Zhang et al., arXiv:1901.09321, for the
    idea); the embedding has deviation 0.5, the head (and a tied embedding) `1 / width`, which starts at the loss of
    guessing evenly. Against 0.02 everywhere: 2.14 and 2.48 bits per byte after 400k tokens (docs/LOG.md).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif parameter is model.lm_head.weight:
            parameter.normal_(0.0, 1.0 / model.config.width, generator=generator)
        elif parameter is model.model.embed_tokens.weight:
            parameter.normal_(0.0, 0.5, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


@functools.lru_cache(maxsize=64)  # a run asks four times before its first step, at 10 ms each
def count_parameters(config: ModelConfig) -> int:
    """Return how many weights a `Decoder` of this shape has, a tied head counted once."""
    return sum(parameter.numel() for parameter in Decoder(config, seed=None).parameters())

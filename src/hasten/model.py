"""The decoder we measure with: a transformer whose weights are a Hugging Face Qwen3 checkpoint.

Pre-norm blocks of grouped-query attention (QK-norm, rotary positions) and SwiGLU, RMSNorm throughout, no biases,
head tied to the embedding or not. Names and shapes of `state_dict()` are those of `Qwen3ForCausalLM`.

Dimensions: B rows, T positions, S positions seen (cached ones included), C width, H query heads, G key/value heads,
D head dimension, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hasten.errors import RecipeError, RunError, printable

NO_TARGET = -100  # a label that carries no loss


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a `Decoder`.

    Args:
        vocab_size: number of token ids, at least 1.
        num_layers: blocks, at least 1.
        width: size of the residual stream.
        num_heads: query heads; a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads; fewer than `num_heads` is grouped-query attention.
        head_dim: size of one head, even; `num_heads * head_dim` need not equal `width`.
        mlp_width: size of the SwiGLU hidden layer.
        seq_len: positions the model is trained for; becomes `max_position_embeddings` of an export.
        tied: whether the head is the embedding.
        rope_theta: base of the rotary frequencies, above 0.
        norm_eps: added to the mean square in every RMSNorm, above 0.

    Raises:
        RecipeError: a size that is not a positive whole number, or two that do not fit together.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    seq_len: int
    tied: bool
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise RecipeError(f"model.{field.name} is {value!r}; it must be a whole number of at least 1")
            if field.type == "float" and (type(value) not in (int, float) or not 0 < value < float("inf")):
                raise RecipeError(f"model.{field.name} is {value!r}; it must be a number above 0")
        if type(self.tied) is not bool:
            raise RecipeError(f"model.tied is {self.tied!r}; it must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise RecipeError(
                f"model.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}; "
                "every key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise RecipeError(f"model.head_dim is {self.head_dim}; rotary positions need an even number")


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
        wide = _widen(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps)


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

    def forward(self, x_BTC: Tensor, rotary: Rotary, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        by_head = (*x_BTC.shape[:2], -1, self.head_dim)
        q_BHTD = rotary.turn(self.q_norm.widened(self.q_proj(x_BTC).view(by_head)), x_BTC.dtype).transpose(1, 2)
        k_BGSD = rotary.turn(self.k_norm.widened(self.k_proj(x_BTC).view(by_head)), x_BTC.dtype).transpose(1, 2)
        v_BGSD = self.v_proj(x_BTC).view(by_head).transpose(1, 2)
        if cache is not None:
            k_BGSD, v_BGSD = cache.extend(k_BGSD, v_BGSD)
        out_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BGSD,
            v_BGSD,
            attn_mask=mask,
            is_causal=mask is None and q_BHTD.shape[2] == k_BGSD.shape[2],
            enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1],
        )
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

    def forward(self, x_BTC: Tensor, rotary: Rotary, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), rotary, mask, cache)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Trunk(nn.Module):
    """Everything below the head; a module of its own only because the checkpoint's names say so."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Decoder(nn.Module):
    """A language model: token ids in, logits of the next token out.

    `forward` runs in the type of the matrices; when they are bf16 or fp16 and the vectors float32, activations are
    in that low precision while norms, rotary positions and the loss are computed in float32.

    Args:
        config: the shape.
        seed: of the initial weights, which depend on it alone and not on the global random state. None leaves the
            parameters without storage (`meta` device), to be assigned from a checkpoint.

    Example:
        >>> model = Decoder(ModelConfig(**SIZES["nano"], vocab_size=256, seq_len=64), seed=0)
        >>> model(torch.zeros(2, 64, dtype=torch.long)).shape
        torch.Size([2, 64, 256])
    """

    def __init__(self, config: ModelConfig, *, seed: int | None) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # the constructors of nn.Linear and nn.Embedding would draw global random numbers
            self.model = Trunk(config)
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if seed is not None:
            self.to_empty(device="cpu")
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        cosine_TD, sine_TD = _rotary_tables(config, config.seq_len)
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
    ) -> Tensor:
        """Return logits (B, T, V), or with `labels_BT` the summed loss of the positions that carry one.

        Args:
            tokens_BT: token ids.
            document_ids_BT: a number per position; positions see earlier ones of the same number only. None: all
                earlier ones. Positions count from the start of the row, not of the document: rotary attention
                depends on distances alone.
            cache: of `new_cache`; the tokens continue what it holds, and are added to it.
            labels_BT: the token to predict at every position, `NO_TARGET` (-100) for none.
        """
        assert cache is None or document_ids_BT is None, "a cache holds one document per row"
        start = 0 if cache is None else cache.length
        stop = start + tokens_BT.shape[1]
        rotary = self._rotary(start, stop)
        mask = _mask(document_ids_BT, start, stop, tokens_BT.device)
        x_BTC = self.model.embed_tokens(tokens_BT)
        for number, block in enumerate(self.model.layers):
            x_BTC = block(x_BTC, rotary, mask, None if cache is None else cache.layer(number, stop))
        if cache is not None:
            cache.length = stop
        x_BTC = self.model.norm(x_BTC)
        if labels_BT is None:
            return self.lm_head(x_BTC)
        return _summed_loss(x_BTC.flatten(0, 1), self.lm_head.weight, labels_BT.flatten())

    def new_cache(self, *, rows: int = 1, capacity: int | None = None) -> Cache:
        """Return an empty cache for `rows` rows of at most `capacity` tokens (default: the trained length)."""
        config = self.config
        shape = (config.num_layers, rows, config.num_kv_heads, capacity or config.seq_len, config.head_dim)
        return Cache(self.lm_head.weight.new_empty(shape), self.lm_head.weight.new_empty(shape))

    def _rotary(self, start: int, stop: int) -> Rotary:
        if stop <= self.config.seq_len:
            return Rotary(self.cosine_TD[start:stop], self.sine_TD[start:stop])
        cosine_TD, sine_TD = _rotary_tables(self.config, stop)
        return Rotary(cosine_TD[start:].to(self.cosine_TD), sine_TD[start:].to(self.sine_TD))


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
    keys_BGSD: Tensor
    values_BGSD: Tensor
    start: int

    def extend(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        self.keys_BGSD[:, :, self.start :] = k_BGTD
        self.values_BGSD[:, :, self.start :] = v_BGTD
        return self.keys_BGSD, self.values_BGSD


def loss_sum(model: nn.Module, tokens_BT: Tensor, labels_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
    """Return the sum of -log p(label) over the positions that carry one.

    A scalar in float32, or float64 for a float64 model.

    Args:
        model: a `Decoder`, compiled or wrapped or not.
        tokens_BT: inputs.  labels_BT: targets, -100 for none.  document_ids_BT: as in `Decoder.forward`.
    """
    return model(tokens_BT, document_ids_BT, labels_BT=labels_BT)


def _summed_loss(x_NC: Tensor, head_VC: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(_widen(F.linear(x_NC, head_VC)), labels_N, ignore_index=NO_TARGET, reduction="sum")


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _mask(document_ids_BT: Tensor | None, start: int, stop: int, device: torch.device) -> Tensor | None:
    """Return which keys each query may see; None where that is plainly causal, or everything."""
    if document_ids_BT is not None:
        same = document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :]
        return same & torch.ones(stop, stop, dtype=torch.bool, device=device).tril()
    if start == 0 or stop - start == 1:
        return None
    return torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)


def _rotary_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, dtype=torch.float32)[:, None] * (1.0 / config.rope_theta**exponents)
    return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)


@torch.no_grad()
def _initialise(model: Decoder, seed: int) -> None:
    """Draw the initial weights from `seed`, in the order of `named_parameters()`.

    Matrices are normal with deviation 0.02, those that write to the residual stream `0.02 / sqrt(2 layers)`, the head
    (and a tied embedding) `1 / width`: at 0.02 a wide tied model predicts the token it has just read with a logit of
    `0.02 * width`, and starts far above the loss of guessing evenly.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / (2 * model.config.num_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif parameter is model.lm_head.weight:
            parameter.normal_(0.0, 1.0 / model.config.width, generator=generator)
        else:
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            parameter.normal_(0.0, std, generator=generator)


def count_parameters(config: ModelConfig) -> int:
    """Return how many weights a `Decoder` of this shape has, a tied head counted once."""
    return sum(parameter.numel() for parameter in Decoder(config, seed=None).parameters())


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Return the floating-point operations that training spends on one token of a row of `length`.

    `6 * matrix weights (head included, embedding look-up not) + 6 * layers * heads * head_dim * (length + 1)`: forward
    and backward, two operations per multiply-add, and causal attention, in which a position sees half a row on average.
    (The often used `12 * layers * heads * head_dim * length` counts the masked half too.)
    """
    attention = 2 * config.width * config.head_dim * (config.num_heads + config.num_kv_heads)
    matrices = config.num_layers * (attention + 3 * config.width * config.mlp_width) + config.width * config.vocab_size
    return 6.0 * matrices + 6.0 * config.num_layers * config.num_heads * config.head_dim * (length + 1)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` with which `transformers` builds the same model (`Qwen3ForCausalLM`)."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.seq_len,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4 reads this, 5 the next line
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """Return the shape that a Qwen3 `config.json` describes.

    Raises:
        RunError: another architecture, or an option of this one that `Decoder` does not have.
    """
    if values.get("model_type") != "qwen3":
        kind = printable(repr(values.get("model_type")))
        raise RunError(f"config.json describes a model of type {kind}; hasten reads 'qwen3' only")
    rope_key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"  # transformers 5 and 4
    rope = values.get(rope_key) or {}
    refused = {
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(values.get("attention_bias", False)),
        "use_sliding_window": bool(values.get("use_sliding_window", False)),
        "layer_types": any(kind != "full_attention" for kind in values.get("layer_types") or []),
        rope_key: not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default",
        "quantization_config": values.get("quantization_config") is not None,
    }
    for name, is_refused in refused.items():
        if is_refused:
            given = printable(repr(values.get(name)))[:80]
            raise RunError(
                f"config.json sets {name} = {given}; hasten's decoder has no such option, use transformers for it"
            )
    try:
        heads = values["num_attention_heads"]
        theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
        return ModelConfig(
            vocab_size=values["vocab_size"],
            num_layers=values["num_hidden_layers"],
            width=values["hidden_size"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or 128,
            mlp_width=values["intermediate_size"],
            seq_len=values["max_position_embeddings"],
            tied=values.get("tie_word_embeddings", False),
            rope_theta=theta,
            norm_eps=values.get("rms_norm_eps", 1e-6),
        )
    except KeyError as missing:
        raise RunError(f"config.json has no {missing}; it must describe a whole Qwen3 model") from None
    except RecipeError as wrong:
        raise RunError(f"config.json cannot be used: {wrong}") from None


def read_model(folder: str | Path) -> Decoder:
    """Return the model in a Hugging Face folder (`config.json`, `model.safetensors`), in float32, on the CPU.

    Raises:
        RunError: a file is missing or damaged, or the folder holds something else than a Qwen3 model.
    """
    folder = Path(folder)
    config = config_from_hf(_read_json(folder / "config.json"))
    tensors = _read_weights(folder)
    if config.tied:
        tensors.setdefault("lm_head.weight", tensors.get("model.embed_tokens.weight"))
    model = Decoder(config, seed=None)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise RunError(
                f"the weights in {printable(str(folder))} do not fit their config.json: {printable(name)} is "
                f"{found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"there is no {printable(str(path))}; give the folder of an exported model") from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{printable(str(path))} cannot be read ({printable(str(error))}); export the model again"
        ) from None
    if not isinstance(values, dict):
        raise RunError(f"{printable(str(path))} holds no table of settings; export the model again")
    return values


def _read_weights(folder: Path) -> dict[str, Tensor]:
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and (folder / "model.safetensors.index.json").exists():
        index = _read_json(folder / "model.safetensors.index.json").get("weight_map")
        names = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
        names = [Path(name).name for name in names]  # weights are never read from outside the folder
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = printable(str(folder / name))
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise RunError(f"there is no {path}; hasten reads weights from safetensors files only") from None
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} cannot be read ({printable(str(error))}); export the model again") from None
    return tensors


def preset(name: str, *, vocab_size: int, seq_len: int, **overrides: Any) -> ModelConfig:
    """Return the shape of a named size with single numbers replaced."""
    return ModelConfig(**{**SIZES[name], "vocab_size": vocab_size, "seq_len": seq_len, **overrides})


# Shapes by name; the vocabulary and the row length come from the recipe. Parameters with the vocabulary in brackets.
SIZES: dict[str, dict[str, Any]] = {
    "nano": {"num_layers": 4, "width": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "mlp_width": 384}
    | {"tied": False},  # 1.8 M (4096)
    "micro": {"num_layers": 6, "width": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "mlp_width": 768}
    | {"tied": False},  # 6.8 M (4096)
    "mini": {"num_layers": 8, "width": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "mlp_width": 1408}
    | {"tied": False},  # 28 M (4096)
    "small": {"num_layers": 12, "width": 768, "num_heads": 12, "num_kv_heads": 12, "head_dim": 64, "mlp_width": 2048}
    | {"tied": True},  # 124 M (50257)
    "medium": {"num_layers": 24, "width": 1024, "num_heads": 16, "num_kv_heads": 16, "head_dim": 64, "mlp_width": 2816}
    | {"tied": True},  # 360 M (50257)
}

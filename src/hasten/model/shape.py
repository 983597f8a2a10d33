"""The shape of a decoder, and what follows from it: presets, parameters, operations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hasten.errors import RecipeError


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
            if field.type == "float" and (type(value) not in (int, float) or not 0 < value < 1e300):
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


def preset(name: str, *, vocab_size: int, seq_len: int, **overrides: Any) -> ModelConfig:
    """Return the shape of a named size with single numbers replaced."""
    return ModelConfig(**{**SIZES[name], "vocab_size": vocab_size, "seq_len": seq_len, **overrides})


def flops_per_token(config: ModelConfig, length: float) -> float:
    """Return the floating-point operations that training spends on one token of a row of `length`.

    `6 * matrix weights (head included, embedding look-up not) + 6 * layers * heads * head_dim * (length + 1)`: forward
    and backward, two operations per multiply-add, and causal attention, in which a position sees half a row on average.
    (The often used `12 * layers * heads * head_dim * length` counts the masked half too.)
    """
    attention = 2 * config.width * config.head_dim * (config.num_heads + config.num_kv_heads)
    matrices = config.num_layers * (attention + 3 * config.width * config.mlp_width) + config.width * config.vocab_size
    return 6.0 * matrices + attention_flops_per_token(config, (length + 1) / 2)


def attention_flops_per_token(config: ModelConfig, seen: float) -> float:
    """Return the part of `flops_per_token` that attention's scores and sums take, for a token that sees `seen`."""
    return 12.0 * config.num_layers * config.num_heads * config.head_dim * seen


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

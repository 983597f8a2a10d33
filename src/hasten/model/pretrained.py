"""A decoder in the form that Hugging Face tools write: its config.json, its safetensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hasten.errors import RecipeError, RunError, one_line, printable
from hasten.files import MOST_BYTES, open_regular, parse_json, read_bytes
from hasten.model.decoder import Decoder
from hasten.model.shape import ModelConfig

# Rows of positions cost memory before the first token is read; the longest rows of models in use have about this many.
MOST_POSITIONS = 1 << 21


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
        kind = one_line(repr(values.get("model_type")))
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
            given = one_line(repr(values.get(name)))
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
        raise RunError(f"config.json cannot be used: {one_line(str(wrong), 200)}") from None


def read_model(folder: str | Path) -> Decoder:
    """Return the model in a Hugging Face folder (`config.json`, `model.safetensors`), in float32, on the CPU.

    Raises:
        RunError: a file is missing or damaged, or the folder holds something else than a Qwen3 model.
    """
    folder = Path(folder)
    config = config_from_hf(_read_json(folder / "config.json"))
    tensors = _read_weights(folder)
    if config.tied and "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    _refuse_giant(config, len(tensors), folder)
    model = Decoder(config, seed=None)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
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


def _refuse_giant(config: ModelConfig, num_tensors: int, folder: Path) -> None:
    """Refuse a shape that its weights cannot have before anything of its size is made."""
    giant = {
        "num_hidden_layers": config.num_layers > num_tensors,
        "max_position_embeddings": config.seq_len > MOST_POSITIONS,
        "a width": max(config.vocab_size, config.width, config.mlp_width, config.head_dim, config.num_heads) > 1 << 31,
    }
    for name, is_giant in giant.items():
        if is_giant:
            raise RunError(
                f"config.json in {printable(str(folder))} is of a giant model ({name}), and its weights are not; "
                "export the model again"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_bytes(path))
    except FileNotFoundError:
        raise RunError(f"there is no {printable(str(path))}; give the folder of an exported model") from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{printable(str(path))} cannot be read ({one_line(_reason(error), 200)}); export the model again"
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
            with open_regular(folder / name) as file:
                _refuse_giant_header(file)
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise RunError(f"there is no {path}; hasten reads weights from safetensors files only") from None
        except (OSError, ValueError, SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
            raise RunError(f"{path} cannot be read ({one_line(_reason(error), 200)}); export the model again") from None
    return tensors


def _refuse_giant_header(file: BinaryIO) -> None:
    """Refuse a header longer than its file, or than names of tensors can be: it would be read into memory whole."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(os.fstat(file.fileno()).st_size, MOST_BYTES):
        raise ValueError(f"it claims a header of {length:,} bytes")


def _reason(error: Exception) -> str:
    return (error.strerror or "no reason given") if isinstance(error, OSError) else str(error)

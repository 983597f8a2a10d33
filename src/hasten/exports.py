"""A trained model as a folder that other tools read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.data.tokenizer import Tokenizer, load_tokenizer
from hasten.errors import RunError, nearest, printable
from hasten.model import Decoder, ModelConfig, hf_config, read_model

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HF_NAMES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    document_token: int | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a Hugging Face folder (Qwen3) that `transformers` and `hasten` read; return its path.

    It holds config.json (`max_position_embeddings` is the length the model was trained for), model.safetensors,
    tokenizer.json, tokenizer_config.json and generation_config.json. The folder is complete or not there: it is
    written beside its place, flushed to disk and renamed. An earlier export in that place is replaced; anything else
    is not touched.

    Args:
        weights: by their names in the model's `state_dict()`; a tied head may be missing.
        config: the shape they have.
        tokenizer: goes into the folder too.
        document_token: begins and ends a document; None: the tokenizer's.
        dtype: ``float32``, ``bf16`` or ``fp16``.

    Raises:
        RunError: an unknown type, a weight that is missing, too many or of another shape, a weight that is not
            finite in this type, or a place that cannot be written.
    """
    if dtype not in DTYPES:
        raise RunError(
            f"dtype is {printable(repr(dtype))}; it must be one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}"
        )
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and _is_export(folder)):
        raise RunError(f"{printable(str(folder))} exists and is no exported model; choose another place")
    tensors = _checked(weights, config, dtype)
    token = tokenizer.document_token if document_token is None else document_token
    ending = {"bos_token_id": token, "eos_token_id": token}
    described = {**hf_config(config), **ending, "torch_dtype": _HF_NAMES[dtype]}
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        tokenizer.save(beside, model_max_length=config.seq_len)
        _write_json(beside / "config.json", described)
        _write_json(beside / "generation_config.json", {**ending, "do_sample": True, "temperature": 0.8, "top_p": 0.95})
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        _move(beside, folder)
    except OSError as error:
        raise RunError(f"{printable(str(folder))} cannot be written ({printable(str(error))})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def convert(source: str | Path, folder: str | Path, *, dtype: str = "float32") -> Path:
    """Write the model in the Hugging Face folder `source` to `folder` in another type; return its path.

    Raises:
        RunError: as `read_model` and `export`.
        DataError: the tokenizer cannot be read.
    """
    model = read_model(source)
    return export(model.state_dict(), model.config, load_tokenizer(source), folder, dtype=dtype)


def _checked(weights: Mapping[str, Tensor], config: ModelConfig, dtype: str) -> dict[str, Tensor]:
    expected = {name: tensor.shape for name, tensor in Decoder(config, seed=None).state_dict().items()}
    given = {name: tensor.detach() for name, tensor in weights.items()}
    if config.tied:  # one tensor, written once, under the embedding's name
        del expected["lm_head.weight"]
        given.pop("lm_head.weight", None)
    for name in sorted(expected.keys() ^ given.keys()):
        raise RunError(
            f"the weight {printable(name)} is {'missing' if name in expected else 'unknown'}; nothing was exported"
        )
    tensors = {name: given[name].to("cpu", DTYPES[dtype]).contiguous() for name in expected}
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise RunError(
                f"{name} has the shape {tuple(tensor.shape)}, expected {tuple(expected[name])}; nothing was exported"
            )
        if not tensor.isfinite().all():
            raise RunError(f"{name} holds values that are not finite in {dtype}; nothing was exported")
    return tensors


def _is_export(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or "config.json" in names


def _move(beside: Path, folder: Path) -> None:
    """Put a complete folder into its place, through to the disk; an old one steps aside first and is removed last."""
    for path in beside.iterdir():
        _flush(path)
    _flush(beside)
    old = beside.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""The decoder we measure with, its loss, and its Hugging Face form."""

from hasten.model.decoder import Cache, Decoder, count_parameters, loss_sum
from hasten.model.loss import NO_TARGET
from hasten.model.pretrained import config_from_hf, hf_config, read_model
from hasten.model.shape import SIZES, ModelConfig, flops_per_token, preset

__all__ = [
    "NO_TARGET",
    "SIZES",
    "Cache",
    "Decoder",
    "ModelConfig",
    "config_from_hf",
    "count_parameters",
    "flops_per_token",
    "hf_config",
    "loss_sum",
    "preset",
    "read_model",
]

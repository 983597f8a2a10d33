"""Optimizers by name, with parameter groups read off the module tree."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from hasten.errors import RecipeError, nearest
from hasten.optim.adamw import adamw
from hasten.optim.groups import parameter_groups

__all__ = ["OPTIMIZERS", "optimizer", "parameter_groups"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw}


def optimizer(
    model: nn.Module,
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.1,
    master: Callable[[nn.Parameter], nn.Parameter] = lambda p: p,
    **settings: object,
) -> torch.optim.Optimizer:
    """Return the optimizer `name` over the parameters of `model`, in groups with sane decay.

    Args:
        model: any module; see `parameter_groups` for what goes where.
        name: a key of `OPTIMIZERS`.
        lr: peak learning rate, finite, above 0; every group also keeps it as ``initial_lr`` for schedules.
        weight_decay: decoupled decay of the matrices, finite, at least 0.
        master: the float32 weights behind a parameter, where the model computes in another format.
        **settings: the optimizer's own, such as ``betas`` and ``eps``.

    Raises:
        RecipeError: an unknown name or setting, or a setting out of range.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> [group["name"] for group in optimizer(model, "adamw", lr=1e-3).param_groups]
        ['matrices', 'embeddings', 'vectors']
    """
    if name not in OPTIMIZERS:
        raise RecipeError(f"optimizer={name!r} is unknown{nearest(name, OPTIMIZERS)}; give {', '.join(OPTIMIZERS)}.")
    known = sorted(set(inspect.signature(OPTIMIZERS[name]).parameters) - {"groups"} | {"weight_decay"})
    for setting in settings:
        if setting not in known:
            raise RecipeError(
                f"optimizer.{setting} is no setting of {name}{nearest(setting, known)}; it has {', '.join(known)}."
            )
    if not 0.0 < lr < float("inf"):
        raise RecipeError(f"optimizer.lr={lr} is out of range; give a finite number above 0.")
    groups = parameter_groups(model, weight_decay=weight_decay, master=master)
    built = OPTIMIZERS[name](groups, lr=lr, **settings)
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    return built

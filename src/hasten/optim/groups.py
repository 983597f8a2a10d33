"""Which parameters decay and which do not, read off the module tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hasten.errors import RecipeError


def parameter_groups(
    model: nn.Module, *, weight_decay: float, master: Callable[[nn.Parameter], nn.Parameter] = lambda p: p
) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices with `weight_decay`; embeddings, norms and vectors without.

    The kind of a parameter is read off the module that owns it, not off its name: a parameter of `nn.Embedding` is an
    embedding (a head tied to it counts as one, once), a parameter of fewer than two dimensions is a vector, the rest
    are matrices. Frozen parameters are in no group.

    Args:
        model: any module.
        weight_decay: of the matrices, at least 0.
        master: maps a parameter of the model to the one the optimizer updates (`hasten.precision.Precision.master`).

    Returns:
        groups with ``name``, ``params``, ``parameter_names`` and ``weight_decay``; every trainable parameter in
        exactly one; empty groups left out.

    Raises:
        RecipeError: the model has nothing to train.
    """
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {"matrices": [], "embeddings": [], "vectors": []}
    seen: set[nn.Parameter] = set()
    embedded = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in seen or not parameter.requires_grad:
            continue
        seen.add(parameter)
        kind = "embeddings" if parameter in embedded else "vectors" if parameter.ndim < 2 else "matrices"
        kinds[kind].append((name, parameter))
    if not seen:
        raise RecipeError("The model has no parameter to train; every one of them is frozen.")
    return [
        {
            "name": kind,
            "params": [master(parameter) for _, parameter in named],
            "parameter_names": [name for name, _ in named],
            "weight_decay": weight_decay if kind == "matrices" else 0.0,
        }
        for kind, named in kinds.items()
        if named
    ]

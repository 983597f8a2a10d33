"""Which parameters decay and which do not, read off the module tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hasten.errors import RecipeError

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Norms whose weights can have two dimensions or more; the others' are vectors anyway.
NORMS = (nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, *, weight_decay: float, master: Callable[[nn.Parameter], nn.Parameter] = lambda p: p
) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices with `weight_decay`; embeddings, norms and vectors without.

    The kind of a parameter is read off the module that owns it, not off its name: a parameter of `nn.Embedding` is an
    embedding (a head tied to it counts as one, once); one of a norm, or of fewer than two dimensions, is a vector; the
    rest, an untied head included, are matrices. Frozen parameters are in no group.

    Args:
        model: any module.
        weight_decay: of the matrices, finite, at least 0.
        master: maps a parameter of the model to the one the optimizer updates (`hasten.precision.Precision.master`).

    Returns:
        groups with ``name`` (``matrices``, ``embeddings``, ``vectors``), ``params``, ``parameter_names`` and
        ``weight_decay``; every trainable parameter in exactly one; empty groups left out.

    Raises:
        RecipeError: `weight_decay` is out of range, the model has nothing to train, or two parameters share their
            memory without being one parameter, so that both would update it.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.RMSNorm(4), nn.Linear(4, 10, bias=False))
        >>> for group in parameter_groups(model, weight_decay=0.1):
        ...     print(group["name"], group["parameter_names"], group["weight_decay"])
        matrices ['2.weight'] 0.1
        embeddings ['0.weight'] 0.0
        vectors ['1.weight'] 0.0
    """
    if not 0.0 <= weight_decay < float("inf"):
        raise RecipeError(f"optimizer.weight_decay={weight_decay} is out of range; give a finite number of at least 0.")
    embeddings, norms = _owned_by(model, EMBEDDINGS), _owned_by(model, NORMS)
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {"matrices": [], "embeddings": [], "vectors": []}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # a shared one comes once
    for name, parameter in trained:
        is_vector = parameter.ndim < 2 or parameter in norms
        kind = "embeddings" if parameter in embeddings else "vectors" if is_vector else "matrices"
        kinds[kind].append((name, parameter))
    if not trained:
        raise RecipeError("The model has no parameter to train; every one of them is frozen.")
    _refuse_shared_memory(trained)
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


def _owned_by(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[nn.Parameter]:
    return {p for module in model.modules() if isinstance(module, kinds) for p in module.parameters(recurse=False)}


def _refuse_shared_memory(named: list[tuple[str, nn.Parameter]]) -> None:
    owners: dict[tuple[str, int], str] = {}
    for name, parameter in named:
        if parameter.device.type == "meta" or parameter.numel() == 0:
            continue
        place = (str(parameter.device), parameter.data_ptr())
        if place in owners:
            raise RecipeError(
                f"{owners[place]} and {name} share their memory but are two parameters, so each step would update it "
                "twice; tie them by giving both modules the same nn.Parameter."
            )
        owners[place] = name

"""What the forward pass of a block keeps for its backward pass, and what is computed again there instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[..., Tensor]


def keep_all(block: nn.Module, *given: Any) -> Tensor:
    """Return what `block` makes of `given`; everything that its backward pass needs is kept."""
    return block(*given)


def keep_nothing(block: nn.Module, *given: Any) -> Tensor:
    """Return what `block` makes of `given`; only `given` is kept, and the whole forward pass is done a second time.

    Source: Chen et al., arXiv:1604.06174.
    """
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)


def keep_products(block: nn.Module, *given: Any) -> Tensor:
    """Return what `block` makes of `given`; what matrix products and attention gave is kept, the rest done again.

    Source: Korthikanti et al., arXiv:2205.05198, for the idea: keep what is expensive for its size.
    """
    from torch.utils.checkpoint import checkpoint

    contexts = functools.partial(_contexts, _policy)
    return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _contexts(policy: Callable[..., Any]) -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(policy)


def _policy(context: Any, function: Any, *args: Any, **named: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = function.name() if isinstance(function, torch._ops.OpOverload) else ""
    is_costly = any(word in name for word in ("::mm", "::addmm", "::bmm", "attention", "hasten::"))
    return CheckpointPolicy.MUST_SAVE if is_costly else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTING: dict[str, Run] = {
    "full": keep_nothing,
    "none": keep_all,
    "selective": keep_products,
}

"""In which number format a model computes, and where its float32 weights live meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.errors import RecipeError, nearest

PRECISIONS: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp16": torch.float16,
}


class Estimating(Protocol):
    """An optimizer that takes the gradients of an extra pass into its state."""

    param_groups: list[dict[str, Any]]

    def estimate(self) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


class Clipped(Protocol):
    """What a clip returns: the global norm before clipping, and whether anything was changed."""

    norm: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class StepReport:
    """What an update did: gradient norm before clipping, whether clipped, whether skipped, loss scale used."""

    norm: Tensor
    clipped: Tensor
    skipped: bool
    loss_scale: float


class Precision:
    """Casts a model's matrices to a compute format and keeps float32 master weights for the optimizer.

    Parameters of one dimension (norms, biases) stay float32. Each backward pass is added to the masters' float32
    gradients at once, so that accumulation never happens in half precision. With ``fp16`` the loss is scaled, because
    small gradients would vanish: an overflow skips the step and halves the scale, 2,000 good steps double it.
    With ``float32`` the masters are the parameters themselves: nothing is copied or cast.

    Source: Micikevicius et al., arXiv:1710.03740.

    Args:
        model: changed in place. Its forward must compute in the type of its matrices, and its norms in float32.
        name: ``float32``, ``bf16`` or ``fp16``.
        is_sharded: the model's weights are float32 shards, which are gathered in the compute format.

    Raises:
        RecipeError: an unknown name.

    Example:
        >>> from hasten.clip import ClipNorm
        >>> from hasten.optim import optimizer
        >>> model = nn.Linear(4, 2, bias=False)
        >>> precision = Precision(model, "bf16")
        >>> adamw = optimizer(model, lr=1e-2, master=precision.master)
        >>> precision.backward(model(torch.ones(3, 4, dtype=torch.bfloat16)).float().square().mean())
        >>> report = precision.step(adamw, ClipNorm(1.0))
        >>> report.skipped, model.weight.dtype, precision.master(model.weight).dtype
        (False, torch.bfloat16, torch.float32)
    """

    def __init__(self, model: nn.Module, name: str, *, is_sharded: bool = False) -> None:
        if name not in PRECISIONS:
            raise RecipeError(
                f"precision={name!r} is unknown{nearest(name, PRECISIONS)}; give {', '.join(PRECISIONS)}."
            )
        self.name = name
        self.dtype = PRECISIONS[name]
        self._model = model
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in model.parameters():  # a shared parameter comes once, and stays shared
            if name == "float32" or parameter.ndim < 2 or is_sharded:
                continue
            master = nn.Parameter(parameter.detach().float().clone(), requires_grad=parameter.requires_grad)
            parameter.data = parameter.data.to(self.dtype)
            self._masters[parameter] = master
        device = next(model.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def master(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the float32 weights that the optimizer updates for `parameter` of the model."""
        return self._masters.get(parameter, parameter)

    def named_masters(self) -> dict[str, nn.Parameter]:
        """Return the masters under the model's names; a shared parameter once, under its first name."""
        return {name: self.master(parameter) for name, parameter in self._model.named_parameters()}

    def backward(self, loss: Tensor, *, is_collected: bool = False) -> None:
        """Add the gradients of `loss` (scaled) to the masters' float32 gradients.

        Args:
            loss: a scalar, already divided by what the whole optimizer step is normalised with.
            is_collected: the backward pass itself adds them to the masters'.
        """
        self._scaler.scale(loss).backward()
        for parameter, master in self._masters.items():
            if parameter.grad is None:
                continue
            if is_collected:
                pass
            elif master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        clip: Callable[[list[Tensor]], Clipped],
        accept: Callable[[Clipped, bool], bool] | None = None,
    ) -> StepReport:
        """Unscale, clip, update the masters, bring the model up to date, drop the gradients.

        With ``fp16`` a gradient that is not finite skips the update: weights and optimizer state stay as they are and
        the loss scale is halved. Nothing waits for the device, except that decision in ``fp16``. A parameter without
        a gradient stays as it is.

        Args:
            optimizer: over the masters, as `hasten.optim.optimizer` builds it.
            clip: one of `hasten.clip`; it sees the gradients unscaled.
            accept: asked before the update, with what the clip saw and whether the gradients overflowed; where it says
                no, weights and optimizer state stay as they are.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        is_scaled = self._scaler.is_enabled() and any(p.grad is not None for p in parameters)
        scale = self._scaler.get_scale()
        if is_scaled:
            self._scaler.unscale_(optimizer)
        report = clip(parameters)
        is_skipped = is_scaled and self._overflowed(scale)
        is_accepted = accept is None or accept(report, is_skipped)
        # Not `GradScaler.step`: with a fused optimizer it steps in any case, which gives a fresh one state for nothing.
        if is_accepted and not is_skipped:
            optimizer.step()
            self.sync()
        optimizer.zero_grad(set_to_none=True)
        return StepReport(report.norm, report.clipped, is_skipped or not is_accepted, scale)

    def estimate(self, optimizer: Estimating) -> None:
        """Give `optimizer` the gradients of an extra pass, unscaled, and drop them; none that overflowed.

        Args:
            optimizer: over the masters; one whose ``estimate_every`` is above 0.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._scaler.is_enabled():
            for gradient in gradients:
                gradient.div_(self._scaler.get_scale())
        if not self._scaler.is_enabled() or all(bool(gradient.isfinite().all()) for gradient in gradients):
            optimizer.estimate()
        optimizer.zero_grad(set_to_none=True)

    def _overflowed(self, scale: float) -> bool:
        """Update the loss scale and say whether this step's gradients overflowed at `scale`."""
        self._scaler.update()
        # Only an overflow makes it shrink. Halved often enough it is zero, where no gradient means anything any more.
        return not 0.0 < scale <= self._scaler.get_scale()

    def sync(self) -> None:
        """Copy the masters into the model's compute weights."""
        with torch.no_grad():
            for parameter, master in self._masters.items():
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale's state as plain data; empty unless ``fp16``.

        The masters are not in it: they are saved as weights, under the names of `named_masters`.
        """
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the loss scale's state that `state_dict` returned."""
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state))

"""In which number format a model computes, and where its float32 weights live meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.clip import Clip
from hasten.errors import RecipeError, nearest

PRECISIONS: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp16": torch.float16,
}


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
        model: changed in place.
        name: ``float32``, ``bf16`` or ``fp16``.

    Raises:
        RecipeError: an unknown name.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        if name not in PRECISIONS:
            raise RecipeError(
                f"precision={name!r} is unknown{nearest(name, PRECISIONS)}; give {', '.join(PRECISIONS)}."
            )
        self.name = name
        self.dtype = PRECISIONS[name]
        self._model = model
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in model.parameters():  # a shared parameter comes once, and stays shared
            if name == "float32" or parameter.ndim < 2:
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

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (scaled) to the masters' float32 gradients."""
        self._scaler.scale(loss).backward()
        for parameter, master in self._masters.items():
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def step(self, optimizer: torch.optim.Optimizer, clip: Clip) -> StepReport:
        """Unscale, clip, update the masters, bring the model up to date, drop the gradients.

        With ``fp16`` a gradient that is not finite skips the update: weights and optimizer state stay as they are and
        the loss scale is halved.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scale = self._scaler.get_scale()
        self._scaler.unscale_(optimizer) if self._scaler.is_enabled() else None
        report = clip(parameters)
        self._scaler.step(optimizer)
        self._scaler.update()
        # The scale only ever shrinks on an overflow; asking it is the one wait for the device, in fp16 alone.
        is_skipped = self._scaler.is_enabled() and self._scaler.get_scale() < scale
        if not is_skipped:
            self.sync()
        optimizer.zero_grad(set_to_none=True)
        return StepReport(report.norm, report.clipped, is_skipped, scale)

    def sync(self) -> None:
        """Copy the masters into the model's compute weights."""
        with torch.no_grad():
            for parameter, master in self._masters.items():
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale's state as plain data; empty unless ``fp16``."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the loss scale's state that `state_dict` returned."""
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state))

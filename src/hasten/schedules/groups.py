"""The settings of an optimizer's groups under schedules: as a `torch` scheduler, or set from a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hasten.errors import RecipeError, nearest
from hasten.schedules.pieces import Schedule

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

# What can be scheduled, and where it stands in a group's ``betas`` if it is not a setting by itself.
SETTINGS = ("lr", "weight_decay", "momentum", "beta1", "beta2")
_PLACES = {"beta1": 0, "beta2": 1}


def apply(optimizer: Optimizer, schedules: Mapping[str, Schedule], progress: float) -> dict[str, float]:
    """Set what `schedules` name in every group that has it, and return the factors.

    Each group's value is its own initial value times the factor, so ratios between groups stay. The initial value is
    kept in the group as ``initial_<name>``, as `torch` keeps ``initial_lr``; it goes into the optimizer's `state_dict`
    and comes back from it. Betas are replaced as tuples. Tensors are filled, so what was captured with them sees it.

    A bias correction such as Adam's ``1 - beta ** step`` uses the present beta: it is exact for a fixed one.

    Args:
        optimizer: any `torch` optimizer.
        schedules: by name: ``lr``, ``weight_decay``, ``momentum``, ``beta1``, ``beta2``.
        progress: of the run, in [0, 1].

    Raises:
        RecipeError: a name is unknown or no group has it, or a momentum or beta would not stay below 1.

    Example:
        >>> import torch
        >>> from hasten.schedules import linear, warmup
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5, momentum=0.9)
        >>> apply(optimizer, {"lr": linear(floor=0.0), "momentum": warmup(0.5, start=0.5)}, 0.25)
        {'lr': 0.75, 'momentum': 0.75}
        >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        (0.375, 0.675)
    """
    factors = {name: schedule(progress) for name, schedule in schedules.items()}
    for name, factor in factors.items():
        if name not in SETTINGS:
            raise RecipeError(
                f"{name!r} cannot be scheduled{nearest(name, SETTINGS)}; there are {', '.join(SETTINGS)}."
            )
        having = [group for group in optimizer.param_groups if _has(group, name)]
        if not having:
            raise RecipeError(f"No group of this optimizer has {name}, so its schedule would do nothing: leave it out.")
        for group in having:
            _set(group, name, factor)
    return factors


def _has(group: Mapping[str, Any], name: str) -> bool:
    return name in group or (name in _PLACES and len(group.get("betas", ())) > _PLACES[name])


def _set(group: dict[str, Any], name: str, factor: float) -> None:
    """Set one group's value, remembering what it was at first."""
    from torch import Tensor

    in_betas = name not in group
    now = group["betas"][_PLACES[name]] if in_betas else group[name]
    is_tensor = isinstance(now, Tensor)
    initial = group.setdefault(f"initial_{name}", now.clone() if is_tensor else now)
    value = initial * factor
    if name not in ("lr", "weight_decay") and not 0 <= float(value) < 1:
        raise RecipeError(f"A schedule sets {name} to {float(value):g}, and it must stay in [0, 1): lower the factor.")
    if is_tensor:
        now.fill_(value)
    elif in_betas:
        betas = list(group["betas"])
        betas[_PLACES[name]] = value
        group["betas"] = tuple(betas)
    else:
        group[name] = value


def as_lr_scheduler(optimizer: Optimizer, schedule: Schedule, total_steps: int) -> LRScheduler:
    """Return a `torch` learning-rate scheduler that follows `schedule` over `total_steps` calls of ``step()``.

    ``lr = initial_lr * schedule(step / total_steps)``. Each parameter group keeps its own peak (its ``initial_lr``), so
    ratios between groups stay; a group that is added later begins with its own ``lr`` as the peak, and follows from the
    next ``step()`` on. `state_dict` holds only the position, because the schedule is a pure function; loading it sets
    the rates too, whether the optimizer was loaded before or comes after.

    Args:
        optimizer: any `torch` optimizer; its groups' ``lr`` are the peaks.
        schedule: of factors.
        total_steps: optimizer steps of the whole run, at least 1; later steps stay at the schedule's end.

    Raises:
        RecipeError: `total_steps` is below 1.

    Example:
        >>> import torch
        >>> from hasten.schedules import linear
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> scheduler = as_lr_scheduler(optimizer, linear(floor=0.0), total_steps=4)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(scheduler.get_last_lr()[0])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.5, 0.375, 0.25, 0.125]
    """
    from torch import Tensor
    from torch.optim.lr_scheduler import LRScheduler

    if total_steps < 1:
        raise RecipeError(f"total_steps={total_steps} is no run; give at least 1.")

    class ScheduledLR(LRScheduler):
        """Multiplies every group's peak with the schedule's factor."""

        def get_lr(self) -> list[Any]:
            factor = schedule(min(1.0, self.last_epoch / total_steps))
            for group in self.optimizer.param_groups[len(self.base_lrs) :]:
                peak = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
                self.base_lrs.append(group.setdefault("initial_lr", peak))
            return [peak * factor for peak in self.base_lrs]

        def state_dict(self) -> dict[str, Any]:
            names = ("base_lrs", "last_epoch", "_step_count", "_last_lr")
            return {name: self.__dict__[name] for name in names}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict({**state_dict, "base_lrs": list(state_dict["base_lrs"])})
            for group, lr in zip(self.optimizer.param_groups, state_dict["_last_lr"]):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    return ScheduledLR(optimizer)

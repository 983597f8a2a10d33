"""What one optimizer algorithm is: settings, state and an update, as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hasten.errors import RecipeError

Group = dict[str, Any]


@dataclass
class Work:
    """The parameters of one group that have a gradient and have been updated equally often.

    Args:
        group: the parameter group: every setting, and numbers that a rule carries from step to step.
        params: as the user gave them (a `DTensor` where they are sharded).
        grads: one for each; never written to.
        states: one dict for each, as `Rule.init` made it, with ``step`` (0-d float32, updates done before this one).
        step: number of this update for these parameters, from 1.
    """

    group: Group
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    step: int


def _nothing(group: Group) -> None:
    return None


@dataclass(frozen=True)
class Rule:
    """One optimizer algorithm.

    Args:
        name: how groups name it (``group["rule"]``).
        settings: every setting with its default, ``lr`` and ``weight_decay`` among them; all live in the group.
        init: makes the state of one parameter; tensors only.
        update: applies one step to all the work of this rule (every group of it at once).
        check: raises `RecipeError` for settings of a group that are out of range; ``lr`` and ``weight_decay`` have been
            checked already.
        only_matrices: whether parameters of fewer than two dimensions have to go elsewhere.
        is_elementwise: whether a shard of a parameter can be updated without the rest of it.
        before: counts the step in all groups of this rule, those without a gradient too; None where nothing is carried.
        averaged: writes the weights to evaluate with into the parameters; None where they are the trained ones.
        estimate: takes the gradients of a loss over sampled labels into the state; None where none are needed.
        is_coupled: whether the decay is added to the gradient, and so a part of the step.
        has_8bit: whether the state can be kept in 8 bits.
        rest: name of the rule for what this one does not take.
        rest_settings: settings of the rest that differ from those given for this rule.
    """

    name: str
    settings: Mapping[str, Any]
    init: Callable[[Tensor, Group], dict[str, Tensor]]
    update: Callable[[list[Work]], None]
    check: Callable[[Group], None] = _nothing
    only_matrices: bool = False
    is_elementwise: bool = True
    before: Callable[[list[Group]], None] | None = None
    averaged: Callable[[Work], None] | None = None
    estimate: Callable[[list[Work]], None] | None = None
    is_coupled: bool = False
    has_8bit: bool = False
    rest: str = "adamw"
    rest_settings: Mapping[str, Any] = field(default_factory=dict)


# --- what the checks of rules have in common ------------------------------------------------------------------------


def check_betas(group: Group, name: str = "betas", count: int = 2) -> None:
    """Refuse anything but `count` numbers in [0, 1).

    Raises:
        RecipeError: out of range.
    """
    betas = group[name]
    is_listed = isinstance(betas, (tuple, list)) and len(betas) == count
    if not is_listed or not all(isinstance(beta, (int, float)) and 0.0 <= beta < 1.0 for beta in betas):
        shown = tuple(betas) if isinstance(betas, (tuple, list)) else betas
        number = {2: "two", 3: "three"}[count]
        raise RecipeError(f"optimizer.{name}={shown} are out of range; give {number} numbers in [0, 1).")


def check_number(
    group: Group, name: str, *, low: float = 0.0, high: float = float("inf"), is_open: bool = False
) -> None:
    """Refuse anything but a number in [low, high), or above `low` where `is_open`.

    Raises:
        RecipeError: out of range.
    """
    value = group[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (low < value if is_open else low <= value) or not value < high:
        least = f"above {low:g}" if is_open else f"of at least {low:g}"
        most = "" if high == float("inf") else f" and below {high:g}"
        raise RecipeError(f"optimizer.{name}={value} is out of range; give a finite number {least}{most}.")

"""Settings that every parameter group has, whatever its rule."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.modifiers import MODIFIERS, check_modifiers
from hasten.optim.rule import Group, Rule, check_number

# With their defaults.
COMMON: dict[str, Any] = {
    "decay_follows_lr": True,
    "rounding": "nearest",
    "seed": 0,
    "state_format": "float32",
    **MODIFIERS,
}
# What groups may carry besides: names for people, torch's own and the group builder's.
NOTES = (
    "params",
    "param_names",
    "rule",
    "name",
    "kind",
    "parameter_names",
    "lr_scale",
    "initial_lr",
    "split_sizes",
    "split_dim",
)
ROUNDINGS = ("nearest", "stochastic", "kahan")
FORMATS = ("float32", "8bit")


def check_settings(group: Group, rule: Rule) -> None:
    """Refuse settings of a group that are out of range, the common ones and those of its rule.

    Raises:
        RecipeError: names the setting.
    """
    for name in ("lr", "weight_decay"):
        if not isinstance(group[name], Tensor):
            check_number(group, name)
    for name, allowed in (("rounding", ROUNDINGS), ("state_format", FORMATS)):
        if group[name] not in allowed:
            near = difflib.get_close_matches(str(group[name]), allowed, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"optimizer.{name}={group[name]!r} is unknown{hint}; give one of {', '.join(allowed)}.")
    if group["state_format"] == "8bit" and not rule.has_8bit:
        raise RecipeError(f"optimizer.state_format='8bit' is not to be had for {rule.name}; leave it out.")
    check_modifiers(group, rule)
    rule.check(group)

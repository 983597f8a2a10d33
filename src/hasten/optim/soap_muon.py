"""SOAP-Muon, SOAP's direction orthogonalised, for matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hasten.optim import muon, soap
from hasten.optim.matrices import apply, parts, step_scale
from hasten.optim.orthogonal import DTYPES, orthogonalize_all_
from hasten.optim.rule import Group, Rule, Work

_OF_MUON = ("adjust_lr", "orthogonalization", "ns_steps", "compute_dtype")
SETTINGS: dict[str, Any] = {
    **{name: default for name, default in soap.SETTINGS.items() if name != "correct_bias"},
    **{name: muon.SETTINGS[name] for name in (*_OF_MUON, "lr", "weight_decay")},
}


def check(group: Group) -> None:
    """Refuse settings that are out of range.

    Raises:
        RecipeError: names the setting.
    """
    soap.check(group)
    muon.check_orthogonal(group)


def update(works: list[Work]) -> None:
    """Apply one step of SOAP-Muon.

    ``u = L (m / (sqrt(v) + eps)) R^T`` as in `hasten.optim.soap`; ``p <- p (1 - lr wd) - lr s O`` with the orthogonalised
    u as O and Muon's `step_scale` as s. No bias correction: O does not see the size of u. The first gradient only gives
    the bases. Source: Vyas et al., "Improving SOAP using iterative whitening and Muon"; theirs orthogonalises by seven
    steps in float32.
    """
    for weight, direction, group, _ in soap.directions(works, _orthogonalize):
        lr = float(group["lr"])
        apply(weight, direction, keep=1.0 - lr * group["weight_decay"], step_size=lr)


def _orthogonalize(direction: Tensor, group: Group) -> None:
    split = parts(tuple(direction.shape), group)
    blocks = [part.of(direction) for part in split]
    orthogonalize_all_(
        blocks,
        coefficients=group["orthogonalization"],
        steps=group["ns_steps"],
        dtype=DTYPES[group["compute_dtype"]],
    )
    for block, part in zip(blocks, split):
        block.mul_(step_scale(part, group["adjust_lr"]))


RULE = Rule(
    name="soap_muon",
    settings=SETTINGS,
    init=soap.init,
    update=update,
    check=check,
    only_matrices=True,
    is_elementwise=False,
)

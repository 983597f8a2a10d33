"""SOAP-Muon, SOAP's direction orthogonalised, for matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hasten.optim import muon, soap
from hasten.optim.elementwise import decay_rate
from hasten.optim.matrices import apply, parts, step_scale
from hasten.optim.orthogonal import DTYPES, orthogonalize_all_
from hasten.optim.rule import Group, Rule, Work
from hasten.optim.shell import Params, RuledOptimizer

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

    ``u = L (m / (sqrt(v) + eps)) R^T`` as in `hasten.optim.soap`; ``p <- p (1 - lr wd) - lr s O`` with the
    orthogonalised u as O and Muon's `step_scale` as s. No bias correction: O does not see the size of u. The first
    gradient only gives the bases. Source: Vyas et al., "Improving SOAP using iterative whitening and Muon"; theirs
    orthogonalises by seven steps in float32.
    """
    for work in works:
        muon.settle_dtype(work)
    for weight, direction, group, _ in soap.directions(works, _orthogonalize):
        apply(weight, direction, keep=1.0 - decay_rate(group), step_size=float(group["lr"]))


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


class SOAPMuon(RuledOptimizer):
    """SOAP-Muon: SOAP's direction made orthogonal; everything that is no matrix goes to AdamW.

    The core of the fewest steps to a loss of 3.28 on modded-nanogpt's track 3 (2690, tuned Muon 3250), which changes
    the bases at every step. See `update`. Source: Vyas et al., "Improving SOAP using iterative whitening and Muon".

    Args:
        params: parameters, or groups of them; vectors go to AdamW by themselves.
        lr: learning rate, at least 0.
        betas: decay rates of the first and second moments, in [0, 1).
        precondition_frequency: steps between changes of a basis, at least 1.
        weight_decay: decoupled, times the learning rate, at least 0.
        adjust_lr: as for `Muon`.
        **more: the other settings of `SOAP` and `Muon`, and see `RuledOptimizer`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        precondition_frequency: int = 10,
        weight_decay: float = 0.1,
        adjust_lr: str = "match_rms_adamw",
        **more: Any,
    ) -> None:
        given = {"betas": betas, "precondition_frequency": precondition_frequency, "adjust_lr": adjust_lr}
        super().__init__(params, RULE, lr=lr, weight_decay=weight_decay, **given, **more)

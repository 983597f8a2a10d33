"""Optimizers by name, with parameter groups read off the module tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hasten.errors import RecipeError, nearest
from hasten.optim.adafactor import ADAFACTOR, Adafactor
from hasten.optim.adam import ADAM, ADAMW, Adam, AdamW
from hasten.optim.ademamix import ADEMAMIX, AdEMAMix
from hasten.optim.adopt import ADOPT, ADOPT_RULE
from hasten.optim.defaults import Defaults, defaults
from hasten.optim.groups import check_complete, parameter_groups
from hasten.optim.mars import MARS, MARS_RULE
from hasten.optim.muon import NORMUON, Muon, NorMuon
from hasten.optim.muon import RULE as MUON
from hasten.optim.prodigy import PRODIGY, Prodigy
from hasten.optim.rmsprop import RMSPROP, RMSprop
from hasten.optim.rule import Rule
from hasten.optim.schedule_free import SCHEDULE_FREE, ScheduleFreeAdamW
from hasten.optim.sgd import SGD, SGD_RULE
from hasten.optim.shell import RuledOptimizer
from hasten.optim.signs import LION, SIGNUM, Lion, Signum
from hasten.optim.soap import RULE as SOAP_RULE
from hasten.optim.soap import SOAP
from hasten.optim.soap_muon import RULE as SOAP_MUON
from hasten.optim.soap_muon import SOAPMuon
from hasten.optim.sophia import SOPHIA, Sophia

__all__ = [
    "ADOPT",
    "MARS",
    "OPTIMIZERS",
    "RULES",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "Adafactor",
    "Adam",
    "AdamW",
    "Defaults",
    "Lion",
    "Muon",
    "NorMuon",
    "Prodigy",
    "RMSprop",
    "RuledOptimizer",
    "SOAPMuon",
    "ScheduleFreeAdamW",
    "Signum",
    "Sophia",
    "check_complete",
    "defaults",
    "optimizer",
    "parameter_groups",
]

# Kinds of parameters that a fixed norm is for.
_SPHERES = ("matrices", "experts", "convolutions")


def optimizer(
    model: nn.Module,
    name: str = "adamw",
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    total_steps: int | None = None,
    tokens_per_step: int | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    master: Callable[[nn.Parameter], Tensor] = lambda p: p,
    **settings: Any,
) -> RuledOptimizer:
    """Return the optimizer `name` over the parameters of `model`, in groups with sane rules and decay.

    Groups are read off the module tree (see `parameter_groups`): hidden matrices take the rule, and for a matrix rule
    (Muon, NorMuon, SOAP, MARS ...) embeddings, head, gates and vectors take AdamW; embeddings and vectors do not decay.
    What is not given is filled in for the horizon (see `defaults`). ``print(optimizer(...).plan())`` shows what came
    out.

    Args:
        model: any module.
        name: a key of `OPTIMIZERS`.
        lr: peak learning rate, finite, above 0; every group also keeps it as ``initial_lr`` for schedules.
        weight_decay: decay of the matrices, finite, at least 0.
        total_steps: optimizer steps of the whole run, at least 1; None where it is not known.
        tokens_per_step: tokens of an optimizer step; None where it is not known.
        overrides: settings for parameters by pattern over their names, such as
            ``{"*.lm_head.weight": {"lr_scale": 0.2}}``.
        master: the float32 weights behind a parameter, where the model computes in another format.
        **settings: the optimizer's own, such as ``betas``, and those of every `RuledOptimizer`.

    Raises:
        RecipeError: an unknown name or setting, or a setting out of range.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> [(group["name"], group["rule"]) for group in optimizer(model, "muon", lr=1e-3).param_groups]
        [('matrices', 'muon'), ('head', 'adamw'), ('embeddings', 'adamw'), ('vectors', 'adamw')]
    """
    if name not in OPTIMIZERS:
        raise RecipeError(f"optimizer={name!r} is unknown{nearest(name, OPTIMIZERS)}; give {', '.join(OPTIMIZERS)}.")
    if total_steps is not None and total_steps < 1:
        raise RecipeError(f"total_steps={total_steps} is no run; give at least 1.")
    if lr is not None and not 0.0 < lr < float("inf"):
        raise RecipeError(f"optimizer.lr={lr} is out of range; give a finite number above 0.")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fallback = defaults(name, total_steps=total_steps, tokens_per_step=tokens_per_step, parameters=trained).settings
    given = {"lr": lr, "weight_decay": weight_decay, **settings}
    chosen = {**fallback, **{key: value for key, value in given.items() if value is not None}}
    if total_steps is not None and "total_steps" in RULES[name].settings:
        chosen["total_steps"] = total_steps
    spheres = {kind: {"hyperball": True} for kind in _SPHERES} if chosen.pop("hyperball", False) else None
    groups = parameter_groups(
        model,
        weight_decay=chosen["weight_decay"],
        master=master,
        rule=name,
        rest=RULES[name].rest,
        kinds=spheres,
        overrides=overrides,
    )
    for group in groups:
        group["lr"] = chosen["lr"] * group["lr_scale"]
    built = OPTIMIZERS[name](groups, **chosen)
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    return built


# Name in a recipe and in ``group["rule"]`` -> what it does, and the class.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        ADAMW,
        ADAM,
        SGD_RULE,
        RMSPROP,
        ADAFACTOR,
        LION,
        SIGNUM,
        ADEMAMIX,
        ADOPT_RULE,
        MARS_RULE,
        SCHEDULE_FREE,
        PRODIGY,
        SOPHIA,
        MUON,
        NORMUON,
        SOAP_RULE,
        SOAP_MUON,
    )
}
OPTIMIZERS: dict[str, type[RuledOptimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "rmsprop": RMSprop,
    "adafactor": Adafactor,
    "lion": Lion,
    "signum": Signum,
    "ademamix": AdEMAMix,
    "adopt": ADOPT,
    "mars": MARS,
    "schedule_free_adamw": ScheduleFreeAdamW,
    "prodigy": Prodigy,
    "sophia": Sophia,
    "muon": Muon,
    "normuon": NorMuon,
    "soap": SOAP,
    "soap_muon": SOAPMuon,
}

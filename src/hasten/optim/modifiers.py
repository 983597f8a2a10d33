"""Changes to any rule's update: cautious steps and decay, weights on a sphere, an average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim.elementwise import LOW, decay_rate, remainders
from hasten.optim.kernels import Kernel, Rounding
from hasten.optim.rule import Group, Rule, Work, check_number
from hasten.optim.storage import mix_number
from hasten.sharding import add_up, local

MODIFIERS: dict[str, Any] = {
    "cautious": False,
    "cautious_decay": False,
    "hyperball": False,
    "ema": 0.0,
    "ema_share": 1.0,
}

_NEEDS_STEP = ("cautious", "cautious_decay", "hyperball")


def assign(p: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Return `value` as the new weight."""
    return {"p": value}


def average(p: Tensor, ema: Tensor, *, old: float, new: float) -> dict[str, Tensor]:
    """Return the running average of the weight."""
    return {"ema": old * ema + new * p}


ASSIGN = Kernel(assign, ("p", "value"), ())
AVERAGE = Kernel(average, ("p", "ema"), ("old", "new"))


def is_modified(group: Group, rule: Rule) -> bool:
    """Say whether anything here changes what the rule alone would do."""
    return bool(
        group["cautious"] or group["cautious_decay"] or group["hyperball"] or group["ema"] or _rounds_here(group, rule)
    )


def _rounds_here(group: Group, rule: Rule) -> bool:
    """Say whether the rule needs its weights rounded for it: one that works on whole matrices rounds to nearest."""
    return group["rounding"] != "nearest" and not rule.is_elementwise


def check_modifiers(group: Group, rule: Rule) -> None:
    """Refuse modifiers that contradict the rule or each other.

    Raises:
        RecipeError: as said.
    """
    check_number(group, "ema", high=1.0)
    check_number(group, "ema_share", high=1.0 + 1e-12)
    wanted = [name for name in (*_NEEDS_STEP, "ema") if group[name]]
    if wanted and rule.averaged is not None:
        raise RecipeError(f"optimizer.{wanted[0]} does not go with {rule.name}, which averages its weights itself.")
    if rule.is_coupled and group["cautious_decay"]:
        raise RecipeError(
            f"optimizer.cautious_decay does not go with {rule.name}, whose decay is part of the gradient; take adamw."
        )
    if group["hyperball"] and group["cautious_decay"]:
        raise RecipeError(
            "optimizer.hyperball fixes the norm of the weights, so cautious_decay has no effect; leave it out."
        )


def modified_update(rule: Rule, works: list[Work]) -> None:
    """Let `rule` update copies of the weights, change the step that it made, and write the weights.

    With ``d`` the step without decay (``p - d`` is what the rule made of ``p``):

    - ``cautious``: elements of ``d`` whose sign differs from the gradient's become zero, the others are divided by
      their share. Liang et al., arXiv:2411.16085.
    - ``cautious_decay``: only elements that ``d`` moves towards zero decay. Chen et al., arXiv:2510.12402.
    - ``hyperball``: a matrix keeps the norm ``R`` it began with, and its step has the norm ``lr * R``; no decay. One
      that began at zero grows up to the norm of a matrix with entries of deviation ``1 / sqrt(columns)``.
      arXiv:2606.16899.
    - ``ema``: a running average of the weights, ``e * average + (1 - e) * p`` with
      ``e = min(ema, (1 + t) / (10 + t))``, which `RuledOptimizer.eval` reads out, mixed with the weights by
      ``ema_share``.
    """
    needs_step = [any(w.group[name] for name in _NEEDS_STEP) or _rounds_here(w.group, rule) for w in works]
    stepped = [work for work, needs in zip(works, needs_step, strict=True) if needs]
    if plain := [work for work, needs in zip(works, needs_step, strict=True) if not needs]:
        rule.update(plain)
    if stepped:
        copies = [_with_copies(work) for work in stepped]
        groups = {id(work.group): work.group for work in stepped}.values()
        saved = [(group, group["weight_decay"], group["rounding"]) for group in groups]
        try:
            for group in groups:
                group["weight_decay"] = group["weight_decay"] if rule.is_coupled else 0.0
                group["rounding"] = "nearest"
            rule.update(copies)
        finally:
            for group, weight_decay, rounding in saved:
                group["weight_decay"], group["rounding"] = weight_decay, rounding
        for work, copy in zip(stepped, copies, strict=True):
            _take_step(rule, work, copy.params)
    for work in works:
        if work.group["ema"] > 0:
            # Short memory at first, or the average would be the initial weights for a long time.
            decay = min(work.group["ema"], (1.0 + work.step) / (10.0 + work.step))
            tensors = {"p": [local(p) for p in work.params], "ema": [local(state["ema"]) for state in work.states]}
            AVERAGE(tensors, {"old": decay, "new": 1.0 - decay})


def _with_copies(work: Work) -> Work:
    return Work(
        work.group,
        [_wide(p, s) for p, s in zip(work.params, work.states, strict=True)],
        work.grads,
        work.states,
        work.step,
    )


def _wide(parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return a copy of the weight in the format that steps are computed in, with what rounding had cut off."""
    copy = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
    if LOW in state:
        local(copy).add_(local(state[LOW]))
    return copy


def _take_step(rule: Rule, work: Work, made: list[Tensor]) -> None:
    group = work.group
    lr = float(group["lr"])
    rate = 0.0 if rule.is_coupled else decay_rate(group)
    old = [local(_wide(p, s)) for p, s in zip(work.params, work.states, strict=True)]
    steps = [before.sub(local(after)) for before, after in zip(old, made, strict=True)]
    if group["cautious"]:
        masks = [(d * local(g) > 0) for d, g in zip(steps, work.grads, strict=True)]
        shares = _sums([mask.to(torch.float64) for mask in masks], work) / _sizes(work)
        for d, mask, share in zip(steps, masks, shares.clamp(min=1e-3), strict=True):
            d.mul_(mask).div_(share.to(d.device, d.dtype))
    has_radius = [group["hyperball"] and p.ndim >= 2 for p in work.params]
    if any(has_radius):
        _take_radii(work, old, has_radius)
    on_sphere = [fixed and lr > 0 for fixed in has_radius]
    if any(on_sphere):
        steps = _sphere_steps(work, steps, on_sphere, lr)
    new: list[Tensor] = []
    for before, d, is_fixed in zip(old, steps, has_radius, strict=True):
        if is_fixed or rate == 0.0:
            new.append(before.sub(d))
        elif group["cautious_decay"]:
            new.append(torch.where(d * before >= 0, before * (1.0 - rate), before).sub_(d))
        else:
            new.append((before * (1.0 - rate)).sub_(d))
    if any(on_sphere):
        _back_to_sphere(work, new, on_sphere)
    mode = group["rounding"]
    seed = mix_number(group["seed"] * 0x9E3779B9 + work.step) if mode == "stochastic" else 0
    ASSIGN(
        {"p": [local(p) for p in work.params], "value": new}, {}, rounding=Rounding(mode, seed), low=remainders(work)
    )


def _take_radii(work: Work, old: list[Tensor], has_radius: list[bool]) -> None:
    """Keep the norm that each matrix begins with.

    A step at rate 0 takes it too: torch.distributed.checkpoint makes one to find out what state there is to load.
    """
    if all("radius" in state for state, fixed in zip(work.states, has_radius, strict=True) if fixed):
        return
    norms = _sums([before.double().square() for before in old], work).sqrt()
    for p, state, norm, fixed in zip(work.params, work.states, norms, has_radius, strict=True):
        if fixed and "radius" not in state:
            grown = (p.numel() / p.shape[-1]) ** 0.5
            state["radius"] = torch.where(norm > 0, norm, grown).float()
            state["on_sphere"] = (norm > 0).float()


def _sphere_steps(work: Work, steps: list[Tensor], on_sphere: list[bool], lr: float) -> list[Tensor]:
    """Give every matrix's step the norm ``lr * R``."""
    sizes = _sums([d.double().square() for d in steps], work).sqrt()
    return [
        d * (lr * state["radius"].to(d.device) / size.to(d.device).clamp(min=1e-30)).to(d.dtype) if fixed else d
        for d, state, size, fixed in zip(steps, work.states, sizes, on_sphere, strict=True)
    ]


def _back_to_sphere(work: Work, new: list[Tensor], on_sphere: list[bool]) -> None:
    norms = _sums([p.double().square() for p in new], work).sqrt()
    for p, state, norm, fixed in zip(new, work.states, norms, on_sphere, strict=True):
        if fixed:
            radius, began_on_it = state["radius"].to(norm.device), state["on_sphere"].to(norm.device) > 0
            target = torch.where(began_on_it, radius, torch.minimum(radius.to(norm.dtype), norm))
            p.mul_((target / norm.clamp(min=1e-30)).to(p.device, p.dtype))


def _sums(values: list[Tensor], work: Work) -> Tensor:
    return add_up(torch.stack([value.sum() for value in values]), work.params)


def _sizes(work: Work) -> Tensor:
    device = local(work.params[0]).device
    return torch.tensor([float(p.numel()) for p in work.params], dtype=torch.float64, device=device)

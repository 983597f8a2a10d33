"""Every optimizer walks the path of the plain reference written from its paper, for 100 steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import reference_matrix_optimizers
import reference_optimizers
import torch
from optimizer_problems import (
    MATRICES,
    SHAPES,
    STEPS,
    Gradients,
    Shapes,
    distance,
    follow,
    noisy_quadratic,
    now_and_then,
    parameters,
    sequence,
    weights,
)
from reference_optimizers import Reference

import hasten.optim
from hasten.optim.orthogonal import POLAR_EXPRESS, minimax
from hasten.optim.soap import refresh_slots

ELEMENTWISE, SOAP, MUON = 1e-6, 1e-4, 1e-3


@dataclass(frozen=True)
class Case:
    """One optimizer under one set of settings.

    Args:
        name: of the class, here and among the references.
        settings: of both.
        bound: largest relative distance of the two paths.
        shapes: of the weights.
        scale: of the first weights.
        ours: settings that only ours has.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    bound: float = ELEMENTWISE
    shapes: Shapes = SHAPES
    scale: float = 0.1
    ours: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])

    def start(self) -> tuple[list[torch.Tensor], list[torch.nn.Parameter], torch.optim.Optimizer, Reference]:
        """Return first weights, parameters of them, our optimizer over these, and the reference."""
        first = weights(self.shapes, scale=self.scale)
        params = parameters(first)
        plain = vars(reference_optimizers) | vars(reference_matrix_optimizers)
        optimizer = getattr(hasten.optim, self.name)(params, **self.settings, **self.ours)
        return first, params, optimizer, plain[self.name](first, **self.settings)


def mars(**settings: Any) -> Case:
    return Case("MARS", settings, shapes=MATRICES)


def soap(shapes: Shapes = ((24, 16), (16, 16), (9, 20), (1, 9)), **settings: Any) -> Case:
    return Case("SOAP", settings, bound=SOAP, shapes=shapes, ours={"spread_refresh": False})


def soap_muon(**settings: Any) -> Case:
    ours = {"spread_refresh": False, "compute_dtype": "float32"}
    return Case("SOAPMuon", settings, bound=MUON, shapes=((24, 16), (16, 16), (9, 20)), ours=ours)


def muon(name: str = "Muon", **settings: Any) -> Case:
    return Case(name, settings, bound=MUON, shapes=MATRICES, ours={"compute_dtype": "float32"})


CASES = [
    Case("AdamW", {"lr": 1e-2}),
    Case("AdamW", {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 1e-2, "weight_decay": 0.0}),
    Case("Adam", {"lr": 1e-2}),
    Case("Adam", {"lr": 1e-2, "betas": (0.0, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    Case("SGD", {"lr": 1e-1}),
    Case("SGD", {"lr": 1e-1, "weight_decay": 0.1}),
    Case("SGD", {"lr": 1e-2, "momentum": 0.9}),
    Case("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    Case("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    Case("RMSprop", {"lr": 1e-2}),
    Case("RMSprop", {"lr": 1e-2, "alpha": 0.9}),
    Case("RMSprop", {"lr": 1e-2, "centered": True}),
    Case("RMSprop", {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}),
    Case("RMSprop", {"lr": 1e-3, "momentum": 0.9, "centered": True, "eps": 1e-3}),
    Case("Adafactor", {"lr": 3e-2}),
    Case("Adafactor", {"lr": 3e-2, "beta2_decay": -0.5, "d": 2.0, "eps": (0.1, 0.5), "weight_decay": 0.1}),
    Case("Lion", {"lr": 1e-2}),
    Case("Lion", {"lr": 1e-2, "betas": (0.95, 0.98), "weight_decay": 0.1}),
    Case("Signum", {"lr": 1e-2}),
    Case("Signum", {"lr": 1e-2, "nesterov": False, "momentum": 0.9, "weight_decay": 0.1}),
    Case("AdEMAMix", {"lr": 1e-2}),
    Case("AdEMAMix", {"lr": 1e-2, "alpha": 2.0, "betas": (0.0, 0.99, 0.999), "eps": 1e-3, "weight_decay": 0.1}),
    Case("AdEMAMix", {"lr": 1e-2, "alpha_warmup": 60, "beta3_warmup": 60}),
    Case("AdEMAMix", {"lr": 1e-2, "alpha_warmup": 30, "weight_decay": 0.1}),
    Case("AdEMAMix", {"lr": 1e-2, "beta3_warmup": 200, "betas": (0.9, 0.999, 0.99995)}),
    Case("ADOPT", {"lr": 1e-2}),
    Case("ADOPT", {"lr": 1e-2, "betas": (0.95, 0.99), "eps": 1e-2, "clip_exponent": 0.1, "weight_decay": 0.1}),
    mars(lr=1e-2),
    mars(lr=1e-2, gamma=0.1, betas=(0.9, 0.95), weight_decay=0.1),
    mars(lr=1e-2, gamma=0.0, eps=1e-3),
    Case("ScheduleFreeAdamW", {"lr": 1e-2}),
    Case("ScheduleFreeAdamW", {"lr": 1e-2, "warmup_steps": 30, "weight_decay": 0.1}),
    Case("ScheduleFreeAdamW", {"lr": 1e-2, "r": 1.0, "weight_lr_power": 1.0, "betas": (0.95, 0.99), "eps": 1e-3}),
    # From zero, or with a larger first distance: p - p0 of float32 weights of 0.1 loses all but 7 bits of a distance of
    # 1e-6, and two correct float32 runs then end 4e-4 apart.
    Case("Prodigy", {}, scale=0.0),
    Case("Prodigy", {"d0": 1e-3, "use_bias_correction": True, "weight_decay": 0.1}),
    Case("Prodigy", {"d0": 1e-3, "safeguard_warmup": True, "lr": 0.5, "beta3": 0.9, "eps": 1e-3}),
    Case("Prodigy", {"d0": 1e-2, "growth_rate": 1.05, "d_coef": 2.0, "betas": (0.95, 0.99)}),
    Case("Sophia", {"lr": 1e-2}),
    Case("Sophia", {"lr": 1e-2, "betas": (0.9, 0.999), "rho": 0.1, "batch_tokens": 100, "weight_decay": 0.0}),
    soap(lr=1e-2),
    # At the first change of bases two gradients span 2 of the 9 dimensions of (1, 9), and rounding picks the others.
    soap(((24, 16), (16, 16), (12, 20)), lr=1e-2, precondition_frequency=1, weight_decay=0.1),
    soap(lr=1e-2, correct_bias=False, shampoo_beta=0.9, betas=(0.9, 0.99), eps=1e-3),
    soap(lr=1e-2, max_precond_dim=12),
    soap(lr=1e-2, one_sided=True),
    soap(((16, 16), (12, 12)), lr=1e-2, kl=True),
    soap(lr=1e-2, kl=True, one_sided=True, correct_bias=False, precondition_frequency=5),
    muon(lr=1e-2, orthogonalization="polar_express"),
    muon(lr=1e-2, orthogonalization="quintic", adjust_lr="original", nesterov=False),
    muon(lr=1e-2, orthogonalization="minimax", adjust_lr="rms_to_rms", ns_steps=4, weight_decay=0.0),
    muon(lr=1e-2, orthogonalization="polar_express", ns_steps=7, momentum=0.8),
    muon("NorMuon", lr=1e-2),
    muon("NorMuon", lr=1e-2, orthogonalization="quintic", adjust_lr="original", beta2=0.9),
    soap_muon(lr=1e-2),
    soap_muon(
        lr=1e-2, orthogonalization="quintic", adjust_lr="original", precondition_frequency=3, one_sided=True, eps=1e-3
    ),
]
# The first of each optimizer's cases stands for it where the settings do not matter.
OPTIMIZERS = list({case.name: case for case in reversed(CASES)}.values())[::-1]


def walk(case: Case, gradients: Gradients, *, lr: Callable[[int], float] | None = None) -> None:
    """Compare the weights after all steps, and those to evaluate with where they differ."""
    first, params, optimizer, reference = case.start()

    def estimate(step: int) -> None:
        if case.name == "Sophia" and step % 10 == 1:
            sampled = sequence(case.shapes, seed=step)(step, params)
            for p, g in zip(params, sampled):
                p.grad = g.clone()
            optimizer.estimate()
            reference.estimate(sampled)

    follow(optimizer, params, reference, gradients, lr=lr, after=estimate)
    assert distance(params, reference.params, first) <= case.bound
    if case.name == "ScheduleFreeAdamW":
        optimizer.eval()
        assert distance(params, reference.averaged(), first) <= case.bound
        optimizer.train()
        assert distance(params, reference.params, first) <= case.bound


# Prodigy has no bound on a slope: its distance doubles at every step, to 1e27.
PROBLEMS = [(case, problem) for case in CASES for problem in (sequence, noisy_quadratic)]
PROBLEMS = [pair for pair in PROBLEMS if pair[0].name != "Prodigy" or pair[1] is noisy_quadratic]


@pytest.mark.parametrize(("case", "problem"), PROBLEMS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_path_is_that_of_the_reference(case: Case, problem: Callable[[Shapes], Gradients]) -> None:
    walk(case, problem(case.shapes))


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_path_under_a_schedule_is_that_of_the_reference(case: Case) -> None:
    peak = case.settings.get("lr", 1.0)
    walk(case, noisy_quadratic(case.shapes), lr=lambda step: peak * (0.55 + 0.45 * math.cos(math.pi * step / STEPS)))


WITH_WARMUP = [
    Case("AdEMAMix", {"lr": 1e-2, "alpha_warmup": 60, "beta3_warmup": 60}),
    Case("ScheduleFreeAdamW", {"lr": 1e-2, "warmup_steps": 30}),
]


@pytest.mark.parametrize("case", [*OPTIMIZERS, *WITH_WARMUP], ids=str)
def test_weights_without_gradient_stay_and_count_their_own_steps(case: Case) -> None:
    walk(case, now_and_then(noisy_quadratic(case.shapes)))


def test_soap_takes_a_stack_as_many_matrices() -> None:
    first = weights([(7, 5, 3)])
    params = parameters(first)
    optimizer = hasten.optim.SOAP(params, lr=1e-2)
    reference = reference_matrix_optimizers.SOAP(list(first[0]), lr=1e-2)
    gradients = sequence([(7, 5, 3)])
    for step in range(1, STEPS + 1):
        (params[0].grad,) = gradients(step, params)
        reference.step(list(params[0].grad))
        optimizer.step()
    assert distance(params, [torch.stack(reference.params)], first) <= SOAP


def test_soap_spread_over_a_period_changes_bases_early_and_nothing_else() -> None:
    shapes = ((16, 16), (8, 12), (12, 8), (10, 10), (16, 16))
    first = weights(shapes)
    params = parameters(first)
    optimizer = hasten.optim.SOAP(params, lr=1e-2, precondition_frequency=4)
    early = list(refresh_slots(params, optimizer.param_groups[0]).values())
    assert set(early) == {0, 1, 2, 3}
    references = [
        reference_matrix_optimizers.SOAP([p], lr=1e-2, precondition_frequency=4, early=steps)
        for p, steps in zip(first, early, strict=True)
    ]
    gradients = sequence(shapes)
    for step in range(1, STEPS + 1):
        for p, g, reference in zip(params, gradients(step, params), references, strict=True):
            p.grad = g
            reference.step([g])
        optimizer.step()
    assert distance(params, [reference.params[0] for reference in references], first) <= SOAP


def groups_apart(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[2:3]}, {"params": [params[1], params[3]]}, {"params": params[:1]}]


@pytest.mark.parametrize("is_sparse", [False, True])
def test_prodigy_has_one_distance_for_all_groups(is_sparse: bool) -> None:
    first = weights(SHAPES, scale=0.0)
    params = parameters(first)
    gradients = noisy_quadratic(SHAPES)
    reference = reference_optimizers.Prodigy(first)
    optimizer = hasten.optim.Prodigy(groups_apart(params))
    follow(optimizer, params, reference, now_and_then(gradients) if is_sparse else gradients)
    assert distance(params, reference.params, first) <= ELEMENTWISE


def test_schedule_free_counts_the_same_steps_in_every_group() -> None:
    first = weights(SHAPES)
    params = parameters(first)
    reference = reference_optimizers.ScheduleFreeAdamW(first, lr=1e-2, warmup_steps=30)
    optimizer = hasten.optim.ScheduleFreeAdamW(groups_apart(params), lr=1e-2, warmup_steps=30)
    follow(optimizer, params, reference, noisy_quadratic(SHAPES))
    assert distance(params, reference.params, first) <= ELEMENTWISE


@pytest.mark.parametrize("name", ["MARS", "SOAP", "Muon", "NorMuon", "SOAPMuon"])
def test_vectors_beside_matrices_are_updated_by_adamw(name: str) -> None:
    first = weights(SHAPES)
    params = parameters(first)
    optimizer = getattr(hasten.optim, name)(params, lr=1e-2, weight_decay=0.1)
    (rest,) = [group for group in optimizer.param_groups if group["rule"] == "adamw"]
    assert [id(p) for p in rest["params"]] == [id(params[1])]
    settings = {key: rest[key] for key in ("lr", "betas", "eps", "weight_decay")}
    reference = reference_optimizers.AdamW(first[1:2], **settings)
    follow(optimizer, params[1:2], reference, sequence(SHAPES[1:2]))
    assert distance(params[1:2], reference.params, first[1:2]) <= ELEMENTWISE


TORCH = [case for case in CASES if case.name in ("AdamW", "Adam", "SGD", "RMSprop", "Adafactor")]


@pytest.mark.parametrize("case", TORCH, ids=str)
def test_path_is_that_of_torch(case: Case) -> None:
    first, params, optimizer, _ = case.start()
    others = parameters(first)
    theirs = getattr(torch.optim, case.name)(others, **case.settings, foreach=False)
    gradients = noisy_quadratic(case.shapes)
    for step in range(1, STEPS + 1):
        for p, q, g in zip(params, others, gradients(step, [q.detach() for q in others])):
            p.grad, q.grad = g.clone(), g
        optimizer.step()
        theirs.step()
    assert distance(params, others, first) <= ELEMENTWISE


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_step_leaves_gradients_alone(case: Case) -> None:
    _, params, optimizer, reference = case.start()
    gradients = sequence(case.shapes)
    for step in range(1, 4):
        grads = gradients(step, reference.params)
        for p, g in zip(params, grads):
            p.grad = g.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads))


def test_published_polynomials_follow_from_the_paper() -> None:
    for derived, ours in zip(reference_matrix_optimizers.polynomials("polar_express", 5), POLAR_EXPRESS, strict=True):
        assert derived == pytest.approx(ours, rel=1e-12)
    for derived, ours in zip(reference_matrix_optimizers.polynomials("minimax", 5), minimax(5), strict=True):
        assert derived == pytest.approx(ours, rel=1e-9)

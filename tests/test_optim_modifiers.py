"""Cautious steps and decay, weights of a fixed norm, averages of weights: around any rule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hasten.errors import RecipeError
from hasten.optim import OPTIMIZERS, RULES, AdamW, Lion, Muon, ScheduleFreeAdamW, Signum, optimizer

STEPPED = [name for name in OPTIMIZERS if RULES[name].averaged is None]


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).mul_(0.1).to(dtype)) for s in [(24, 16), (8, 5), (7,)]]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (p.detach().float() + torch.randn(p.shape, generator=generator)).to(p.dtype)


def train(params: list[nn.Parameter], stepper: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(params, step)
        stepper.step()


def test_cautious_steps_leave_out_what_points_against_the_gradient():
    weight = nn.Parameter(torch.zeros(4))
    stepper = Signum([weight], lr=1.0, momentum=0.9, nesterov=False, cautious=True)
    weight.grad = torch.tensor([1.0, 1.0, 1.0, 1.0])
    stepper.step()
    assert weight.tolist() == [-1.0] * 4
    weight.grad = torch.tensor([0.1, -0.1, 0.1, -0.1])  # the momentum still points up everywhere
    stepper.step()
    # Half of the elements agree, so each of them moves twice as far.
    torch.testing.assert_close(weight.detach(), torch.tensor([-3.0, -1.0, -3.0, -1.0]))


def test_cautious_decay_decays_only_what_moves_to_zero():
    weight = nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    stepper = Lion([weight], lr=0.1, weight_decay=1.0, cautious_decay=True)
    weight.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
    stepper.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.8, 1.1, -1.1, -0.8]))


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_on_the_hyperball_matrices_keep_their_norm_and_steps_have_theirs(name):
    params = weights()
    norms = [p.norm().item() for p in params]
    stepper = OPTIMIZERS[name](params, lr=0.01, weight_decay=5.0, hyperball=True)
    for step in range(5):
        before = [p.detach().clone() for p in params]
        train(params, stepper, step, step + 1)
        for p, old, norm in list(zip(params, before, norms, strict=True))[:2]:
            assert p.norm().item() == pytest.approx(norm, rel=1e-5)
            # The step is taken straight, then what points away from the sphere is undone.
            assert 0.8 * 0.01 * norm < (p - old).norm().item() <= 1.0001 * 0.01 * norm


def test_a_matrix_that_begins_at_zero_grows_up_to_its_sphere():
    weight = nn.Parameter(torch.zeros(16, 4))
    stepper = AdamW([weight], lr=0.1, hyperball=True)
    norms = []
    for step in range(40):
        weight.grad = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)) - 1.0
        stepper.step()
        norms.append(weight.norm().item())
    assert norms[0] == pytest.approx(0.4, rel=1e-4)  # one step of lr * sqrt(rows)
    assert max(norms) == pytest.approx(4.0, rel=1e-4)
    assert norms[-1] <= 4.0 + 1e-4


def test_by_model_the_sphere_is_for_hidden_matrices_alone():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))
    flags = {g["name"]: g["hyperball"] for g in optimizer(model, "muon", lr=1e-3, hyperball=True).param_groups}
    assert flags == {"matrices": True, "head": False, "embeddings": False, "vectors": False}


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("flag", ["cautious", "cautious_decay", "hyperball", "ema"])
def test_modifiers_compose_with_every_rule_and_resume_exactly(name, flag):
    if flag == "cautious_decay" and RULES[name].is_coupled:
        with pytest.raises(RecipeError, match="cautious_decay"):
            OPTIMIZERS[name](weights(), cautious_decay=True)
        return
    more = {flag: 0.9 if flag == "ema" else True, "weight_decay": 0.1, "lr": 1e-2}
    whole, plain = weights(), weights()
    stepper = OPTIMIZERS[name](whole, **more)
    train(whole, stepper, 0, 3)
    held, state = copy.deepcopy(whole), copy.deepcopy(stepper.state_dict())
    train(whole, stepper, 3, 6)
    resumed = OPTIMIZERS[name](held, **more)
    resumed.load_state_dict(state)
    train(held, resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, held, strict=True))
    train(plain, OPTIMIZERS[name](plain, weight_decay=0.1, lr=1e-2), 0, 6)
    if name != "prodigy":  # it hardly moves in six steps, so that a step against the gradient does not occur
        is_changed = not all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))
        assert is_changed == (flag != "ema")


@pytest.mark.parametrize("flag", ["cautious", "cautious_decay"])
def test_a_modifier_without_anything_to_change_leaves_the_step_as_it_is(flag):
    """In its first step all of Adam points along the gradient, and without decay there is none to leave out."""
    params, same = weights(), weights()
    train(params, AdamW(params, lr=1e-2, weight_decay=0.0), 0, 1)
    train(same, AdamW(same, lr=1e-2, weight_decay=0.0, **{flag: True}), 0, 1)
    for a, b in zip(params, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_modifiers_step_bfloat16_weights_in_float32(rounding):
    params = weights(torch.bfloat16)
    stepper = AdamW(params, lr=1e-2, cautious=True, ema=0.5, rounding=rounding)
    train(params, stepper, 0, 4)
    assert params[0].dtype == torch.bfloat16
    assert stepper.state[params[0]]["ema"].dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in params)


def test_kahan_follows_float32_weights_where_rounding_to_nearest_stands_still():
    def after(dtype: torch.dtype, **more: str) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(64, dtype=dtype))
        stepper = Lion([weight], lr=1e-4, **more)
        for _ in range(200):
            weight.grad = torch.ones(64, dtype=dtype)
            stepper.step()
        return weight.detach().float()

    exact = after(torch.float32)
    assert torch.equal(after(torch.bfloat16), torch.ones(64))
    torch.testing.assert_close(after(torch.bfloat16, rounding="kahan"), exact, rtol=2**-8, atol=0)
    random = after(torch.bfloat16, rounding="stochastic")
    torch.testing.assert_close(random.mean(), exact.mean(), rtol=3e-3, atol=0)


def test_the_average_is_read_out_and_put_back():
    weight = nn.Parameter(torch.tensor([1.0]))
    stepper = OPTIMIZERS["sgd"]([weight], lr=1.0, ema=0.75, ema_share=0.5)
    weight.grad = torch.tensor([1.0])
    stepper.step()  # the weight is 0, its average 2 / 11: memory is short at first
    assert stepper.averages
    stepper.eval()
    assert weight.item() == pytest.approx(1 / 11)
    stepper.train()
    assert weight.item() == 0.0


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda p: ScheduleFreeAdamW(p, cautious=True), "schedule_free_adamw, which averages"),
        (lambda p: ScheduleFreeAdamW(p, ema=0.9), "schedule_free_adamw, which averages"),
        (lambda p: AdamW(p, hyperball=True, cautious_decay=True), "hyperball fixes the norm"),
        (lambda p: AdamW(p, ema=-0.1), "ema"),
        (lambda p: Muon(p, ema_share=1.5), "ema_share"),
    ],
)
def test_contradictions_are_refused(build, says):
    with pytest.raises(RecipeError, match=says):
        build(weights())

"""Precision: float32 masters behind low-precision matrices, and steps that an overflow skips."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.clip import ClipNorm, NoClip
from hasten.errors import RecipeError
from hasten.optim import optimizer
from hasten.precision import PRECISIONS, Precision

LOW = ["bf16", "fp16"]


class Net(nn.Module):
    """Two layers of three products, norms in float32, matrices in any format; `spare` never gets a gradient."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.up = nn.Linear(width, 8 * width, bias=False)
        self.mid = nn.Linear(8 * width, 8 * width, bias=False)
        self.down = nn.Linear(8 * width, width, bias=False)
        self.spare = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            normed = F.rms_norm(x.float(), self.norm.shape, self.norm).to(self.up.weight.dtype)
            x = x + self.down(F.gelu(self.mid(F.gelu(self.up(normed)))))
        return x


def net(width: int = 16) -> Net:
    generator = torch.Generator().manual_seed(3)
    model = Net(width)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


def inputs(model: Net) -> Tensor:
    x = torch.randn(32, model.norm.numel(), generator=torch.Generator().manual_seed(4))
    return x.to(model.up.weight.dtype)


def set_up(name: str) -> tuple[Net, Precision, torch.optim.Optimizer]:
    model = net()
    precision = Precision(model, name)
    return model, precision, optimizer(model, lr=1e-2, master=precision.master)


def loss_of(model: Net) -> Tensor:
    return model(inputs(model)).float().square().mean()


def step(model: Net, precision: Precision, stepper: torch.optim.Optimizer, *, factor: float = 1.0):
    precision.backward(loss_of(model) * factor)
    return precision.step(stepper, ClipNorm(1.0))


def snapshot(model: Net, precision: Precision, stepper: torch.optim.Optimizer) -> dict:
    masters = {name: master.detach() for name, master in precision.named_masters().items()}
    return copy.deepcopy(
        {"model": dict(model.state_dict()), "masters": masters, "state": stepper.state_dict()["state"]}
    )


def assert_equal(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- formats ----------------------------------------------------------------------------------------------------


def test_float32_copies_and_casts_nothing():
    model = net()
    before = list(model.parameters())
    precision = Precision(model, "float32")
    assert [precision.master(p) for p in model.parameters()] == before
    assert {p.dtype for p in before} == {torch.float32}


@pytest.mark.parametrize("name", LOW)
def test_matrices_are_low_vectors_and_masters_float32(name):
    model = net()
    wanted = copy.deepcopy(model.state_dict())
    precision = Precision(model, name)
    assert {p.dtype for p in model.parameters() if p.ndim == 2} == {PRECISIONS[name]}
    assert model.norm.dtype == torch.float32
    assert precision.master(model.norm) is model.norm
    assert_equal({key: master.detach() for key, master in precision.named_masters().items()}, dict(wanted))


@pytest.mark.parametrize("name", PRECISIONS)
def test_shared_weights_stay_shared_with_one_master(name):
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    precision = Precision(model, name)
    stepper = optimizer(model, lr=1e-2, master=precision.master)
    precision.backward(model["head"](model["embed"](torch.arange(10))).float().square().sum())
    precision.step(stepper, NoClip())
    assert model["head"].weight is model["embed"].weight
    assert list(precision.named_masters()) == ["embed.weight"]
    assert_equal(model["head"].weight, precision.master(model["embed"].weight).to(PRECISIONS[name]))


def test_a_float64_model_stays_float64():
    model = net().double()
    precision = Precision(model, "float32")
    assert {master.dtype for master in precision.named_masters().values()} == {torch.float64}


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'fp16'"):
        Precision(net(), "f16")


def bytes_of_weights(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def bytes_of_activations(model: Net) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs(model))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("name", LOW)
def test_weights_and_activations_take_about_half_the_bytes(name):
    full, low = net(width=64), net(width=64)
    Precision(full, "float32")
    Precision(low, name)
    assert bytes_of_weights(low) <= 0.55 * bytes_of_weights(full)
    assert bytes_of_activations(low) <= 0.55 * bytes_of_activations(full)


# --- steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRECISIONS)
def test_training_lowers_the_loss(name):
    model, precision, stepper = set_up(name)
    before = loss_of(model).item()
    reports = [step(model, precision, stepper) for _ in range(40)]
    assert loss_of(model).item() < 0.7 * before
    assert not any(report.skipped for report in reports)


@pytest.mark.parametrize("name", PRECISIONS)
def test_after_a_step_the_weights_are_the_rounded_masters_and_gradients_are_gone(name):
    model, precision, stepper = set_up(name)
    step(model, precision, stepper)
    for parameter in model.parameters():
        master = precision.master(parameter)
        assert_equal(parameter.detach(), master.detach().to(parameter.dtype))
        assert parameter.grad is None
        assert master.grad is None


@pytest.mark.parametrize("name", LOW)
def test_updates_too_small_for_the_format_are_not_lost(name):
    model, precision, stepper = set_up(name)
    for group in stepper.param_groups:
        group["lr"] = 1e-6
    before = precision.master(model.up.weight).detach().clone()
    for _ in range(3):
        step(model, precision, stepper)
    moved = (precision.master(model.up.weight) - before).abs()
    assert moved.max() > 2e-6
    assert moved.max() < 5e-6


@pytest.mark.parametrize("name", LOW)
def test_gradients_accumulate_in_float32(name):
    model = nn.Linear(1, 1, bias=False)
    precision = Precision(model, name)
    scale = precision.state_dict().get("scale", 1.0)
    for x in (1.0, 2.0**-12):  # their sum needs more bits than either format has
        precision.backward(model(torch.full((1, 1), x, dtype=PRECISIONS[name])).float().sum() / 8)
    assert model.weight.grad is None
    assert precision.master(model.weight).grad.item() == scale * (1.0 + 2.0**-12) / 8


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_parameter_without_a_gradient_is_left_alone(name):
    model, precision, stepper = set_up(name)
    before = precision.master(model.spare.weight).detach().clone()
    step(model, precision, stepper)
    assert_equal(precision.master(model.spare.weight).detach(), before)
    assert precision.master(model.spare.weight) not in stepper.state


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_without_any_gradient_changes_nothing(name):
    model, precision, stepper = set_up(name)
    before = snapshot(model, precision, stepper)
    report = precision.step(stepper, ClipNorm(1.0))
    assert not report.skipped
    assert report.norm.item() == 0.0
    assert_equal(snapshot(model, precision, stepper), before)


def test_the_norm_is_that_of_the_unscaled_gradient():
    norms = {}
    for name in PRECISIONS:
        model, precision, stepper = set_up(name)
        norms[name] = step(model, precision, stepper).norm.item()
    assert norms["fp16"] == pytest.approx(norms["float32"], rel=1e-2)
    assert norms["bf16"] == pytest.approx(norms["float32"], rel=5e-2)


def test_clipping_sees_unscaled_gradients():
    seen = []

    def look(parameters):
        seen.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item())
        return ClipNorm(1.0)(parameters)

    model, precision, stepper = set_up("fp16")
    precision.backward(loss_of(model))
    report = precision.step(stepper, look)
    assert seen[0] == pytest.approx(report.norm.item())
    assert report.loss_scale == 65536.0


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which on a GPU waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(operation)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "waits"), [("float32", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_waits_for_the_device(name, waits):
    model, precision, stepper = set_up(name)
    step(model, precision, stepper)
    with Reads() as reads:
        step(model, precision, stepper)
    assert (reads.count > 0) == waits


# --- overflow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("good_steps", [0, 3])
@pytest.mark.parametrize("factor", [1e30, float("inf"), float("nan")])
def test_an_overflow_skips_the_step_halves_the_scale_and_changes_nothing_else(factor, good_steps):
    model, precision, stepper = set_up("fp16")
    for _ in range(good_steps):
        step(model, precision, stepper)
    before = snapshot(model, precision, stepper)
    report = step(model, precision, stepper, factor=factor)
    assert report.skipped
    assert report.loss_scale == 65536.0
    assert precision.state_dict()["scale"] == 32768.0
    assert_equal(snapshot(model, precision, stepper), before)


def test_an_overflow_of_a_vector_alone_skips_the_step_too():
    model, precision, stepper = set_up("fp16")
    before = snapshot(model, precision, stepper)
    precision.backward(loss_of(model))
    model.norm.grad[0] = float("inf")
    assert precision.step(stepper, NoClip()).skipped
    assert_equal(snapshot(model, precision, stepper), before)


def test_training_goes_on_after_an_overflow_as_if_it_had_not_been():
    (model, precision, stepper), (other, other_precision, other_stepper) = set_up("fp16"), set_up("fp16")
    step(model, precision, stepper, factor=1e30)
    other_precision.load_state_dict(precision.state_dict())
    for _ in range(3):
        assert not step(model, precision, stepper).skipped
        step(other, other_precision, other_stepper)
    assert_equal(snapshot(model, precision, stepper), snapshot(other, other_precision, other_stepper))


def test_the_scale_doubles_after_two_thousand_good_steps():
    model, precision, stepper = set_up("fp16")
    precision.load_state_dict(precision.state_dict() | {"_growth_tracker": 1998})
    scales = [step(model, precision, stepper).loss_scale for _ in range(3)]
    assert scales == [65536.0, 65536.0, 131072.0]


def test_a_scale_halved_to_nothing_never_updates_a_weight():
    model, precision, stepper = set_up("fp16")
    precision.load_state_dict(precision.state_dict() | {"scale": 2.0**-149})
    before = snapshot(model, precision, stepper)
    reports = [step(model, precision, stepper, factor=float("nan")), step(model, precision, stepper)]
    assert [report.skipped for report in reports] == [True, True]
    assert_equal(snapshot(model, precision, stepper), before)


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_without_loss_scaling_nothing_is_skipped(name):
    model, precision, stepper = set_up(name)
    report = step(model, precision, stepper, factor=float("nan"))
    assert not report.skipped
    assert report.loss_scale == 1.0
    assert report.norm.isnan()  # the guard's to judge


# --- resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_resumed_run_equals_the_uninterrupted_one(name):
    whole = set_up(name)
    first = set_up(name)
    for made in (whole, first):
        step(*made, factor=1e30 if name == "fp16" else 1.0)
    for _ in range(6):
        step(*whole)
    for _ in range(2):
        step(*first)
    saved, scaling = snapshot(*first), json.loads(json.dumps(first[1].state_dict()))
    stepper_state = copy.deepcopy(first[2].state_dict())

    model, precision, stepper = set_up(name)
    with torch.no_grad():
        for key, master in precision.named_masters().items():
            master.copy_(saved["masters"][key])
    precision.sync()
    precision.load_state_dict(scaling)
    stepper.load_state_dict(stepper_state)
    for _ in range(4):
        step(model, precision, stepper)
    assert_equal(snapshot(model, precision, stepper), snapshot(*whole))
    assert precision.state_dict() == whole[1].state_dict()

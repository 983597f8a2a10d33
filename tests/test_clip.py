"""Clips equal torch's own on every kind of gradient, say what they did, and wait for nothing."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.clip import AGC, CLIPS, ClipBoth, ClipNorm, ClipValue, NoClip, ZClip
from hasten.errors import RecipeError

INF, NAN = math.inf, math.nan
ALL = [NoClip(), ClipNorm(1.0), ClipValue(0.5), ClipBoth(1.0, 0.5), AGC(0.01, 1e-3), ZClip(2.5, 0.97, 25)]


def random_gradients(scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [scale * torch.randn(shape, generator=generator) for shape in ((7, 5), (11,), (2, 3, 4), ())]


GRADIENTS = {
    "random": random_gradients(1.0),
    "small": random_gradients(1e-4),
    "tiny": random_gradients(1e-30),
    "large": random_gradients(1e6),
    "norm overflows": random_gradients(1e30),
    "zero": random_gradients(0.0),
    "inf": [torch.tensor([1.0, INF]), torch.tensor([2.0])],
    "minus inf": [torch.tensor([1.0, -INF]), torch.tensor([2.0])],
    "nan": [torch.tensor([1.0, NAN]), torch.tensor([2.0])],
    "inf and nan": [torch.tensor([NAN, INF, -INF]), torch.tensor([0.0])],
    "float64": [gradient.double() for gradient in random_gradients(3.0)],
    "bfloat16": [gradient.bfloat16() for gradient in random_gradients(3.0)],
    "one is missing": [*random_gradients(1.0), None],
    "all are missing": [None, None],
    "no parameters": [],
}


def parameters(gradients: list[Tensor | None]) -> list[torch.nn.Parameter]:
    made = []
    for gradient in gradients:
        made.append(torch.nn.Parameter(torch.zeros(3) if gradient is None else torch.zeros_like(gradient)))
        made[-1].grad = None if gradient is None else gradient.clone()
    return made


def assert_same_gradients(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert torch.equal(one.grad.nan_to_num(12345.0), other.grad.nan_to_num(12345.0))
            assert torch.equal(one.grad.isfinite(), other.grad.isfinite())
            assert torch.equal(one.grad.isnan(), other.grad.isnan())


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_clipping_by_norm_equals_torchs(kind, max_norm):
    ours, theirs = parameters(GRADIENTS[kind]), parameters(GRADIENTS[kind])
    report = ClipNorm(max_norm)(ours)
    norm = clip_grad_norm_(theirs, max_norm)
    assert_same_gradients(ours, theirs)
    assert torch.equal(report.norm.nan_to_num(-1.0), norm.nan_to_num(-1.0))
    assert bool(report.clipped) == bool(norm > max_norm)


@pytest.mark.parametrize("max_value", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_clipping_by_value_equals_torchs(kind, max_value):
    ours, theirs = parameters(GRADIENTS[kind]), parameters(GRADIENTS[kind])
    report = ClipValue(max_value)(ours)
    if any(p.grad is not None for p in theirs):  # torch's fails without any gradient
        clip_grad_value_(theirs, max_value)
    assert_same_gradients(ours, theirs)
    before = [g for g in GRADIENTS[kind] if g is not None]
    assert torch.equal(report.norm.nan_to_num(-1.0), torch.nn.utils.get_total_norm(before).nan_to_num(-1.0))


@pytest.mark.parametrize("kind", GRADIENTS)
def test_clipping_by_both_is_by_value_and_then_by_norm(kind):
    ours, theirs = parameters(GRADIENTS[kind]), parameters(GRADIENTS[kind])
    ClipBoth(max_norm=1.0, max_value=0.5)(ours)
    if any(p.grad is not None for p in theirs):
        clip_grad_value_(theirs, 0.5)
    clip_grad_norm_(theirs, 1.0)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_no_clip_changes_nothing_and_reports_the_norm(kind):
    ours, before = parameters(GRADIENTS[kind]), parameters(GRADIENTS[kind])
    report = NoClip()(ours)
    assert_same_gradients(ours, before)
    expected = torch.nn.utils.get_total_norm([p.grad for p in before if p.grad is not None])
    assert torch.equal(report.norm.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    assert not report.clipped


@pytest.mark.parametrize(
    ("clip", "gradient", "is_clipped"),
    [
        (ClipNorm(5.0), [3.0, 4.0], False),
        (ClipNorm(4.999), [3.0, 4.0], True),
        (ClipValue(4.0), [3.0, -4.0], False),
        (ClipValue(3.999), [3.0, -4.0], True),
        (ClipBoth(5.0, 4.0), [3.0, 4.0], False),
        (ClipBoth(4.999, 4.0), [3.0, 4.0], True),
        (ClipBoth(5.0, 3.999), [3.0, 4.0], True),
        (ClipNorm(1.0), [0.0, 0.0], False),
        (ClipValue(1.0), [0.0, INF], True),
    ],
)
def test_a_clip_says_whether_it_acted(clip, gradient, is_clipped):
    assert bool(clip(parameters([torch.tensor(gradient)])).clipped) == is_clipped


@pytest.mark.parametrize("clip", ALL, ids=repr)
def test_the_reported_norm_is_that_before_clipping(clip):
    assert clip(parameters([torch.tensor([30.0, 40.0])])).norm.item() == 50.0


@pytest.mark.parametrize("clip", ALL, ids=repr)
def test_a_clip_never_waits_for_the_device(clip):
    read = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            read.append(operation) if "_local_scalar_dense" in str(operation) else None
            return operation(*args, **(kwargs or {}))

    with Watch():
        report = clip(parameters(GRADIENTS["random"]))
        assert not read
        report.norm.item()
    assert len(read) == 1


@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
@pytest.mark.parametrize("build", [ClipNorm, ClipValue, lambda v: ClipBoth(v, 1.0), lambda v: ClipBoth(1.0, v)])
def test_a_limit_that_cannot_clip_is_refused(build, value):
    with pytest.raises(RecipeError, match="cannot clip"):
        build(value)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: AGC(0.0, 1e-3), "clip.clipping=0.0 cannot clip"),
        (lambda: AGC(0.01, NAN), "clip.eps=nan cannot clip"),
        (lambda: ZClip(INF, 0.97, 25), "clip.threshold=inf cannot clip"),
        (lambda: ZClip(2.5, 1.0, 25), "clip.alpha=1.0 is no share"),
        (lambda: ZClip(2.5, 0.97, 1), "clip.warmup_steps=1 shows no deviation"),
    ],
)
def test_settings_without_a_meaning_are_refused(build, says):
    with pytest.raises(RecipeError, match=says):
        build()


def test_clips_are_values_under_the_names_of_recipes():
    assert sorted(CLIPS) == ["agc", "none", "norm", "norm_and_value", "value", "zclip"]
    assert CLIPS["norm"](2.0) == ClipNorm(2.0)
    assert repr(ClipBoth(1.0, 0.5)) == "ClipBoth(max_norm=1.0, max_value=0.5)"
    assert repr(ZClip(2.5, 0.97, 25)) == "ZClip(threshold=2.5, alpha=0.97, warmup_steps=25)"


@pytest.mark.parametrize("clip", ALL[:-1], ids=repr)
def test_a_clip_that_looks_at_one_step_alone_has_no_state(clip):
    clip(parameters(GRADIENTS["random"]))
    assert clip.state_dict() == {}
    clip.load_state_dict({})


@pytest.mark.parametrize("kind", [kind for kind in GRADIENTS if kind != "bfloat16"])  # which rounds by more than that
@pytest.mark.parametrize("clip", ALL, ids=repr)
def test_what_a_clip_left_is_within_what_it_allows(clip, kind):
    made = parameters(GRADIENTS[kind])
    report = clip(made)
    assert bool(clip.holds(made)) or not bool(report.norm.isfinite())


# --- adaptive clipping by unit --------------------------------------------------------------------------------------


def test_agc_equals_its_formula_in_plain_python():
    generator = torch.Generator().manual_seed(7)
    acted = 0
    for step in range(200):
        made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 5), (7,), (3, 2, 2))]
        made[0].data[step % 6] = 0.0
        for parameter in made:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10 ** (step % 7 - 5)
        expected = [
            torch.tensor(
                [agc_unit(w, g) for w, g in zip(units(parameter), units(parameter.grad), strict=True)]
            ).reshape(parameter.shape)
            for parameter in made
        ]
        before = [parameter.grad.clone() for parameter in made]
        acted += bool(AGC(0.01, 1e-3)(made).clipped)
        for parameter, wanted, old in zip(made, expected, before, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=2e-6, atol=1e-12)
            same = (parameter.grad == old).reshape(len(units(old)), -1).all(1)
            assert same.tolist() == [agc_unit(w, g) == g for w, g in zip(units(parameter), units(old), strict=True)]
    assert 50 < acted < 200


def units(tensor: Tensor) -> list[list[float]]:
    rows = tensor.detach().double()
    return (rows.reshape(1, -1) if rows.ndim < 2 else rows.reshape(len(rows), -1)).tolist()


def agc_unit(weights: list[float], gradient: list[float]) -> list[float]:
    size = math.sqrt(sum(g * g for g in gradient))
    most = 0.01 * max(math.sqrt(sum(w * w for w in weights)), 1e-3)
    return [g * most / size for g in gradient] if size > most else gradient


def test_agc_leaves_a_unit_that_is_not_finite_to_the_guard_and_clips_the_others():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.tensor([[NAN, 1.0], [INF, 1.0], [3.0, 4.0]])
    report = AGC(0.1, 1e-3)([weight])
    assert report.clipped
    assert not report.norm.isfinite()
    assert weight.grad[1].tolist() == [INF, 1.0]
    assert weight.grad[2].norm().item() == pytest.approx(0.1 * math.sqrt(2))


# --- clipping by what is usual --------------------------------------------------------------------------------------


def norms(steps: int) -> list[float]:
    """Return norms that fall, vary, and have a spike now and then, one of them a hundredfold."""
    chance = random.Random(6)
    made = [(0.5 + math.exp(-step / 50)) * math.exp(chance.gauss(0, 0.15)) for step in range(steps)]
    return [n * (100.0 if step == 100 else 4.0 if step % 23 == 22 else 1.0) for step, n in enumerate(made)]


def clipped_norms(clip: ZClip, given: list[float]) -> Iterator[float]:
    """Yield the norm that the clip leaves of each one given, of a gradient in two tensors."""
    for norm in given:
        made = parameters([torch.tensor([0.6 * norm, 0.0]), torch.tensor([[0.8 * norm]])])
        clip(made)
        yield math.hypot(made[0].grad[0].item(), made[1].grad.item())


def zclip_in_plain_python(given: list[float], threshold: float, alpha: float, warmup_steps: int) -> list[float]:
    left, warm, mean, variance = [], [], 0.0, 0.0
    for norm in given:
        if len(warm) < warmup_steps:
            warm.append(norm)
            mean = sum(warm) / len(warm)
            variance = sum((n - mean) ** 2 for n in warm) / len(warm)
            left.append(norm)
            continue
        deviation = math.sqrt(variance) + 1e-6 * mean
        z = (norm - mean) / deviation
        left.append(mean + threshold**2 / z * deviation if z > threshold else norm)
        mean = alpha * mean + (1 - alpha) * left[-1]
        variance = alpha * variance + (1 - alpha) * (left[-1] - mean) ** 2
    return left


@pytest.mark.parametrize("settings", [(2.5, 0.97, 25), (1.0, 0.9, 2), (3.0, 0.99, 60)])
def test_zclip_equals_its_formula_in_plain_python(settings):
    given = norms(200)
    expected = zclip_in_plain_python(given, *settings)
    assert list(clipped_norms(ZClip(*settings), given)) == pytest.approx(expected, rel=1e-4)
    assert sum(abs(e - g) > 1e-3 * g for e, g in zip(expected, given, strict=True)) >= 3


def test_zclip_lets_of_a_hundredfold_norm_through_what_is_usual():
    given = norms(200)
    left = list(clipped_norms(ZClip(2.5, 0.97, 25), given))
    assert given[100] > 45
    assert left[100] < 1.3 * sum(left[75:100]) / 25
    assert left[101:110] == pytest.approx(given[101:110])  # and what comes after it is usual still


def test_zclip_does_not_act_in_its_warm_up():
    given = norms(25)
    assert list(clipped_norms(ZClip(0.1, 0.97, 25), given)) == pytest.approx(given)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_zclip_does_not_depend_on_the_scale_of_gradients(scale):
    one = list(clipped_norms(ZClip(2.5, 0.97, 25), norms(120)))
    other = list(clipped_norms(ZClip(2.5, 0.97, 25), [n * scale for n in norms(120)]))
    assert [n / scale for n in other] == pytest.approx(one, rel=1e-4)


def test_zclip_leaves_equal_norms_alone():
    assert list(clipped_norms(ZClip(2.5, 0.97, 5), [0.1] * 50)) == pytest.approx([0.1] * 50, rel=1e-6)


@pytest.mark.parametrize("broken", [NAN, INF])
@pytest.mark.parametrize("at", [0, 10, 40])
def test_a_norm_that_is_not_finite_is_neither_clipped_nor_remembered_by_zclip(broken, at):
    clip, spared = ZClip(2.5, 0.97, 25), ZClip(2.5, 0.97, 25)
    for norm in norms(at):
        list(clipped_norms(clip, [norm])), list(clipped_norms(spared, [norm]))
    made = parameters([torch.tensor([broken, 2.0])])
    assert not clip(made).clipped
    assert made[0].grad[1].item() == 2.0
    assert clip.state_dict() == spared.state_dict()


@pytest.mark.parametrize("stop", [0, 10, 25, 100, 101, 150])
def test_zclip_resumed_from_json_is_bit_equal(stop):
    given = norms(200)
    first, second = ZClip(2.5, 0.97, 25), ZClip(2.5, 0.97, 25)
    began = list(clipped_norms(first, given[:stop]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert began + list(clipped_norms(second, given[stop:])) == list(clipped_norms(ZClip(2.5, 0.97, 25), given))

"""Clips equal torch's own on every kind of gradient, say what they did, and wait for nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.clip import CLIPS, ClipBoth, ClipNorm, ClipValue, NoClip
from hasten.errors import RecipeError

INF, NAN = math.inf, math.nan
ALL = [NoClip(), ClipNorm(1.0), ClipValue(0.5), ClipBoth(1.0, 0.5)]


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


def test_clips_are_values_under_the_names_of_recipes():
    assert sorted(CLIPS) == ["none", "norm", "norm_and_value", "value"]
    assert CLIPS["norm"](2.0) == ClipNorm(2.0)
    assert repr(ClipBoth(1.0, 0.5)) == "ClipBoth(max_norm=1.0, max_value=0.5)"

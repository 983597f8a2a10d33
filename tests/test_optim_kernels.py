"""One update, three ways to run it: machine code, torch.compile and PyTorch as it is give the same numbers."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hasten.optim import native
from hasten.optim.adam import KERNEL as ADAM
from hasten.optim.ademamix import KERNEL as ADEMAMIX
from hasten.optim.adopt import FIRST
from hasten.optim.adopt import KERNEL as ADOPT
from hasten.optim.kernels import Kernel, Rounding, use
from hasten.optim.mars import KERNEL as MARS
from hasten.optim.mars import SQUARES
from hasten.optim.prodigy import MEASURE, MOVE
from hasten.optim.rmsprop import KERNELS as RMSPROP
from hasten.optim.schedule_free import KERNEL as SCHEDULE_FREE
from hasten.optim.sgd import MOMENTUM, NESTEROV, PLAIN
from hasten.optim.signs import LION_KERNEL, PLAIN_SIGNUM_KERNEL, SIGNUM_KERNEL
from hasten.optim.sophia import ESTIMATE
from hasten.optim.sophia import KERNEL as SOPHIA
from hasten.optim.storage import QUANTUM, empty_packed, mix, mix_number, round_randomly
from hasten.optim.tracing import trace

KERNELS = {
    "adam": ADAM,
    "ademamix": ADEMAMIX,
    "adopt": ADOPT,
    "adopt first": FIRST,
    "lion": LION_KERNEL,
    "mars": MARS,
    "mars squares": SQUARES,
    "prodigy measure": MEASURE,
    "prodigy move": MOVE,
    **{f"rmsprop {key}": kernel for key, kernel in RMSPROP.items()},
    "schedule-free": SCHEDULE_FREE,
    "sgd": PLAIN,
    "sgd momentum": MOMENTUM,
    "sgd nesterov": NESTEROV,
    "signum": SIGNUM_KERNEL,
    "signum plain": PLAIN_SIGNUM_KERNEL,
    "sophia": SOPHIA,
    "sophia estimate": ESTIMATE,
}
# An empty one, one element, less than a block, blocks that do not come out even.
SHAPES = [(0, 4), (1,), (3, 5, 7), (2, 16384), (33000,)]

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="there is no C compiler on this machine")


def tensors(kernel: Kernel, dtype: torch.dtype = torch.float32, state: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    made: dict[str, list[Tensor]] = {}
    for name in kernel.tensors:
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        is_square = name in ("exp_avg_sq", "square_avg", "hessian")
        values = [v.square() + 1.0 if is_square else 0.1 * v if name == "grad_avg" else v for v in values]
        made[name] = [v.to(dtype if name in ("p", "g") else state) for v in values]
    return made


def numbers(kernel: Kernel) -> dict[str, float]:
    return {name: 0.1 + 0.8 * place / len(kernel.scalars) for place, name in enumerate(kernel.scalars)}


def run(kernel: Kernel, path: str, given: dict, rounding: Rounding | None = None, low: list | None = None) -> dict:
    made = {name: [t.clone() for t in values] for name, values in given.items()}
    low = None if low is None else [t.clone() for t in low]
    with use(path):
        sums = kernel(made, numbers(kernel), rounding=rounding or Rounding(), low=low)
    return {**made, "sums": [sums[name] for name in kernel.sums], "low": low or []}


def assert_same(one: dict, other: dict, *, tolerance: float) -> None:
    for name in one:
        for a, b in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code_equals_the_pytorch_form(name):
    given = tensors(KERNELS[name])
    assert_same(run(KERNELS[name], "native", given), run(KERNELS[name], "eager", given), tolerance=1e-6)


@needs_compiler
@pytest.mark.parametrize("name", ["lion", "sgd nesterov", "signum", "sophia estimate"])
def test_updates_without_a_square_root_are_the_same_to_the_bit(name):
    given = tensors(KERNELS[name])
    assert_same(run(KERNELS[name], "native", given), run(KERNELS[name], "eager", given), tolerance=0.0)


@needs_compiler
@pytest.mark.parametrize("name", ["adam", "mars squares"])
def test_torch_compile_equals_the_pytorch_form(name):
    given = tensors(KERNELS[name])
    assert_same(run(KERNELS[name], "compiled", given), run(KERNELS[name], "eager", given), tolerance=1e-6)


@needs_compiler
@pytest.mark.parametrize("name", ["adam", "lion"])
def test_float64_stays_float64(name):
    given = tensors(KERNELS[name], torch.float64, torch.float64)
    assert_same(run(KERNELS[name], "native", given), run(KERNELS[name], "eager", given), tolerance=1e-14)


@needs_compiler
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "kahan"])
def test_bfloat16_weights_round_alike_everywhere(mode):
    given = tensors(LION_KERNEL, torch.bfloat16)
    low = [torch.full_like(p, 1e-4) for p in given["p"]] if mode == "kahan" else None
    one, other = (run(LION_KERNEL, path, given, Rounding(mode, 7), low) for path in ("native", "eager"))
    assert one["p"][4].dtype == torch.bfloat16
    assert_same(one, other, tolerance=0.0)


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads():
    given = tensors(SQUARES)
    given = {name: [torch.randn(300_000, generator=torch.Generator().manual_seed(2))] for name in given}
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(SQUARES, "native", given)["sums"][0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
def test_mixed_formats_and_layouts_go_their_own_ways():
    given = tensors(LION_KERNEL)
    given = {name: [v.clone() for v in values] for name, values in given.items()}
    for name in given:
        given[name] += [torch.arange(12.0).view(3, 4).t(), torch.ones(5)]  # the first is not contiguous
    given["g"][-1] = given["g"][-1].to(torch.bfloat16)
    assert_same(run(LION_KERNEL, "native", given), run(LION_KERNEL, "eager", given), tolerance=0.0)


@needs_compiler
def test_a_number_can_be_one_for_each_tensor():
    given = tensors(MARS)
    shrink = torch.linspace(0.1, 1.0, len(SHAPES), dtype=torch.float64)
    found = []
    for path in ("native", "eager"):
        made = {name: [t.clone() for t in values] for name, values in given.items()}
        with use(path):
            MARS(made, numbers(MARS) | {"shrink": shrink})
        found.append(made)
    assert_same(*found, tolerance=1e-6)
    whole = run(MARS, "native", given)
    assert not torch.equal(whole["exp_avg"][2], found[0]["exp_avg"][2])


@pytest.mark.parametrize("path", ["native", "eager"])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["alike", "mixed"])
def test_lists_with_numbers_of_their_own_equal_calls_of_their_own(path, is_mixed):
    given, halved = tensors(ADAM), {name: value / 2 for name, value in numbers(ADAM).items()}
    lists = [{name: [place + t for t in values] for name, values in given.items()} for place in (0.0, 1.0)]
    if is_mixed:
        lists[1] = {name: [t.double() for t in values] for name, values in lists[1].items()}
    apart = [{name: [t.clone() for t in values] for name, values in each.items()} for each in lists]
    with use(path):
        ADAM.each([(lists[0], numbers(ADAM)), (lists[1], halved)])
        ADAM(apart[0], numbers(ADAM))
        ADAM(apart[1], halved)
    for together, alone in zip(lists, apart, strict=True):
        assert all(torch.equal(a, b) for name in alone for a, b in zip(together[name], alone[name], strict=True))
    assert not torch.equal(apart[0]["p"][4].double(), apart[1]["p"][4].double() - 1.0)


def test_one_number_is_mixed_as_a_tensor_of_it_is():
    for number in (0, 1, 2**31 + 5, 2**32 - 1, 2**32 + 7, 0x9E3779B9 * 3 + 11):
        assert mix_number(number) == int(mix(torch.tensor(number)))


def test_a_function_that_cannot_be_followed_is_no_kernel():
    with pytest.raises(KeyError):
        trace(lambda p: {"p": torch.sin(p)}, ["p"], [])


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@needs_compiler
def test_8bit_state_is_the_same_in_machine_code_and_pytorch():
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 300), (8, 4, 260), (3, 256)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    found = []
    for path in ("native", "eager"):
        made = {"p": [w.clone() for w in weights], "g": [w * 0.1 for w in weights]}
        made["exp_avg"] = [empty_packed(w, is_signed=True) for w in weights]
        with use(path):
            for _ in range(4):
                LION_KERNEL(made, numbers(LION_KERNEL))
        found.append(made)
    for name in ("p", "g"):
        assert all(torch.equal(a, b) for a, b in zip(found[0][name], found[1][name], strict=True))
    for a, b in zip(found[0]["exp_avg"], found[1]["exp_avg"], strict=True):
        # A square root that is rounded differently can move a code by one, once in thousands.
        assert (a.codes.int() - b.codes.int()).abs().max() <= 1
        assert (a.codes != b.codes).float().mean() < 1e-3
        assert torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("is_signed", [True, False])
def test_packing_keeps_every_value_close_and_none_lost(is_signed):
    values = torch.randn(6, 600, generator=torch.Generator().manual_seed(0))
    values = values if is_signed else values.square() + 1e-9
    packed = empty_packed(values, is_signed=is_signed)
    packed.pack(values)
    back = packed.unpack()
    quanta = torch.nn.functional.pad(values, (0, -600 % QUANTUM)).unflatten(-1, (-1, QUANTUM))
    tops = quanta.abs().amax(-1, keepdim=True).expand_as(quanta).flatten(-2)[:, :600]
    assert packed.kind == ("signed8" if is_signed else "unsigned8")
    # Codes are even in the square root (signed) or the fourth root: the next one below or above.
    power, codes = (0.5, 127) if is_signed else (0.25, 255)
    error = ((back.abs() / tops) ** power - (values.abs() / tops) ** power).abs()
    above_zero = back != 0 if is_signed else torch.ones_like(back, dtype=torch.bool)
    assert error[above_zero & (values.abs() / tops > 1e-6)].max() <= 1.0 / codes + 1e-4
    assert torch.equal(back.sign()[above_zero], values.sign()[above_zero])
    if not is_signed:
        assert (back > 0).all()


@pytest.mark.parametrize("is_signed", [True, False])
def test_packing_is_right_on_average_and_a_function_of_its_seed(is_signed):
    values = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    values = values if is_signed else values.square()
    total = torch.zeros_like(values)
    for seed in range(400):
        packed = empty_packed(values, is_signed=is_signed)
        packed.pack(values, seed)
        total += packed.unpack()
    # One code is at most 0.016 of the largest value; 400 draws bring that down to a twentieth.
    assert ((total / 400 - values).abs() / values.abs().max()).max() < 0.004
    again = empty_packed(values, is_signed=is_signed)
    again.pack(values, 399)
    assert torch.equal(again.codes, packed.codes)
    again.pack(values, 398)
    assert not torch.equal(again.codes, packed.codes)


@needs_compiler
def test_an_average_in_8_bits_follows_what_moves_it_by_less_than_a_code():
    kernel = Kernel(lambda g, m: {"m": 0.999 * m + 0.001 * g}, ("g", "m"), ())
    target = torch.rand(16, 256, generator=torch.Generator().manual_seed(0))
    average = empty_packed(target, is_signed=True)
    average.pack(torch.ones(16, 256))
    for step in range(700):
        kernel({"g": [target], "m": [average]}, {}, rounding=Rounding(seed=step * 7919))
    error = average.unpack() - (0.999**700 + (1 - 0.999**700) * target)
    assert error.mean().abs() < 0.01  # rounded to the nearest code, nothing would ever leave 1
    assert error.square().mean().sqrt() < 0.12


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_right_on_average_and_a_function_of_its_seed():
    values = torch.full((20_000,), 1.0 + 2**-9)  # a quarter of the way to the next bfloat16
    rounded = round_randomly(values, seed=5).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded > 1.0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(rounded, round_randomly(values, seed=5).float())
    assert not torch.equal(rounded, round_randomly(values, seed=6).float())
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38])
    assert round_randomly(special, 1)[:2].tolist() == [float("inf"), float("-inf")]
    assert round_randomly(special, 1)[2].isnan()


# --- compiling --------------------------------------------------------------------------------------------------------

ONE_STEP = """
import torch
from hasten.optim import Lion, native
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.tensor([1.0, -1.0, 0.0])
Lion([weight], lr=0.5).step()
print(weight.tolist(), native.compiler())
"""


def one_step(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ONE_STEP], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return done.stdout


def test_without_a_compiler_pytorch_does_it():
    assert one_step(PATH="/nowhere", CC="") == "[0.5, 1.5, 1.0] None\n"


def test_a_compiler_that_fails_is_done_without(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert one_step(CC=str(broken), HASTEN_CACHE=str(tmp_path / "cache")).startswith("[0.5, 1.5, 1.0]")


@needs_compiler
def test_compiled_code_is_kept_where_only_its_owner_writes(tmp_path):
    one_step(HASTEN_CACHE=str(tmp_path))
    libraries = list((tmp_path / "kernels").glob("*.so"))
    assert len(libraries) == 1
    assert not stat.S_IMODE((tmp_path / "kernels").stat().st_mode) & 0o022
    first = libraries[0].stat().st_mtime_ns
    one_step(HASTEN_CACHE=str(tmp_path))
    assert libraries[0].stat().st_mtime_ns == first


@needs_compiler
def test_a_folder_that_others_can_write_is_not_trusted(tmp_path):
    (tmp_path / "kernels").mkdir(mode=0o777)
    (tmp_path / "kernels").chmod(0o777)
    assert one_step(HASTEN_CACHE=str(tmp_path)).startswith("[0.5, 1.5, 1.0]")
    assert not list((tmp_path / "kernels").iterdir())

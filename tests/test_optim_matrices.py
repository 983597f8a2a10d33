"""Rules that see a weight as a matrix: what they make of singular values, blocks, stacks, bases and refreshes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.optim import (
    SOAP,
    Muon,
    NorMuon,
    SOAPMuon,
    eigenbasis,
    exchange,
    matrices,
    muon,
    orthogonal,
    soap,
    soap_muon,
)
from hasten.optim.rule import Rule, Work

RULES = {rule.name: rule for rule in (muon.RULE, muon.NORMUON, soap.RULE, soap_muon.RULE)}
FLOAT32 = {"compute_dtype": "float32"}
# What the shell puts into every group, whatever its rule.
COMMON = {"decay_follows_lr": True, "rounding": "nearest", "seed": 0, "state_format": "float32"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group_of(rule: Rule, **settings: Any) -> dict[str, Any]:
    form = FLOAT32 if "compute_dtype" in rule.settings else {}
    return {**COMMON, **rule.settings, "lr": 1e-2, **form, **settings}


def run(
    rule: Rule,
    weights: list[Tensor],
    *,
    steps: int = 4,
    gradient: Callable[[Tensor, int], Tensor] | None = None,
    **settings,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return the weights and states after `steps` with gradients that depend on the step, the same for equal shapes."""
    group = group_of(rule, **settings)
    params = [weight.clone() for weight in weights]
    states = [rule.init(p, group) for p in params]
    make = gradient or (lambda p, step: noise(*p.shape, seed=step).to(p.dtype))
    for step in range(1, steps + 1):
        grads = [make(p, step) for p in params]
        kept = [g.clone() for g in grads]
        with torch.no_grad():
            rule.update([Work(group, params, grads, states, step)])
        assert all(torch.equal(g, k) for g, k in zip(grads, kept)), "a rule changed a gradient"
    return params, states


def singular_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


# --- orthogonalisation ----------------------------------------------------------------------------------------------


def test_default_singular_values_of_a_gaussian_matrix_are_within_five_percent_of_one() -> None:
    values = singular_values(orthogonal.orthogonalize(noise(256, 512), dtype=torch.float32))
    assert values.min() >= 0.95
    assert values.max() <= 1.05


@pytest.mark.parametrize(("steps", "slope"), [(3, 38), (4, 158), (5, 666), (6, 2806)])
def test_minimax_steps_have_the_documented_slope_and_error(steps: int, slope: float) -> None:
    terms = orthogonal.minimax(steps)
    assert math.prod(a for a, _, _ in terms) == pytest.approx(slope, rel=0.01)
    x = torch.linspace(0.0, 1.0, 100_001, dtype=torch.float64)
    for a, b, c in terms:
        x = a * x + b * x**3 + c * x**5
    # From where it first comes near 1, it never leaves.
    reached = int((x > 0.98 - 1e-3).nonzero()[0])
    assert (x[reached:] - 1).abs().max() <= 0.021
    assert x.min() >= 0.0


@pytest.mark.parametrize("coefficients", orthogonal.METHODS)
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (3, 48, 96), (1, 40), (33, 33)])
def test_gram_form_equals_plain_form(coefficients: str, shape: tuple[int, ...], monkeypatch) -> None:
    matrix = noise(*shape)
    found = []
    for is_gram in (True, False):
        monkeypatch.setattr(orthogonal, "gram_is_cheaper", lambda aspect, steps, answer=is_gram: answer)
        found.append(orthogonal.orthogonalize(matrix, coefficients=coefficients, dtype=torch.float32))
    tolerance = 1e-5 if max(shape) > 1.5 * min(shape[-2:]) else 1e-3
    assert found[0].shape == matrix.shape
    assert (found[0] - found[1]).norm() <= tolerance * found[1].norm()


def test_gram_form_is_taken_where_it_needs_fewer_products() -> None:
    assert not orthogonal.gram_is_cheaper(1.5, 5)
    assert orthogonal.gram_is_cheaper(1.6, 5)
    assert not orthogonal.gram_is_cheaper(100.0, 1)


@pytest.mark.parametrize("coefficients", orthogonal.METHODS)
def test_small_matrices_go_through_together_as_precisely_as_their_singular_values(coefficients: str) -> None:
    # The second is nearly singular; the last two are beyond what counts as small, and of the usual precision.
    shapes = [(24, 8), (8, 8), (8, 32), (1, 5), (5, 1), (64, 64), (64, 512), (65, 65), (64, 513)]
    given = [noise(*shape, seed=place) for place, shape in enumerate(shapes)]
    given[1][:, 7] = given[1][:, :7].sum(-1) + 1e-5 * given[1][:, 7]
    found = [matrix.clone() for matrix in given]
    threads = torch.get_num_threads()
    orthogonal.orthogonalize_all_(found, coefficients=coefficients, steps=5, dtype=torch.float32)
    assert torch.get_num_threads() == threads
    for place, (matrix, result) in enumerate(zip(given, found)):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        order = 4 if coefficients == "minimax" else 2
        x = values / torch.linalg.vector_norm(values, order) / (1.02 if coefficients == "polar_express" else 1.0)
        for a, b, c in orthogonal.tuples(coefficients, 5):
            x = a * x + b * x**3 + c * x**5
        expected = left * x @ right
        assert (result - expected).norm() <= (1e-6 if place < 7 else 2e-4) * expected.norm(), shapes[place]


def test_what_goes_through_together_does_not_change_a_small_matrix() -> None:
    given = [noise(8, columns, seed=columns) for columns in (8, 24, 32, 5, 8, 8, 8, 8, 40)]
    alone, together = ([matrix.clone() for matrix in given] for _ in range(2))
    settings = {"coefficients": "minimax", "steps": 5}
    orthogonal.orthogonalize_all_(together, **settings)
    for matrix in alone:
        orthogonal.orthogonalize_all_([matrix], **settings)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(alone, together))


@pytest.mark.parametrize("span", [1e2, 1e4])
def test_bfloat16_stays_bounded_on_ill_conditioned_matrices(span: float) -> None:
    left, right = torch.linalg.qr(noise(32, 32))[0], torch.linalg.qr(noise(128, 32))[0]
    matrix = left * torch.logspace(0, -math.log10(span), 32) @ right.T
    result = orthogonal.orthogonalize(matrix, dtype=torch.bfloat16)
    assert singular_values(result).max() <= 1.06


@pytest.mark.parametrize("coefficients", orthogonal.METHODS)
def test_zero_and_tiny_matrices_stay_finite(coefficients: str) -> None:
    assert not orthogonal.orthogonalize(torch.zeros(4, 8), coefficients=coefficients).any()
    tiny = orthogonal.orthogonalize(1e-25 * noise(16, 64), coefficients=coefficients, dtype=torch.float32)
    assert singular_values(tiny).max() <= 1.2


def test_size_of_a_matrix_does_not_matter() -> None:
    one, other = (orthogonal.orthogonalize(size * noise(16, 64), dtype=torch.float32) for size in (1e-12, 1e12))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("method", "steps", "named"), [("svd", 5, "minimax"), ("quintic", 0, "ns_steps is 0")])
def test_unknown_orthogonalization_is_refused(method: str, steps: int, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        orthogonal.tuples(method, steps)


# --- Muon and NorMuon -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["muon", "normuon", "soap", "soap_muon"])
def test_split_weight_equals_separate_matrices(name: str) -> None:
    whole, sizes = noise(48, 20), [24, 12, 12]
    gradient = {step: noise(48, 20, seed=step) for step in range(1, 5)}
    (fused,), _ = run(RULES[name], [whole], split_sizes=sizes, gradient=lambda p, step: gradient[step])
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        (alone,), _ = run(RULES[name], [whole[rows]], gradient=lambda p, step, rows=rows: gradient[step][rows])
        assert torch.allclose(fused[rows], alone, atol=1e-6)
        start += size


@pytest.mark.parametrize("name", ["muon", "normuon", "soap", "soap_muon"])
def test_weight_split_by_columns_equals_its_transpose_split_by_rows(name: str) -> None:
    whole, sizes = noise(20, 48), [24, 12, 12]
    gradient = {step: noise(20, 48, seed=step) for step in range(1, 5)}
    (fused,), _ = run(RULES[name], [whole], split_sizes=sizes, split_dim=1, gradient=lambda p, step: gradient[step])
    for start, size in ((0, 24), (24, 12), (36, 12)):
        columns = slice(start, start + size)
        (alone,), _ = run(
            RULES[name], [whole[:, columns]], gradient=lambda p, step, columns=columns: gradient[step][:, columns]
        )
        assert torch.allclose(fused[:, columns], alone, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "normuon", "soap", "soap_muon"])
def test_stack_of_experts_equals_separate_matrices(name: str) -> None:
    stack = noise(3, 8, 20)
    (together,), _ = run(RULES[name], [stack])
    for expert in range(3):
        (alone,), _ = run(
            RULES[name], [stack[expert]], gradient=lambda p, step, n=expert: noise(3, 8, 20, seed=step)[n]
        )
        assert torch.allclose(together[expert], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["muon", "normuon", "soap", "soap_muon"])
def test_convolution_equals_its_flattened_matrix(name: str) -> None:
    weight = noise(8, 3, 2, 2)
    (flat,), _ = run(RULES[name], [weight.flatten(1)])
    (channels_last,), _ = run(
        RULES[name],
        [weight.to(memory_format=torch.channels_last)],
        gradient=lambda p, step: noise(8, 12, seed=step).view(8, 3, 2, 2),
    )
    assert torch.allclose(channels_last.flatten(1), flat, atol=1e-6)
    (three,), _ = run(
        RULES[name],
        [weight.flatten(2)],
        as_matrix="flatten",
        gradient=lambda p, step: noise(8, 12, seed=step).view(8, 3, 4),
    )
    assert torch.allclose(three.flatten(1), flat, atol=1e-6)


@pytest.mark.parametrize(
    ("adjust_lr", "shape", "scale"),
    [
        ("match_rms_adamw", (8, 32), 0.2 * math.sqrt(32)),
        ("match_rms_adamw", (32, 8), 0.2 * math.sqrt(32)),
        ("original", (8, 32), 1.0),
        ("original", (32, 8), 2.0),
        ("rms_to_rms", (8, 32), 0.5),
        ("rms_to_rms", (32, 8), 2.0),
    ],
)
def test_step_has_the_scale_of_its_adjustment(adjust_lr: str, shape: tuple[int, int], scale: float) -> None:
    weight = noise(*shape)
    (after,), _ = run(muon.RULE, [weight], steps=1, adjust_lr=adjust_lr, weight_decay=0.0)
    values = singular_values(weight - after) / 1e-2
    assert torch.allclose(values, torch.full_like(values, scale), rtol=0.03)


def test_decay_is_not_scaled_and_comes_from_the_weight_before_the_step() -> None:
    weight = noise(8, 32)
    still = {"gradient": lambda p, step: torch.zeros_like(p), "steps": 1, "weight_decay": 0.5}
    (after,), _ = run(muon.RULE, [weight], **still)
    assert torch.allclose(after, weight * (1 - 1e-2 * 0.5))


def test_normuon_rows_are_equal_in_size_and_keep_the_norm() -> None:
    weight = noise(64, 16)
    uneven = torch.logspace(0, -2, 64).unsqueeze(1)
    settings = {"steps": 1, "weight_decay": 0.0, "gradient": lambda p, step: uneven * noise(64, 16, seed=step)}
    (plain,), _ = run(muon.RULE, [weight], **settings)
    (normed,), _ = run(muon.NORMUON, [weight], **settings)
    rows = (normed - weight).norm(dim=1)
    assert rows.max() <= 1.001 * rows.min()
    assert (plain - weight).norm(dim=1).max() > 2 * (plain - weight).norm(dim=1).min()
    assert torch.allclose((normed - weight).norm(), (plain - weight).norm(), rtol=1e-4)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (5, 7)])
def test_any_matrix_shape_moves_and_stays_finite(name: str, shape: tuple[int, int]) -> None:
    (after,), _ = run(RULES[name], [noise(*shape)])
    assert after.isfinite().all()
    assert (after != noise(*shape)).any()


@pytest.mark.parametrize("name", list(RULES))
def test_bfloat16_weights_have_float32_state_and_move(name: str) -> None:
    (after,), (state,) = run(RULES[name], [noise(8, 32).bfloat16()], lr=0.1)
    assert after.dtype == torch.bfloat16
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert (after != noise(8, 32).bfloat16()).any()


@pytest.mark.parametrize("name", list(RULES))
def test_learning_rate_zero_changes_nothing_but_state(name: str) -> None:
    (after,), _ = run(RULES[name], [noise(8, 32)], lr=0.0, gradient=lambda p, step: torch.zeros_like(p))
    assert torch.equal(after, noise(8, 32))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"adjust_lr": "adam"}, "adjust_lr"),
        ({"compute_dtype": "float8"}, "compute_dtype"),
        ({"as_matrix": "stack"}, "as_matrix"),
        ({"orthogonalization": "qintic"}, "did you mean 'quintic'"),
        ({"ns_steps": 0}, "ns_steps"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    muon.check(group_of(muon.RULE))
    with pytest.raises(RecipeError, match=named):
        muon.check(group_of(muon.RULE, **settings))


@pytest.mark.parametrize("kind", [Muon, NorMuon, SOAPMuon])
@pytest.mark.parametrize("fastest", ["bf16", "float32"])
def test_first_step_settles_the_number_format_for_good(
    kind: type, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "fastest_dtype", lambda device: orthogonal.DTYPES[fastest])
    weight = torch.nn.Parameter(noise(8, 12))
    first = kind([weight])
    assert first.param_groups[0]["compute_dtype"] == "auto"
    weight.grad = noise(8, 12, seed=1)
    first.step()
    assert first.param_groups[0]["compute_dtype"] == fastest
    monkeypatch.setattr(muon, "fastest_dtype", None)
    resumed = kind([weight])
    resumed.load_state_dict(first.state_dict())
    resumed.step()
    assert resumed.param_groups[0]["compute_dtype"] == fastest


def test_cpus_of_several_processes_agree_on_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "fastest_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(muon.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(muon.dist, "get_world_size", lambda: 2)
    group = group_of(muon.RULE, compute_dtype="auto")
    muon.settle_dtype(Work(group, [noise(4, 4)], [], [], 1))
    assert group["compute_dtype"] == "float32"


@pytest.mark.parametrize(("sizes", "dim"), [([4, 5], None), ([8, 0], 0), ([4, 4], 1)])
def test_split_sizes_that_do_not_fit_are_refused(sizes: list[int], dim: int | None) -> None:
    with pytest.raises(RecipeError, match="split_sizes"):
        muon.init(noise(8, 32), group_of(muon.RULE, split_sizes=sizes, split_dim=dim))
    with pytest.raises(RecipeError, match="no side of a matrix"):
        muon.init(noise(2, 8, 32), group_of(muon.RULE, split_sizes=[1, 1], split_dim=0))


def test_owners_and_rounds_share_the_work() -> None:
    owners = exchange.balanced([8.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0], 3)
    loads = [sum(c for c, o in zip([8.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0], owners) if o == rank) for rank in range(3)]
    assert loads == [8.0, 8.0, 8.0]
    found = exchange.rounds([6, 6, 6, 2], [3.0, 2.0, 1.0, 4.0], size=2, limit=4)
    assert found == [[3, 0], [1], [2]]
    assert [matrices.Part((2, 6), (0, 3), 0).of(torch.ones(4, 3), first).shape[0] for first in (0, 4, 8)] == [2, 2, 0]


# --- SOAP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"one_sided": True}, {"kl": True}, {"split_sizes": [16, 16]}])
def test_soap_bases_stay_orthonormal(settings: dict[str, Any]) -> None:
    _, (state,) = run(soap.RULE, [noise(32, 20)], steps=30, precondition_frequency=3, **settings)
    bases = [value for name, value in state.items() if name.startswith("basis")]
    assert bases
    for basis in bases:
        assert torch.allclose(basis.mT @ basis, torch.eye(len(basis)), atol=1e-5)


def test_spread_refresh_equals_unspread_at_frequency_one() -> None:
    weights = [noise(12, 8), noise(8, 12), noise(6, 6)]
    spread, _ = run(soap.RULE, weights, steps=10, precondition_frequency=1, spread_refresh=True)
    together, _ = run(soap.RULE, weights, steps=10, precondition_frequency=1, spread_refresh=False)
    assert all(torch.equal(one, other) for one, other in zip(spread, together))


def test_spread_refresh_shares_the_work_among_the_steps_of_a_period() -> None:
    params = [noise(*shape) for shape in [(48, 16), (16, 16), (64, 16), (16, 64)] * 12]
    slots = soap.refresh_slots(params, group_of(soap.RULE))
    loads = [sum(sum(n**3 for n in p.shape) for p, s in slots.items() if s == slot) for slot in range(10)]
    assert max(loads) <= 1.5 * sum(loads) / 10
    assert slots == soap.refresh_slots(params, group_of(soap.RULE))
    assert set(soap.refresh_slots(params, group_of(soap.RULE, spread_refresh=False)).values()) == {0}


def test_first_gradient_only_gives_the_bases() -> None:
    (after,), (state,) = run(soap.RULE, [noise(12, 8)], steps=1)
    assert torch.equal(after, noise(12, 8))
    g = noise(12, 8, seed=1)
    turned = state["basis_rows"].T @ (g @ g.T) @ state["basis_rows"]
    assert torch.allclose(turned, torch.diag(turned.diagonal()), atol=1e-4 * turned.max())
    assert not state["exp_avg"].any()


def test_one_sided_has_only_the_basis_of_the_shorter_side() -> None:
    for shape, side in (((32, 8), "columns"), ((8, 32), "rows"), ((8, 8), "rows")):
        state = soap.init(noise(*shape), group_of(soap.RULE, one_sided=True))
        assert set(state) == {"exp_avg", "exp_avg_sq", "early", f"statistic_{side}", f"basis_{side}"}
        assert state[f"basis_{side}"].shape == (8, 8)
    wide = soap.init(noise(32, 128), group_of(soap.RULE, one_sided=True))
    assert sum(4 * value.numel() for value in wide.values()) <= 12 * 32 * 128


def test_dimensions_above_the_limit_have_no_basis() -> None:
    state = soap.init(noise(32, 8), group_of(soap.RULE, max_precond_dim=31))
    assert {"statistic_columns", "basis_columns"} == set(state) - {"exp_avg", "exp_avg_sq", "early"}


@pytest.mark.parametrize("size", [24, 300])
def test_banded_statistic_equals_the_whole_one(size: int) -> None:
    banded, whole = torch.zeros(size, size), torch.zeros(size, size)
    for step in range(3):
        factor = noise(size, 40, seed=step)
        eigenbasis.add_outer_(banded, factor, beta=0.9)
        whole.lerp_(factor @ factor.T, 0.1)
    assert torch.allclose(eigenbasis.complete_(banded), whole, atol=1e-5)


def test_next_basis_approaches_sorted_eigenvectors() -> None:
    true = torch.linalg.qr(noise(16, 16)).Q
    statistic = true * torch.logspace(0, -3, 16) @ true.T
    basis = torch.linalg.qr(noise(16, 16, seed=1)).Q
    for _ in range(60):
        basis, _ = eigenbasis.next_basis(statistic, basis)
    assert torch.allclose((basis.T @ true).abs(), torch.eye(16), atol=1e-2)


def correlated(size: int, orders: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the mean of 4 `size` outer products, eigenvalues over `orders` of ten, and the basis of three quarters."""
    directions = torch.linalg.qr(noise(size, size, seed=seed)).Q * torch.logspace(0, -orders / 2, size)
    factor = directions @ noise(size, 4 * size, seed=seed + 1)
    earlier = factor[:, : 3 * size]
    basis = torch.linalg.eigh((earlier @ earlier.T).double()).eigenvectors.flip(-1).float()
    return factor @ factor.T, basis


@pytest.mark.parametrize("orders", [0.0, 2.0, 4.0])
def test_large_bases_are_those_of_reflections(orders: float) -> None:
    statistic, basis = correlated(300, orders)
    found, order = eigenbasis.next_basis(statistic, basis)
    assert torch.allclose(found.T @ found, torch.eye(300), atol=2e-5)
    expected = torch.linalg.qr((statistic @ basis).double()[:, order]).Q
    assert torch.allclose((found.double() * expected).sum(0).abs(), torch.ones(300).double(), atol=1e-4)


def test_products_alone_make_the_large_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "householder_product", None)
    eigenbasis.next_basis(*correlated(300, 2.0))


@pytest.mark.parametrize("rank", [0, 1, 100])
def test_large_bases_of_few_gradients_are_orthonormal(rank: int) -> None:
    factor = noise(300, rank)
    basis = eigenbasis.first_basis(factor @ factor.T)
    for _ in range(3):
        basis, _ = eigenbasis.next_basis(factor @ factor.T, basis)
        assert torch.allclose(basis.T @ basis, torch.eye(300), atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_change_of_bases_turns_the_first_moment_with_them(shape: tuple[int, int]) -> None:
    group = group_of(soap.RULE, precondition_frequency=2, weight_decay=0.0)
    params, state = [noise(*shape)], soap.init(noise(*shape), group)
    average = torch.zeros(shape)
    for step in range(1, 6):
        gradient = noise(*shape, seed=step)
        with torch.no_grad():
            soap.RULE.update([Work(group, params, [gradient], [state], step)])
        if step > 1:
            average.lerp_(gradient, 0.05)
            assert torch.allclose(state["basis_rows"] @ state["exp_avg"] @ state["basis_columns"].T, average, atol=1e-6)


def test_when_bases_change_stays_with_the_parameter() -> None:
    """Whatever other parameters have no gradient at a step, and though modified steps are those of copies."""
    for more in ({}, {"cautious": True}):
        params = [torch.nn.Parameter(noise(*shape)) for shape in [(16, 16), (8, 12), (12, 8), (10, 10)]]
        optimizer = SOAP(params, precondition_frequency=4, **more)
        slots = soap.refresh_slots(params, optimizer.param_groups[0])
        assert set(slots.values()) == {0, 1, 2, 3}
        for step in range(1, 10):
            before = [optimizer.state[p]["basis_rows"].clone() if p in optimizer.state else None for p in params]
            for number, p in enumerate(params):
                p.grad = None if number == step % 3 and step > 1 else noise(*p.shape, seed=step)
            optimizer.step()
            for p, basis in zip(params, before):
                if p.grad is not None and basis is not None:
                    updates = int(optimizer.state[p]["step"]) - 1
                    is_due = (updates + slots[p]) % 4 == 0
                    assert torch.equal(optimizer.state[p]["basis_rows"], basis) != is_due


def test_without_bases_soap_is_adam_that_skips_a_step() -> None:
    weight = noise(12, 8)
    (ours,), _ = run(soap.RULE, [weight], steps=5, max_precond_dim=1, weight_decay=0.0, eps=1e-12)
    theirs = torch.nn.Parameter(weight.clone())
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.95, 0.95), eps=1e-12)
    for step in range(2, 6):
        theirs.grad = noise(12, 8, seed=step)
        adam.step()
    assert torch.allclose(ours, theirs.detach(), atol=1e-6)


def test_kl_statistics_are_weighted_by_the_other_side() -> None:
    beta, group = 0.95, group_of(soap.RULE, kl=True)
    _, (before,) = run(soap.RULE, [noise(6, 4)], steps=1, kl=True)
    _, (after,) = run(soap.RULE, [noise(6, 4)], steps=2, kl=True)
    g, right, left = noise(6, 4, seed=2), before["basis_columns"], before["basis_rows"]
    first = soap.KL_FIRST_EIGENVALUE
    assert torch.allclose(before["statistic_rows"], 0.05 * noise(6, 4, seed=1) @ noise(6, 4, seed=1).T / 4, atol=1e-6)
    expected = beta * before["statistic_rows"] + (1 - beta) / 4 * (g @ right / first @ right.T @ g.T)
    assert torch.allclose(after["statistic_rows"], expected, atol=1e-5)
    mean = ((left.T @ g @ right) ** 2 / first).mean(1)
    assert torch.allclose(after["eigenvalues_rows"], beta * first + (1 - beta) * mean, atol=1e-5)
    assert group["kl"]


def test_soap_muon_steps_are_orthogonal() -> None:
    weight = noise(16, 64)
    states, group = [soap.init(weight, group_of(soap_muon.RULE))], group_of(soap_muon.RULE, weight_decay=0.0)
    params = [weight.clone()]
    for step in range(1, 4):
        before = params[0].clone()
        with torch.no_grad():
            soap_muon.RULE.update([Work(group, params, [noise(16, 64, seed=step)], states, step)])
    values = singular_values(before - params[0]) / (1e-2 * 0.2 * 8)
    assert torch.allclose(values, torch.ones_like(values), atol=0.03)

"""The plan of an optimizer: a table of what happens to each parameter, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.optim.groups import parameter_groups
from hasten.optim.plan import Plan, matrices_of, muon_operations, plan, soap_operations


def float32_pair(parameter: Tensor, group: dict[str, Any]) -> int:
    return 8 * parameter.numel() * (group["rule"] != "muon") + 4 * parameter.numel() * (group["rule"] == "muon")


def plan_of(model: nn.Module, tokens: int | None = None, **settings: Any) -> Plan:
    named = {parameter: name for name, parameter in model.named_parameters()}
    return plan(parameter_groups(model, weight_decay=0.1, **settings), named, float32_pair, tokens)


def blocks(count: int, width: int = 8) -> nn.ModuleDict:
    layers = [nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width)) for _ in range(count)]
    return nn.ModuleDict({"embed": nn.Embedding(20, width), "layers": nn.ModuleList(layers)})


def test_a_plan_prints_as_a_table_with_repeated_layers_together():
    text = str(plan_of(blocks(12), rule="muon", overrides={"layers.3.1.weight": {"lr_scale": 0.5}}))
    assert text.splitlines() == [
        "parameter               shape  group                    rule   decay  lr scale  state",
        "-" * 87,
        "layers.*.1.weight  x11  8x8    matrices                 muon   0.1    1         2.8 KiB",
        "layers.3.1.weight       8x8    matrices (lr_scale=0.5)  muon   0.1    0.5       256 B",
        "embed.weight            20x8   embeddings               adamw  0      1         1.2 KiB",
        "layers.*.0.weight  x12  8      vectors                  adamw  0      1         768 B",
        "layers.*.1.bias    x12  8      vectors                  adamw  0      1         768 B",
        "-" * 87,
        "11 tensors              704    matrices                 muon   0.1    1         2.8 KiB",
        "1 tensor                64     matrices (lr_scale=0.5)  muon   0.1    0.5       256 B",
        "1 tensor                160    embeddings               adamw  0      1         1.2 KiB",
        "24 tensors              192    vectors                  adamw  0      1         1.5 KiB",
        "37 tensors              1,120  total                                            5.8 KiB",
    ]


def test_a_plan_has_a_row_for_every_parameter_and_adds_up_their_state():
    model = blocks(2)
    made = plan_of(model)
    assert sorted(row.name for row in made.rows) == sorted(name for name, _ in model.named_parameters())
    assert made.state_bytes == 8 * sum(parameter.numel() for parameter in model.parameters())
    assert {row.name: row.shape for row in made.rows}["layers.1.1.weight"] == (8, 8)
    with pytest.raises(AttributeError):
        made.rows = ()


def test_experts_of_several_layers_come_together():
    experts = [nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3)) for _ in range(2)]
    assert "layers.*.*.weight  x6" in str(plan_of(nn.ModuleDict({"layers": nn.ModuleList(experts)})))


def test_groups_of_any_optimizer_can_be_planned():
    scalar, weight = torch.zeros(()), torch.zeros(3, 2)
    made = plan([{"params": [scalar, weight], "lr": 0.1}], {weight: "w"}, lambda parameter, group: 0)
    assert [(row.name, row.group, row.rule, row.lr_scale) for row in made.rows] == [
        ("group 0[0]", "group 0", "", 1.0),
        ("w", "group 0", "", 1.0),
    ]
    assert "scalar" in str(made)


def test_nothing_to_plan_prints_a_heading_and_a_total():
    assert len(str(plan([], {}, lambda parameter, group: 0)).splitlines()) == 4


@pytest.mark.parametrize(
    ("shape", "group", "expected"),
    [
        ((6, 4), {}, [(1, 6, 4)]),
        ((6, 4), {"split_sizes": None, "split_dim": -2}, [(1, 6, 4)]),
        ((6, 4), {"split_sizes": (4, 2), "split_dim": -2}, [(1, 4, 4), (1, 2, 4)]),
        ((4, 6), {"split_sizes": (4, 2), "split_dim": -1}, [(1, 4, 4), (1, 4, 2)]),
        ((8, 6, 4), {}, [(8, 6, 4)]),
        ((3, 8, 4), {"split_sizes": (4, 4), "split_dim": -2}, [(3, 4, 4), (3, 4, 4)]),
        ((8, 6, 4), {"as_matrix": "flatten"}, [(1, 8, 24)]),
        ((8, 2, 3, 3), {"split_sizes": (4, 4)}, [(1, 4, 18), (1, 4, 18)]),
        ((5,), {}, []),
        ((), {}, []),
    ],
)
def test_a_matrix_rule_sees_these_matrices(shape, group, expected):
    assert matrices_of(torch.empty(shape, device="meta"), group) == expected


# Twelve layers of width 384: query-key-value in one, its projection, up and down.
GPT = [(1152, 384), (384, 384), (1536, 384), (384, 1536)] * 12


def test_operations_are_those_counted_by_hand():
    assert muon_operations(16, 16, {}) == 5 * 6 * 16**3
    assert muon_operations(16, 16, {"ns_steps": 3}) == 3 * 6 * 16**3
    assert muon_operations(16, 64, {}) == muon_operations(64, 16, {}) == 2 * (17 + 8) * 16**3  # by its Gram matrix
    assert sum(muon_operations(*shape, {}) for shape in GPT) == pytest.approx(120e9, rel=0.01)
    without_refresh = {"precondition_frequency": 10**9}
    assert sum(soap_operations(*shape, without_refresh) for shape in GPT) == pytest.approx(220e9, rel=0.01)
    assert sum(soap_operations(*shape, {}) for shape in GPT) == pytest.approx(220e9 + 54.4e9, rel=0.01)
    one_sided = without_refresh | {"one_sided": True}
    assert sum(soap_operations(*shape, one_sided) for shape in GPT) == pytest.approx(49e9, rel=0.01)
    assert soap_operations(64, 16, {"max_precond_dim": 63}) == soap_operations(16, 64, {"one_sided": True})
    assert soap_operations(64, 16, {"max_precond_dim": 15}) == 0


@pytest.mark.parametrize("rule", ["muon", "normuon", "soap", "soap_muon"])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_warning_comes_where_a_matrix_rule_takes_more_than_a_tenth_of_a_step(rule, per_token):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    # For square matrices Muon takes 5 d / B of a step of B tokens.
    operations = 30 * 16**3 * ("muon" in rule) + (12 + 1) * 16**3 * ("soap" in rule)
    boundary = operations / (0.1 * 6 * 16**2)
    assert rule != "muon" or boundary == pytest.approx(50 * 16)
    tokens = int(boundary) + (-1 if per_token else 1)
    made = plan_of(model, tokens, rule=rule)
    if per_token:
        assert len(made.warnings) == 1
        assert made.warnings[0].startswith(f"{rule} computes ")
        assert f"10% of what {tokens} tokens take to train on" in made.warnings[0]
        assert str(made).endswith(f"\nwarning: {made.warnings[0]}")
    else:
        assert made.warnings == ()


def test_elementwise_rules_and_unknown_batches_are_not_warned_about():
    assert plan_of(blocks(2), 1, rule="lion").warnings == ()
    assert plan_of(blocks(2), None, rule="muon").warnings == ()


def test_an_embedding_is_trained_without_products_unless_it_is_the_head():
    untied = nn.ModuleDict({"embed": nn.Embedding(640, 16), "layer": nn.Linear(16, 16), "head": nn.Linear(16, 640)})
    tied = nn.ModuleDict({"embed": nn.Embedding(640, 16), "layer": nn.Linear(16, 16)})
    operations, weights = 30 * 16**3, 16 * 16 + 16 * 640
    for model in (untied, tied):
        boundary = operations / (0.1 * 6 * weights)
        assert plan_of(model, int(boundary), rule="muon").warnings
        assert not plan_of(model, int(boundary) + 1, rule="muon").warnings

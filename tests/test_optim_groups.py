"""Parameter groups are read off the module tree; optimizers by name take them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hasten.errors import RecipeError
from hasten.model import SIZES, Decoder, ModelConfig
from hasten.optim import OPTIMIZERS, optimizer, parameter_groups


def names(model: nn.Module) -> dict[str, list[str]]:
    return {group["name"]: group["parameter_names"] for group in parameter_groups(model, weight_decay=0.1)}


def decoder(*, tied: bool) -> Decoder:
    return Decoder(ModelConfig(**SIZES["nano"] | {"tied": tied, "num_layers": 1}, vocab_size=64, seq_len=8), seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_the_decoder_is_in_exactly_one_group(tied):
    model = decoder(tied=tied)
    grouped = [p for group in parameter_groups(model, weight_decay=0.1) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


def test_matrices_and_an_untied_head_decay_while_embedding_and_norms_do_not():
    model = decoder(tied=False)
    groups = {group["name"]: group for group in parameter_groups(model, weight_decay=0.3)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.3,
        "embeddings": 0.0,
        "vectors": 0.0,
    }
    assert groups["embeddings"]["parameter_names"] == ["model.embed_tokens.weight"]
    assert "lm_head.weight" in groups["matrices"]["parameter_names"]
    assert all("norm" in name for name in groups["vectors"]["parameter_names"])
    assert len(groups["matrices"]["params"]) == 8


def test_a_tied_head_is_an_embedding_once():
    groups = names(decoder(tied=True))
    assert groups["embeddings"] == ["model.embed_tokens.weight"]
    assert len(groups["matrices"]) == 7


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_a_transformers_llama_is_in_the_group_of_its_kind(tied):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads))
    groups = parameter_groups(model, weight_decay=0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    assert names(model)["embeddings"] == ["model.embed_tokens.weight"]
    assert all("norm" in name for name in names(model)["vectors"])
    assert ("lm_head.weight" in names(model)["matrices"]) == (not tied)


def test_a_head_registered_before_the_embedding_it_shares_is_still_an_embedding():
    model = nn.ModuleDict({"head": nn.Linear(4, 10, bias=False), "embed": nn.Embedding(10, 4)})
    model["head"].weight = model["embed"].weight
    assert names(model) == {"embeddings": ["head.weight"]}


def test_a_norm_over_two_dimensions_does_not_decay():
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.Flatten(), nn.Linear(12, 2))
    assert names(model) == {"matrices": ["2.weight"], "vectors": ["0.weight", "0.bias", "2.bias"]}


def test_the_kind_comes_from_the_module_and_not_from_the_name():
    class Misnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_norm_bias = nn.Linear(3, 3, bias=False)
            self.proj = nn.Embedding(3, 3)

    assert names(Misnamed()) == {"matrices": ["embed_norm_bias.weight"], "embeddings": ["proj.weight"]}


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert names(model) == {"matrices": ["1.weight"], "vectors": ["1.bias"]}
    with pytest.raises(RecipeError, match="no parameter to train"):
        parameter_groups(model.requires_grad_(False), weight_decay=0.1)


def test_two_parameters_of_the_same_memory_are_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = nn.Parameter(model["embed"].weight.data)
    with pytest.raises(RecipeError, match=r"embed\.weight and head\.weight share"):
        parameter_groups(model, weight_decay=0.1)


def test_groups_hold_the_masters():
    model = nn.Linear(2, 2)
    masters = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    groups = parameter_groups(model, weight_decay=0.1, master=masters.__getitem__)
    assert {p for group in groups for p in group["params"]} == set(masters.values())


def test_adamw_equals_torchs_reference_form_over_many_steps():
    ours, theirs = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    fast = optimizer(ours, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    matrices, vectors = [[p for p in theirs.parameters() if (p.ndim > 1) is big] for big in (True, False)]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        for model, stepper in ((ours, fast), (theirs, plain)):
            stepper.zero_grad()
            model(inputs).square().mean().backward()
            stepper.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_adamw_is_fused_on_the_cpu():
    assert optimizer(nn.Linear(2, 2), lr=1e-3).defaults["fused"] is True
    assert optimizer(nn.Linear(2, 2).double(), lr=1e-3).defaults["fused"] is True


def test_a_parameter_without_a_gradient_is_left_alone():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    before = copy.deepcopy(model.state_dict())
    adamw = optimizer(model, lr=0.1)
    model[0](torch.ones(1, 2)).sum().backward()
    adamw.step()
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[1].weight, before["1.weight"])
    assert torch.equal(model[1].bias, before["1.bias"])


def test_groups_remember_the_peak_rate():
    assert {group["initial_lr"] for group in optimizer(nn.Linear(2, 2), lr=0.25).param_groups} == {0.25}


@pytest.mark.parametrize(
    "setting",
    [
        *({"lr": value} for value in (0.0, -1.0, float("nan"), float("inf"))),
        *({"weight_decay": value} for value in (-0.1, float("nan"), float("inf"))),
        *({"betas": value} for value in ((0.9, 1.0), (-0.1, 0.9), (0.9,))),
        *({"eps": value} for value in (-1e-8, float("inf"))),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(setting):
    with pytest.raises(RecipeError, match=f"optimizer.{next(iter(setting))}"):
        optimizer(nn.Linear(2, 2), **{"lr": 1e-3} | setting)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'adamw'"):
        optimizer(nn.Linear(2, 2), "adam", lr=1e-3)
    with pytest.raises(RecipeError, match="did you mean 'betas'"):
        optimizer(nn.Linear(2, 2), lr=1e-3, beta=(0.9, 0.95))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_saved_state_exactly(name):
    def train(model: nn.Module, stepper: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            stepper.zero_grad()
            model(torch.ones(2, 3)).square().mean().backward()
            stepper.step()

    whole = nn.Linear(3, 2)
    first = copy.deepcopy(whole)
    train(whole, optimizer(whole, name, lr=1e-2), 7)
    stepper = optimizer(first, name, lr=1e-2)
    train(first, stepper, 3)
    second = copy.deepcopy(first)
    resumed = optimizer(second, name, lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    train(second, resumed, 4)
    assert torch.equal(second.weight, whole.weight)

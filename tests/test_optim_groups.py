"""Parameter groups are read off the module tree; optimizers by name take them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import RecipeError
from hasten.model import SIZES, Decoder, ModelConfig
from hasten.optim import OPTIMIZERS, RULES, optimizer
from hasten.optim.groups import MATRIX_RULES, check_complete, parameter_groups
from hasten.optim.kinds import COLUMNS, KINDS, ROWS, Kind, kinds_of
from hasten.optim.matrices import SETTINGS, matrix_shape, parts


def names(model: nn.Module, **settings: object) -> dict[str, list[str]]:
    groups = parameter_groups(model, weight_decay=0.1, **settings)
    return {group["name"]: group["parameter_names"] for group in groups}


def decoder(*, tied: bool) -> Decoder:
    return Decoder(ModelConfig(**SIZES["nano"] | {"tied": tied, "num_layers": 1}, vocab_size=64, seq_len=8), seed=0)


# --- models of all sorts --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """As in nanoGPT: one projection for query, key and value; `kv_heads` fewer keys and values than queries."""

    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int | None = None, *, counts: bool = True) -> None:
        super().__init__()
        kv_width = width // heads * (kv_heads or heads)
        self.c_attn = nn.Linear(width, width + 2 * kv_width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        if counts:
            self.n_head = heads


class FusedMLP(nn.Module):
    def __init__(self, width: int = 16, inner: int = 40) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(16), attention, nn.LayerNorm(16), mlp


class NanoGPT(nn.Module):
    def __init__(self, *, tied: bool = False, vocab: int = 65, make_mlp: Callable[[], nn.Module] = FusedMLP) -> None:
        super().__init__()
        layers = nn.ModuleList(Block(Attention(), make_mlp()) for _ in range(2))
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(vocab, 16), "wpe": nn.Embedding(256, 16), "h": layers, "ln_f": nn.LayerNorm(16)}
        )
        self.lm_head = nn.Linear(16, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight


class FlatBlock(nn.Module):
    """All projections of a block in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.fc1, self.fc2 = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(16, 16, bias=False), nn.Linear(24, 32, bias=False)
        self.to_out = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Dropout(0.0))
        self.heads = 4


class SeparateAttention(nn.Module):
    """Queries come with a gate of their size, twice the width: not a fused query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, width, bias=False) for width in (32, 8, 8))
        self.o = nn.Linear(16, 16, bias=False)
        self.num_heads, self.num_key_value_groups = 4, 2


class LatentAttention(nn.Module):
    """As in DeepSeek: keys without positions and values come from a small latent, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv_a, self.kv_b = (nn.Linear(*sizes, bias=False) for sizes in ((16, 24), (16, 12), (8, 32)))
        self.o = nn.Linear(16, 16, bias=False)
        self.num_heads, self.head_dim = 4, 4


class ListedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 6, bias=False)
        self.experts = nn.ModuleList(FusedMLP() for _ in range(6))
        self.shared = FusedMLP()
        self.shared_gate = nn.Linear(16, 1, bias=False)


class StackedExperts(nn.Module):
    """Everything in parameters of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(6, 16))
        self.up = nn.Parameter(torch.randn(6, 40, 16))
        self.down = nn.Parameter(torch.randn(6, 16, 40))


class BiasedStacks(nn.Module):
    """Matrices as (in, out), as in GPT-OSS and Llama 4; a bias for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 16, 80))
        self.up_bias = nn.Parameter(torch.randn(6, 80))
        self.down = nn.Parameter(torch.randn(6, 40, 16))
        self.down_bias = nn.Parameter(torch.randn(6, 16))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 6), BiasedStacks()


class HeadNorm(nn.Module):
    """A gain for each head, as in Cohere's models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4, 8)), 1e-6


class LinearWithEpsilon(nn.Linear):
    """Normalises what it reads, and is no norm."""

    def __init__(self) -> None:
        super().__init__(4, 8, bias=False)
        self.eps = 1e-6


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.randn(8, 4))
        self.A_log._no_weight_decay = True


class StateSpace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.conv = nn.Parameter(torch.randn(32, 8)), nn.Conv1d(32, 32, 4, groups=32, bias=False)
        self.in_proj, self.out_proj = nn.Linear(16, 64, bias=False), nn.Linear(32, 16, bias=False)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 16, 4, bias=False)
        self.positions, self.start = nn.Parameter(torch.randn(1, 9, 16)), nn.Parameter(torch.randn(1, 1, 16))


class Misnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_norm_bias = nn.Linear(3, 3, bias=False)
        self.proj = nn.Embedding(5, 3)


class Conv1D(nn.Module):
    """The transposed linear layer of transformers' GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx, self.weight = nf, nx, nn.Parameter(torch.randn(nx, nf))


class TransposedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.num_heads = Conv1D(48, 16), Conv1D(16, 16), 4


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


NANOGPT = {
    "transformer.wte.weight": Kind("embeddings"),
    "transformer.wpe.weight": Kind("embeddings"),
    "transformer.h.1.ln_1.weight": Kind("vectors"),
    "transformer.h.1.ln_1.bias": Kind("vectors"),
    "transformer.h.1.attn.c_attn.weight": Kind("matrices", (16, 16, 16)),
    "transformer.h.1.attn.c_proj.weight": Kind("matrices"),
    "transformer.h.1.mlp.up.weight": Kind("matrices", (40, 40)),
    "transformer.h.1.mlp.down.weight": Kind("matrices"),
    "transformer.ln_f.weight": Kind("vectors"),
}
PLAIN, CONVOLUTION = Kind("matrices"), Kind("convolutions", as_matrix="flatten")
SMALL_CONVOLUTION = Kind("gates", as_matrix="flatten")

# A model, and the kinds of some of its parameters: of all, where none starts with a layer's number.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Kind]]] = {
    "nanoGPT": (NanoGPT, NANOGPT | {"lm_head.weight": Kind("head")}),
    "nanoGPT, tied": (lambda: NanoGPT(tied=True), NANOGPT),
    "vocabulary as wide as the block": (
        lambda: NanoGPT(vocab=16),
        NANOGPT | {"lm_head.weight": Kind("head")},
    ),
    "padded head": (
        lambda: nn.ModuleList([nn.Embedding(1000, 4), linear(4, 1010)]),
        {"0.weight": Kind("embeddings"), "1.weight": Kind("head")},
    ),
    "head padded beyond doubt": (
        lambda: nn.ModuleList([nn.Embedding(1000, 4), linear(4, 1011)]),
        {"0.weight": Kind("embeddings"), "1.weight": PLAIN},
    ),
    "last of a sequence": (
        lambda: nn.Sequential(nn.Embedding(9, 9), linear(9, 9), nn.Tanh(), linear(9, 9)),
        {"0.weight": Kind("embeddings"), "1.weight": PLAIN, "3.weight": Kind("head")},
    ),
    "two heads": (
        lambda: nn.ModuleDict({"embed": nn.Embedding(9, 4), "heads": nn.ModuleList([linear(4, 9), linear(4, 9)])}),
        {"embed.weight": Kind("embeddings"), "heads.0.weight": Kind("head"), "heads.1.weight": Kind("head")},
    ),
    "a block of its own": (
        lambda: nn.ModuleDict({"embed": nn.Embedding(16, 16), "block": Attention(), "head": linear(16, 16)}),
        {
            "embed.weight": Kind("embeddings"),
            "block.c_attn.weight": Kind("matrices", (16, 16, 16)),
            "block.c_proj.weight": PLAIN,
            "head.weight": Kind("head"),
        },
    ),
    "grouped queries": (
        lambda: Attention(kv_heads=1),
        {"c_attn.weight": Kind("matrices", (16, 4, 4)), "c_proj.weight": PLAIN},
    ),
    "grouped queries of half the width, counted": (
        lambda: Attention(kv_heads=2),
        {"c_attn.weight": Kind("matrices", (16, 8, 8)), "c_proj.weight": PLAIN},
    ),
    "the same, uncounted, is an MLP": (
        lambda: Attention(kv_heads=2, counts=False),
        {"c_attn.weight": Kind("matrices", (16, 16)), "c_proj.weight": PLAIN},
    ),
    "grouped queries, uncounted": (
        lambda: Attention(kv_heads=1, counts=False),
        {"c_attn.weight": Kind("matrices", (16, 4, 4)), "c_proj.weight": PLAIN},
    ),
    "transposed": (
        TransposedAttention,
        {"c_attn.weight": Kind("matrices", (16, 16, 16), COLUMNS), "c_proj.weight": Kind("matrices", None, COLUMNS)},
    ),
    "flat block": (
        FlatBlock,
        {"qkv.weight": Kind("matrices", (16,) * 3), "out.weight": PLAIN, "fc1.weight": PLAIN, "fc2.weight": PLAIN},
    ),
    "cross-attention": (
        CrossAttention,
        {"to_q.weight": PLAIN, "to_kv.weight": Kind("matrices", (16, 16)), "to_out.0.weight": PLAIN},
    ),
    "gated queries": (SeparateAttention, dict.fromkeys(["q.weight", "k.weight", "v.weight", "o.weight"], PLAIN)),
    "latent": (LatentAttention, dict.fromkeys(["q.weight", "kv_a.weight", "kv_b.weight", "o.weight"], PLAIN)),
    "plain MLP": (lambda: nn.Sequential(linear(4, 16), linear(16, 4)), {"0.weight": PLAIN, "1.weight": PLAIN}),
    "gated MLP in a sequence": (
        lambda: nn.Sequential(linear(4, 16), nn.GLU(), linear(8, 4)),
        {"0.weight": Kind("matrices", (8, 8)), "2.weight": PLAIN},
    ),
    "torch's attention": (
        lambda: nn.MultiheadAttention(16, 4, bias=False, add_bias_kv=True),
        {
            "in_proj_weight": Kind("matrices", (16, 16, 16)),
            "out_proj.weight": PLAIN,
            "bias_k": Kind("vectors"),
            "bias_v": Kind("vectors"),
        },
    ),
    "torch's encoder layer": (
        lambda: nn.TransformerEncoderLayer(16, 4, 40, bias=False),
        {
            "self_attn.in_proj_weight": Kind("matrices", (16, 16, 16)),
            "self_attn.out_proj.weight": PLAIN,
            "linear1.weight": PLAIN,
            "linear2.weight": PLAIN,
            "norm1.weight": Kind("vectors"),
            "norm2.weight": Kind("vectors"),
        },
    ),
    "LSTM": (
        lambda: nn.LSTM(8, 8, bias=False),
        {"weight_ih_l0": Kind("matrices", (8,) * 4), "weight_hh_l0": Kind("matrices", (8,) * 4)},
    ),
    "listed experts": (
        lambda: NanoGPT(make_mlp=ListedExperts),
        {
            "transformer.h.0.mlp.gate.weight": Kind("gates"),
            "transformer.h.0.mlp.experts.3.up.weight": Kind("matrices", (40, 40)),
            "transformer.h.0.mlp.experts.3.down.weight": PLAIN,
            "transformer.h.0.mlp.shared.up.weight": Kind("matrices", (40, 40)),
            "transformer.h.0.mlp.shared_gate.weight": Kind("gates"),
            "lm_head.weight": Kind("head"),
        },
    ),
    "stacked experts": (
        StackedExperts,
        {"router": Kind("gates"), "up": Kind("experts"), "down": Kind("experts")},
    ),
    "stacked experts with biases": (
        Routed,
        {
            "router.weight": Kind("gates"),
            "router.bias": Kind("vectors"),
            "experts.up": Kind("experts", (40, 40), COLUMNS),
            "experts.up_bias": Kind("vectors"),
            "experts.down": Kind("experts", None, COLUMNS),
            "experts.down_bias": Kind("vectors"),
        },
    ),
    "norms": (
        lambda: nn.ModuleList([nn.LayerNorm((3, 4), bias=False), HeadNorm(), nn.RMSNorm(4), nn.GroupNorm(2, 4)]),
        dict.fromkeys(["0.weight", "1.weight", "2.weight", "3.weight", "3.bias"], Kind("vectors")),
    ),
    "no norm": (LinearWithEpsilon, {"weight": PLAIN}),
    "marked": (Marked, {"A_log": Kind("vectors")}),
    "state space": (
        StateSpace,
        {
            "A_log": Kind("vectors"),
            "conv.weight": SMALL_CONVOLUTION,
            "in_proj.weight": Kind("matrices", (32, 32)),
            "out_proj.weight": PLAIN,
        },
    ),
    "patches": (
        Patches,
        {"project.weight": CONVOLUTION, "positions": Kind("embeddings"), "start": Kind("vectors")},
    ),
    "convolutions": (
        lambda: nn.ModuleList(
            [
                nn.Conv1d(8, 6, 3, bias=False),
                nn.Conv1d(8, 8, 3, groups=8, bias=False),
                nn.Conv2d(8, 12, 3, groups=4, bias=False),
                nn.Conv2d(8, 1, 3, bias=False),
                nn.ConvTranspose2d(8, 6, 3, bias=False),
            ]
        ),
        {
            "0.weight": CONVOLUTION,
            "1.weight": SMALL_CONVOLUTION,
            "2.weight": replace(CONVOLUTION, split_sizes=(3, 3, 3, 3)),
            "3.weight": SMALL_CONVOLUTION,
            "4.weight": CONVOLUTION,
        },
    ),
    "one row, one column": (
        lambda: nn.ModuleList([linear(4, 1), linear(1, 4), linear(2, 2)]),
        {"0.weight": Kind("gates"), "1.weight": Kind("gates"), "2.weight": PLAIN},
    ),
    "misnamed": (Misnamed, {"embed_norm_bias.weight": PLAIN, "proj.weight": Kind("embeddings")}),
    "embedding bag": (
        lambda: nn.ModuleList([nn.EmbeddingBag(9, 1), nn.Embedding(1, 4)]),
        {"0.weight": Kind("embeddings"), "1.weight": Kind("embeddings")},
    ),
}


@pytest.mark.parametrize(("make", "expected"), MODELS.values(), ids=MODELS.keys())
def test_kinds_and_fused_parts_follow_from_the_modules(make, expected):
    model = make()
    found = kinds_of(model)
    assert list(found) == list(model.parameters())
    by_name = {name: found[parameter] for name, parameter in model.named_parameters()}
    assert {name: by_name[name] for name in expected} == expected
    if not any(".h." in name for name in expected):
        assert set(by_name) == set(expected)


@pytest.mark.parametrize(("make", "expected"), MODELS.values(), ids=MODELS.keys())
def test_a_matrix_rule_can_take_every_group_apart(make, expected):
    for group in parameter_groups(make(), weight_decay=0.1, rule="muon"):
        for parameter in group["params"]:
            if group["rule"] == "muon":
                settings = SETTINGS | group
                found = parts(matrix_shape(parameter, settings), settings)
                assert len(found) == len(group["split_sizes"] or [None])


def test_a_wrapped_model_has_the_same_kinds():
    model = NanoGPT()
    wrapped = nn.ModuleDict({"module": model})
    assert kinds_of(wrapped) == kinds_of(torch.nn.parallel.DataParallel(model)) == kinds_of(model)


# --- models of transformers -----------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
SEPARATE = {
    "matrices": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj "
    "mlp.down_proj",
    "head": "lm_head",
    "embeddings": "model.embed_tokens",
    "vectors": "input_layernorm post_attention_layernorm model.norm",
}
MIXTURE = {
    "matrices": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
    "experts (split 40+40)": "mlp.experts.gate_up_proj",
    "experts": "mlp.experts.down_proj",
    "head": "lm_head",
    "embeddings": "model.embed_tokens",
    "gates": "mlp.gate",
    "vectors": "input_layernorm post_attention_layernorm model.norm",
}
HEAD_NORMS = " self_attn.q_norm self_attn.k_norm"
TRANSFORMERS = {
    "Llama": (SHAPE, SEPARATE),
    "Qwen3": (SHAPE | {"head_dim": 8}, SEPARATE | {"vectors": SEPARATE["vectors"] + HEAD_NORMS}),
    "Mixtral": (SHAPE | {"num_local_experts": 6}, MIXTURE),
    "Qwen3Moe": (
        SHAPE | {"num_experts": 6, "moe_intermediate_size": 40},
        MIXTURE | {"vectors": MIXTURE["vectors"] + HEAD_NORMS},
    ),
    "Phi3": (
        SHAPE,
        SEPARATE
        | {
            "matrices": "self_attn.o_proj mlp.down_proj",
            "matrices (split 16+8+8)": "self_attn.qkv_proj",
            "matrices (split 40+40)": "mlp.gate_up_proj",
        },
    ),
    "GPT2": (
        GPT2,
        {
            "matrices (transposed)": "attn.c_proj mlp.c_fc mlp.c_proj",
            "matrices (transposed, split 16+16+16)": "attn.c_attn",
            "embeddings": "transformer.wte transformer.wpe",
            "vectors": "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj transformer.ln_f",
        },
    ),
}


def build(family: str, settings: dict[str, object]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**settings, **TOKENS)
    with torch.device("meta"):
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        return getattr(transformers, family + head)(config)


def roles(names: list[str]) -> set[str]:
    """Return parameter names without the number of the layer, and without what all of one module share."""
    short = {name.rpartition(".layers.")[2] if ".layers." in name else name.rpartition(".h.")[2] for name in names}
    return {name.lstrip("0123456789.").removesuffix(".weight").removesuffix(".bias") for name in short}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_parameter_of_a_transformers_model_is_in_the_group_of_its_kind(family):
    settings, expected = TRANSFORMERS[family]
    model = build(family, settings)
    groups = parameter_groups(model, weight_decay=0.1, rule="muon")
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    found = {group["name"]: roles(group["parameter_names"]) for group in groups}
    assert found == {name: set(text.split()) for name, text in expected.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_transformers_llama_is_its_own_group_unless_it_is_tied(tied):
    groups = names(build("Llama", SHAPE | {"tie_word_embeddings": tied}))
    assert groups["embeddings"] == ["model.embed_tokens.weight"]
    assert groups.get("head") == (None if tied else ["lm_head.weight"])


def test_gate_and_up_that_alternate_stay_one_matrix():
    groups = names(build("GptOss", SHAPE | {"num_local_experts": 6, "head_dim": 8}), rule="muon")
    assert roles(groups["experts (transposed)"]) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert roles(groups["gates"]) == {"mlp.router"}
    assert {"mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"} <= roles(groups["vectors"])


# --- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rule", ["adamw", "lion", *sorted(MATRIX_RULES)])
def test_every_parameter_of_the_decoder_is_in_exactly_one_group(tied, rule):
    model = decoder(tied=tied)
    groups = parameter_groups(model, weight_decay=0.1, rule=rule)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    assert check_complete(model, groups) == groups


def test_matrices_and_an_untied_head_decay_while_embedding_and_norms_do_not():
    model = decoder(tied=False)
    groups = {group["name"]: group for group in parameter_groups(model, weight_decay=0.3)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.3,
        "head": 0.3,
        "embeddings": 0.0,
        "vectors": 0.0,
    }
    assert groups["embeddings"]["parameter_names"] == ["model.embed_tokens.weight"]
    assert groups["head"]["parameter_names"] == ["lm_head.weight"]
    assert all("norm" in name for name in groups["vectors"]["parameter_names"])
    assert len(groups["matrices"]["params"]) == 7


def test_a_tied_head_is_an_embedding_once():
    groups = names(decoder(tied=True))
    assert groups["embeddings"] == ["model.embed_tokens.weight"]
    assert len(groups["matrices"]) == 7
    assert "head" not in groups


def test_a_head_registered_before_the_embedding_it_shares_is_still_an_embedding():
    model = nn.ModuleDict({"head": nn.Linear(4, 10, bias=False), "embed": nn.Embedding(10, 4)})
    model["head"].weight = model["embed"].weight
    assert names(model) == {"embeddings": ["head.weight"]}


def one_of_each_kind() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "norm": nn.RMSNorm(16),
            "gate": linear(16, 1),
            "embed": nn.Embedding(65, 16),
            "head": linear(16, 65),
            "conv": nn.Conv1d(16, 16, 3, bias=False),
            "experts": BiasedStacks(),
            "attention": Attention(),
        }
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("lion", dict.fromkeys(KINDS, "lion")),
        ("muon", dict.fromkeys(KINDS, "adamw") | dict.fromkeys(("matrices", "experts", "convolutions"), "muon")),
        ("soap", dict.fromkeys(KINDS, "adamw") | dict.fromkeys(("matrices", "experts", "convolutions"), "soap")),
    ],
)
def test_a_matrix_rule_takes_hidden_matrices_and_an_elementwise_rule_takes_all(rule, expected):
    groups = parameter_groups(one_of_each_kind(), weight_decay=0.2, rule=rule)
    assert {group["kind"]: group["rule"] for group in groups} == expected
    decays = {group["kind"]: group["weight_decay"] for group in groups}
    assert decays == dict.fromkeys(KINDS, 0.2) | {"embeddings": 0.0, "vectors": 0.0}
    assert list(dict.fromkeys(group["kind"] for group in groups)) == list(KINDS)
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert all("split_sizes" in group for group in groups if group["rule"] in MATRIX_RULES)
    assert {group["kind"] for group in groups if "as_matrix" in group} <= {"convolutions"}
    assert not any("split_sizes" in group for group in groups if group["rule"] not in MATRIX_RULES)


def test_what_a_matrix_rule_leaves_goes_to_the_rest():
    groups = parameter_groups(nn.Linear(2, 2), weight_decay=0.0, rule="muon", rest="lion")
    assert [(group["name"], group["rule"]) for group in groups] == [("matrices", "muon"), ("vectors", "lion")]


def test_each_way_to_split_is_a_group_for_a_matrix_rule_only():
    model = NanoGPT()
    split = {group["name"]: group for group in parameter_groups(model, weight_decay=0.1, rule="muon")}
    assert {name: (group["split_sizes"], group["split_dim"]) for name, group in split.items() if "split" in name} == {
        "matrices (split 16+16+16)": ((16, 16, 16), ROWS),
        "matrices (split 40+40)": ((40, 40), ROWS),
    }
    assert (split["matrices"]["split_sizes"], split["matrices"]["split_dim"]) == (None, ROWS)
    assert list(names(model)) == ["matrices", "head", "embeddings", "vectors"]


def test_mars_is_for_matrices_but_does_not_take_them_apart():
    assert list(names(NanoGPT(), rule="mars")) == ["matrices", "head", "embeddings", "vectors"]
    assert not any("split_sizes" in group for group in parameter_groups(NanoGPT(), weight_decay=0.1, rule="mars"))


def test_the_rules_that_take_only_matrices_are_known_here():
    assert {name for name, rule in RULES.items() if rule.only_matrices} <= MATRIX_RULES


def test_many_equal_parts_have_a_short_name():
    assert list(names(nn.Conv1d(16, 32, 3, groups=8, bias=False), rule="muon")) == ["convolutions (split 8 x 4)"]


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert names(model) == {"matrices": ["1.weight"], "vectors": ["1.bias"]}
    with pytest.raises(RecipeError, match="no parameter to train"):
        parameter_groups(model.requires_grad_(False), weight_decay=0.1)


def test_a_frozen_embedding_still_tells_the_head():
    model = NanoGPT()
    model.transformer["wte"].requires_grad_(False)
    assert names(model)["head"] == ["lm_head.weight"]


def test_two_parameters_of_the_same_memory_are_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = nn.Parameter(model["embed"].weight.data)
    with pytest.raises(RecipeError, match=r"embed\.weight and head\.weight share"):
        parameter_groups(model, weight_decay=0.1)


def test_a_sharded_model_has_the_groups_of_the_whole():
    from torch.distributed.fsdp import fully_shard

    whole, sharded = NanoGPT(), NanoGPT()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*sharded.transformer["h"], sharded):
            fully_shard(module, mesh=mesh)
        assert names(sharded, rule="muon") == names(whole, rule="muon")
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_shapes_is_refused():
    with pytest.raises(RecipeError, match=r"weight has no shape yet; run the model on one batch"):
        parameter_groups(nn.LazyLinear(3), weight_decay=0.1)


def test_groups_hold_the_masters():
    model = nn.Linear(2, 2)
    masters = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    groups = parameter_groups(model, weight_decay=0.1, master=masters.__getitem__)
    assert {p for group in groups for p in group["params"]} == set(masters.values())


def test_settings_by_kind():
    groups = parameter_groups(
        NanoGPT(),
        weight_decay=0.1,
        kinds={"embeddings": {"lr_scale": 10.0}, "head": {"weight_decay": 0.0, "eps": 1e-6}},
    )
    found = {group["name"]: (group["lr_scale"], group["weight_decay"], group.get("eps")) for group in groups}
    assert found == {
        "matrices": (1.0, 0.1, None),
        "head": (1.0, 0.0, 1e-6),
        "embeddings": (10.0, 0.0, None),
        "vectors": (1.0, 0.0, None),
    }


# Overrides, and the names of the groups that a nanoGPT of two layers has under Muon.
OVERRIDES = {
    "one head": ({"lm_head.*": {"lr_scale": 0.2}}, {"head (lr_scale=0.2)": ["lm_head.weight"]}),
    "a dot in front of every name": (
        {"*.lm_head.*": {"lr_scale": 0.2, "weight_decay": 0.0, "rule": "lion"}},
        {"head (lr_scale=0.2, rule=lion, weight_decay=0.0)": ["lm_head.weight"]},
    ),
    "part of a kind": (
        {"*.0.mlp.down.weight": {"weight_decay": 0.5}},
        {"matrices (weight_decay=0.5)": ["transformer.h.0.mlp.down.weight"]},
    ),
    "another split": (
        {"*.0.attn.c_attn.weight": {"split_sizes": [24, 24]}},
        {"matrices (split 24+24)": ["transformer.h.0.attn.c_attn.weight"]},
    ),
    "a split by columns": (
        {"*.0.attn.c_attn.weight": {"split_sizes": (8, 8), "split_dim": -1}},
        {"matrices (transposed, split 8+8)": ["transformer.h.0.attn.c_attn.weight"]},
    ),
    "no split for one": (
        {"*.h.0.attn.c_attn.weight": {"split_sizes": None}},
        {"matrices (split 16+16+16)": ["transformer.h.1.attn.c_attn.weight"]},
    ),
    "another rule": ({"lm_head.weight": {"rule": "muon"}}, {"head (rule=muon)": ["lm_head.weight"]}),
    "what was so anyway": ({"lm_head.weight": {"lr_scale": 1.0}}, {"head": ["lm_head.weight"]}),
    "patterns that agree": (
        {"*.wpe.*": {"lr_scale": 2.0}, "*.w?e.*": {"lr_scale": 2.0}, "*.wte.weight": {"eps": 1e-9}},
        {
            "embeddings (lr_scale=2.0)": ["transformer.wpe.weight"],
            "embeddings (eps=1e-09, lr_scale=2.0)": ["transformer.wte.weight"],
        },
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_overrides_by_pattern_make_groups_of_their_own(overrides, expected):
    model = NanoGPT()
    groups = parameter_groups(model, weight_decay=0.1, rule="muon", overrides=overrides)
    found = {group["name"]: group["parameter_names"] for group in groups}
    assert len(found) == len(groups)
    assert {name: found.get(name) for name in expected} == expected
    grouped = [name for group in groups for name in group["parameter_names"]]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    for settings in overrides.values():
        changed = [group for group in groups if group["name"] in expected]
        for key in set(settings) - {"split_sizes", "split_dim"}:
            assert settings[key] in [group.get(key) for group in changed]


def test_an_override_finds_a_tied_parameter_by_either_name():
    for pattern in ("*.wte.weight", "lm_head.weight"):
        groups = parameter_groups(NanoGPT(tied=True), weight_decay=0.1, overrides={pattern: {"lr_scale": 3.0}})
        assert {group["name"] for group in groups} >= {"embeddings", "embeddings (lr_scale=3.0)"}


def test_a_matrix_rule_for_gates_knows_which_of_them_are_convolutions():
    model = nn.ModuleList([linear(4, 1), nn.Conv1d(8, 8, 3, groups=8, bias=False), nn.Conv1d(2, 2, 2, bias=False)])
    overrides = {"2.weight": {"as_matrix": None}}
    groups = parameter_groups(
        model, weight_decay=0.1, rule="muon", kinds={"gates": {"rule": "muon"}}, overrides=overrides
    )
    assert [(group["name"], group["parameter_names"], group.get("as_matrix")) for group in groups] == [
        ("convolutions (stacked)", ["2.weight"], None),
        ("gates", ["0.weight"], None),
        ("gates (flattened)", ["1.weight"], "flatten"),
    ]


def test_splits_are_for_matrix_rules():
    overrides = {"*.c_attn.weight": {"split_sizes": (24, 24)}}
    assert list(names(NanoGPT(), overrides=overrides)) == ["matrices", "head", "embeddings", "vectors"]


REFUSED = {
    "matches nothing": ({"*.qkv.*": {"lr_scale": 2.0}}, r"'\*\.qkv\.\*' matches no parameter"),
    "nearest": ({"lm_heat.weight": {"lr_scale": 2.0}}, "did you mean 'lm_head.weight'"),
    "contradiction": (
        {"*.wte.*": {"lr_scale": 2.0}, "*.w?e.*": {"lr_scale": 3.0}},
        r"transformer\.wte\.weight matches .*'\*\.wte\.\*' and '\*\.w\?e\.\*', .*lr_scale=2\.0 and 3\.0",
    ),
    "matrix rule for vectors": (
        {"*.attn.*": {"rule": "muon"}, "*.ln_1.*": {"rule": "muon"}},
        r"ln_1\.weight has 1 dimensions, and muon is for matrices",
    ),
    "parts do not add up": (
        {"*.c_attn.weight": {"split_sizes": (16, 16)}},
        r"split_sizes=\(16, 16\) do not fit .*c_attn\.weight; .* its 48 rows",
    ),
    "parts of nothing": ({"*.c_attn.weight": {"split_sizes": (48, 0)}}, "whole numbers above 0"),
    "columns": ({"*.c_attn.weight": {"split_sizes": (48,), "split_dim": -1}}, "add up to its 16 columns"),
    "dimension": ({"*.c_attn.weight": {"split_dim": 2}}, "split_dim=2 is out of range"),
    "decay": ({"*.wte.*": {"weight_decay": -1.0}}, "weight_decay=-1.0 is out of range"),
    "decay without end": ({"*.wte.*": {"weight_decay": float("nan")}}, "weight_decay=nan is out of range"),
    "scale": ({"*.wte.*": {"lr_scale": 0.0}}, "lr_scale=0.0 is out of range"),
    "reserved": ({"*.wte.*": {"params": []}}, "params cannot be set"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_overrides_that_cannot_be_followed_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        parameter_groups(NanoGPT(), weight_decay=0.1, rule="muon", overrides=overrides)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"matrix": {"lr_scale": 2.0}}, "kinds.matrix is no kind of parameter, did you mean 'matrices'"),
        ({"head": {"lr_scale": -2.0}}, "kinds.head.lr_scale=-2.0 is out of range"),
        ({"head": {"name": "x"}}, "kinds.head.name cannot be set"),
        ({"vectors": {"rule": "soap"}}, "bias has 1 dimensions, and soap is for matrices"),
    ],
)
def test_settings_by_kind_that_cannot_be_followed_are_refused(kinds, message):
    with pytest.raises(RecipeError, match=message):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), weight_decay=0.1, kinds=kinds)


# --- groups made by hand --------------------------------------------------------------------------------------------


def test_hand_made_groups_come_back_with_names_and_lists():
    model = nn.Linear(2, 2)
    whole = [{"params": model.weight, "lr": 0.1}, {"params": iter([("bias", model.bias)]), "name": "biases"}]
    assert check_complete(model, whole) == [
        {"params": [model.weight], "lr": 0.1, "parameter_names": ["weight"]},
        {"params": [model.bias], "name": "biases", "parameter_names": ["bias"]},
    ]


def by_hand(*groups: list[str]) -> Callable[[nn.Module], list[dict[str, object]]]:
    return lambda model: [
        {"name": f"group {number}", "params": [model.get_parameter(name) for name in names]}
        for number, names in enumerate(groups)
    ]


INCOMPLETE = {
    "in two": (by_hand(["0.weight", "1.weight"], ["1.weight", "0.bias"]), r"1\.weight is in 'group 0' and 'group 1'"),
    "twice": (by_hand(["0.weight", "0.weight"]), r"0\.weight is in group 'group 0' twice"),
    "missing": (by_hand(["0.weight", "1.weight", "0.bias"]), r"1\.bias is in no optimizer group"),
    "many missing": (by_hand(["0.weight"]), r"0\.bias and 2 more parameters are in no optimizer group"),
    "empty": (by_hand(["0.weight"], []), "group 'group 1' is empty"),
    "nameless and empty": (lambda model: [{"params": []}], "group 'number 0' is empty"),
    "foreign": (
        lambda model: [{"params": [nn.Parameter(torch.ones(3, 1))]}],
        "holds a 3x1 tensor that is no parameter",
    ),
}


@pytest.mark.parametrize(("make", "message"), INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_hand_made_groups_that_do_not_fit_are_refused_by_name(make, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(RecipeError, match=message):
        check_complete(model, make(model))


def test_hand_made_groups_may_hold_masters_and_leave_out_what_is_frozen():
    model = nn.Linear(2, 2)
    masters = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    groups = [{"params": list(masters.values())}]
    assert check_complete(model, groups, master=masters.__getitem__)[0]["parameter_names"] == ["weight", "bias"]
    model.bias.requires_grad_(False)
    assert check_complete(model, [{"params": [model.weight]}])


# --- the parts mean what they say -----------------------------------------------------------------------------------


def test_the_parts_of_torchs_attention_are_query_key_and_value():
    model = nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    sizes = kinds_of(model)[model.in_proj_weight].split_sizes
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

    def heads(weight: Tensor) -> Tensor:
        return F.linear(x, weight).unflatten(-1, (4, 4)).transpose(1, 2)

    query, key, value = map(heads, model.in_proj_weight.split(sizes))
    ours = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2) @ model.out_proj.weight.T
    torch.testing.assert_close(ours, model(x, x, x, need_weights=False)[0])


# --- optimizers by name ---------------------------------------------------------------------------------------------


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
    with pytest.raises(RecipeError, match=r"did you mean '.*'adam"):
        optimizer(nn.Linear(2, 2), "adamm", lr=1e-3)
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

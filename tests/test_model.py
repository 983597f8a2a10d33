"""The decoder: equal to transformers, blind across documents, safe in low precision, the same for the same seed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from hasten.errors import RecipeError, RunError
from hasten.model import (
    SIZES,
    Decoder,
    ModelConfig,
    config_from_hf,
    count_parameters,
    flops_per_token,
    hf_config,
    loss,
    loss_sum,
    preset,
    read_model,
)
from hasten.model.decoder import RMSNorm
from hasten.precision import Precision

VOCAB, LENGTH = 97, 32


def tiny(**overrides) -> ModelConfig:
    shape = {"num_layers": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 48}
    return ModelConfig(**{**shape, "vocab_size": VOCAB, "seq_len": LENGTH, "tied": False, **overrides})


def trained(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder whose every weight, the norms' included, is away from its initial value."""
    model = Decoder(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def save(model: Decoder, folder) -> None:
    tensors = dict(model.state_dict())
    if model.config.tied:
        del tensors["lm_head.weight"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)), encoding="utf-8")


SHAPES = [
    tiny(),
    tiny(tied=True),
    tiny(num_kv_heads=1, head_dim=16),
    tiny(num_kv_heads=4, rope_theta=500.0, norm_eps=1e-5, num_layers=3),
]


@pytest.mark.parametrize("config", SHAPES)
def test_logits_equal_those_of_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = trained(config)
    save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=0)


def test_weights_are_named_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    for config in SHAPES:
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**hf_config(config)))
        assert list(theirs.state_dict()) == list(Decoder(config, seed=0).state_dict())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("vocab_size", [256, 4096])
def test_initial_loss_is_that_of_guessing_evenly(name, vocab_size):
    if name in ("small", "medium") and vocab_size == 4096:
        pytest.skip("slow, and the same widths are covered with 256 tokens")
    model = Decoder(preset(name, vocab_size=vocab_size, seq_len=16, num_layers=2), seed=0)
    rows = torch.randint(0, vocab_size, (4, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = loss_sum(model, rows[:, :-1], rows[:, 1:]) / 64
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=0.1)


def test_sizes_have_the_parameters_their_class_says():
    millions = {
        name: count_parameters(preset(name, vocab_size=50257, seq_len=1024)) / 1e6 for name in ("small", "medium")
    }
    assert millions == {"small": pytest.approx(124, abs=2), "medium": pytest.approx(355, abs=15)}
    assert 1e6 < count_parameters(preset("nano", vocab_size=4096, seq_len=256)) < 3.5e6


def test_same_seed_same_weights_whatever_the_global_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Decoder(tiny(), seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = Decoder(tiny(), seed=3), Decoder(tiny(), seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("boundary", [1, 13, LENGTH - 1])
def test_changing_one_document_never_moves_the_logits_of_another(boundary):
    model = trained(tiny())
    ids = (torch.arange(LENGTH) >= boundary).int().repeat(2, 1)
    original = tokens()
    changed_first, changed_second = original.clone(), original.clone()
    changed_first[:, :boundary] = (original[:, :boundary] + 1) % VOCAB
    changed_second[:, boundary:] = (original[:, boundary:] + 1) % VOCAB
    with torch.no_grad():
        reference = model(original, ids)
        assert torch.equal(model(changed_first, ids)[:, boundary:], reference[:, boundary:])
        assert torch.equal(model(changed_second, ids)[:, :boundary], reference[:, :boundary])
        assert not torch.equal(model(changed_first)[:, boundary:], model(original)[:, boundary:])


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_row_equals_its_documents_run_alone(tied):
    model, lengths = trained(tiny(tied=tied)), [1, 12, 2, 17]
    row, labels = tokens(rows=1), tokens(rows=1, seed=1)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = loss_sum(model, row, labels, ids)
    packed_gradients = torch.autograd.grad(packed, list(model.parameters()))
    alone = sum(loss_sum(model, r, t) for r, t in zip(row.split(lengths, 1), labels.split(lengths, 1), strict=True))
    gradients = torch.autograd.grad(alone, list(model.parameters()))
    torch.testing.assert_close(packed, alone, atol=0, rtol=1e-5)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


def test_no_position_sees_a_later_one():
    model, original = trained(tiny()), tokens()
    changed = original.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCAB
    with torch.no_grad():
        assert torch.equal(model(original)[:, :20], model(changed)[:, :20])


def test_loss_equals_cross_entropy_over_the_labelled_positions():
    model, labels = trained(tiny()), tokens(seed=1)
    labels[0, 3:9] = -100
    log_p = model(tokens()).log_softmax(-1)
    by_hand = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100].sum()
    torch.testing.assert_close(loss_sum(model, tokens(), labels), by_hand)
    assert loss_sum(model, tokens(), torch.full_like(labels, -100)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vectors", ["float32 vectors", "low-precision vectors"])
def test_low_precision_matrices_give_low_precision_activations_and_a_float32_loss(dtype, vectors):
    model = trained(tiny())
    exact = loss_sum(model, tokens(), tokens(seed=1))
    for parameter in model.parameters():
        if parameter.ndim > 1 or vectors == "low-precision vectors":
            parameter.data = parameter.data.to(dtype)
    loss = loss_sum(model, tokens(), tokens(seed=1))
    loss.backward()
    assert model(tokens()).dtype == dtype
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(loss, exact, atol=0, rtol=0.02)


def bytes_kept_for_backward(name: str, precision: str, tied: bool) -> int:
    model = Decoder(preset(name, vocab_size=512, seq_len=64, num_layers=2, tied=tied), seed=0)
    Precision(model, precision)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    rows, kept = tokens(length=65), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_sum(model, rows[:, :-1], rows[:, 1:], torch.zeros(2, 64, dtype=torch.int32))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["nano", "micro"])
def test_low_precision_keeps_about_half_the_bytes_for_the_backward_pass(name, tied, precision):
    full = bytes_kept_for_backward(name, "float32", tied)
    assert bytes_kept_for_backward(name, precision, tied) <= 0.55 * full


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_weights_take_about_half_the_bytes(precision):
    model = Decoder(preset("micro", vocab_size=512, seq_len=64), seed=0)
    before = sum(parameter.nbytes for parameter in model.parameters())
    Precision(model, precision)
    assert sum(parameter.nbytes for parameter in model.parameters()) <= 0.55 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", ["float32 weight", "low-precision weight"])
def test_the_widening_norm_equals_the_plain_one(dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(16, eps=1e-6).to(torch.float32 if weight_dtype == "float32 weight" else dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(16, generator=generator))
    x = torch.randn(3, 5, 16, generator=generator).to(dtype)
    x[0, 0] = 0.0  # eps alone divides
    x.requires_grad_()
    grad = 1e-2 * torch.randn(3, 5, 16, generator=generator)
    plain = torch.nn.functional.rms_norm(x.float(), (16,), norm.weight.float(), 1e-6)
    ours = norm.widened(x)
    assert torch.equal(ours, plain)
    results = (torch.autograd.grad(form, [x, norm.weight], grad) for form in (ours, plain))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        exact = one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5 if exact else 2e-2, atol=1e-7 if exact else 1e-4)


def test_low_precision_compiles_to_the_same_gradients():
    model = trained(tiny(num_layers=1))
    Precision(model, "bf16")
    compiled = torch.compile(model, dynamic=False, backend="aot_eager")
    results = []
    for form in (compiled, model):
        value = loss_sum(form, tokens(), tokens(seed=1))
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2 * plain.abs().max().item())


def test_float64_stays_float64():
    model = trained(tiny()).double()
    logits = model(tokens())
    assert logits.dtype == torch.float64
    assert loss_sum(model, tokens(), tokens(seed=1)).dtype == torch.float64
    torch.testing.assert_close(logits.float(), trained(tiny())(tokens()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pieces", [[1] * 8, [5, 3], [8], [1, 6, 1]])
def test_a_cache_changes_no_logits(pieces):
    model, row = trained(tiny()), tokens(rows=3, length=8)
    cache = model.new_cache(rows=3)
    with torch.no_grad():
        together = torch.cat([model(piece, cache=cache) for piece in row.split(pieces, 1)], dim=1)
        torch.testing.assert_close(together, model(row), atol=1e-5, rtol=1e-5)
    assert cache.length == 8


def test_rows_longer_than_the_trained_length_are_the_same_function():
    short, long = trained(tiny(seq_len=8)), trained(tiny(seq_len=LENGTH))
    with torch.no_grad():
        torch.testing.assert_close(short(tokens()), long(tokens()))


@pytest.mark.parametrize("config", SHAPES)
def test_a_saved_model_is_read_back_bit_for_bit(config, tmp_path):
    model = trained(config)
    save(model, tmp_path)
    back = read_model(tmp_path)
    assert back.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == config.tied
    assert torch.equal(model(tokens()), back(tokens()))


def test_a_model_in_several_files_is_read(tmp_path):
    model = trained(tiny())
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = list(model.state_dict())
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for part in set(files.values()):
        save_file({n: t for n, t in model.state_dict().items() if files[n] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert torch.equal(read_model(tmp_path)(tokens()), model(tokens()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_kv_heads = 3"),
        ({"head_dim": 7}, "head_dim"),
        ({"vocab_size": "many\x1b[31m"}, "vocab_size"),
    ],
)
def test_a_config_we_cannot_represent_is_refused_in_one_sentence(change, words):
    with pytest.raises(RunError) as refusal:
        config_from_hf({**hf_config(tiny()), **change})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


def test_a_config_without_a_size_is_refused():
    values = hf_config(tiny())
    del values["hidden_size"]
    with pytest.raises(RunError, match="no 'hidden_size'"):
        config_from_hf(values)


@pytest.mark.parametrize(
    "damage", ["no folder", "no weights", "cut weights", "bad json", "other shape", "missing tensor"]
)
def test_a_damaged_folder_is_refused(damage, tmp_path):
    model, folder = trained(tiny()), tmp_path
    save(model, folder)
    weights = folder / "model.safetensors"
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "no weights":
        weights.rename(folder / "pytorch_model.bin")
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "bad json":
        (folder / "config.json").write_text("{")
    elif damage == "other shape":
        (folder / "config.json").write_text(json.dumps(hf_config(tiny(width=64))))
    else:
        save_file({n: t for n, t in model.state_dict().items() if "k_norm" not in n}, weights)
    with pytest.raises(RunError) as refusal:
        read_model(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [{"width": 0}, {"num_kv_heads": 3}, {"head_dim": 7}, {"vocab_size": 2.5}, {"num_layers": True}, {"tied": 1}],
)
def test_impossible_shapes_are_refused(change):
    with pytest.raises(RecipeError, match=next(iter(change))):
        tiny(**change)


def test_flops_are_six_per_weight_and_token_plus_attention():
    config = tiny()
    weights = count_parameters(config) - VOCAB * 32 - (4 * 32 + 32 + 4 * 8)  # without the embedding and the norms
    assert flops_per_token(config, 1) == 6 * weights + 6 * 2 * 32 * 2
    assert flops_per_token(config, 3) - flops_per_token(config, 1) == 6 * 2 * 32 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("num", "chunk"), [(1, 8), (7, 8), (8, 8), (9, 8), (24, 8), (5, 1)])
def test_the_chunked_loss_equals_the_plain_one(dtype, num, chunk, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", chunk * VOCAB)
    generator = torch.Generator().manual_seed(num)
    x = torch.randn(num, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (num,), generator=generator)
    labels[::4] = loss.NO_TARGET
    results = []
    for form in (loss.summed_loss, loss.plain_summed_loss):
        value = form(x, head, labels)
        results.append([value, *torch.autograd.grad(value / 3, [x, head])])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        assert torch.equal(loss.summed_loss(x, head, labels), results[0][0])


def test_huge_logits_give_a_finite_loss_and_nan_ones_do_not():
    x, head, labels = torch.full((3, 4), 1e4), torch.eye(4), torch.tensor([0, 1, -100])
    head[1] = -1.0
    torch.testing.assert_close(loss.summed_loss(x, head, labels), loss.plain_summed_loss(x, head, labels))
    x[0, 0] = float("nan")
    assert loss.summed_loss(x, head, labels).isnan()


def test_the_loss_compiles_to_the_same_number():
    model = trained(tiny())
    compiled = torch.compile(model, dynamic=False, backend="aot_eager")
    value = loss_sum(compiled, tokens(), tokens(seed=1))
    gradients = torch.autograd.grad(value, list(model.parameters()))
    torch.testing.assert_close(value, loss_sum(model, tokens(), tokens(seed=1)))
    expected = torch.autograd.grad(loss_sum(model, tokens(), tokens(seed=1)), list(model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

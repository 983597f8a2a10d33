"""An export loads elsewhere, gives the same logits, and is complete or not there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from hasten.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from hasten.errors import RunError
from hasten.exports import convert, export
from hasten.model import Decoder, preset, read_model

TEXT = "def f(x):\n    return x  # naïve ☕\n"
SHAPES = {
    "grouped": {"num_layers": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 48},
    "tied": {"num_layers": 2, "width": 48, "num_heads": 2, "num_kv_heads": 2, "head_dim": 24, "tied": True},
    "nano": {},
    "micro": {},
}


def decoder(name: str, vocab_size: int, seed: int = 0) -> Decoder:
    size = name if name in ("nano", "micro") else "nano"
    model = Decoder(preset(size, vocab_size=vocab_size, seq_len=64, **SHAPES[name]), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_it_and_gives_the_same_logits(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe([TEXT] * 20, vocab_size=300)
    model = decoder(name, tokenizer.vocab_size)
    folder = export(model.state_dict(), model.config, tokenizer, tmp_path / "final")
    theirs, their_tokenizer = (
        kind.from_pretrained(folder) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    ids = their_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist()
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(model(torch.tensor([ids])), logits, atol=1e-5, rtol=0)
    assert theirs.config.max_position_embeddings == their_tokenizer.model_max_length == 64
    assert theirs.generation_config.eos_token_id == their_tokenizer.eos_token_id == tokenizer.document_token


def test_their_greedy_text_is_ours(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer()
    model = decoder("grouped", tokenizer.vocab_size)
    export(model.state_dict(), model.config, tokenizer, tmp_path / "final")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    start = torch.tensor([[tokenizer.document_token, *b"def "]])
    written = theirs.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=8)
    for length in range(5, written.shape[1]):
        assert model(written[:, :length])[0, -1].argmax() == written[0, length]


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("fp16", "F16"), ("float32", "F32")])
def test_weights_are_stored_in_the_type_asked_for(dtype, stored, tmp_path):
    model = decoder("tied", 257)
    folder = export(model.state_dict(), model.config, byte_tokenizer(), tmp_path / "first", dtype=dtype)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {stored}
    assert "lm_head.weight" not in names
    converted = convert(folder, tmp_path / "second", dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(read_model(folder).parameters(), read_model(converted).parameters()))
    assert load_tokenizer(converted).sha256 == byte_tokenizer().sha256


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path):
    first, second = decoder("grouped", 257, seed=0), decoder("grouped", 257, seed=1)
    for model in (first, second):
        export(model.state_dict(), model.config, byte_tokenizer(), tmp_path / "final")
    assert torch.equal(read_model(tmp_path / "final").lm_head.weight, second.lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="exists and is no exported model"):
        export(first.state_dict(), first.config, byte_tokenizer(), tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_a_failed_export_leaves_nothing_and_keeps_the_earlier_one(tmp_path):
    model = decoder("grouped", 257)
    export(model.state_dict(), model.config, byte_tokenizer(), tmp_path / "final")
    before = (tmp_path / "final" / "model.safetensors").read_bytes()
    weights = dict(model.state_dict())
    weights["model.norm.weight"] = torch.full((32,), float("nan"))
    with pytest.raises(RunError, match=r"model\.norm\.weight holds values that are not finite"):
        export(weights, model.config, byte_tokenizer(), tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        export(model.state_dict(), model.config, byte_tokenizer(), tmp_path / "file" / "final")


def test_wrong_weights_and_types_are_refused(tmp_path):
    model = decoder("grouped", 257)
    weights, name = dict(model.state_dict()), "model.layers.1.mlp.up_proj.weight"
    wrong = {
        "is missing": {n: t for n, t in weights.items() if n != name},
        "is unknown": {**weights, "more": torch.zeros(1)},
        "has the shape": {**weights, name: torch.zeros(3, 3)},
    }
    for words, given in wrong.items():
        with pytest.raises(RunError, match=words):
            export(given, model.config, byte_tokenizer(), tmp_path / "final")
    with pytest.raises(RunError, match="not finite in fp16"):
        export({**weights, name: weights[name] + 1e6}, model.config, byte_tokenizer(), tmp_path / "final", dtype="fp16")
    with pytest.raises(RunError, match="did you mean 'float32'"):
        export(weights, model.config, byte_tokenizer(), tmp_path / "final", dtype="float16")
    assert not (tmp_path / "final").exists()


def test_an_export_of_masters_by_name_needs_no_tied_head(tmp_path):
    model = decoder("tied", 257)
    folder = export(
        dict(model.named_parameters()), model.config, byte_tokenizer(), tmp_path / "final", document_token=256
    )
    assert torch.equal(read_model(folder).lm_head.weight, model.model.embed_tokens.weight)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 256

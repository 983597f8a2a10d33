"""Sampling follows its definition, the cache changes nothing, and no character is ever broken."""

from __future__ import annotations

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from hasten.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from hasten.errors import RecipeError, RunError
from hasten.exports import export
from hasten.generation import _characters, _tokens, generate, probabilities
from hasten.model import Decoder, preset

SHAPE = {"num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 64}
MIXED = "naïve ☕ 日本語 🙂 end"


def decoder(vocab_size: int = 257, seq_len: int = 64) -> Decoder:
    model = Decoder(preset("nano", vocab_size=vocab_size, seq_len=seq_len, **SHAPE), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def plain_probabilities(logits: list[float], temperature: float, top_p: float) -> torch.Tensor:
    """By the definition, one token at a time."""
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0).tolist()
    kept, total = set(), 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if total >= top_p:
            break
        kept.add(token)
        total += p[token]
    return torch.tensor([p[token] / total if token in kept else 0.0 for token in range(len(p))])


@pytest.mark.parametrize("temperature", [0.1, 0.8, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1.0])
def test_probabilities_equal_a_plain_reference(temperature, top_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    found = probabilities(logits, temperature=temperature, top_p=top_p)
    torch.testing.assert_close(found, plain_probabilities(logits.tolist(), temperature, top_p), atol=1e-6, rtol=1e-5)


def test_top_p_keeps_the_token_that_reaches_the_sum():
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()
    for top_p, kept in [(0.49, [1]), (0.51, [0, 1]), (0.74, [0, 1]), (0.76, [0, 1, 2]), (1.0, [0, 1, 2, 3])]:
        assert probabilities(logits, temperature=1, top_p=top_p).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e-6])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert probabilities(logits, temperature=temperature, top_p=0.9).tolist() == [0, 1, 0]


def test_greedy_text_equals_the_argmax_of_plain_forward_passes():
    model, tokenizer = decoder(), byte_tokenizer()
    context = [tokenizer.document_token, *b"def "]
    for _ in range(30):
        context.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        if context[-1] == tokenizer.document_token:
            break
    text = "".join(generate(model, tokenizer, "def ", max_tokens=30, temperature=0))
    assert tokenizer.decode(context[5:]).startswith(text)
    assert len(text.encode()) >= 25


@pytest.mark.parametrize("prompt_length", [1, 7, 8, 9, 50])
def test_text_beyond_the_trained_length_goes_on_from_its_last_half_row(prompt_length):
    model, context = decoder(seq_len=8), list(range(prompt_length))
    seen = []

    def draw(logits_V: torch.Tensor) -> int:
        seen.append(logits_V)
        return len(seen) + 100

    written = context + list(_tokens(model, context, 20, draw))
    assert written[prompt_length:] == list(range(101, 121))
    for number, logits_V in enumerate(seen):
        so_far = written[: prompt_length + number]
        windows = [so_far[-n:] for n in range(min(4, len(so_far)), 9)]
        plain = [model(torch.tensor([window]))[0, -1] for window in windows]
        assert any(torch.allclose(logits_V, other_V, atol=1e-4) for other_V in plain)


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
def test_no_more_tokens_than_asked_for(max_tokens):
    model, tokenizer = decoder(), byte_tokenizer()
    text = "".join(generate(model, tokenizer, max_tokens=max_tokens, seed=0))
    assert len(text) <= max_tokens


def test_the_end_of_the_document_ends_the_text():
    model, tokenizer = decoder(), byte_tokenizer()
    texts = []
    for sign in (1.0, -1.0):  # one of them makes the begin/end token the likeliest, the other byte 0
        model.lm_head.weight.data.zero_()
        model.lm_head.weight.data[tokenizer.document_token] = sign
        texts.append("".join(generate(model, tokenizer, temperature=0, max_tokens=1)))
    assert sorted(texts) == ["", "\0"]


def test_a_seed_repeats_the_text_and_leaves_the_global_random_state_alone():
    model, tokenizer = decoder(), byte_tokenizer()
    before = torch.get_rng_state()
    texts = ["".join(generate(model, tokenizer, "a", max_tokens=30, seed=seed)) for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts[1:])) >= 3  # an untrained model may end at once under two seeds
    assert torch.equal(before, torch.get_rng_state())


def test_a_folder_is_enough(tmp_path):
    tokenizer = train_bpe([MIXED] * 5, vocab_size=280)
    model = decoder(tokenizer.vocab_size)
    folder = export(model.state_dict(), model.config, tokenizer, tmp_path / "final")
    from_folder = "".join(generate(folder, prompt="end", max_tokens=20, seed=3))
    assert from_folder == "".join(generate(model, tokenizer, "end", max_tokens=20, seed=3))


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": -1}],
)
def test_impossible_settings_are_refused_at_the_call(setting):
    with pytest.raises(RecipeError, match=next(iter(setting))):
        generate(decoder(), byte_tokenizer(), **setting)
    with pytest.raises(RecipeError, match="tokenizer"):
        generate(decoder())


def test_a_diverged_model_is_named():
    model = decoder()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        list(generate(model, byte_tokenizer()))


def byte_fallback_tokenizer() -> Tokenizer:
    """A small vocabulary that spells what it does not know in byte tokens and marks spaces, as Llama 2's does."""
    words = ["<|endoftext|>", "▁", "n", "a", "v", "e", "d", "▁end"]
    vocabulary = {word: number for number, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(inner.to_str())


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bpe": train_bpe(["plain ascii text"] * 5, vocab_size=270),
    "fallback": byte_fallback_tokenizer(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streamed_pieces_are_whole_characters_and_add_up(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(MIXED).tolist()
    pieces = list(_characters(ids, tokenizer, tokenizer.document_token))
    assert "".join(pieces) == tokenizer.decode(ids) == MIXED
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_space_after_the_prompt_is_kept(name):
    tokenizer = TOKENIZERS[name]
    first, second = tokenizer.encode("ave").tolist(), tokenizer.encode("ave dan").tolist()
    rest = second[len(first) :]
    assert "".join(_characters(rest, tokenizer, first[-1])) == " dan"


def test_an_unfinished_character_is_not_shown():
    ids = list("é🙂".encode())
    assert "".join(_characters(ids[:-1], byte_tokenizer(), 256)) == "é"
    assert "".join(_characters([0xFF, 0x41], byte_tokenizer(), 256)) == "\ufffdA"  # no character begins so

"""Every token is predicted once, every byte counted once, and tools outside agree."""

from __future__ import annotations

import lzma
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from hasten import evaluation
from hasten.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from hasten.errors import DataError
from hasten.evaluation import baselines, evaluate, evaluate_shards
from hasten.exports import export
from hasten.model import Decoder, preset

LENGTH = 16
SHAPE = {"num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 64}


@dataclass
class Stream:
    """A stored stream of tokens, in memory, that remembers what was read of it."""

    tokens: np.ndarray
    source_bytes: int
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.num_tokens
        self.spans.append((start, stop))
        return self.tokens[start:stop]


def decoder(vocab_size: int, seed: int = 0) -> Decoder:
    model = Decoder(preset("nano", vocab_size=vocab_size, seq_len=LENGTH, **SHAPE), seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # away from guessing evenly
    return model


def stream_of(texts, tokenizer) -> Stream:
    parts = [np.array([tokenizer.document_token, *tokenizer.encode(text)]) for text in texts]
    return Stream(np.concatenate(parts).astype(np.uint16), sum(len(text.encode()) for text in texts))


def hand_loop(model, tokens, seq_len) -> float:
    """Nats of all tokens but the first, one row at a time, by the definition."""
    total = 0.0
    for start in range(0, len(tokens) - 1, seq_len):
        row = torch.tensor(tokens[start : start + seq_len + 1].astype(np.int64))[None]
        with torch.no_grad():
            output = model(row[:, :-1])
        log_p = getattr(output, "logits", output)[0].double().log_softmax(-1)
        total -= log_p[torch.arange(row.shape[1] - 1), row[0, 1:]].sum().item()
    return total


TEXTS = ["def f(x):\n    return x\n", "naïve café ☕\n", "", "import this\n" * 9]


@pytest.mark.parametrize("num_tokens", [2, LENGTH, LENGTH + 1, LENGTH + 2, 3 * LENGTH, 3 * LENGTH + 1, 100])
@pytest.mark.parametrize("micro_rows", [None, 1, 2])
def test_every_token_but_the_first_is_predicted_once(num_tokens, micro_rows):
    tokenizer = byte_tokenizer()
    model, stream = decoder(tokenizer.vocab_size), stream_of(TEXTS, tokenizer)
    stream.tokens = stream.tokens[:num_tokens]
    found = evaluate_shards(
        model, stream, seq_len=LENGTH, document_token=tokenizer.document_token, micro_rows=micro_rows
    )
    nats = hand_loop(model, stream.tokens, LENGTH)
    assert found.tokens == num_tokens - 1
    assert found.bytes == stream.source_bytes
    assert found.loss == pytest.approx(nats / (num_tokens - 1), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / stream.source_bytes, rel=1e-5)


def test_a_stream_without_a_token_to_predict_is_refused():
    with pytest.raises(DataError, match="no token to predict"):
        evaluate_shards(decoder(257), Stream(np.array([256]), 0), seq_len=4, document_token=256)


@pytest.mark.parametrize(("max_tokens", "rows"), [(1, 1), (LENGTH, 1), (LENGTH + 1, 2), (10**6, 7)])
def test_a_sample_is_whole_rows_spread_over_the_stream(max_tokens, rows):
    stream = Stream(np.arange(7 * LENGTH + 1) % 251, 200)
    found = evaluate_shards(decoder(257), stream, seq_len=LENGTH, document_token=256, max_tokens=max_tokens)
    starts = [start for start, _ in stream.spans]
    assert len(set(starts)) == rows
    assert found.tokens == rows * LENGTH
    assert found.bytes == round(200 * rows / 7)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * 7 * LENGTH / 200)
    assert starts == [number * 7 // rows * LENGTH for number in range(rows)]


def test_training_mode_and_gradients_are_left_alone():
    model, tokenizer = decoder(257), byte_tokenizer()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    for mode in (True, False):
        model.train(mode)
        evaluate_shards(model, stream_of(TEXTS, tokenizer), seq_len=LENGTH, document_token=256)
        assert model.training is mode
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))


def test_the_exported_model_in_transformers_gives_the_same_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe(TEXTS * 20, vocab_size=300)
    model, stream = decoder(tokenizer.vocab_size), stream_of(TEXTS * 3, tokenizer)
    folder = export(model.state_dict(), model.config, tokenizer, tmp_path / "final")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = evaluate_shards(model, stream, seq_len=LENGTH, document_token=tokenizer.document_token)
    assert found.loss * found.tokens == pytest.approx(hand_loop(theirs, stream.tokens, LENGTH), rel=1e-4)


def test_a_folder_and_a_file_give_the_loss_of_the_same_stream(tmp_path, validation_file):
    tokenizer = byte_tokenizer()
    model = decoder(tokenizer.vocab_size)
    folder = export(model.state_dict(), model.config, tokenizer, tmp_path / "final")
    stream = stream_of([validation_file.read_text(encoding="utf-8")], load_tokenizer(folder))
    expected = evaluate_shards(model, stream, seq_len=LENGTH, document_token=tokenizer.document_token)
    found = evaluate(folder, validation_file)
    assert found.tokens == len(validation_file.read_bytes())
    assert found.bytes == len(validation_file.read_bytes())
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert evaluate(model, [validation_file], tokenizer=tokenizer) == found


def test_a_model_without_a_tokenizer_is_refused(validation_file):
    with pytest.raises(DataError, match="tokenizer"):
        evaluate(decoder(257), validation_file)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), train_bpe(TEXTS * 20, vocab_size=300)], ids=["bytes", "bpe"])
def test_baselines_are_those_of_the_held_out_bytes(tokenizer):
    found = baselines(stream_of(TEXTS, tokenizer), tokenizer)
    text = "".join(TEXTS).encode()
    shares = [text.count(byte) / len(text) for byte in set(text)]
    assert found["xz_bpb"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert found["unigram_bpb"] == pytest.approx(-sum(share * math.log2(share) for share in shares))
    assert found["baseline_bytes"] == len(text)
    assert found["baseline_is_capped"] == 0


@pytest.mark.parametrize(("cap", "is_capped"), [(99, 1), (100, 0), (101, 0)])
def test_baselines_say_when_they_saw_a_part_only(cap, is_capped, monkeypatch):
    monkeypatch.setattr(evaluation, "BASELINE_BYTES", cap)
    found = baselines(stream_of(["a" * 60, "b" * 40], byte_tokenizer()), byte_tokenizer())
    assert (found["baseline_bytes"], found["baseline_is_capped"]) == (min(cap, 100), is_capped)


def test_one_byte_repeated_has_no_entropy():
    assert baselines(stream_of(["aaaa"], byte_tokenizer()), byte_tokenizer())["unigram_bpb"] == 0

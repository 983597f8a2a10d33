"""Rows of growing length, compiled: a graph for every length, and none after all lengths were seen."""

from __future__ import annotations

import random

import pytest
import torch

from hasten.model import Decoder, ModelConfig, loss_sum
from hasten.model.attention import _bounds, mask_for

VOCAB, TOKENS = 31, 128
LENGTHS = (16, 32, 64, 128)


def model(attention: str = "auto", dtype: torch.dtype = torch.float32) -> Decoder:
    shape = {"num_layers": 1, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 32}
    return Decoder(ModelConfig(**shape, vocab_size=VOCAB, seq_len=TOKENS, tied=False), seed=0, attention=attention).to(
        dtype
    )


class Counter:
    """A compiler that counts the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list) -> object:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lengths_of(steps: int, lengths: tuple[int, ...] = LENGTHS) -> list[int]:
    """All lengths once, a ramp over half of the rest, then full rows with a tenth of shorter ones mixed in."""
    rng, rest = random.Random(0), steps - len(lengths)
    ramp = [lengths[len(lengths) * step // (rest // 2 + 1)] for step in range(rest // 2)]
    replayed = [rng.choice(lengths[:-1]) if rng.random() < 0.1 else lengths[-1] for _ in range(rest - rest // 2)]
    return [*reversed(lengths), *ramp, *replayed]


def batches(lengths: list[int], tokens: int = TOKENS):
    """Rows of new tokens and new documents, viewed at each length: (tokens, document ids, a window)."""
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        tokens_BT = torch.randint(0, VOCAB, (tokens // length, length), generator=generator)
        is_first_N = torch.rand(tokens, generator=generator) < 0.1
        window = torch.randint(1, length + 1, (), generator=generator)
        yield tokens_BT, is_first_N.cumsum(0).int().view(-1, length), window


@pytest.mark.parametrize("attention", ["varlen", "dense"])
@pytest.mark.parametrize("dynamic", [False, None])
def test_no_graph_is_compiled_after_each_length_was_seen(dynamic, attention):
    counter, plain, seen = Counter(), model(attention), 0
    compiled = torch.compile(plain, dynamic=dynamic, backend=counter, fullgraph=True)
    for step, (tokens, ids, window) in enumerate(batches(lengths_of(1000))):
        value = loss_sum(compiled, tokens, tokens, ids, window)
        if step < len(LENGTHS):
            value.backward()
            torch.testing.assert_close(value, loss_sum(plain, tokens, tokens, ids, window))
            seen = counter.graphs
    assert counter.graphs == seen <= len(LENGTHS)
    assert dynamic is None or seen == len(LENGTHS)


@pytest.mark.parametrize("kind", ["no documents", "documents", "window"])
@pytest.mark.parametrize("dynamic", [False, None])
def test_graphs_are_no_more_than_lengths_whatever_limits_the_view(dynamic, kind):
    counter = Counter()
    compiled = torch.compile(model("varlen"), dynamic=dynamic, backend=counter, fullgraph=True)
    for tokens, ids, window in batches(lengths_of(60)):
        ids, window = ids if kind == "documents" else None, window if kind == "window" else None
        loss_sum(compiled, tokens, tokens, ids, window).backward()
    assert 1 <= counter.graphs <= len(LENGTHS)


def test_eight_lengths_fit_what_the_compiler_allows_by_itself():
    lengths = (1, 2, 4, 8, 16, 32, 64, 128)
    counter = Counter()
    compiled = torch.compile(model(), dynamic=False, backend=counter, fullgraph=True)  # one more would be an error
    for tokens, ids, _ in batches(lengths_of(40, lengths)):
        loss_sum(compiled, tokens, tokens, ids)
    assert counter.graphs == len(lengths)


@pytest.mark.parametrize("windowed", [False, True])
def test_flex_attention_compiles_once_for_each_length(windowed):
    counter, lengths = Counter(), (64, 128)
    compiled = torch.compile(model(), dynamic=False, backend=counter, fullgraph=True)
    for tokens, ids, window in batches(lengths_of(12, lengths)):
        rows, length = tokens.shape
        shape = {"rows": rows, "length": length, "device": tokens.device, "dtype": torch.float32}
        mask = mask_for("flex", ids, window if windowed else None, **shape)
        with torch.no_grad():  # on a CPU it cannot go backward
            compiled(tokens, mask=mask)
    assert counter.graphs == len(lengths)


def test_the_gpu_kernel_for_documents_is_traced_once_for_each_length():
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen attention")
    graphs = []

    def without_running(graph, _):  # there may be no GPU, but what a compiler is given needs none
        graphs.append(graph)
        return lambda *_: (torch.zeros(()),)

    compiled = torch.compile(model(dtype=torch.bfloat16), dynamic=False, backend=without_running, fullgraph=True)
    lengths = (1024, 2048)  # 2,048 tokens have room for 32 documents
    for tokens, ids, _ in batches(lengths_of(12, lengths), tokens=2048):
        mask = _bounds(ids.div(8, rounding_mode="floor"), tokens.device)
        assert mask.bounds.shape == (33,)
        compiled(tokens, labels_BT=tokens, mask=mask)
    assert len(graphs) == len(lengths)


def test_documents_can_be_given_inside_compiled_code():
    plain, (tokens, ids, window) = model(), next(batches([64]))
    compiled = torch.compile(plain, dynamic=False, backend=Counter(), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, ids, window=window), plain(tokens, ids, window=window))


@pytest.mark.heavy
def test_what_the_compiler_makes_gives_the_same_gradients():
    plain, (tokens, ids, window) = model("varlen"), next(batches([64]))
    compiled = torch.compile(plain, dynamic=False)
    results = []
    for form in (compiled, plain):
        value = loss_sum(form, tokens, tokens, ids, window)
        results.append([value, *torch.autograd.grad(value, list(plain.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)

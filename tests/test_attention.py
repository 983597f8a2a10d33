"""Packed rows: every back end equals plain attention, and a packed row equals its documents alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import RecipeError
from hasten.model import Decoder, ModelConfig, loss_sum
from hasten.model.attention import Causal, Scores, Spans, Work, _bounds, choose, mask_for
from hasten.model.decoder import _rotary_tables
from hasten.model.spans import BLOCK, SHARED, attend_by_spans, plan_spans

VOCAB = 53
CPU = torch.device("cpu")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")


def decoder(length: int, attention: str = "auto", dtype: torch.dtype = torch.float64) -> Decoder:
    """A decoder of two layers whose every weight is away from its initial value."""
    shape = {"num_layers": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 48}
    config = ModelConfig(**shape, vocab_size=VOCAB, seq_len=length, tied=False)
    model = Decoder(config, seed=0, attention=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.to(dtype)
    if dtype == torch.float64:  # the tables of a float32 model are rounded
        model.cosine_TD, model.sine_TD = _rotary_tables(config, length, dtype)
    return model


def ids_of(*rows: list[int]) -> torch.Tensor:
    """Document ids of rows that hold documents of these lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]).int()


def heads(rows: int, length: int, queries: int = 4, groups: int = 2, dtype=torch.float64, device="cpu", size: int = 8):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(rows, length, num, size, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for num in (queries, groups, groups)
    )


def plain_attention(q, k, v, ids, window):
    """Softmax over the seen keys, position by position of the definition."""
    repeats, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < window) & (ids[:, None, :, None] == ids[:, None, None, :])
    scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def mask_of(backend, ids, window, dtype=torch.float64, device=CPU):
    window = None if window is None else torch.tensor(window)
    return mask_for(backend, ids, window, rows=ids.shape[0], length=ids.shape[1], device=device, dtype=dtype)


LAYOUTS = {
    "one document": [[300], [300]],
    "one token each": [[1] * 300, [299, 1]],
    "around the sizes of spans": [[SHARED, SHARED, SHARED + 1, 300 - 3 * SHARED - 1], [1, BLOCK + 1, BLOCK, 42]],
    "many short": [[7, 3, 50, 1, 1, 100, 2, 30, 60, 46], [150, 64, 1, 85]],
}


@pytest.mark.parametrize("window", [None, 1, 2, SHARED, BLOCK, 299, 300, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["varlen", "dense"])
def test_outputs_and_gradients_equal_plain_attention(backend, layout, window):
    ids, inputs = ids_of(*LAYOUTS[layout]), heads(2, 300)
    grad = torch.randn(2, 4, 300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = mask_of(backend, ids, window).attend(*inputs)
    plain = plain_attention(*inputs, ids, window or 300)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    gradients = (torch.autograd.grad(form, inputs, grad) for form in (ours, plain))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flex_attention_sees_what_plain_attention_sees(layout, window):
    ids, inputs = ids_of(*LAYOUTS[layout]), heads(2, 300, dtype=torch.float32)
    q, k, v = (x.detach() for x in inputs)  # on a CPU it cannot go backward
    ours = mask_of("flex", ids, window, torch.float32).attend(q, k, v)
    torch.testing.assert_close(ours, plain_attention(q, k, v, ids, window or 300), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["varlen", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_close_and_stays_finite(dtype, backend):
    ids, inputs = ids_of([1, 200, 99], [300]), heads(2, 300, dtype=dtype)
    ours = mask_of(backend, ids, 70, dtype).attend(*inputs)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, plain_attention(*inputs, ids, 70), atol=2e-2, rtol=2e-2)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(ours.sum(), inputs))


@pytest.mark.parametrize("backend", ["varlen", "dense"])
def test_a_window_without_documents_is_a_sliding_window(backend):
    inputs, ids = heads(2, 300), torch.zeros(2, 300)
    mask = mask_for(backend, None, torch.tensor(40), rows=2, length=300, device=CPU, dtype=torch.float64)
    torch.testing.assert_close(mask.attend(*inputs), plain_attention(*inputs, ids, 40), atol=1e-12, rtol=0)


def test_nothing_is_masked_where_nothing_limits_the_view():
    kinds = {backend: type(mask_for(backend, None, None, rows=1, length=9, device=CPU, dtype=torch.float32))
             for backend in ("varlen", "flex", "dense")}  # fmt: skip
    assert set(kinds.values()) == {Causal}


# --- spans ------------------------------------------------------------------------------------------------------------

rows_of_documents = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=30), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(rows=rows_of_documents, window=st.integers(1, 400))
def test_spans_hold_every_query_once_and_every_key_it_sees(rows, window):
    length = max(sum(row) for row in rows)
    ids = ids_of(*[[*row, length - sum(row)] for row in rows])  # the rest is padding
    plan = plan_spans(ids, window)
    assert len(plan) == len(plan_spans(torch.arange(length).repeat(len(rows), 1), 1))  # whatever the documents
    queries = torch.zeros(ids.shape, dtype=torch.int64)
    for row, start, stop, first_key, masked in plan.tolist():
        queries[row, start:stop] += 1
        if start < stop:
            seen = [s for s in range(max(0, start - window + 1), start + 1) if ids[row, s] == ids[row, start]]
            assert first_key <= seen[0]
            is_whole = first_key == start and ids[row, start] == ids[row, stop - 1] and stop - start <= window
            assert masked == (not is_whole)
    assert (queries == 1).all()


def test_the_operation_is_sound_for_a_compiler():
    ids = ids_of([5, 90, 1, 4], [100])
    q, k, v = heads(2, 100, groups=4)
    torch.library.opcheck(attend_by_spans, (q, k, v, ids, torch.tensor(30), plan_spans(ids, 30)))


# --- the whole model --------------------------------------------------------------------------------------------------


def padded(length: int):
    """Two rows: a cut document, documents of one token, and padding with an id of its own and no targets."""
    first = [70, 1, 1, 40, length - 130, 18]
    second = [length - 60, 1, 9, 50]
    generator = torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(0, VOCAB, (2, length), generator=generator) for _ in range(2))
    labels[0, length - 18 :] = labels[1, length - 50 :] = -100
    tokens[0, length - 18 :] = tokens[1, length - 50 :] = 0
    return tokens, labels, first, second


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("backend", ["varlen", "dense"])
@pytest.mark.parametrize("length", [192, 320])
def test_packed_rows_equal_their_documents_alone(length, backend, dtype, tolerance):
    # Alone, a document begins at position 0: positions that count from the start of the row change nothing.
    model = decoder(length, backend, dtype)
    tokens, labels, *lengths = padded(length)
    packed = loss_sum(model, tokens, labels, ids_of(*lengths))
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(packed, parameters)
    alone = torch.zeros((), dtype=dtype)
    for row, pieces in enumerate(lengths):
        for piece, label in zip(tokens[row].split(pieces), labels[row].split(pieces), strict=True):
            alone = alone + loss_sum(model, piece[None], label[None])
    torch.testing.assert_close(packed, alone, atol=0, rtol=tolerance)
    for ours, theirs in zip(gradients, torch.autograd.grad(alone, parameters), strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("backend", ["varlen", "dense"])
def test_the_last_piece_of_a_cut_document_sees_its_own_row_only(backend):
    model = decoder(100, backend)
    whole = torch.randint(0, VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    rows, ids = whole.view(2, 100), torch.zeros(2, 100, dtype=torch.int32)  # one document over two rows, one id
    with torch.no_grad():
        torch.testing.assert_close(model(rows, ids), model(rows), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["varlen", "dense"])
def test_a_window_as_long_as_the_row_is_no_window(backend):
    model, (tokens, labels, *lengths) = decoder(192, backend), padded(192)
    for ids in (None, ids_of(*lengths)):
        full = loss_sum(model, tokens, labels, ids)
        for window in (192, 193, 10_000):
            torch.testing.assert_close(loss_sum(model, tokens, labels, ids, torch.tensor(window)), full)
        assert not torch.isclose(loss_sum(model, tokens, labels, ids, torch.tensor(20)), full)


@pytest.mark.parametrize("backend", ["varlen", "dense"])
def test_with_a_window_of_one_every_position_is_alone(backend):
    model, (tokens, labels, *_) = decoder(192, backend), padded(192)
    alone = loss_sum(model, tokens.view(-1, 1), labels.view(-1, 1))
    torch.testing.assert_close(loss_sum(model, tokens, labels, None, torch.tensor(1)), alone)


@pytest.mark.parametrize("backend", ["varlen", "dense"])
@pytest.mark.parametrize("window", [2, 5, 150])
def test_a_window_in_every_layer_reaches_layers_times_as_far(backend, window):
    model, (tokens, *_) = decoder(192, backend), padded(192)
    reach = 2 * (window - 1)  # two layers
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    with torch.no_grad():
        before, after = (model(x, window=torch.tensor(window)) for x in (tokens, changed))
    moved = (before != after).any(-1).any(0)
    assert moved[min(reach, 191)]
    assert not moved[reach + 1 :].any()


@pytest.mark.parametrize("backend", ["varlen", "dense"])
def test_documents_are_kept_apart_bit_for_bit(backend):
    model, (tokens, _, *lengths) = decoder(320, backend, torch.float32), padded(320)
    ids, row = ids_of(*lengths), lengths[0]
    with torch.no_grad():
        reference = model(tokens, ids)
        for stop, size in zip(itertools.accumulate(row), row, strict=True):
            changed = tokens.clone()
            changed[0, stop - size : stop] = (changed[0, stop - size : stop] + 1) % VOCAB
            logits = model(changed, ids)
            assert torch.equal(logits[0, : stop - size], reference[0, : stop - size])
            assert torch.equal(logits[0, stop:], reference[0, stop:])
            assert torch.equal(logits[1], reference[1])


def test_rows_viewed_shorter_keep_their_ids():
    model, (tokens, labels, *lengths) = decoder(320), padded(320)
    views = [x.view(-1, 80) for x in (tokens, labels, ids_of(*lengths))]
    alone = sum(loss_sum(model, *(x[row : row + 1] for x in views)) for row in range(len(views[0])))
    torch.testing.assert_close(loss_sum(model, *views), alone)


def test_the_mask_is_made_once_for_all_layers_and_can_be_given():
    model, (tokens, labels, *lengths) = decoder(192), padded(192)
    mask = model.mask(tokens, ids_of(*lengths))
    torch.testing.assert_close(
        model(tokens, labels_BT=labels, mask=mask), loss_sum(model, tokens, labels, ids_of(*lengths))
    )
    assert isinstance(mask, Scores)
    assert isinstance(decoder(192, "varlen").mask(tokens, ids_of(*lengths)), Spans)


# --- the choice -------------------------------------------------------------------------------------------------------

GPU = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "length": 512, "capability": (9, 0)}
GPU |= {"has_varlen": True, "has_triton": True}
HERE = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "length": 512}


@pytest.mark.parametrize(
    ("work", "backend", "words"),
    [
        (HERE, "varlen", "the fastest"),
        ({**HERE, "windowed": True}, "varlen", ""),
        ({**HERE, "length": 511}, "dense", "rows of 511 are too short"),
        ({**HERE, "threads": 2, "length": 1023}, "dense", "below 1024"),
        ({**HERE, "threads": 2, "length": 1024}, "varlen", ""),
        ({**HERE, "compiling": True}, "dense", "compiled"),
        ({**HERE, "device": "mps"}, "dense", "mps"),
        (GPU, "varlen", "the fastest"),
        ({**GPU, "has_varlen": False}, "flex", "has none"),
        ({**GPU, "has_varlen": False, "has_triton": False}, "dense", "triton is not installed"),
        ({**GPU, "compiling": True}, "flex", "compiled"),
        ({**GPU, "dtype": torch.float32}, "flex", "float32"),
        ({**GPU, "capability": (7, 5)}, "flex", "7.5"),
        ({**GPU, "capability": (6, 1)}, "dense", "6.1"),
        ({**GPU, "windowed": True}, "flex", "window"),
        ({**GPU, "head_dim": 12}, "dense", "not 12"),
        ({**GPU, "head_dim": 320}, "flex", "not 320"),
    ],
)
def test_the_choice_and_its_reason(work, backend, words):
    choice = choose(Work(**work))
    assert choice.backend == backend
    assert words in choice.reason


def test_a_wish_is_granted_or_refused_in_one_sentence():
    assert choose(Work(**HERE), "dense") == choose(Work(**{**HERE, "threads": 8}), "dense")
    assert choose(Work(**HERE, threads=8), "varlen").backend == "varlen"
    with pytest.raises(RecipeError, match=r"^attention=flex cannot train here, because it cannot train on cpu; \S.*$"):
        choose(Work(**HERE), "flex")
    with pytest.raises(RecipeError, match="did you mean 'dense'"):
        choose(Work(**HERE), "dens")
    with pytest.raises(RecipeError, match="flex"):
        decoder(8, "flex").mask(torch.zeros(1, 8), torch.zeros(1, 8))


# --- the GPU's forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("documents", "room"), [(2, 8), (8, 8), (9, 16), (33, 64)])
def test_bounds_have_a_length_that_hardly_depends_on_the_documents(documents, room):
    lengths = [[1] * (documents - 2) + [256 - documents + 2], [256]]  # 512 tokens: room for 8 documents
    assert _bounds(ids_of(*lengths), CPU).bounds.shape == (room + 1,)


def test_bounds_are_where_documents_begin_and_then_the_end():
    ids = torch.tensor([[5, 5, 6, 6], [6, 6, 6, 9]], dtype=torch.int32)  # a number goes on in the next row: another one
    assert _bounds(ids, CPU).bounds.tolist() == [0, 2, 4, 7, 8]
    assert _bounds(torch.zeros(1, 256, dtype=torch.int32), CPU).bounds.tolist() == [0, 256, 256, 256, 256]


@gpu
@needs_gpu
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("backend", ["varlen", "flex", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_gives_what_plain_attention_gives(layout, backend, window):
    if backend == "varlen" and window is not None:
        pytest.skip("windows go to FlexAttention")
    cuda = torch.device("cuda")
    dtype = torch.bfloat16 if backend == "varlen" else torch.float32
    ids, inputs = ids_of(*LAYOUTS[layout]), heads(2, 300, dtype=dtype, device="cuda", size=32)
    ours = mask_of(backend, ids, window, dtype, cuda).attend(*inputs)
    here = [x.detach().cpu().double().requires_grad_() for x in inputs]
    plain = plain_attention(*here, ids, window or 300)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 5e-3
    torch.testing.assert_close(ours.cpu().double(), plain, atol=tolerance, rtol=tolerance)
    results = zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(plain.sum(), here), strict=True)
    for one, other in results:
        torch.testing.assert_close(one.cpu().double(), other, atol=5 * tolerance, rtol=5 * tolerance)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiled_model_on_a_gpu_equals_the_plain_one(dtype):
    model, (tokens, labels, *lengths) = decoder(320, dtype=dtype), padded(320)
    plain = loss_sum(model.float(), tokens, labels, ids_of(*lengths))
    compiled = torch.compile(model.to("cuda", dtype), dynamic=False)
    value = loss_sum(compiled, tokens.cuda(), labels.cuda(), ids_of(*lengths))
    torch.testing.assert_close(value.cpu().float(), plain, rtol=2e-2, atol=0)

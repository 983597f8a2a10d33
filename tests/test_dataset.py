"""The dataset: items that models take, a state that says what was handed out, and the loops of other packages."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from itertools import chain, islice, pairwise

import numpy as np
import pytest
import torch
from synthetic_documents import WINDOW_TOKENS, Places, Synthetic, counts_of
from torch.utils.data import DataLoader

import hasten.data
from hasten.data import LengthSchedule, PackedBatches, for_transformers
from hasten.data.items import cumulative_lengths
from hasten.data.windows import Pack
from hasten.errors import DataError, RecipeError

LENGTHS = np.random.default_rng(0).integers(1, 60, 300).tolist()


def packed(documents=None, **changed) -> PackedBatches:
    """Return batches of 4 rows of 32 tokens, each token its own place."""
    return PackedBatches(
        Places(LENGTHS, 7) if documents is None else documents, **{"seq_len": 32, "batch_tokens": 128, **changed}
    )


def taken(data, count: int) -> list[list[int]]:
    """Return the tokens of the next items."""
    return [item["input_ids"].flatten().tolist() for item in islice(data, count)]


# --- items ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [32, 8])
def test_an_item_is_what_models_take(length):
    item = next(iter(packed(lengths=lambda progress: length, total_steps=10)))
    types = {name: value.dtype for name, value in item.items() if name != "max_seqlen"}
    assert types == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "document_ids": torch.int32,
        "cu_seqlens": torch.int32,
    }
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert item[name].shape == (128 // length, length)
        assert item[name].is_contiguous()
    assert item["max_seqlen"] == length
    # The cumulative lengths say where positions begin again.
    ends = item["cu_seqlens"].unique()
    assert (item["position_ids"].flatten() == 0).nonzero().flatten().tolist() == ends[:-1].tolist()
    assert ends[-1] == 128
    assert ends.diff().max() <= length


def test_without_a_document_mask_an_item_has_tokens_labels_and_positions():
    item = next(iter(packed(document_mask=False)))
    assert sorted(item) == ["input_ids", "labels", "position_ids"]
    assert item["position_ids"].tolist() == [list(range(32))] * 4


@pytest.mark.parametrize("packing", ["best_fit", "chunk", "pad"])
def test_cumulative_lengths_have_one_size_for_one_shape(packing):
    data = packed([[1]] * 40 + [[1, 2, 3] * 20] * 10, document_token=0, packing=packing, batch_tokens=64)
    sizes = {len(item["cu_seqlens"]) for item in islice(data, 60)}
    assert len(sizes) == 1
    lengths = packed([[]] * 300, document_token=0, lengths=lambda progress: 4, total_steps=60)
    assert {len(item["cu_seqlens"]) for item in lengths} == {192}


def test_cumulative_lengths_count_documents_across_rows():
    assert cumulative_lengths(torch.tensor([[3, 3, 3], [3, 4, 5]]), 8).tolist() == [0, 3, 4, 5, 6, 6, 6, 6]


# --- epochs, lengths, ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["best_fit", "chunk", "pad"])
@pytest.mark.parametrize("overflow", ["split", "truncate", "drop"])
def test_an_epoch_has_every_token_once_or_counted(packing, overflow):
    if (packing, overflow) in {("chunk", "truncate"), ("chunk", "drop")}:
        pytest.skip("chunks are always split")
    data = packed(packing=packing, overflow=overflow, batch_tokens=32)
    seen = Counter()
    for item in islice(data, data.report().rows):
        seen.update(item["input_ids"][item["labels"] != -100].tolist())
    report = data.report()
    assert set(seen.values()) == {1}
    assert len(seen) == report.targets
    assert report.targets + sum(report.lost.values()) == report.tokens == sum(LENGTHS)
    assert data.epochs == 1.0


def test_an_epoch_of_buckets_has_every_token_once():
    data = packed(Places([5] * 100 + [12] * 40 + [30] * 20, 7), mode="bucket", buckets=(8, 16, 32))
    seen, shapes = Counter(), set()
    for item in data:
        seen.update(item["input_ids"][item["labels"] != -100].tolist())
        shapes.add(tuple(item["input_ids"].shape))
        if data.epochs == 1.0:
            break
    assert set(seen.values()) == {1}
    assert len(seen) == 500 + 480 + 600 - 1
    assert shapes == {(16, 8), (8, 16), (4, 32)}


def test_views_read_the_same_tokens_under_every_schedule():
    schedule = LengthSchedule(32, (8, 16, 32), growth="steps", share=0.8, replay=0.5)
    plain, short = packed(total_steps=20), packed(total_steps=20, lengths=schedule)
    shapes = [item["input_ids"].shape[1] for item in packed(total_steps=20, lengths=schedule)]
    assert shapes[:16] == [8] * 8 + [16] * 8
    assert set(shapes[16:]) <= {8, 16, 32}
    assert taken(short, 99) == taken(plain, 99)


@pytest.mark.parametrize("mode", ["view", "bucket"])
def test_items_of_a_step_and_ranks_together_are_the_step(mode):
    whole = taken(packed(mode=mode, batch_tokens=256), 6)
    micro = taken(packed(mode=mode, batch_tokens=256, micro_rows=2), 24)
    assert [list(chain(*micro[4 * step : 4 * step + 4])) for step in range(6)] == whole
    ranks = [taken(packed(mode=mode, batch_tokens=256, rank=rank, world_size=3), 6) for rank in range(3)]
    assert [list(chain(*(rank[step] for rank in ranks))) for step in range(6)] == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_tokens": 100}, "batch_tokens=100 is no multiple of seq_len=32: give 96 or 128"),
        ({"batch_tokens": 20}, "no multiple of seq_len=32: give 32"),
        ({"seq_len": 0}, "seq_len=0 is out of range"),
        ({"world_size": 5}, "fewer than world_size=5 ranks: give at least 160"),
        ({"micro_rows": 3}, "micro_rows=3 does not divide the 4 rows"),
        ({"micro_rows": 4, "world_size": 2}, "micro_rows=4 does not divide"),
        ({"mode": "views"}, "mode='views' is unknown"),
        ({"buckets": (8, 32)}, "has no effect with mode='view'"),
        ({"mode": "bucket", "packing": "pad"}, "packing='pad' has no effect with mode='bucket'"),
        ({"mode": "bucket", "buckets": (8, 12, 32)}, "must rise, divide seq_len=32"),
        ({"mode": "bucket", "buckets": (8, 16)}, "end with it"),
        ({"packing": "bestfit"}, "did you mean 'best_fit'"),
        ({"lengths": lambda progress: 16}, "give total_steps"),
        ({"lengths": lambda progress: 12, "total_steps": 9}, "rows of 12 tokens at progress 0, which do not divide"),
        ({"lengths": lambda progress: 64, "total_steps": 9}, "rows of 64 tokens"),
        ({"lengths": LengthSchedule(64)}, "lengths grows to 64 tokens, but seq_len=32"),
        ({"lengths": LengthSchedule(32, (8, 32), growth="linear")}, "give total_steps"),
        ({"total_steps": 0}, "total_steps=0 is out of range"),
        ({"rank": 2, "world_size": 2}, "rank=2 is none of world_size=2"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        packed(**settings)


# --- the state ------------------------------------------------------------------------------------------------------


def test_the_state_of_a_trillion_tokens_is_short_and_resumes_through_few_windows():
    pack = Pack("bucketed", (64, 128, 256, 512, 1024))
    settings = {"seq_len": 1024, "batch_tokens": 1 << 19, "counts": counts_of(22_000, pack), "mode": "bucket"}
    data = PackedBatches(Synthetic(22_000), buckets=pack.capacities, **settings)
    state = data.state_dict()
    rows = data.windows.counts.rows_WK.sum(axis=0).tolist()
    state.update(
        step=10**12, position=[10**6, *(count // 3 for count in rows)], skipped={"steps": 10**9, "tokens": 10**15}
    )
    assert len(json.dumps(state)) <= 1024
    data.load_state_dict(json.loads(json.dumps(state)))
    data.windows.documents.touched.clear()
    item = next(iter(data))
    assert item["input_ids"].numel() == 1 << 19
    assert len(data.windows.documents.touched) <= 16
    assert WINDOW_TOKENS * 22_000 > 10**12


@pytest.mark.parametrize("mode", ["view", "bucket"])
def test_the_state_counts_what_was_handed_out_and_not_what_was_prepared(mode):
    expected = taken(packed(mode=mode), 12)
    data = packed(mode=mode)
    loader = data.loader(num_workers=2, prefetch_factor=4)
    assert taken(loader, 5) == expected[:5]
    state = json.loads(json.dumps(data.state_dict()))
    assert state["step"] == 5
    # Another number of workers, another object; and this one goes on as well.
    again = packed(mode=mode)
    again.load_state_dict(state)
    assert taken(again, 7) == expected[5:]
    assert taken(loader, 7) == expected[5:]
    assert data.state_dict()["step"] == 12


def test_with_workers_of_another_loader_the_step_has_to_be_said():
    data = packed()
    loader = DataLoader(data, batch_size=None, num_workers=1)
    expected = taken(packed(), 8)
    assert taken(loader, 5) == expected[:5]
    with pytest.raises(DataError, match=r"state_dict\(step=\.\.\.\)"):
        data.state_dict()
    state = data.state_dict(step=5)
    again = packed()
    again.load_state_dict(state)
    assert taken(DataLoader(again, batch_size=None), 3) == expected[5:]
    data.load_state_dict(state)
    assert data.state_dict()["step"] == 5


@pytest.mark.parametrize("mode", ["view", "bucket"])
def test_the_state_of_a_step_said_is_that_of_a_step_read(mode):
    data = packed(mode=mode, lengths=lambda progress: 8 if progress < 0.5 else 32, total_steps=40)
    states = []
    for _ in data:
        states.append(data.state_dict())
    fresh = packed(mode=mode, lengths=lambda progress: 8 if progress < 0.5 else 32, total_steps=40)
    for step in (40, 3, 17, 1):
        assert fresh.state_dict(step=step) == states[step - 1]


def test_a_state_within_a_step_goes_on_with_the_items_that_are_left():
    expected = taken(packed(micro_rows=1), 20)
    data = packed(micro_rows=1)
    taken(data, 6)
    state = data.state_dict()
    assert (state["step"], state["micro"]) == (1, 2)
    again = packed(micro_rows=1)
    again.load_state_dict(state)
    assert taken(again, 14) == expected[6:]
    with pytest.raises(DataError, match="saved after 2 items of a step, which has 2 here"):
        packed(micro_rows=2).load_state_dict(state)
    again.load_state_dict(state)
    with pytest.raises(DataError, match="2 of 4 items of step 1 are read"):
        again.skip()


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"documents": Places([*LENGTHS[:-1], 1], 7)}, "corpus"),
        ({"packing": "pad"}, "packing"),
        ({"overflow": "drop"}, "overflow"),
        ({"seq_len": 16}, "seq_len"),
        ({"seed": 1}, "seed"),
        ({"mode": "bucket", "buckets": (16, 32)}, "packing"),
    ],
)
def test_a_state_of_other_data_is_refused_with_what_differs(changed, field):
    state = packed().state_dict()
    with pytest.raises(DataError, match=f"saved with {field}="):
        packed(**changed).load_state_dict(state)


def test_buckets_are_part_of_what_a_state_belongs_to():
    state = packed(mode="bucket", buckets=(8, 32)).state_dict()
    with pytest.raises(DataError, match=r"saved with buckets=\[8, 32\], but this data has buckets=\[16, 32\]"):
        packed(mode="bucket", buckets=(16, 32)).load_state_dict(state)


@pytest.mark.parametrize(
    "changed", [{"version": 2}, {"step": -1}, {"micro": None}, {"position": [True]}, {"position": 3}]
)
def test_what_is_no_state_is_refused(changed):
    with pytest.raises(DataError, match="no state of packed batches"):
        packed().load_state_dict({**packed().state_dict(), **changed})


def test_a_batch_size_may_change_between_runs_without_losing_a_token():
    first, second = packed(), packed(batch_tokens=64)
    seen = Counter(token for item in taken(first, 5) for token in item)
    second.load_state_dict(first.state_dict())
    rows = first.report().rows - 20
    for item in islice(second, rows // 2):
        seen.update(item["input_ids"].flatten().tolist())
    del seen[7]
    assert set(seen.values()) == {1}
    assert len(seen) > sum(LENGTHS) - 64


@pytest.mark.parametrize("mode", ["view", "bucket"])
def test_skipped_steps_are_left_out_and_counted(mode):
    expected = taken(packed(mode=mode), 12)
    data = packed(mode=mode)
    assert taken(data, 4) == expected[:4]
    data.skip(3)
    state = data.state_dict()
    assert state["step"] == 4
    assert data.skipped["steps"] == 3
    assert 0 < data.skipped["tokens"] <= 3 * 128
    assert taken(data, 5) == expected[7:]
    again = packed(mode=mode)
    again.load_state_dict(state)
    assert again.skipped == data.skipped
    assert taken(again, 5) == expected[7:]
    with pytest.raises(DataError, match="Step 3 lies before step 4"):
        again.state_dict(step=3)


def test_iteration_ends_with_the_steps_of_the_run():
    data = packed(total_steps=3)
    assert len(taken(data, 99)) == 3
    assert taken(data, 99) == []
    assert len(taken(packed(total_steps=3).loader(num_workers=2), 99)) == 3


def test_workers_that_stay_would_be_at_an_old_place():
    with pytest.raises(RecipeError, match="persistent_workers"):
        packed().loader(num_workers=1, persistent_workers=True)


def test_the_names_of_the_data_room_are_there_without_loading_torch():
    code = "import sys, hasten.data; assert dir(hasten.data) == hasten.data.__all__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)
    assert all(callable(getattr(hasten.data, name)) for name in hasten.data.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hasten.data.nothing


@pytest.mark.parametrize("mode", ["view", "bucket"])
def test_a_copy_in_another_process_is_small_and_reads_the_same(mode):
    data = packed([[1, 2, 3] * 50] * 400, document_token=0, mode=mode)
    expected = taken(packed([[1, 2, 3] * 50] * 400, document_token=0, mode=mode), 8)
    assert taken(data, 5) == expected[:5]
    content = pickle.dumps(data)
    assert len(content) < 3 * data.report().tokens
    assert taken(pickle.loads(content), 3) == expected[5:]


@pytest.mark.heavy
def test_workers_started_anew_read_the_same(tmp_path):
    code = (
        "from hasten.data import PackedBatches\n"
        "if __name__ == '__main__':\n"
        "    texts = [list(range(1, n)) for n in range(2, 60)]\n"
        "    data = PackedBatches(texts, document_token=0, seq_len=16, batch_tokens=64, total_steps=4)\n"
        "    plain = [item['input_ids'].tolist() for item in data]\n"
        "    data.load_state_dict(data.state_dict(step=0))\n"
        "    spawned = [i['input_ids'].tolist() for i in data.loader(num_workers=2, multiprocessing_context='spawn')]\n"
        "    assert plain == spawned and len(plain) == 4\n"
    )
    (tmp_path / "spawned.py").write_text(code)
    subprocess.run([sys.executable, "spawned.py"], check=True, timeout=300)


# --- other packages -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    return make


def words(**changed) -> PackedBatches:
    texts = [np.random.default_rng(size).integers(1, 64, size).tolist() for size in range(3, 40)]
    return PackedBatches(texts, **{"document_token": 0, "seq_len": 32, "batch_tokens": 128, **changed})


def test_a_model_of_transformers_loses_on_a_packed_item_what_it_loses_on_its_documents(llama):
    model, item = llama(), next(iter(words()))
    loss = model(**for_transformers([item])).loss
    total, count = 0.0, 0
    bounds = item["cu_seqlens"].unique().tolist()
    for begin, end in pairwise(bounds):
        tokens, labels = (item[name].flatten()[begin:end] for name in ("input_ids", "labels"))
        logits = model(input_ids=tokens[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-6)


def test_items_are_not_put_together():
    item = next(iter(words()))
    with pytest.raises(RecipeError, match="per_device_train_batch_size=1"):
        for_transformers([item, item])


@pytest.fixture
def trainer(llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make(data: PackedBatches, max_steps: int, **changed):
        settings = {"gradient_accumulation_steps": 1, "dataloader_num_workers": 0, **changed}
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            remove_unused_columns=False,
            max_steps=max_steps,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            **settings,
        )
        return transformers.Trainer(model=llama(), args=arguments, train_dataset=data, data_collator=for_transformers)

    return make


def by_hand(model: torch.nn.Module, data: PackedBatches, steps: int) -> torch.nn.Module:
    """Train with plain gradient descent on whole steps."""
    for item in islice(data, steps):
        model(**for_transformers([item])).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return model


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1}, {"gradient_accumulation_steps": 2}])
def test_the_trainer_of_transformers_learns_what_a_plain_loop_learns(llama, trainer, settings):
    micro_rows = 2 if "gradient_accumulation_steps" in settings else None
    run = trainer(words(micro_rows=micro_rows), 4, **settings)
    run.train()
    assert run.state.global_step == 4
    assert_same_weights(run.model, by_hand(llama(), words(), 4))


def test_the_trainer_goes_on_from_the_state_of_its_step(llama, trainer):
    data = words()
    first = trainer(data, 2, dataloader_num_workers=1)
    first.train()
    state = data.state_dict(step=first.state.global_step)
    second = words()
    second.load_state_dict(state)
    run = trainer(second, 2)
    run.model.load_state_dict(first.model.state_dict())
    run.train()
    assert_same_weights(run.model, by_hand(llama(), words(), 4))


def test_a_dataset_of_hugging_face_and_a_list_give_the_same_items():
    datasets = pytest.importorskip("datasets")
    texts = [np.random.default_rng(size).integers(1, 64, size).tolist() for size in range(3, 40)]
    data = PackedBatches(
        datasets.Dataset.from_dict({"input_ids": texts}), document_token=0, seq_len=32, batch_tokens=128
    )
    assert taken(data, 9) == taken(words(), 9)
    data.load_state_dict(words().state_dict())

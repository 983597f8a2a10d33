"""The loop over mixtures, buckets and other packings: what is on record, and going on from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hasten.checkpoint import load, save
from hasten.errors import RecipeError
from hasten.loop import advance, capture, prepare_for, restore, start, train
from hasten.recipe import resolve


@pytest.fixture
def second_file(library_text: str, tmp_path: Path) -> Path:
    path = tmp_path / "second.txt"
    path.write_text(library_text[-20_000:], encoding="utf-8")
    return path


MIXTURE = "data.weights=[3,1]"
BUCKETS = ("lengths=linear", "lengths.start=16", "lengths.mode=bucket", "lengths.over=40%", "lengths.replay=0.2")


def sources(text_file: Path, second_file: Path) -> str:
    return f'data.train=["{text_file}", "{second_file}"]'


def test_a_mixture_trains_and_says_how_often_each_source_was_read(text_file, second_file, tiny):
    given = [sources(text_file, second_file), MIXTURE, *tiny, "budget=12", "out=run", "evaluate.every=6"]
    result = train(resolve(None, given).recipe)
    epochs = result.values["source_epochs"]
    assert list(epochs) == [text_file.name, second_file.name]
    # 96 rows of 64 tokens: 72 of the first source, which has about 60 kB, and 24 of the second with 20 kB.
    assert epochs[text_file.name] == pytest.approx(72 * 64 / 60_000, rel=0.1)
    assert epochs[second_file.name] == pytest.approx(24 * 64 / 20_000, rel=0.1)
    assert train(resolve(None, given).recipe).already_finished


@pytest.mark.parametrize("way", ["mixture", "buckets", "pad"])
def test_resumed_anywhere_a_run_is_bit_identical(way, text_file, second_file, tiny, tmp_path):
    settings = {
        "mixture": [sources(text_file, second_file), MIXTURE],
        "buckets": [f"data={text_file}", *BUCKETS],
        "pad": [f"data={text_file}", "data.packing=pad"],
    }[way]
    recipe = resolve(None, [*settings, *tiny, "budget=14"]).recipe
    data = prepare_for(recipe)
    whole = advance(start(recipe, data), 14)
    for stop in (1, 5, 6, 13):
        stopped = advance(start(recipe, data), stop)
        saved = load(save(tmp_path / f"{way}{stop}", stop, *capture(stopped), keep=1))
        resumed = start(recipe, data)
        restore(resumed, saved.tensors, saved.state)
        advance(resumed, 14)
        assert resumed.position == whole.position
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), stop


def test_bucketed_steps_have_one_length_each_and_never_more_than_the_schedule_allows(text_file, tiny):
    # Documents of one to sixty lines, so that every bucket has some.
    recipe = resolve(None, [f"data={text_file}", *tiny, *BUCKETS, "budget=40", "data.separator=\ndef "]).recipe
    state = start(recipe, prepare_for(recipe))
    lengths: list[int] = []
    advance(state, 40, hooks=[lambda event: lengths.append(event.values["seq_len"])])
    allowed = [state.lengths(step / 40, step) for step in range(40)]
    assert all(length <= most for length, most in zip(lengths, allowed, strict=True))
    assert set(lengths) > {16, 64}


def test_what_packing_made_of_the_text_is_on_record(text_file, tiny):
    train(resolve(None, [f"data={text_file}", *tiny, "budget=2", "out=run"]).recipe)
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text(encoding="utf-8").splitlines()]
    (packing,) = next(event for event in events if event["kind"] == "start")["data"]["packing"]
    assert packing["documents"] >= 1
    assert packing["targets"] == packing["tokens"] - 1
    assert packing["lost"] == {"last": 1}
    assert packing["utilisation"] > 0.99


def test_text_left_out_and_padding_are_warned_about(text_file, tiny):
    def warnings(*settings: str) -> list[str]:
        told: list[str] = []

        def listen(event):
            if event.kind == "warning":
                told.append(event.values["message"])

        train(resolve(None, [f"data={text_file}", *tiny, "budget=100", *settings]).recipe, hooks=[listen], dry_run=True)
        return [message for message in told if "%" in message]

    assert not warnings()
    assert "data.overflow=truncate leaves 100% of the training tokens out" in warnings("data.overflow=truncate")[0]
    lines = warnings("data.packing=pad", "data.separator=return")
    assert "of the positions in the rows are padding (data.packing=pad)" in lines[0]
    assert "give data.packing=best_fit" in lines[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("lengths=linear", "lengths.start=16", "lengths.mode=bucket", "data.packing=chunk"), "bucket"),
        ((MIXTURE,), "data.weights"),
    ],
)
def test_contradictions_are_refused_before_any_text_is_read(settings, said, tiny):
    with pytest.raises(RecipeError, match=said):
        resolve(None, ["data=nowhere.txt", *tiny, *settings])

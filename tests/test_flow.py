"""The whole road: text in; a trained, exported, resumable, reported model out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from hasten.cli import main
from hasten.errors import RecipeError
from hasten.loop import Event, Result, train
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events, read_metrics, read_result


def run(settings: list[str], **options: object) -> Result:
    return train(resolve(None, settings).recipe, **options)


def command(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def settings(text_file: Path, validation_file: Path, tiny: tuple[str, ...]) -> list[str]:
    return [
        f"data={text_file}",
        f"val={validation_file}",
        *tiny,
        "budget=40",
        "checkpoint.every=4",
        "evaluate.every=25%",
    ]


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run([*settings, f"out={folder}"]).status == "finished"
    return folder


def test_a_finished_run_leaves_everything_the_readme_names(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    for name in ("status", "val_loss", "val_bpb", "tokens", "seconds", "params", "corpus_sha256"):
        assert result[name], name
    assert result["status"] == "finished"
    assert result["val_bpb"] < result["untrained_val_bpb"]
    assert (finished / "recipe.toml").is_file()
    assert [row["step"] for row in read_metrics(RunFolder(finished))] == list(range(1, 41))
    kinds = {event["kind"] for event in read_events(RunFolder(finished))}
    assert {"start", "evaluation", "checkpoint", "sample", "phases", "finish", "compile"} <= kinds


def test_the_export_evaluated_independently_agrees_with_val_bpb(finished: Path, validation_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "final")
    text = validation_file.read_text(encoding="utf-8")
    tokens = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, length = 0.0, model.config.max_position_embeddings
    for begin in range(0, len(tokens) - 1, length):
        row = torch.tensor(tokens[begin : begin + length + 1])
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    bits_per_byte = nats / math.log(2) / len(text.encode())
    assert bits_per_byte == pytest.approx(read_result(RunFolder(finished))["val_bpb"], rel=1e-4)


def test_the_same_command_on_a_finished_run_says_so(finished: Path, settings: list[str]) -> None:
    before = weights(finished)
    again = run([*settings, f"out={finished}"])
    assert (again.status, again.already_finished) == ("finished", True)
    assert weights(finished) == before


def test_cleaning_away_checkpoints_keeps_a_finished_run_finished(
    finished: Path, settings: list[str], own_folder: Path
) -> None:
    copy = own_folder / "runs" / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    assert command(["runs", "--prune", "--yes"]) == 0
    assert not (copy / "checkpoints").exists()
    assert run([*settings, f"out={copy}"]).already_finished


def test_a_checkpoint_is_exported_without_its_corpus(finished: Path, own_folder: Path) -> None:
    assert command(["export", str(finished), "--to", "model"]) == 0
    assert (own_folder / "model" / "model.safetensors").read_bytes() == weights(finished)


def test_going_on_never_rewrites_the_recipe_that_a_kill_could_halve(
    finished: Path, settings: list[str], own_folder: Path
) -> None:
    out = own_folder / "run"
    shutil.copytree(finished, out, symlinks=True)
    (out / "result.json").unlink()
    shutil.rmtree(sorted((out / "checkpoints").glob("step-*"))[-1])
    before = (out / "recipe.toml").stat()
    assert not run([*settings, f"out={out}"]).already_finished
    after = (out / "recipe.toml").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert weights(out) == weights(finished)


def test_a_damaged_last_checkpoint_is_trained_again_from_the_older_one(finished: Path, settings: list[str]) -> None:
    before = weights(finished)
    newest = sorted((finished / "checkpoints").glob("step-*"))[-1]
    victim = newest / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    messages: list[str] = []
    again = run(
        [*settings, f"out={finished}"],
        hooks=[lambda event: messages.append(event.values["message"]) if event.kind == "warning" else None],
    )
    assert (again.status, again.already_finished) == ("finished", False)
    assert any(newest.name in message for message in messages)
    assert weights(finished) == before


def test_a_changed_recipe_is_refused_with_what_changed(finished: Path, settings: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.lr"):
        run([*settings, f"out={finished}", "lr=0.123"])


def test_a_run_starts_from_the_weights_of_another(finished: Path, settings: list[str], own_folder: Path) -> None:
    kept = [word for word in settings if not word.startswith(("model.", "data.tokenizer"))]
    result = run([*kept, f"init_from={finished}", f"out={own_folder / 'tuned'}"])
    assert result.values["untrained_val_bpb"] == pytest.approx(read_result(RunFolder(finished))["val_bpb"], rel=0.1)
    assert result.values["val_bpb"] < read_result(RunFolder(finished))["val_bpb"]


def test_a_run_ends_when_the_target_loss_is_reached(settings: list[str], own_folder: Path) -> None:
    result = run([*settings, "target_loss=5.0", f"out={own_folder / 'run'}"])
    assert result.status == "finished"
    assert "target_loss" in result.reason
    assert result.values["steps"] < 40


def test_divergence_is_a_status_and_no_broken_checkpoint_is_kept(settings: list[str], own_folder: Path) -> None:
    out = own_folder / "run"
    assert command(["train", *settings, "lr=100", "precision=fp16", "schedule.warmup=0", f"out={out}"]) == 3
    assert read_result(RunFolder(out))["status"] == "diverged"
    assert not (out / "final").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_and_exports_float32_weights(
    precision: str, settings: list[str], finished: Path, own_folder: Path
) -> None:
    from safetensors.torch import load_file

    result = run([*settings, f"precision={precision}", f"out={own_folder / 'run'}"])
    exported = load_file(own_folder / "run" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert result.values["val_bpb"] == pytest.approx(read_result(RunFolder(finished))["val_bpb"], rel=0.05)


def test_a_wall_clock_budget_is_kept_and_its_schedule_completed(settings: list[str], own_folder: Path) -> None:
    out = own_folder / "run"
    kept = [word for word in settings if not word.startswith(("budget", "checkpoint"))]
    result = run([*kept, "budget=8s", "checkpoint.every=3s", f"out={out}"])
    # The bar is 5 % of a minute on a machine of one's own; a test runs beside others.
    assert result.values["seconds"] == pytest.approx(8.0, rel=0.15)
    rates = [row["lr"] for row in read_metrics(RunFolder(out))]
    assert rates[-1] < 0.05 * max(rates)
    assert result.values["steps"] == result.values["total_steps"]


def test_a_dry_run_checks_and_leaves_nothing(settings: list[str], own_folder: Path) -> None:
    assert command(["train", "--dry-run", *settings]) == 0
    assert list(own_folder.iterdir()) == []


def test_hooks_see_every_step_and_change_nothing(settings: list[str], finished: Path, own_folder: Path) -> None:
    seen: list[Event] = []
    run([*settings, f"out={own_folder / 'run'}"], hooks=[seen.append])
    assert [event.step for event in seen if event.kind == "step"] == list(range(1, 41))
    assert weights(own_folder / "run") == weights(finished)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "data=nowhere.txt"], "nowhere.txt"),
        (["train", "lerning_rate=1"], "optimizer.lr|learning_rate"),
        (["train", "budget=15m"], "15min"),
        (["train", "a.toml", "b.toml"], "b.toml"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["report", "nowhere"], "nowhere"),
        (["runs", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], says: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(arguments) == 2
    error = capsys.readouterr().err
    assert any(word in error for word in says.split("|")), error
    assert "Traceback" not in error
    assert list(own_folder.iterdir()) == []

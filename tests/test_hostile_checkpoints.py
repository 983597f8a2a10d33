"""A checkpoint that an attacker wrote and sealed with hashes that fit: refused or taken, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile_files as hostile
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sizes import size
from small_runs import small_settings

from hasten import checkpoint
from hasten.cli import main
from hasten.errors import CheckpointError, HastenError
from hasten.loop import State, advance, capture, prepare_for, restore, saved, start, train
from hasten.recipe import resolve, schema

SEEDS = st.integers(0, 2**48)


def seal(folder: Path, files: dict[str, bytes], spoil: Callable[[Any], Any] = lambda manifest: manifest) -> Path:
    """Write a checkpoint folder whose manifest has every size and sha256 right, its own included."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = {}
    for name, data in sorted(files.items()):
        (folder / name).write_bytes(data)
        entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = spoil({"format": 1, "step": 3, "files": entries})
    text = json.dumps(manifest, sort_keys=True)
    if isinstance(manifest, dict):
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def tensor_file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else hostile.json_bytes(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def parts(file: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


@dataclass
class Target:
    """A run, a checkpoint of it as files, and a state to restore into, started anew after every one that was taken."""

    fresh: Callable[[], State] = field(repr=False)
    files: dict[str, bytes] = field(repr=False)
    folder: Path
    state: State | None = field(default=None, repr=False)
    met: Counter[str] = field(default_factory=Counter)

    def attack(self, files: dict[str, bytes], spoil: Callable[[Any], Any] = lambda manifest: manifest) -> None:
        seal(self.folder, files, spoil)
        state = self.state = self.state or self.fresh()

        def use() -> None:
            loaded = saved.load(self.folder)
            saved.fits(state, loaded.tensors, loaded.state)
            self.state = None
            restore(state, loaded.tensors, loaded.state)
            advance(state, min(state.step + 1, state.total_steps))

        outcome = hostile.harmless(use, sum(map(len, files.values())))
        self.met[outcome.kind] += 1

    def plain(self) -> dict[str, Any]:
        return json.loads(self.files["state.json"])


@pytest.fixture(scope="module")
def target(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("target")
    recipe = resolve(None, small_settings(folder, library_text)).recipe
    data = prepare_for(recipe)
    state = advance(start(recipe, data), 3)
    path = checkpoint.save(folder / "good", 3, *capture(state), keep=1)
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    target = Target(lambda: start(recipe, data), files, folder / "bad")
    target.attack(files)  # everything that is made once is made now
    assert target.met == {"taken": 1}
    return target


def attacked(chance: random.Random, target: Target) -> tuple[dict[str, bytes], Callable[[Any], Any]]:
    """Return the files of a checkpoint with one thing in them as an attacker would have it, and what he does after."""
    files, plain = dict(target.files), target.plain()
    tensor_files = sorted(name for name in files if name.endswith(".safetensors"))
    deed = chance.randrange(9)
    if deed < 2:
        files["state.json"] = hostile.json_bytes(hostile.spoiled(plain, chance))
    elif deed < 5:  # one part of the state at a time, so that each is reached as often as the largest
        key = chance.choice(sorted(plain))
        files["state.json"] = hostile.json_bytes({**plain, key: hostile.spoiled(plain[key], chance)})
    elif deed == 5:
        name = chance.choice(tensor_files)
        header, data = parts(files[name])
        files[name] = tensor_file(hostile.spoiled(header, chance), data)
    elif deed == 6:
        name = chance.choice(sorted(files))
        files[name] = hostile.garbled(files[name], chance)
    elif deed == 7:
        return files, lambda manifest: hostile.spoiled(manifest, chance)
    else:
        one, other = chance.sample(sorted(files), 2)
        files[one] = files[other]
        if chance.random() < 0.3:
            del files[other]
    return files, lambda manifest: manifest


@pytest.mark.torture
@hostile.cases(size(500, 20_000))
@given(SEEDS)
def test_a_fuzzed_checkpoint_with_fitting_hashes_is_refused_or_harmless(target: Target, seed: int) -> None:
    target.attack(*attacked(random.Random(seed), target))


def test_the_cases_reached_both_ends(target: Target) -> None:
    assert target.met["refused"] >= 200
    assert target.met["taken"] >= 20


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("place", ["state.json", "model.safetensors", "optimizer.safetensors", "random.safetensors"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_bytes_in_any_file_are_never_run(target: Target, tmp_path: Path, place: str, protocol: int) -> None:
    payload = pickle.dumps(Payload(tmp_path / "ran"), protocol)
    if place == "state.json":
        variants = [payload, hostile.json_bytes({**target.plain(), "notes": payload.decode("latin-1")})]
    else:
        header, data = parts(target.files[place])
        variants = [payload, tensor_file(header, payload + data[len(payload) :]), tensor_file(payload, data)]
    for content in variants:
        target.attack({**target.files, place: content})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "hasten.loop.train", "torch.load", "../optimizer", ""])
def test_a_dotted_name_is_never_looked_up(target: Target, name: str) -> None:
    plain = target.plain()
    before = target.met["refused"]
    for group in plain["optimizer"]["param_groups"]:
        group["rule"] = name
    target.attack({**target.files, "state.json": hostile.json_bytes(plain)})
    for tag in ({"$call": name}, {"$tensor": name}, {"$dict": [[name, 1]]}, {"__reduce__": name}):
        target.attack({**target.files, "state.json": hostile.json_bytes({**target.plain(), "optimizer": tag})})
    assert target.met["refused"] == before + 5


NUMBERS = (-1, 1.5, "3", None, [], True, 2**60, "missing")
TEXTS = (3, None, [], {}, "x" * 200_000, "missing")
TABLES = (3, None, [], "text", [["a", 1]], "missing")
WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("format", "step", "tokens", "schedule_steps"), NUMBERS),
    **dict.fromkeys(("status", "reason", "corpus_sha256", "tokenizer_sha256"), TEXTS),
    **dict.fromkeys(("identity", "precision", "guard", "clip", "optimizer"), TABLES),
    "notes": (*TABLES, {"costs": {"32": 0}}, {"micro_rows": 0}, {"proof": {}}, {"packing": {}}, {"first_weights": 3}),
    "model": (*TABLES, {}, {"num_layers": 1}),
    "seconds": (-1, float("nan"), float("inf"), "1", None, "missing"),
    "phases": (*TABLES, {"train": "long"}),
    "seed": (-1, 2**63, "0", None, "missing"),
    "position": (3, None, [-1], [0.5], [[0]], ["0"], "missing"),
    "jumps": (3, {}, [3], [{}], [{"begin": [0], "end": [1]}], [{"begin": 0, "end": 1, "tokens": 1}], "missing"),
    "progress": (
        3,
        [],
        [[0, 0.0]],
        [[0, 1.0], [9, 0.0]],
        [[0, 0.0], [0, 1.0]],
        [[0, 0.0], ["9", 1.0]],
        [[1, 0.0], [9, 1.0]],
    ),
}


def test_every_key_that_a_run_saves_has_wrong_values(target: Target) -> None:
    assert set(WRONG) == set(target.plain())


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_another_kind_is_refused_by_the_name_of_its_key(target: Target, key: str) -> None:
    for value in WRONG[key]:
        plain = {**target.plain(), key: value}
        if value == "missing":
            del plain[key]
        with pytest.raises(CheckpointError, match=rf"not one that a run saved \(.*{key}"):
            saved.checked(plain)


@pytest.mark.torture
def test_what_a_run_saves_is_taken_whatever_its_optimizer_remembers(library_text: str, tmp_path: Path) -> None:
    settings = small_settings(tmp_path, library_text)
    every = [f"{table}={name}" for table in ("optimizer", "clip") for name in schema().tables[table]]
    techniques = size(["optimizer=muon", "optimizer=soap", "optimizer=prodigy", "clip=zclip", "precision=fp16"], every)
    for technique in techniques:
        recipe = resolve(None, [*settings, technique]).recipe
        data = prepare_for(recipe)
        state = advance(start(recipe, data), 2)
        loaded = saved.load(checkpoint.save(tmp_path / technique, 2, *capture(state), keep=1))
        saved.fits(start(recipe, data), loaded.tensors, loaded.state)


@pytest.fixture(scope="module")
def run_folder(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("run")
    mine = ("budget", "checkpoint.every", "schedule.warmup")
    settings = [word for word in small_settings(folder, library_text) if word.partition("=")[0] not in mine]
    settings += ["budget=6", "checkpoint.every=3", "schedule.warmup=1"]
    assert train(resolve(None, [*settings, f"out={folder / 'out'}"]).recipe, until="3").status == "paused"
    return settings, folder / "out"


@pytest.mark.torture
@hostile.cases(size(12, 1000))
@given(SEEDS)
def test_a_run_that_goes_on_from_a_hostile_checkpoint_says_one_sentence(
    run_folder: tuple[list[str], Path], target: Target, seed: int
) -> None:
    settings, good = run_folder
    chance = random.Random(seed)
    folder = target.folder.with_name("resumed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder, symlinks=True)
    step = folder / "checkpoints" / "step-00000003"
    files = {file.name: file.read_bytes() for file in step.iterdir() if file.name != "manifest.json"}
    there = Target(target.fresh, files, step)
    seal(step, *attacked(chance, there))
    recipe = resolve(None, [*settings, f"out={folder}"]).recipe
    hostile.met(lambda: train(recipe, until="4"), most_lines=100)  # what changed since is a line for each


def test_all_checkpoints_bad_is_one_line_and_exit_code_two(
    run_folder: tuple[list[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings, good = run_folder
    for number, damage in enumerate((lambda p: p.write_bytes(b""), lambda p: p.unlink(), lambda p: os.truncate(p, 9))):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder, symlinks=True)
        for step in (folder / "checkpoints").glob("step-*"):
            damage(step / "model.safetensors")
        metrics = (folder / "metrics.jsonl").read_bytes()
        for _ in range(2):  # never a silent fresh start, not the second time either
            with pytest.raises(SystemExit) as ended:
                main(["train", *settings, f"out={folder}"])
            assert ended.value.code == 2
            said = capfd.readouterr().err.strip().splitlines()
            assert len(said) == 1
            assert "can be trusted" in said[0]
        assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert issubclass(CheckpointError, HastenError)

"""Recipes, prepared text, tokenizers, models, records and studies as an attacker writes them: refused or harmless."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files as hostile
import numpy as np
import pytest
import tomli_w
from fake_run import make_run
from fake_study import make_study
from hypothesis import given
from hypothesis import strategies as st
from sizes import size
from test_shards import some_documents, write

from hasten.comparison.study import Arm, Study, changed, tomllib
from hasten.comparison.study import read_study as read_plan
from hasten.data.shards import PreparedData
from hasten.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from hasten.exports import export
from hasten.generation import generate
from hasten.model import Decoder, ModelConfig
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events, read_metrics, read_result
from hasten.report import page as run_page
from hasten.report import study_page
from hasten.report.charts import run_charts
from hasten.report.forest import forest
from hasten.report.overlays import comparison_charts
from hasten.report.render import render
from hasten.report.runs import read_runs
from hasten.report.study import read_study
from hasten.report.study_charts import study_curves
from hasten.report.trajectories import read_trajectories

SEEDS = st.integers(0, 2**48)
MET: dict[str, Counter[str]] = {}


def attack(what: str, use: Callable[[], Any], num_bytes: int = 0) -> None:
    outcome = hostile.harmless(use, num_bytes)
    MET.setdefault(what, Counter())[outcome.kind] += 1


def without_none(value: Any) -> Any:
    """Return plain data without what TOML cannot write."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value if item is not None] if isinstance(value, list) else value


def toml(value: Any) -> bytes:
    return tomli_w.dumps(without_none(value) if isinstance(value, dict) else {"": 1}).encode("utf-8", "surrogatepass")


def spoiled_file(good: Any, chance: random.Random, to_bytes: Callable[[Any], bytes] = hostile.json_bytes) -> bytes:
    """Return a file whose content, or whose bytes, an attacker changed."""
    if chance.random() < 0.3:
        return hostile.garbled(to_bytes(good), chance)
    return to_bytes(hostile.spoiled(good, chance))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


# --- recipes --------------------------------------------------------------------------------------------------------

CHOICES = ("optimizer=muon", "optimizer=soap", "schedule=wsd")


@pytest.mark.torture
@hostile.cases(size(200, 20_000))
@given(SEEDS)
def test_a_hostile_recipe(place: Path, seed: int) -> None:
    chance = random.Random(seed)
    recipe = resolve(None, ["data=x.txt", "budget=60s", chance.choice(CHOICES)]).recipe.to_dict()
    (place / "recipe.toml").write_bytes(spoiled_file(recipe, chance, toml))

    def use() -> None:
        read = resolve(place / "recipe.toml").recipe
        assert resolve(read.to_toml()).recipe == read
        _ = read.sha256, read.default_run_name()

    attack("recipe", use)


# --- prepared text --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(place: Path) -> tuple[dict[str, Any], dict[str, bytes], Path]:
    good = write(place / "prepared", some_documents([40, 3, 200]), shard_tokens=100)
    files = {path.name: path.read_bytes() for path in good.iterdir() if path.name != "manifest.json"}
    return json.loads((good / "manifest.json").read_text()), files, good


def sealed(manifest: Any) -> bytes:
    if isinstance(manifest, dict):
        manifest.pop("manifest_sha256", None)
        text = json.dumps(manifest, sort_keys=True) if all(isinstance(key, str) for key in manifest) else ""
        manifest = {**manifest, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return hostile.json_bytes(manifest)


def refreshed(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the manifest with sizes and hashes of the shards as they are now."""
    for shard in (shard for split in manifest["splits"].values() for shard in split["shards"]):
        for part in ("tokens", "index"):
            content = (folder / shard[part]["file"]).read_bytes()
            shard[part] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        shard["index"]["crc32"] = zlib.crc32((folder / shard["index"]["file"]).read_bytes()[:40])
    return manifest


@pytest.mark.torture
@hostile.cases(size(200, 20_000))
@given(SEEDS)
def test_hostile_prepared_text(prepared: tuple[dict[str, Any], dict[str, bytes], Path], seed: int) -> None:
    manifest, files, folder = json.loads(json.dumps(prepared[0])), prepared[1], prepared[2]
    chance = random.Random(seed)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    deed = chance.randrange(4)
    if deed == 0:
        (folder / "manifest.json").write_bytes(hostile.garbled(sealed(manifest), chance))
    elif deed == 1:
        name = chance.choice([name for name in sorted(files) if name.endswith((".bin", ".idx"))])
        (folder / name).write_bytes(hostile.garbled(files[name], chance))
        (folder / "manifest.json").write_bytes(sealed(refreshed(manifest, folder)))
    else:
        (folder / "manifest.json").write_bytes(sealed(hostile.spoiled(manifest, chance)))

    def use() -> None:
        data = PreparedData.open(folder)
        for shards in (*data.trains, data.val):
            shards.read(0, shards.num_tokens)
            starts = shards.starts(0, shards.num_documents)
            assert (np.diff(starts) > 0).all()
            _ = shards.fingerprint
        data.verify()
        _ = data.train_names, data.train_size, data.corpus_sha256, data.tokenizer_sha256

    attack("prepared", use)


@pytest.mark.parametrize("starts", [(0, 0), (5, 2), (0, 2**63), (0, 2**64 - 1), (0, 10**9)])
def test_documents_that_start_nowhere_are_damage(
    prepared: tuple[dict[str, Any], dict[str, bytes], Path], starts: tuple[int, int]
) -> None:
    manifest, files, folder = json.loads(json.dumps(prepared[0])), prepared[1], prepared[2]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    index = files["train-00000.idx"]
    table = np.array(starts, "<u8").tobytes()
    header = index[:24] + index[24:32] + zlib.crc32(table).to_bytes(4, "little")
    (folder / "train-00000.idx").write_bytes(header + index[36:40] + table)
    (folder / "manifest.json").write_bytes(sealed(refreshed(manifest, folder)))
    outcome = hostile.harmless(lambda: PreparedData.open(folder).train.document_starts)
    assert outcome.kind == "refused"


# --- tokenizers and models ------------------------------------------------------------------------------------------

TOKENIZERS = [json.loads(t.document) for t in (byte_tokenizer(), train_bpe(["what is it that it is " * 20], 280))]
TEXT = "hello <|endoftext|> \x00 what it is ü"


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(TEXT)
    _ = tokenizer.decode(ids), tokenizer.decode_bytes(ids), tokenizer.is_bytes, tokenizer.sha256
    tokenizer.save(folder / "again")


@pytest.mark.torture
@hostile.cases(size(200, 20_000))
@given(SEEDS)
def test_a_hostile_tokenizer(place: Path, seed: int) -> None:
    chance = random.Random(seed)
    folder = place / "tokenizer"
    (folder / "again").mkdir(parents=True, exist_ok=True)
    config = {"eos_token": "<|endoftext|>", "auto_map": {"AutoTokenizer": "evil.Evil"}, "model_max_length": 9}
    if chance.random() < 0.3:
        (folder / "tokenizer.json").write_bytes(hostile.json_bytes(TOKENIZERS[0]))
        (folder / "tokenizer_config.json").write_bytes(spoiled_file(config, chance))
    else:
        (folder / "tokenizer_config.json").write_bytes(b"{}")
        (folder / "tokenizer.json").write_bytes(spoiled_file(chance.choice(TOKENIZERS), chance))
    attack("tokenizer", lambda: use_tokenizer(folder))


@pytest.mark.parametrize("token", [2**32 - 1, 2**31, 1 << 20])
def test_a_giant_id_does_not_fill_the_memory(tmp_path: Path, token: int) -> None:
    description = json.loads(json.dumps(TOKENIZERS[0]))
    description["model"]["vocab"]["Ā"] = token
    (tmp_path / "tokenizer.json").write_bytes(hostile.json_bytes(description))
    assert hostile.harmless(lambda: use_tokenizer(tmp_path)).kind == "refused"


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y", "(.*)*b", "(" * 500, "(?=a)*", "\\p{L"])
def test_a_pattern_that_goes_back_for_ever_ends_in_a_sentence(tmp_path: Path, pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_bytes(hostile.json_bytes({**TOKENIZERS[0], "pre_tokenizer": split}))
    hostile.met(lambda: load_tokenizer(tmp_path).encode("a" * 26 + "b" + "x" * 26))


SHAPE = ModelConfig(
    vocab_size=257, num_layers=1, width=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=8, seq_len=16, tied=False
)


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    export(Decoder(SHAPE, seed=0).state_dict(), SHAPE, byte_tokenizer(), place / "model")
    list(generate(place / "model", prompt="a", max_tokens=1))
    return place / "model"


@pytest.mark.torture
@hostile.cases(size(200, 20_000))
@given(SEEDS)
def test_a_hostile_model_folder(model: Path, seed: int) -> None:
    folder = model.with_name("attacked")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    chance = random.Random(seed)
    config, weights = json.loads((model / "config.json").read_text()), (model / "model.safetensors").read_bytes()
    deed = chance.randrange(4)
    if deed < 2:
        (folder / "config.json").write_bytes(spoiled_file(config, chance))
    elif deed == 2:
        (folder / "model.safetensors").write_bytes(hostile.garbled(weights, chance))
    else:
        length = int.from_bytes(weights[:8], "little")
        header = spoiled_file(json.loads(weights[8 : 8 + length]), chance)
        named = len(header) if chance.random() < 0.9 else chance.choice((2**63, 2**64 - 1, 0, 100_000_000))
        (folder / "model.safetensors").write_bytes(named.to_bytes(8, "little") + header + weights[8 + length :])
    attack("model", lambda: list(generate(folder, prompt="ab", max_tokens=2, seed=0)))


@pytest.mark.parametrize("key", ["num_hidden_layers", "max_position_embeddings", "vocab_size", "hidden_size"])
@pytest.mark.parametrize("value", [2**22, 2**31, 2**60, 10**30])
def test_a_giant_model_is_refused_before_it_is_built(model: Path, tmp_path: Path, key: str, value: int) -> None:
    shutil.copytree(model, tmp_path / "giant")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "giant" / "config.json").write_text(json.dumps({**config, key: value}))
    assert hostile.harmless(lambda: list(generate(tmp_path / "giant", max_tokens=1))).kind == "refused"


def test_a_tokenizer_of_a_larger_model_is_one_sentence(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(hostile.json_bytes(TOKENIZERS[1]))
    outcome = hostile.met(lambda: list(generate(tmp_path / "model", prompt="what is it that it is", max_tokens=1)))
    assert "give the tokenizer that it was trained with" in outcome.said


# --- records, reports and studies -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(place: Path) -> tuple[Path, Path, dict[str, bytes]]:
    one, other = make_run(place / "run", steps=12), make_run(place / "other", steps=12, seed=1)
    use_runs(one, other)  # our own templates are compiled once, here
    names = ("metrics.jsonl", "events.jsonl", "result.json", "recipe.toml")
    return one, other, {name: (one / name).read_bytes() for name in names}


def use_runs(one: Path, other: Path) -> None:
    """Do everything that a report does but draw."""
    run, both = read_runs([one])[0], read_runs([one, other])
    render("page.html", {"charts": [], **run_page._one(run)})
    render("page.html", {"charts": [], **run_page._several(both)})
    run_charts(run)
    comparison_charts(both)


@pytest.mark.torture
@hostile.cases(size(100, 10_000))
@given(SEEDS)
def test_a_hostile_record(runs: tuple[Path, Path, dict[str, bytes]], seed: int) -> None:
    one, other, good = runs
    chance = random.Random(seed)
    for name, content in good.items():
        (one / name).write_bytes(content)
    name = chance.choice(sorted(good))
    if name == "recipe.toml" or chance.random() < 0.2:
        content = hostile.garbled(good[name], chance)
    elif name == "result.json":
        content = hostile.json_bytes(hostile.spoiled(json.loads(good[name]), chance))
    else:
        lines = good[name].splitlines()
        for number in chance.sample(range(len(lines)), 3):
            lines[number] = hostile.json_bytes(hostile.spoiled(json.loads(lines[number]), chance))
        content = b"\n".join(lines) + b"\n"
    (one / name).write_bytes(content)
    attack("record", lambda: use_runs(one, other))
    for read in (read_metrics, read_events, read_result):
        hostile.harmless(lambda read=read: read(RunFolder(one)))


def use_study(folder: Path) -> None:
    study = read_study(folder)
    trajectories = read_trajectories(study, folder)
    study_curves(study, trajectories)
    forest(study)
    for make in study_page.TABLES.values():
        make(study)
    values = {"forest": "", "forest_caption": "", "charts": [], "tables": []}
    render("study.html", study_page._values(study, trajectories) | values)


@pytest.fixture(scope="module")
def study(place: Path) -> tuple[Path, dict[str, Any]]:
    folder = make_study(place / "study", seeds=2, evaluations=4, lines=4)
    use_study(folder)
    return folder, json.loads((folder / "verdicts.json").read_text())


@pytest.mark.torture
@hostile.cases(size(100, 10_000))
@given(SEEDS)
def test_hostile_verdicts(study: tuple[Path, dict[str, Any]], seed: int) -> None:
    folder, verdicts = study
    (folder / "verdicts.json").write_bytes(spoiled_file(verdicts, random.Random(seed)))
    attack("verdicts", lambda: use_study(folder))


PLAN = Study(resolve(None, ["data=x.txt", "budget=60s"]).recipe, (Arm("a", ("lr=0.1",)), Arm("b", ("optimizer=lion",))))


@pytest.mark.torture
@hostile.cases(size(100, 10_000))
@given(SEEDS)
def test_a_hostile_study(place: Path, seed: int) -> None:
    (place / "study.toml").write_bytes(spoiled_file(tomllib.loads(PLAN.to_toml()), random.Random(seed), toml))

    def use() -> None:
        read = read_plan(place / "study.toml")
        for arm in read.arms:
            changed(read.base, arm.settings, f"Arm {arm.name}")
        read.to_toml()

    attack("study", use)


# --- memory, and what was reached -----------------------------------------------------------------------------------

LARGE = {
    "a long list": b"[" + b"1," * 4_000_000 + b"1]",
    "many empty lists": b"[" + b"[]," * 2_700_000 + b"[]]",
    "many objects": b"[" + b'{"a":1},' * 1_000_000 + b"{}]",
    "deep": b"[" * 8_000_000,
    "a long number": b"9" * 8_000_000,
    "a long text": b'{"a":"' + b"x" * 8_000_000 + b'"}',
    "many keys": b"{" + b",".join(b'"%d":[]' % n for n in range(700_000)) + b"}",
}


@pytest.mark.parametrize("what", LARGE)
def test_a_large_file_takes_twice_its_size_and_a_constant(place: Path, model: Path, what: str) -> None:
    content = LARGE[what]
    for name, folder in (("result.json", place / "large"), ("config.json", place / "large")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    hostile.harmless(lambda: read_result(RunFolder(place / "large")), len(content))
    hostile.harmless(lambda: list(generate(place / "large", max_tokens=1)), len(content))


def test_the_cases_reached_refusal_and_use() -> None:
    assert all(kinds["refused"] and kinds["taken"] for what, kinds in MET.items() if what != "record")

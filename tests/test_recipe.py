"""Recipes: what is accepted, what is refused, what is said, and that nothing is lost on the way to TOML and back."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import RecipeError
from hasten.recipe import Recipe, resolve, schema
from hasten.recipe import names as foreign
from hasten.recipe.recipe import RECIPES
from hasten.recipe.settings import read_toml

LEAVES = sorted(schema().leaves)
TABLES_WITH_VARIANTS = [table for table in schema().tables if schema().has_variants(table)]

# What the tests count with, so that tuning a default changes none of them.
BASE = """
lr = 0.002
batch_tokens = 8192
seq_len = 256
budget = "3min"
[schedule]
warmup = "2%"
floor = 0.01
"""


def recipe_of(*overrides: str, source: Any = BASE) -> Recipe:
    return resolve(source, list(overrides)).recipe


def refusal(*overrides: str, source: Any = BASE) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(source, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


def variant_of(key: str) -> dict[str, Any]:
    """The setting that makes `key` exist: some keys belong to one variant of their table only."""
    table = key.partition(".")[0]
    if table not in TABLES_WITH_VARIANTS or key.endswith(".name"):
        return {}
    return {f"{table}.name": next(iter(schema().leaves[key]))}


# Writing and reading


def test_defaults_survive_toml_exactly():
    recipe = resolve().recipe
    assert resolve(recipe.to_toml()).recipe == recipe
    assert resolve(recipe).recipe == recipe
    assert resolve(recipe.to_dict()).recipe == recipe


@settings(max_examples=60, deadline=None)
@given(
    lr=st.floats(1e-9, 100.0, exclude_min=True),
    warmup=st.one_of(
        st.integers(0, 10**6).map(str),
        st.floats(0, 0.99).map(lambda share: f"{share * 100:f}%"),
        st.floats(0.001, 1e5).map(lambda seconds: f"{seconds:f}s"),
    ),
    budget=st.floats(1e6, 1e7).map(lambda seconds: f"{seconds!r}s"),
    schedule=st.sampled_from(["cosine", "linear", "sqrt", "constant"]),
    clip=st.sampled_from(["none", "norm", "value", "norm_and_value"]),
    train=st.lists(st.text(min_size=1).filter(str.isprintable), min_size=1, max_size=3),
    separator=st.one_of(st.none(), st.text(st.characters(codec="utf-8"), min_size=1)),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_recipe_survives_toml_exactly(lr, warmup, budget, schedule, clip, train, separator, seed):
    chosen = {
        "lr": lr,
        "schedule": {"name": schedule, "warmup": warmup},
        "clip": clip,
        "budget": budget,
        "data": {"train": train, "separator": separator},
        "seed": seed,
    }
    recipe = resolve(None, chosen).recipe
    again = resolve(recipe.to_toml()).recipe
    assert again == recipe
    assert again.to_toml() == recipe.to_toml()
    assert again.sha256 == recipe.sha256


def test_recipe_is_json_and_has_every_key():
    plain = json.loads(json.dumps(recipe_of("optimizer.betas=[0.9,0.95]").to_dict(), allow_nan=False))
    assert plain["budget"] == "3min"
    assert plain["optimizer"]["betas"] == [0.9, 0.95]
    assert set(plain) == set(Recipe.model_fields)


def test_sources_of_a_recipe(tmp_path):
    recipe = recipe_of("seed=5")
    file = tmp_path / "my.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_bytes(b"\xef\xbb\xbf" + recipe.to_toml().encode())
    assert resolve(file).recipe == resolve(str(file)).recipe == resolve(run).recipe == recipe
    assert resolve(run, ["seed=6"]).recipe.seed == 6
    assert "reference" in refusal(source="referense")
    assert "missing.toml" in refusal(source=tmp_path / "missing.toml")
    file.write_text("lr = \n", encoding="utf-8")
    assert "my.toml" in refusal(source=file)
    file.write_bytes(b"\xff\xfe")
    assert "my.toml" in refusal(source=file)


def test_the_reference_recipe_is_reproducible():
    recipe = resolve("reference").recipe
    assert recipe.budget.unit in ("steps", "tokens")
    assert recipe.model.name == "nano"
    assert recipe.data.train == "python"


def test_the_reference_recipe_does_not_lean_on_defaults():
    left_out = {"data.val", "data.text_key", "data.separator", "batch.micro_rows", "threads", "out", "init_from"}
    left_out |= {
        "data.shuffle_tokens",
        "batch.schedule",
        "batch.lr_power",
        "data.weights",
        "branch_from",
        "branch_step",
    }
    left_out |= {f"schedule.{beside}" for beside in ("weight_decay", "momentum", "beta1", "beta2", "start")}
    given = {item.key for item in read_toml((RECIPES / "reference.toml").read_text(encoding="utf-8"), "in the file")}
    keys = {key for key in LEAVES if next(iter(schema().leaves[key])) in ("", "cosine", "norm")}
    assert keys - given == left_out | {"target_loss"}


def test_reading_recipes_needs_no_torch():
    code = "import sys, hasten.recipe as r; r.resolve(None, ['lr=1']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# key=value


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("budget=60s", "budget", "1min"),
        ("budget=2000", "budget", "2000"),
        ("data=my file.txt", "data.train", "my file.txt"),
        ("data=[ab]*.txt", "data.train", "[ab]*.txt"),
        ("data=2024-01-01", "data.train", "2024-01-01"),
        ("data.train=['a.txt', 'b.txt']", "data.train", ["a.txt", "b.txt"]),
        ("data.train=['a.txt']", "data.train", "a.txt"),
        ('data.separator="\\n\\n"', "data.separator", "\n\n"),
        ("data.separator=---", "data.separator", "---"),
        ("data.document_mask=False", "data.document_mask", False),
        ("lr=3e-4", "optimizer.lr", 3e-4),
        ("lr=1", "optimizer.lr", 1.0),
        ("lr=.001", "optimizer.lr", 0.001),
        ("--lr=.001", "optimizer.lr", 0.001),
        ("clip.max-norm=1", "clip.max_norm", 1.0),
        ("optimizer.betas=[0.9,0.99]", "optimizer.betas", [0.9, 0.99]),
        ("model=micro", "model.name", "micro"),
        ("precision=bf16", "precision.name", "bf16"),
        ("precision=16", "precision.name", "fp16"),
        ("schedule=linear", "schedule.name", "linear"),
        ("optimizer=adamw", "optimizer.name", "adamw"),
        ("optimizer=AdEMAMix", "optimizer.name", "ademamix"),
        ("lengths=constant", "lengths.name", "constant"),
        ("clip=none", "clip.name", "none"),
        ("clip.name=value", "clip.name", "value"),
        ("seed=007", "seed", 7),
        ("batch_tokens=8e3", "batch.tokens", 8000),
        ("batch_tokens=1_024", "batch.tokens", 1024),
        ("out=7", "out", "7"),
        ("out=true", "out", "true"),
        ("out=none", "out", None),
        ("target_loss=none", "target_loss", None),
        ("compile=on", "compile", "on"),
        ("device=cuda:1", "device", "cuda:1"),
        ("optimizer={lr=0.5}", "optimizer.lr", 0.5),
    ],
)
def test_override_is_read(override, key, value):
    plain: Any = recipe_of(override).to_dict()
    for part in key.split("."):
        plain = plain[part]
    assert plain == value
    assert type(plain) is type(value)


def test_overrides_as_a_mapping_are_typed():
    recipe = resolve(None, {"lr": 1e-3, "optimizer": {"betas": (0.8, 0.9)}, "schedule.floor": 0, "clip": "none"}).recipe
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-3, (0.8, 0.9))
    assert (recipe.schedule.floor, recipe.clip.name) == (0.0, "none")
    with pytest.raises(RecipeError, match=r"optimizer\.lr='1e-3'.* expected a number above 0"):
        resolve(None, {"lr": "1e-3"})


@pytest.mark.parametrize("text", ["lr", "=3", "lr=", "data.train=[a.txt,b.txt]", "lr=3\nseed=1"])
def test_malformed_override_is_refused(text):
    assert refusal(text)


def test_unquoted_list_is_shown_quoted():
    assert '["a.txt", "b.txt"]' in refusal("data.train=[a.txt,b.txt]")


def test_a_new_optimizer_takes_its_own_defaults_over_an_old_ones_that_were_written_out():
    written = recipe_of("optimizer=adamw", source=None).to_toml()
    lion = recipe_of("optimizer=lion", source=written).optimizer
    assert (lion.lr, lion.weight_decay, lion.betas) == (0.0007, 0.5, (0.9, 0.99))
    chosen = recipe_of("lr=0.002", source=None).to_toml()
    lion = recipe_of("optimizer=lion", source=chosen).optimizer
    assert (lion.lr, lion.weight_decay) == (0.002, 0.5)


@pytest.mark.parametrize("pair", [("lr=1", "lr=2"), ("lr=1", "optimizer.lr=1"), ("lr=1", "learning_rate=2")])
def test_key_given_twice_is_refused(pair):
    message = refusal(*pair)
    assert "optimizer.lr is given twice" in message
    assert all(text in message for text in pair)


def test_override_beats_file():
    assert recipe_of("lr=2", source="lr = 1\n").optimizer.lr == 2


# Variants


def test_variant_change_drops_defaults_and_keeps_what_both_have():
    saved = recipe_of("schedule.warmup=3%").to_toml()
    schedule = recipe_of("schedule=constant", source=saved).schedule
    assert schedule.name == "constant"
    assert str(schedule.warmup) == "3%"
    assert recipe_of("clip=none", source=saved).clip.name == "none"


def test_variant_change_refuses_to_lose_a_setting():
    message = refusal("schedule=constant", source="[schedule]\nfloor = 0.05\n")
    assert "schedule.floor=0.05" in message
    assert "schedule=constant" in message


@pytest.mark.parametrize("pair", [("clip=none", "clip.max_norm=1"), ("clip.max_norm=1", "clip.name=none")])
def test_setting_of_another_variant_is_refused(pair):
    message = refusal(*pair)
    assert "clip.max_norm" in message
    assert "'norm' or 'norm_and_value'" in message
    assert "the default clip='norm'" in refusal("clip.max_value=1")


# Refusals


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("optimizer.wieght_decay=1", "did you mean 'optimizer.weight_decay'?"),
        ("optimiser.lr=1", "did you mean 'optimizer.lr'"),
        ("floor=0.1", "did you mean 'schedule.floor'?"),
        ("budgett=60s", "did you mean 'budget'?"),
        ("lerning_rate=1", "'optimizer.lr'"),
        ("optimizer.zzz=1", "optimizer has optimizer.lr, optimizer.weight_decay"),
        ("qqqqqq=1", "the keys at the top are activation_checkpointing, batch, branch_from"),
        ("a.b.c=1", "'a.b.c'"),
        ("optimizer.lr.x=1", "optimizer.lr is a single value"),
        ("batch=8192", "batch.tokens"),
        ("schedule=cosin", "did you mean 'cosine'?"),
        ("lr=fast", "optimizer.lr=fast: expected a number above 0"),
        ("learning_rate=-1", "optimizer.lr=-1 (given as learning_rate): expected a number above 0"),
        ("lr=nan", "optimizer.lr=nan"),
        ("seed=1.5", "seed=1.5: expected a whole number of at least 0"),
        ("threads=0", "threads=0: expected a whole number of at least 1"),
        ("budget=15m", "15Mtok"),
        ("device=gpu", "'cuda:N'"),
    ],
)
def test_refusal_says_key_value_and_expectation(override, wanted):
    assert wanted in refusal(override)


def test_refusal_names_the_file_and_escapes_terminal_codes():
    assert "in the.toml" not in refusal(source="lr = 'x'\n")
    assert "\x1b" not in refusal("lr=\x1b[31m")
    assert "\x1b" not in refusal("a\x1b[31m=1")


WRONG_EVERYWHERE = [[[]], {"nonsense": 1}, float("nan"), "", datetime.date(2024, 1, 1), b"bytes", object]
WRONG_FOR_TEXT = [3, 2.5, [1], ["", "a"]]
WRONG_FOR_NUMBERS = [True, "many", "1", -1]


def wrong_values(key: str) -> list[Any]:
    field = next(iter(schema().leaves[key].values()))
    default = field.get_default(call_default_factory=True)
    is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
    is_text = isinstance(default, str)
    return WRONG_EVERYWHERE + (WRONG_FOR_NUMBERS if is_number else WRONG_FOR_TEXT if is_text else [])


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_refuses_wrong_values_by_name(key):
    values = wrong_values(key)
    assert len(values) >= 5
    for value in values:
        with pytest.raises(RecipeError) as caught:
            resolve(None, {**variant_of(key), key: value})
        assert key in str(caught.value), value
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", LEAVES)
def test_every_default_is_accepted_and_described(key):
    name = variant_of(key)
    default = schema().default(key, next(iter(name.values()), ""))
    assert resolve(None, {**name, key: default}).recipe
    assert schema().expected(key) not in ("", "another value")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["batch_tokens=255"], "batch.tokens=255"),
        (["batch.micro_rows=33"], "batch.micro_rows=33"),
        (["budget=0"], "budget=0"),
        (["budget=0s"], "budget=0s"),
        (["budget=5%"], "budget=5%"),
        (["schedule.warmup=100%"], "schedule.warmup=100%"),
        (["schedule.warmup=100", "budget=100"], "schedule.warmup=100"),
        (["schedule.warmup=819200tok", "budget=100"], "schedule.warmup=819.2ktok"),
        (["schedule.warmup=60s", "budget=60s"], "schedule.warmup=1min"),
        (["schedule.warmup=1s", "budget=100"], "schedule.warmup=1s"),
        (["data.val_share=0"], "data.val_share=0"),
        (["data.val_share=0.1", "val=v.txt"], "data.val_share=0.1"),
        (["data=a.txt", "val=a.txt"], "data.val='a.txt'"),
        (["data.tokenizer=bytes", "data.vocab_size=1000"], "data.vocab_size=1000"),
        (["init_from=runs/a", "model=micro"], "init_from='runs/a'"),
        (["init_from=runs/a", "data.tokenizer=bytes"], "data.tokenizer"),
        (["data.val_share=0.51"], "data.val_share=0.51"),
        (["optimizer.betas=[0.9,1.0]"], "optimizer.betas"),
        (["data.vocab_size=256"], "data.vocab_size=256"),
    ],
)
def test_contradiction_is_refused(overrides, wanted):
    assert wanted in refusal(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["batch_tokens=256"],
        ["batch.micro_rows=32"],
        ["schedule.warmup=99", "budget=100"],
        ["schedule.warmup=819199tok", "budget=100"],
        ["schedule.warmup=59s", "budget=60s"],
        ["schedule.warmup=1ep", "budget=100"],
        ["schedule.warmup=0"],
        ["data.val_share=0", "val=v.txt"],
        ["data.val_share=0.5"],
        ["init_from=runs/a"],
        ["data.vocab_size=257"],
        ["optimizer.betas=[0,0.999]"],
    ],
)
def test_the_other_side_of_each_boundary_is_accepted(overrides):
    recipe = recipe_of(*overrides)
    assert resolve(recipe.to_toml()).recipe == recipe


def test_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        resolve().recipe.seed = 3


# Names from elsewhere


@pytest.mark.parametrize(
    ("overrides", "change", "note"),
    [
        (["learning_rate=1e-3"], "optimizer.lr: 0.002 -> 0.001", "learning_rate sets optimizer.lr"),
        (["max_steps=2000"], "budget: 3min -> 2000", "max_steps=2000 sets budget='2000'"),
        (["num_train_epochs=1"], "budget: 3min -> 1ep", "num_train_epochs=1 sets budget='1ep'"),
        (["max_steps=5", "num_train_epochs=-1"], "budget: 3min -> 5", "num_train_epochs=-1 changes nothing here"),
        (["train.max_tokens=1000000"], "budget: 3min -> 1Mtok", "train.max_tokens=1000000 sets budget='1000000tok'"),
        (["max_duration=4800ba"], "budget: 3min -> 4800", "max_duration=4800ba sets budget='4800'"),
        (["warmup_ratio=0.07"], "schedule.warmup: 2% -> 7%", "warmup_ratio=0.07 sets schedule.warmup='7%'"),
        (["warmup_steps=100"], "schedule.warmup: 2% -> 100", "warmup_steps=100 sets schedule.warmup='100'"),
        (["warmup_steps=0.1"], "schedule.warmup: 2% -> 10%", "warmup_steps=0.1 sets schedule.warmup='10%'"),
        (["t_warmup=0.1dur"], "schedule.warmup: 2% -> 10%", "t_warmup=0.1dur sets schedule.warmup='10%'"),
        (["bf16=true"], "precision.name: float32 -> bf16", "bf16=true sets precision.name='bf16'"),
        (["dtype=bfloat16"], "precision.name: float32 -> bf16", "dtype=bfloat16 reads as precision.name='bf16'"),
        (["min_lr=1e-4", "lr=1e-3"], "schedule.floor: 0.01 -> 0.1", "min_lr=1e-4 sets schedule.floor=0.1"),
        (["min_lr_ratio=0.1"], "schedule.floor: 0.01 -> 0.1", "min_lr_ratio sets schedule.floor"),
        (["max_grad_norm=0.5"], "clip.max_norm: 1.0 -> 0.5", "max_grad_norm sets clip.max_norm"),
        (["grad_clip=0"], "clip.name: norm -> none", "grad_clip=0 sets clip.name='none'"),
        (["clip_value=.5"], "clip.name: norm -> value", "clip_value=.5 sets clip.name='value'"),
        (["clip_norm=2", "clip_value=1"], "clip.name: norm -> norm_and_value", "clip_norm sets clip.max_norm"),
        (["block_size=128"], "lengths.seq_len: 256 -> 128", "block_size sets lengths.seq_len"),
        (["n_embd=64"], "model.width: none -> 64", "n_embd sets model.width"),
        (["adam_beta2=.99"], "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]", "adam_beta2=.99 sets optimizer.betas"),
        (["--lr-warmup-iters=10"], "schedule.warmup: 2% -> 10", "--lr-warmup-iters=10 sets schedule.warmup='10'"),
        (["lr_decay_style=linear"], "schedule.name: cosine -> linear", "lr_decay_style sets schedule.name"),
        (["optimizer.learning_rate=1"], "optimizer.lr: 0.002 -> 1.0", "optimizer.learning_rate sets optimizer.lr"),
        (["output_dir=007"], "out: none -> 007", "output_dir sets out"),
        (["total_batch_size=4096"], "batch.tokens: 8192 -> 4096", "total_batch_size sets batch.tokens"),
        (["micro_batch_size=4"], "batch.micro_rows: none -> 4", "micro_batch_size sets batch.micro_rows"),
    ],
)
def test_foreign_name_is_read_and_said(overrides, change, note):
    resolved = resolve(BASE, overrides)
    assert change in resolve(BASE).recipe.difference(resolved.recipe)
    assert any(said.startswith(note) for said in resolved.notes), resolved.notes


def test_rows_become_tokens_where_the_row_length_is_given():
    rows = ["per_device_train_batch_size=8", "gradient_accumulation_steps=4"]
    resolved = resolve(None, [*rows, "max_length=512"])
    assert (resolved.recipe.batch.tokens, resolved.recipe.batch.micro_rows) == (8 * 4 * 512, 8)
    assert "sets batch.tokens=16384" in " ".join(resolved.notes)
    message = refusal(*rows)
    assert "batch.tokens" in message
    assert "per_device_train_batch_size=8" in message
    assert recipe_of("global_batch_size=16", "micro_batch_size=2", "block_size=64").batch.tokens == 1024


def test_accumulation_sets_the_micro_batch_or_is_refused():
    step = ("global_batch_size=32", "block_size=64")
    assert recipe_of(*step, "gradient_accumulation_steps=4").batch.micro_rows == 8
    assert recipe_of(*step, "micro_batch_size=8", "gradient_accumulation_steps=4").batch.micro_rows == 8
    assert "multiple" in refusal(*step, "gradient_accumulation_steps=5")
    assert "keep two" in refusal(*step, "micro_batch_size=4", "gradient_accumulation_steps=4")


@pytest.mark.parametrize("override", ["resume=auto", "lr_decay_iters=100", "gradient_accumulation_steps=4"])
def test_foreign_name_without_counterpart_is_refused_with_the_reason(override):
    assert override in refusal(override)


def test_own_names_are_not_noted():
    assert resolve(BASE, ["lr=1", "data=a", "val=b", "model=nano", "seq_len=64", "batch_tokens=64"]).notes == ()


def test_every_foreign_name_leads_to_a_key_and_hides_none_of_ours():
    assert set(foreign.RENAMED.values()) <= set(LEAVES)
    assert set(foreign.SHORT.values()) <= set(LEAVES)
    assert set(foreign.VALUES) <= set(LEAVES)
    assert not foreign.FOREIGN & (set(LEAVES) | set(schema().tables) | set(foreign.SHORT))


def said_or_refused(setting: dict[str, Any]) -> str:
    try:
        return " ".join(resolve(None, setting).notes)
    except RecipeError as error:
        return str(error)


@pytest.mark.parametrize("name", sorted(foreign.FOREIGN))
def test_foreign_name_is_never_passed_over_in_silence(name):
    for value in ([[]], "non sense", object, None, True, -1, 0.5, 10**400):
        told = said_or_refused({name: value})
        assert told, value
        assert "\n" not in told


# Identity


def test_difference_says_what_changed_and_in_which_direction():
    one, other = recipe_of("lr=0.001"), recipe_of("lr=0.002", "out=x")
    assert one.difference(other) == ["optimizer.lr: 0.001 -> 0.002", "out: none -> x"]
    assert one.difference(other, ignore=other.free_on_resume) == ["optimizer.lr: 0.001 -> 0.002"]
    assert one.difference(one) == []


@pytest.mark.parametrize(
    ("overrides", "is_free"),
    [
        (["budget=100"], {"out", "checkpoint.keep", "checkpoint.every", "evaluate.every", "evaluate.tokens"}),
        (["budget=100", "target_loss=3"], {"out", "checkpoint.keep", "checkpoint.every"}),
        (["budget=60s"], {"out", "checkpoint.keep"}),
    ],
)
def test_only_what_cannot_change_the_weights_is_free_on_resume(overrides, is_free):
    assert set(recipe_of(*overrides).free_on_resume) == is_free


def test_hash_is_of_the_choices_not_of_the_folder():
    assert recipe_of("out=a").sha256 == recipe_of("out=b").sha256
    assert recipe_of("seed=1").sha256 != recipe_of("seed=2").sha256
    assert recipe_of("data=['a']").sha256 == recipe_of("data=a").sha256


@pytest.mark.parametrize(
    ("data", "start"),
    [
        ("python", "python-nano-"),
        ("some folder/My Text (1).txt.gz", "My-Text-1-nano-"),
        ("-", "stdin-nano-"),
        ("../*.txt", "text-nano-"),
        (["a.txt", "b.txt", "c.txt"], "a-and-2-more-nano-"),
        ("x" * 300, "x" * 40 + "-nano-"),
        ("日本語.txt", "text-nano-"),
        (".hidden", "hidden-nano-"),
    ],
)
def test_run_name_is_safe_and_says_what_runs(data, start):
    recipe = resolve(None, {"data": data}).recipe
    name = recipe.default_run_name()
    assert name == start + recipe.sha256[:8]
    assert name == resolve(recipe.to_toml()).recipe.default_run_name()


# Building


def test_choices_match_the_techniques_that_exist():
    from hasten.clip import CLIPS
    from hasten.model import SIZES
    from hasten.optim import OPTIMIZERS
    from hasten.precision import PRECISIONS
    from hasten.schedules import SCHEDULES

    for table, known in (("clip", CLIPS), ("model", SIZES), ("precision", PRECISIONS), ("schedule", SCHEDULES)):
        assert set(schema().names(table)) - {"custom"} == set(known)
    assert set(schema().names("optimizer")) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", ["cosine", "linear", "sqrt", "constant"])
def test_schedule_is_built_with_its_warmup(name):
    schedule = recipe_of(f"schedule={name}", "schedule.warmup=10", "schedule.warmup_start=0.1").schedule
    built = schedule.build(total_steps=100, tokens_per_step=512)
    assert built(0.0) == pytest.approx(0.1)
    assert built(0.1) == 1.0
    assert built(1.0) == pytest.approx(1.0 if name == "constant" else 0.01)
    assert recipe_of("schedule.warmup=0").schedule.build(total_steps=5, tokens_per_step=1)(0.0) == 1.0


@pytest.mark.parametrize(
    ("warmup", "budget", "share"),
    [("10", "100", 0.1), ("10%", "100", 0.1), ("5120tok", "100", 0.1), ("2ep", "100", 0.4), ("6s", "60s", 0.1)],
)
def test_warmup_in_every_unit(warmup, budget, share):
    recipe = recipe_of(f"schedule.warmup={warmup}", f"budget={budget}")
    built = recipe.schedule.build(total_steps=100, tokens_per_step=512, steps_per_epoch=20.0, seconds=60.0)
    assert built(share) == 1.0
    assert built(share - 0.01) < 1.0


def test_warmup_as_long_as_the_run_is_refused_when_it_is_built():
    schedule = recipe_of("schedule.warmup=2ep", "budget=100").schedule
    with pytest.raises(RecipeError, match=r"schedule\.warmup=2ep is as long as the run"):
        schedule.build(total_steps=100, tokens_per_step=512, steps_per_epoch=50.0)
    assert schedule.build(total_steps=101, tokens_per_step=512, steps_per_epoch=50.0)


def test_tables_build_what_they_name():
    recipe = recipe_of(
        "clip=norm_and_value", "clip.max_norm=2", "clip.max_value=3", "model.num_layers=7", "data=a", "val=b"
    )
    clip = recipe.clip.build()
    assert (clip.max_norm, clip.max_value) == (2.0, 3.0)
    config = recipe.model.build(300, 64)
    assert (config.num_layers, config.width, config.vocab_size, config.seq_len) == (7, 128, 300, 64)
    spec = recipe.data.build()
    assert (spec.train, spec.val) == (("a",), ("b",))
    with pytest.raises(RecipeError, match="head_dim"):
        recipe_of("model.head_dim=3").model.build(300, 64)
    for name in schema().names("clip"):
        assert recipe_of(f"clip={name}").clip.build()


def test_a_step_reads_whole_rows():
    recipe = recipe_of("seq_len=200", "batch_tokens=1100")
    assert (recipe.rows_per_step, recipe.tokens_per_step) == (5, 1000)

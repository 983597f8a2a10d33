"""Names of settings that people know from other trainers, and which of ours each one sets.

Sources: the public documentation and configuration files of Hugging Face `TrainingArguments` and TRL, nanoGPT, litgpt,
axolotl, Megatron-LM, torchtune, torchtitan, Composer and llm-foundry, Levanter, OLMo-core, nanochat, lingua.

A renamed setting keeps its value. Where the meaning differs (a ratio, an absolute floor, rows instead of tokens) the
value is converted. Both are said in a note, so that nobody has to guess what a foreign word did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from hasten.errors import RecipeError, one_line

ON_COMMAND_LINE = "on the command line"


@dataclass(frozen=True)
class Given:
    """One setting as somebody gave it.

    Args:
        key: dotted name, `-` read as `_`.
        value: as parsed.
        raw: the text it was parsed from, where it came as text; None for typed values.
        name: the name that was typed, kept through every translation for messages.
        origin: where it was given: ``on the command line``, ``in recipe.toml``.
    """

    key: str
    value: Any
    raw: str | None = None
    name: str = ""
    origin: str = ON_COMMAND_LINE

    def __str__(self) -> str:
        return f"{one_line(self.name or self.key)}={self.shown()}"

    def shown(self) -> str:
        """Return the value as it was given, on one line and not too long."""
        return one_line(self.raw if self.raw is not None else repr(self.value))


# Short names of our own: no note.
SHORT = {
    "lr": "optimizer.lr",
    "data": "data.train",
    "val": "data.val",
    "seq_len": "lengths.seq_len",
    "batch_tokens": "batch.tokens",
    # A bare name chooses a table's variant.
    **{t: f"{t}.name" for t in ("model", "lengths", "optimizer", "schedule", "clip", "guard", "precision", "parallel")},
}

_SAME_VALUE = {
    "optimizer.lr": "learning_rate max_lr peak_lr",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.eps": "adam_epsilon adam_eps eps",
    "optimizer.betas": "betas adam_betas",
    "optimizer.name": "optim optimizer_name optimizer_type",
    "schedule.name": "lr_scheduler_type lr_scheduler lr_decay_style lr_schedule scheduler",
    "schedule.floor": "min_lr_ratio min_lr_factor alpha_f final_lr_frac cosine_min_lr_ratio lr_min_ratio",
    "lengths.seq_len": "max_length max_seq_length sequence_len block_size max_seq_len seq_length sequence_length "
    "context_length",
    "batch.tokens": "total_batch_size num_tokens_per_train_step tokens_per_step",
    "precision.name": "dtype torch_dtype mixed_precision amp",
    "data.train": "train_file train_files train_data dataset data_path",
    "data.val": "validation_file val_file val_data valid_file",
    "data.val_share": "val_set_size",
    "data.vocab_size": "vocab_size",
    "data.tokenizer": "tokenizer tokenizer_path tokenizer_name_or_path tokenizer_name",
    "data.text_key": "text_column text_field dataset_text_field",
    "model.num_layers": "n_layer n_layers num_layers num_hidden_layers",
    "model.num_heads": "n_head n_heads num_heads num_attention_heads",
    "model.num_kv_heads": "n_kv_heads n_kv_head num_kv_heads num_key_value_heads num_query_groups n_query_groups",
    "model.width": "n_embd d_model dim hidden_size",
    "model.mlp_width": "intermediate_size ffn_hidden_size",
    "model.head_dim": "head_dim kv_channels",
    "model.tied": "tie_word_embeddings",
    "checkpoint.keep": "save_total_limit",
    "clip.clipping": "clip_factor",
    "clip.threshold": "z_thresh",
    "guard.threshold": "sigma_factor",
    "guard.window": "rolling_interval_length",
    "out": "output_dir out_dir save_dir run_dir",
    "seed": "manual_seed global_seed",
    "compile": "torch_compile",
    "device": "device_type",
}
RENAMED = {name: key for key, names in _SAME_VALUE.items() for name in names.split()}

# key -> what people write -> what we call it.
VALUES = {
    "precision.name": {
        **dict.fromkeys(("fp32", "float", "32", "32-true", "no", "none", "full"), "float32"),
        **dict.fromkeys(("bfloat16", "bf16-mixed", "bf16-true", "amp_bf16", "torch.bfloat16"), "bf16"),
        **dict.fromkeys(("float16", "half", "16", "16-mixed", "16-true", "amp_fp16", "torch.float16"), "fp16"),
    },
    "compile": {"true": "on", "false": "off"},
    "schedule.name": {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"},
    "optimizer.name": dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "AdamW"), "adamw"),
    "clip.name": {"off": "none", "AGC": "agc", "ZClip": "zclip"},
    "guard.name": {"off": "none"},
}

# Tables of other trainers whose keys are read as if they stood alone: `train.max_tokens`, `lr_scheduler.warmup_steps`.
_TABLES = ("train", "training", "trainer", "args", "training_args", "lr_scheduler", "lr_scheduler_kwargs")

_NEEDLESS = {
    **dict.fromkeys(("logging_steps", "log_interval", "log_every_n_steps"), "every step is recorded"),
    **dict.fromkeys(("overwrite_output_dir", "do_train", "do_eval"), "train and evaluate are always done"),
}
_REFUSED = {
    **dict.fromkeys(
        ("lr_decay_iters", "lr_decay_steps", "max_lr_steps", "decay_steps"),
        "the schedule always ends with the budget; leave it out",
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "resume", "auto_resume", "auto_resume_from_checkpoints", "autoresume"),
        "the same command resumes by itself; leave it out, and name the run's folder with out=FOLDER",
    ),
    "eval_iters": "evaluate.tokens says how many held-out tokens an evaluation in the run reads",
    "auto_find_batch_size": "batch.micro_rows is found by itself when it is not given",
}

Settings = list[tuple[str, Any]]


def _percent(share: Any) -> str:
    """Return a share as a percentage, exactly: 0.07 is 7%, not 7.000000000000001%."""
    return f"{(Decimal(repr(_number(share))) * 100).normalize():f}%"


def _number(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError("expected a number")
    return value


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _steps_or_share(value: Any) -> Any:
    """Read a count of steps, or a fraction of the run below 1 (Hugging Face's reading since version 5)."""
    if isinstance(value, str):
        return value
    if 0 < _number(value) < 1:
        return _percent(value)
    return f"{value:.0f}" if float(value).is_integer() else str(value)


def _limit(unit: str) -> Callable[[Any], Settings]:
    def convert(value: Any) -> Settings:
        if isinstance(value, str):
            return [("budget", value)]
        if _number(value) == -1:  # How Hugging Face spells "no limit"; the other limit then decides.
            return []
        number = f"{value:.0f}" if float(value).is_integer() else repr(value)
        return [("budget", number + unit)]

    return convert


def _composer(key: str) -> Callable[[Any], Settings]:
    """Read Composer's time strings: `4800ba` batches, `0.1dur` a share, `1ep`, `300tok`."""

    def convert(value: Any) -> Settings:
        text = str(value)
        if text.endswith("ba"):
            return [(key, text[:-2])]
        if text.endswith("dur"):
            return [(key, _percent(_share_of_text(text[:-3])))]
        return [(key, text)]

    return convert


def _share_of_text(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a share of the run such as 0.1dur") from None


def _norm(value: Any) -> Settings:
    # nanoGPT and Hugging Face switch clipping off with zero.
    return [("clip.name", "none")] if value == 0 and not isinstance(value, bool) else [("clip.max_norm", value)]


def _precision(name: str) -> Callable[[Any], Settings]:
    return lambda value: [("precision.name", name)] if _flag(value) else []


_CONVERSIONS: tuple[tuple[Callable[[Any], Settings], str], ...] = (
    (
        _limit(""),
        "max_steps max_iters train_iters num_iterations steps total_steps max_train_steps num_train_steps "
        "training_steps num_steps",
    ),
    (_limit("ep"), "num_train_epochs num_epochs epochs max_epochs"),
    (_limit("tok"), "max_tokens train_tokens max_train_tokens total_tokens"),
    (_composer("budget"), "max_duration"),
    (_composer("schedule.warmup"), "t_warmup"),
    (
        lambda value: [("schedule.warmup", _steps_or_share(value))],
        "warmup warmup_steps lr_warmup_steps warmup_iters lr_warmup_iters num_warmup_steps",
    ),
    (lambda value: [("schedule.warmup", _percent(value))], "warmup_ratio warmup_fraction lr_warmup_fraction"),
    (
        lambda value: [("evaluate.every", _steps_or_share(value))],
        "eval_steps eval_interval val_check_interval val_loss_every eval_every",
    ),
    (
        lambda value: [("checkpoint.every", _steps_or_share(value))],
        "save_steps save_interval checkpoint_interval save_every",
    ),
    (_norm, "max_norm max_grad_norm grad_clip clip_grad gradient_clipping gradient_clip_val clip_norm"),
    (_precision("bf16"), "bf16"),
    (_precision("fp16"), "fp16"),
    (lambda value: [] if _flag(value) else [("schedule.name", "constant")], "decay_lr"),
    (lambda value: [("device", "cpu")] if _flag(value) else [], "use_cpu no_cuda"),
)
_CONVERTED = {name: convert for convert, names in _CONVERSIONS for name in names.split()}

# Settings that mean something only together with others.
_MIN_LR = ("min_lr", "min_decay_lr", "lr_min", "eta_min")
_ROWS_PER_DEVICE = ("per_device_train_batch_size", "per_gpu_train_batch_size", "batch_size", "local_batch_size")
_ROWS_PER_STEP = ("global_batch_size", "global_train_batch_size", "train_batch_size", "effective_batch_size")
_ROWS_PER_MICRO = ("micro_batch_size", "device_train_microbatch_size", "micro_batch")
_ACCUMULATION = ("gradient_accumulation_steps", "gradient_accumulation_iters", "accumulate_grad_batches")
_BETAS = {"adam_beta1": 0, "beta1": 0, "adam_beta2": 1, "beta2": 1}
_BATCH = _ROWS_PER_DEVICE + _ROWS_PER_STEP + _ROWS_PER_MICRO + _ACCUMULATION

FOREIGN = frozenset(
    [*RENAMED, *_CONVERTED, *_MIN_LR, *_BATCH, *_BETAS, *_NEEDLESS, *_REFUSED, "clip_value", "gradient_clip_value"]
)


def translate(
    givens: Sequence[Given], known: Callable[[str], Any], is_ours: Callable[[str], bool]
) -> tuple[list[Given], list[str]]:
    """Return `givens` under our names, and a note for every name and value that came from elsewhere.

    Args:
        givens: one layer of settings: a file, or a command line.
        known: the value a key of ours has so far (an earlier layer's, or the default).
        is_ours: says whether a name is a key or a table of ours; such a name is never translated.

    Raises:
        RecipeError: a foreign setting whose value cannot be read, or that has no counterpart here.
    """
    ours: list[Given] = []
    notes: list[str] = []
    together: dict[str, Given] = {}
    for given in givens:
        name = _bare(given.key, is_ours)
        if given.key in SHORT:
            ours.append(replace(given, key=SHORT[given.key]))
        elif is_ours(given.key) or name not in FOREIGN:
            ours.append(given)
        elif name in _REFUSED:
            raise RecipeError(f"{given} is a setting of another trainer that is not needed here: {_REFUSED[name]}.")
        elif name in _NEEDLESS:
            notes.append(f"{given} is not needed: {_NEEDLESS[name]}")
        elif name in RENAMED:
            ours.append(replace(given, key=RENAMED[name]))
            notes.append(f"{given.name} sets {RENAMED[name]}")
        elif name in _CONVERTED:
            _add(ours, notes, given, _converted(given, name))
        elif name in together:
            raise RecipeError(f"{together[name].name} and {given.name} set the same thing; keep one.")
        else:
            together[name] = given
    _join(together, ours, notes, known)
    return [_named_value(given, notes) for given in ours], notes


def _bare(key: str, is_ours: Callable[[str], bool]) -> str:
    table, _, rest = key.partition(".")
    is_foreign_table = table in _TABLES and not is_ours(table)
    is_same_table = RENAMED.get(rest, "").startswith(f"{table}.")  # optimizer.learning_rate
    return rest if rest and (is_foreign_table or is_same_table) else key


def _converted(given: Given, name: str) -> Settings:
    try:
        return _CONVERTED[name](given.value)
    except (ValueError, ArithmeticError) as error:
        raise RecipeError(f"{given}: {error if isinstance(error, ValueError) else 'expected a number'}.") from None


def _add(ours: list[Given], notes: list[str], given: Given, settings: Settings) -> None:
    if not settings:
        notes.append(f"{given} changes nothing here")
    for key, value in settings:
        same = value is given.value
        ours.append(replace(given, key=key, value=value, raw=given.raw if same else None))
        notes.append(f"{given.name} sets {key}" if same else f"{given} sets {key}={value!r}")


def _named_value(given: Given, notes: list[str]) -> Given:
    text = given.raw if given.raw is not None else given.value
    if isinstance(text, bool):
        text = str(text).lower()
    ours = VALUES.get(given.key, {}).get(text) if isinstance(text, str) else None
    if ours is None:
        return given
    notes.append(f"{given} reads as {given.key}={ours!r}")
    return replace(given, value=ours, raw=None)


def _join(together: dict[str, Given], ours: list[Given], notes: list[str], known: Callable[[str], Any]) -> None:
    """Translate the settings that mean something only together with others."""

    def value_of(key: str) -> Any:
        return next((given.value for given in reversed(ours) if given.key == key), known(key))

    for name, given in together.items():
        if name in _MIN_LR:
            lr = value_of("optimizer.lr")
            try:
                floor = _number(given.value) / _number(lr)
            except (ValueError, ArithmeticError):
                raise RecipeError(f"{given}: expected a learning rate of at most optimizer.lr={lr!r}.") from None
            _add(ours, notes, given, [("schedule.floor", floor)])
        elif name in ("clip_value", "gradient_clip_value"):
            both = any(g.key == "clip.max_norm" for g in ours)
            settings: Settings = [("clip.max_value", given.value)]
            if not any(g.key in ("clip", "clip.name") for g in ours):
                settings.append(("clip.name", "norm_and_value" if both else "value"))
            _add(ours, notes, given, settings)
    betas: dict[int, Given] = {}
    for name, place in _BETAS.items():
        if name in together and place in betas:
            raise RecipeError(f"{betas[place].name} and {together[name].name} set the same thing; keep one.")
        if name in together:
            betas[place] = together[name]
    if betas:
        pair = value_of("optimizer.betas")
        pair = list(pair) if isinstance(pair, (list, tuple)) and len(pair) == 2 else [None, None]
        for place, given in betas.items():
            pair[place] = given.value
        _add(ours, notes, next(iter(betas.values())), [("optimizer.betas", pair)])
    batch = {name: given for name, given in together.items() if name in _BATCH}
    if batch:
        _join_batch(batch, ours, notes)


def _join_batch(batch: dict[str, Given], ours: list[Given], notes: list[str]) -> None:
    """Turn rows per device, micro-batch and accumulation into tokens per step, where the row length was given too."""

    def first(names: Sequence[str]) -> Given | None:
        found = [batch[name] for name in names if name in batch]
        if len(found) > 1:
            raise RecipeError(f"{found[0].name} and {found[1].name} set the same thing; keep one.")
        for given in found:
            if isinstance(given.value, bool) or not isinstance(given.value, int) or given.value < 1:
                raise RecipeError(f"{given}: expected a whole number of at least 1.")
        return found[0] if found else None

    step, device = first(_ROWS_PER_STEP), first(_ROWS_PER_DEVICE)
    micro, accumulation = first(_ROWS_PER_MICRO), first(_ACCUMULATION)
    part = device or micro
    if step is None and part is micro and accumulation is None:
        assert micro is not None
        _add(ours, notes, micro, [("batch.micro_rows", micro.value)])
        return
    lengths = [g.value for g in ours if g.key == "lengths.seq_len" and isinstance(g.value, int)]
    named = step or part or accumulation
    assert named is not None
    counted = step or part
    if counted is None or not lengths:
        raise RecipeError(
            f"{named} counts rows, and here batch.tokens is tokens per optimizer step (rows x accumulation x row "
            "length; micro-batches are found by themselves): give batch.tokens, or add the row length as seq_len=N."
        )
    rows = counted.value * (accumulation.value if accumulation and not step else 1)
    product = " x ".join(str(g) for g in ([step] if step else [part, accumulation]) if g is not None)
    tokens = rows * lengths[-1]
    ours.append(replace(named, key="batch.tokens", value=tokens, raw=None))
    notes.append(f"{product} x seq_len={lengths[-1]} sets batch.tokens={tokens} (on one device)")
    if part is not None:
        if step and accumulation and step.value != part.value * accumulation.value:
            raise RecipeError(f"{step} is not {part} x {accumulation}, which one device reads: keep two of them.")
        ours.append(replace(part, key="batch.micro_rows", value=part.value, raw=None))
        notes.append(f"{part.name} sets batch.micro_rows")
    elif accumulation:
        if rows % accumulation.value:
            raise RecipeError(f"{named} is not a multiple of {accumulation}: give batch.micro_rows instead.")
        _add(ours, notes, accumulation, [("batch.micro_rows", rows // accumulation.value)])

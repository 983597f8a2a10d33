"""Optimizer groups of a model: which rule, decay and rate each parameter gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from hasten.errors import RecipeError, nearest
from hasten.optim.kinds import COLUMNS, KINDS, ROWS, Kind, kinds_of
from hasten.optim.rule import Group
from hasten.sharding import local

# Rules that act on whole matrices, and the kinds that they are for: elsewhere they lose to an element-wise rule.
MATRIX_RULES = frozenset({"muon", "normuon", "soap", "soap_muon", "mars"})
# What else they need to know of a matrix, unless they are element-wise at heart.
FORM = ("split_sizes", "split_dim", "as_matrix")
FORMLESS = frozenset({"mars"})
MATRIX_KINDS = frozenset({"matrices", "experts", "convolutions"})
UNDECAYED = frozenset({"embeddings", "vectors"})
RESERVED = frozenset({"name", "kind", "params", "parameter_names"})
Settings = Mapping[str, Mapping[str, Any]]


def _itself(parameter: nn.Parameter) -> nn.Parameter:
    return parameter


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    master: Callable[[nn.Parameter], Tensor] = _itself,
    rule: str = "adamw",
    rest: str = "adamw",
    kinds: Settings | None = None,
    overrides: Settings | None = None,
) -> list[Group]:
    """Return optimizer groups with sane decay and rules, one or more for each kind of parameter.

    Kinds are read off the module tree, not off names (`hasten.optim.kinds.kinds_of`). Embeddings and vectors do not
    decay; matrices, experts, convolutions, the head and gates do. A matrix rule (`MATRIX_RULES`) gets the first three
    kinds and `rest` everything else; an element-wise rule gets everything. Frozen parameters are in no group.

    Args:
        model: any module.
        weight_decay: of what decays, finite, at least 0.
        master: maps a parameter of the model to the one the optimizer updates (`hasten.precision.Precision.master`).
        rule: name of the optimizer rule.
        rest: name of the rule for what a matrix rule does not take.
        kinds: settings for all of a kind, such as ``{"embeddings": {"lr_scale": 10.0}}``.
        overrides: settings by pattern over parameter names, such as ``{"*.lm_head.*": {"lr_scale": 0.2}}``, or
            ``{"*.c_attn.weight": {"split_sizes": None}}``. Names are as in ``model.named_parameters()`` with a dot in
            front; a tied parameter answers to all its names. Patterns may meet if they do not contradict each other.
            What is not ``weight_decay``, ``rule``, ``lr_scale``, ``split_sizes``, ``split_dim`` or ``as_matrix`` is a
            setting of the rule and goes into the group as it is.

    Returns:
        groups with ``name``, ``kind``, ``params``, ``parameter_names``, ``weight_decay``, ``rule`` and ``lr_scale``,
        in the order of `hasten.optim.kinds.KINDS`; every trainable parameter in exactly one, no group empty. Under a
        matrix rule other than MARS also ``split_sizes`` (the matrices fused in one, None for one matrix), ``split_dim``
        (the output dimension of a matrix, -2 or -1) and for convolutions ``as_matrix`` (see
        `hasten.optim.kinds.Kind`), a group for each. Where a kind needs several groups, the name says what is
        particular: ``matrices (split 384+128+128)``.

    Raises:
        RecipeError: a setting is out of range; a pattern matches nothing, or two contradict each other; a matrix rule
            was asked for a vector; the model has nothing to train or is not initialised yet; two parameters share
            their memory without being one parameter, so that both would update it.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.RMSNorm(4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False))
        >>> for group in parameter_groups(model, weight_decay=0.1, rule="muon"):
        ...     print(group["name"], group["parameter_names"], group["rule"], group["weight_decay"])
        matrices ['2.weight'] muon 0.1
        head ['3.weight'] adamw 0.1
        embeddings ['0.weight'] adamw 0.0
        vectors ['1.weight', '2.bias'] adamw 0.0
    """
    _check_settings("optimizer", {"weight_decay": weight_decay})
    trained = trained_parameters(model)
    _refuse_shared_memory(trained)
    defaults = {kind: _of_kind(kind, weight_decay, rule, rest, dict(kinds or {})) for kind in KINDS}
    _check_kinds(kinds or {})
    chosen = _override(model, trained, overrides or {})
    found = kinds_of(model)
    groups: dict[tuple[str, str], Group] = {}
    for name, parameter in trained:
        kind, extra = found[parameter], chosen.get(parameter, {})
        settings = defaults[kind.name] | extra
        form = _matrix_form(name, parameter, kind, settings) if settings["rule"] in MATRIX_RULES else {}
        settings = {key: value for key, value in settings.items() if key not in FORM} | form
        particular = [
            f"{key}={value}"
            for key, value in sorted(extra.items())
            if key not in FORM and defaults[kind.name].get(key) != value
        ]
        particular = _form_in_words(kind.name, form) + particular
        title = f"{kind.name} ({', '.join(particular)})" if particular else kind.name
        empty = {"name": title, "kind": kind.name, "params": [], "parameter_names": []}
        group = groups.setdefault((kind.name, title), empty | settings)
        group["params"].append(master(parameter))
        group["parameter_names"].append(name)
    return [group for kind in KINDS for (of, _), group in groups.items() if of == kind]


def check_complete(
    model: nn.Module, groups: Iterable[Group], *, master: Callable[[nn.Parameter], Tensor] = _itself
) -> list[Group]:
    """Return hand-made `groups` with lists as ``params`` and with ``parameter_names``, if they fit `model` exactly.

    Args:
        model: the module that they are for.
        groups: as for any `torch.optim.Optimizer`; ``params`` may be one tensor, an iterable, or (name, tensor) pairs.
        master: as in `parameter_groups`.

    Raises:
        RecipeError: a group is empty, a parameter is in two groups or twice in one, a trainable parameter is in none,
            or a tensor belongs to another model; each by name.
    """
    names = {master(parameter): name for name, parameter in model.named_parameters()}
    places: dict[Tensor, str] = {}
    complete = []
    for number, group in enumerate(groups):
        title = repr(str(group.get("name", f"number {number}")))
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        if not params:
            raise RecipeError(f"Optimizer group {title} is empty; leave it out, or give it parameters.")
        for parameter in params:
            if parameter not in names:
                shape = "x".join(map(str, parameter.shape))
                raise RecipeError(
                    f"Optimizer group {title} holds a {shape} tensor that is no parameter of the model; take its "
                    "parameters from model.named_parameters()."
                )
            if parameter in places:
                where = (
                    f"in group {title} twice" if places[parameter] == title else f"in {places[parameter]} and {title}"
                )
                raise RecipeError(f"{names[parameter]} is {where}; every parameter belongs in exactly one group.")
            places[parameter] = title
        complete.append(dict(group) | {"params": params, "parameter_names": [names[p] for p in params]})
    missing = [name for name, parameter in trained_parameters(model) if master(parameter) not in places]
    if missing:
        more = f" and {len(missing) - 1} more parameters are" if len(missing) > 1 else " is"
        raise RecipeError(
            f"{missing[0]}{more} in no optimizer group; add what is missing, or freeze it with requires_grad_(False)."
        )
    return complete


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of `model` that are not frozen, by name, a tied one once.

    Raises:
        RecipeError: there is none, or a lazy module has not got its shape yet.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise RecipeError("The model has no parameter to train; every one of them is frozen.")
    for name, parameter in trained:
        if isinstance(parameter, UninitializedParameter):
            raise RecipeError(f"{name} has no shape yet; run the model on one batch before building the optimizer.")
    return trained


def _of_kind(kind: str, weight_decay: float, rule: str, rest: str, given: Settings) -> dict[str, Any]:
    chosen = rule if rule not in MATRIX_RULES or kind in MATRIX_KINDS else rest
    decay = 0.0 if kind in UNDECAYED else weight_decay
    return {"weight_decay": decay, "rule": chosen, "lr_scale": 1.0} | dict(given.get(kind, {}))


def _check_kinds(given: Settings) -> None:
    for kind, settings in given.items():
        if kind not in KINDS:
            raise RecipeError(
                f"optimizer.kinds.{kind} is no kind of parameter{nearest(kind, KINDS)}; give {_list(KINDS)}."
            )
        _check_settings(f"optimizer.kinds.{kind}", settings)


def _override(
    model: nn.Module, trained: list[tuple[str, nn.Parameter]], overrides: Settings
) -> dict[nn.Parameter, dict[str, Any]]:
    """Return the settings that patterns give to parameters, by parameter."""
    names: dict[nn.Parameter, list[str]] = {parameter: [] for _, parameter in trained}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            names[parameter].append(name)
    chosen: dict[nn.Parameter, dict[str, Any]] = {}
    origins: dict[tuple[nn.Parameter, str], str] = {}
    for pattern, settings in overrides.items():
        _check_settings(f"optimizer.overrides.{pattern!r}", settings)
        matched = [
            p
            for p, given in names.items()
            if any(fnmatchcase(n, pattern) or fnmatchcase(f".{n}", pattern) for n in given)
        ]
        if not matched:
            close = nearest(pattern.strip("*."), [name for given in names.values() for name in given])
            raise RecipeError(
                f"optimizer.overrides.{pattern!r} matches no parameter that is trained{close}; patterns are like "
                f"'*.q_proj.weight', over names like {trained[0][0]!r}."
            )
        for parameter in matched:
            for setting, value in settings.items():
                before = chosen.setdefault(parameter, {}).setdefault(setting, value)
                origin = origins.setdefault((parameter, setting), pattern)
                if before != value:
                    raise RecipeError(
                        f"{names[parameter][0]} matches optimizer.overrides {origin!r} and {pattern!r}, which give it "
                        f"{setting}={before} and {value}; make one of the patterns narrower."
                    )
    return chosen


def _check_settings(where: str, settings: Mapping[str, Any]) -> None:
    if reserved := RESERVED & set(settings):
        raise RecipeError(f"{where}.{min(reserved)} cannot be set; it follows from the model.")
    decay, scale = settings.get("weight_decay", 0.0), settings.get("lr_scale", 1.0)
    if not 0.0 <= decay < float("inf"):
        raise RecipeError(f"{where}.weight_decay={decay} is out of range; give a finite number of at least 0.")
    if not 0.0 < scale < float("inf"):
        raise RecipeError(f"{where}.lr_scale={scale} is out of range; give a finite number above 0.")
    if settings.get("split_dim", ROWS) not in (ROWS, COLUMNS):
        raise RecipeError(f"{where}.split_dim={settings['split_dim']} is out of range; give -2 (rows) or -1 (columns).")


def _matrix_form(name: str, parameter: nn.Parameter, kind: Kind, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `FORM` lists, from `settings` or else from the module tree."""
    rule = settings["rule"]
    if parameter.ndim < 2:
        raise RecipeError(f"{name} has {parameter.ndim} dimensions, and {rule} is for matrices; give it another rule.")
    if rule in FORMLESS:
        return {}
    dim = settings.get("split_dim", kind.split_dim)
    as_matrix = settings.get("as_matrix", kind.as_matrix)
    found = kind.split_sizes if dim == kind.split_dim else None
    sizes = settings.get("split_sizes", found)
    if sizes is not None:
        sizes = tuple(sizes)
        is_flat = as_matrix == "flatten" or parameter.ndim > 3
        width = ((parameter.shape[0], parameter[0].numel()) if is_flat else parameter.shape)[dim]
        if sum(sizes) != width or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise RecipeError(
                f"split_sizes={sizes} do not fit {name}; give whole numbers above 0 that add up to its {width} "
                f"{'rows' if dim == ROWS else 'columns'}."
            )
    return {"split_sizes": sizes, "split_dim": dim} | ({"as_matrix": as_matrix} if as_matrix else {})


def _form_in_words(kind: str, form: Mapping[str, Any]) -> list[str]:
    """Return what is particular about the form of a matrix of this kind; different forms give different words."""
    sizes = form.get("split_sizes") or ()
    is_long = len(sizes) > 4 and len(set(sizes)) == 1
    text = f"{len(sizes)} x {sizes[0]}" if is_long else "+".join(map(str, sizes))
    is_flat, is_convolution = form.get("as_matrix") == "flatten", kind == "convolutions"
    words = {
        "flattened": is_flat and not is_convolution,
        "stacked": form and is_convolution and not is_flat,
        "transposed": form.get("split_dim") == COLUMNS,
        f"split {text}": sizes,
    }
    return [word for word, applies in words.items() if applies]


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def _refuse_shared_memory(named: list[tuple[str, nn.Parameter]]) -> None:
    owners: dict[tuple[str, int], str] = {}
    for name, parameter in named:
        held = local(parameter.detach())  # a DTensor has no memory of its own
        if held.device.type == "meta" or held.numel() == 0:
            continue
        place = (str(held.device), held.data_ptr())
        if place in owners:
            raise RecipeError(
                f"{owners[place]} and {name} share their memory but are two parameters, so each step would update it "
                "twice; tie them by giving both modules the same nn.Parameter."
            )
        owners[place] = name

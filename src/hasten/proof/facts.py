"""What a run did, in words: a name and a line for each technique."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Data = Mapping[str, Any]
Fact = tuple[str, str]
# Settings of a group that are told only where they changed while training.
SCHEDULED = {"momentum": "Momentum", "beta1": "First beta", "beta2": "Second beta"}
MASKS = {
    "Blocks": "FlexAttention",
    "Bounds": "variable-length kernels",
    "Causal": "no mask",
    "Pairs": "a mask of pairs",
    "Scores": "a mask of scores",
    "Spans": "document by document",
    "none": "no document numbers",
}


def facts_of(data: Data) -> list[list[str]]:
    """Return what a proof's data say, as pairs of a name and a line.

    Example:
        >>> from hasten.proof import empty
        >>> facts_of(empty())
        []
    """
    if not data["steps"]:
        return []
    about: tuple[Callable[[Data], Iterator[Fact]], ...] = (
        _rows,
        _documents,
        _sizes,
        _rates,
        _clip,
        _left_out,
        _precision,
        _compilation,
        _optimizer,
        _origin,
    )
    return [list(fact) for tell in about for fact in tell(data)]


def _rows(data: Data) -> Iterator[Fact]:
    steps = data["steps"]
    of = f" of {data['total_steps']:,} planned" if data["total_steps"] != steps else ""
    yield "Steps", f"{_times(steps, 'step')}{of}, {data['targets']:,} tokens that carried loss"
    lengths = sorted(data["lengths"].items(), key=lambda item: int(item[0]))
    if len(lengths) == 1:
        yield "Row lengths", f"every row had {int(lengths[0][0]):,} tokens"
    else:
        told = (f"{int(n):,} tokens: {_times(times, 'step')}, {tokens:,} tokens" for n, (times, tokens) in lengths)
        yield "Row lengths", "; ".join(told)
    padding = 1 - data["targets"] / data["positions"]
    yield "Padding", f"{_percent(padding)} of the {data['positions']:,} positions read carried no loss"
    windows = data["windows"]
    if windows["limited"]:
        yield (
            "Attention window",
            f"{windows['min']:,} to {windows['max']:,} tokens; narrower than the row on {windows['narrower']:,} of "
            f"{_times(steps, 'step')}",
        )


def _documents(data: Data) -> Iterator[Fact]:
    packing = data["packing"]
    if packing:
        lost = ", ".join(f"{tokens:,} {cause}" for cause, tokens in packing["lost"].items() if cause != "last")
        yield (
            "Packing",
            f"{packing['name']}: {packing['documents']:,} documents in {_times(packing['rows'], 'row')}, "
            f"{packing['cuts']:,} of them cut that would fit a row{f'; tokens left out: {lost}' if lost else ''}",
        )
    seen = data["looks"].get("masks", {})
    if not data["document_mask"]:
        yield "Documents", "of one row see each other (data.document_mask=false)"
    elif seen:
        how = ", ".join(f"{_times(n, 'micro-batch')} with {MASKS.get(name, name)}" for name, n in seen.items())
        yield "Documents", f"of one row kept apart; looked at: {how}"
    elif data["looks"].get("micro_batches"):
        looked = data["looks"]["micro_batches"]["seen"]
        yield "Documents", f"no row of the {_times(looked, 'micro-batch')} looked at held two documents"


def _sizes(data: Data) -> Iterator[Fact]:
    sizes = sorted(map(int, data["sizes"]))
    if len(sizes) == 1:
        text = f"{sizes[0]:,} positions in every step"
    else:
        often = ", ".join(f"{size:,} ({data['sizes'][str(size)]:,})" for size in sizes[:8])
        text = f"{sizes[0]:,} to {sizes[-1]:,} positions; by number of steps: {often}{' ...' if len(sizes) > 8 else ''}"
    micro = sorted(map(int, data["micro_batches"]))
    parts = f"{micro[0]}" if len(micro) == 1 else f"{micro[0]} to {micro[-1]}"
    yield "Batch", f"{text}, in {parts} micro-batch{'' if micro == [1] else 'es'}"


def _rates(data: Data) -> Iterator[Fact]:
    groups = data["groups"]
    yield "Learning rate", _by_group(groups, "lr")
    decays = {name: group for name, group in groups.items() if group["decay"]["max"] > 0}
    coupled = "added to the gradient" if data["optimizer"]["is_coupled"] else "apart from the gradient"
    if decays:
        yield "Weight decay", f"share of a weight in each step, {coupled}; {_by_group(decays, 'decay')}"
    else:
        yield "Weight decay", "zero in every group"
    for setting, name in SCHEDULED.items():
        moved = {n: g for n, g in groups.items() if setting in g and g[setting]["min"] != g[setting]["max"]}
        if moved:
            yield name, _by_group(moved, setting)


def _by_group(groups: Data, setting: str) -> str:
    """Return the range of a setting, for groups that share one together."""
    names: dict[str, list[str]] = {}
    for name, group in groups.items():
        if setting not in group:
            continue
        spread = group[setting]
        if spread["min"] == spread["max"]:
            text = f"{spread['last']:.3g} throughout"
        else:
            text = f"{spread['min']:.3g} to {spread['max']:.3g}, {spread['last']:.3g} in the last step"
        names.setdefault(text, []).append(name)
    return "; ".join(f"{', '.join(found)}: {text}" for text, found in names.items())


def _clip(data: Data) -> Iterator[Fact]:
    steps, clipped = data["steps"], data["clip"]["clipped"]
    name = data["clip"]["name"]
    if name != "none":
        how_often = {0: f"never acted in {_times(steps, 'step')}", steps: f"acted on every one of {steps:,} steps"}
        share = _percent(clipped / steps)
        yield "Clipping", f"{name} {how_often.get(clipped, f'acted on {clipped:,} of {steps:,} steps ({share})')}"
    norm = data["norm"]
    broken = f"; not finite on {_times(norm['broken'], 'step')}" if norm["broken"] else ""
    if norm["p50"] is not None:
        yield (
            "Gradient norm",
            f"median {norm['p50']:.3g}, nine of ten steps between {norm['p5']:.3g} and {norm['p95']:.3g}, "
            f"at most {norm['max']:.3g}{broken}",
        )
    scale = data["loss_scale"]
    if scale.get("max", 1.0) != 1.0:
        yield (
            "Loss scale",
            f"{scale['first']:g} at first, {scale['last']:g} at last; {_times(scale['rises'], 'rise')}, "
            f"{_times(scale['falls'], 'fall')}; {_times(data['skipped'], 'step')} skipped",
        )


def _left_out(data: Data) -> Iterator[Fact]:
    parts = [f"{tokens:,} tokens {cause}" for cause, tokens in data.get("left_out", {}).items() if tokens]
    if data.get("rollbacks"):
        parts.append(f"the run went back {_times(data['rollbacks'], 'time')}")
    if parts:
        yield "Left out", "; ".join(parts)


def _precision(data: Data) -> Iterator[Fact]:
    seen = data["looks"].get("matmuls", {})
    if seen:
        told = ", ".join(f"{number:,} in {name}" for name, number in seen.items())
        yield "Matrix products", f"{told}{data['matmul_note']}"
    else:
        yield "Matrix products", "not looked at"


def _compilation(data: Data) -> Iterator[Fact]:
    compiled = data["compile"]
    if not compiled:
        yield "Compilation", "off"
        return
    breaks = f", {_times(compiled['graph_breaks'], 'graph break')}" if compiled["graph_breaks"] else ""
    while_training = _times(compiled["recompiles"], "graph")
    yield "Compilation", f"on: {_times(compiled['graphs'], 'graph')}, {while_training} of them while training{breaks}"


def _optimizer(data: Data) -> Iterator[Fact]:
    known = data["optimizer"]
    state = ", ".join(f"{_size(size)} in {dtype}" for dtype, size in known["state_bytes"].items()) or "none"
    yield "Optimizer", f"{known['name']}; state: {state}"
    if known["moved"]:
        shares = {name: f"{name} {_percent(share)}" for name, share in known["moved"].items()}
        parts = ", ".join(text for name, text in shares.items() if name != "all")
        whole = f"{_percent(known['moved']['all'])} of their norm: " if "all" in shares else ""
        yield "Weights moved", f"about {whole}{parts} (from a sample of each group)"
    looks = data["looks"]
    if "estimates" in looks:
        yield "Curvature", f"estimated {_times(looks['estimates']['done'], 'time')}"
    if "cautious" in looks:
        still, moved = (looks["cautious"].get(key, 0) for key in ("still", "moved"))
        yield (
            "Cautious steps",
            f"left alone {_percent(still / max(still + moved, 1))} of the elements with a gradient that were looked at",
        )
    if known["on_sphere"] is not None:
        yield "Hyperball", f"held {_times(known['on_sphere'], 'matrix')} at a fixed norm"
    if known["ema_distance"] is not None:
        yield "Average", f"of the weights is {_percent(known['ema_distance'])} of their norm away from them"


def _origin(data: Data) -> Iterator[Fact]:
    yield "Seed", str(data["seed"])
    hashes = (f"{name} {data[f'{name}_sha256'][:12]}" for name in ("recipe", "corpus", "tokenizer"))
    yield "SHA-256", ", ".join(hashes)


def _times(number: int, word: str) -> str:
    many = {"matrix": "matrices", "micro-batch": "micro-batches"}.get(word, f"{word}s")
    return f"{number:,} {word if number == 1 else many}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"

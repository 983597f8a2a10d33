"""What was asked for and did nothing: a sentence for each technique that was enabled without effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hasten.recipe import Recipe
from hasten.recipe.schedules import BESIDE
from hasten.schedules import parse

Data = Mapping[str, Any]
# A clip that acts on every step is told from so many steps on, and compiling again from so many times on.
FEWEST_STEPS, FEWEST_RECOMPILES = 20, 5
# How far a rate may be from the plan, as a share of its peak.
OFF_PLAN = 0.005
SAME = 1e-9
FAULT = "that is a fault, of hasten or of a hook: do not trust this run, and report it"
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def warnings_of(recipe: Recipe, data: Data) -> list[str]:
    """Return a sentence for every technique of `recipe` that `data` show without effect, with what to do about it.

    What nobody chose (a default) is not held against a run, and what was told before the first step is not said again.
    What needs the whole schedule is judged only where the run did all of it.

    Args:
        recipe: what was asked for.
        data: of the proof: a tally, and what `hasten.loop` found out at the end of the run.
    """
    if not data["steps"]:
        return []
    about = (_lengths, _window, _sizes, _micro_batches, _rate, _beside, _decay, _clip, _precision, _compilation)
    about += (_documents, _state, _weights, _modifiers)
    return [sentence for ask in about for sentence in ask(recipe, data)]


def _idle(what: str, data: Data, why: str) -> str:
    return f"{what} enabled, acted on 0 of {data['steps']:,} steps: {why}."


def _lengths(recipe: Recipe, data: Data) -> Iterator[str]:
    lengths = recipe.lengths
    if len(lengths.row_lengths) < 2 or data["planned"]["growing_steps"] < 2:
        return
    if data["lengths"].keys() == {str(lengths.seq_len)}:
        why = f"every row had {lengths.seq_len:,} tokens; look at lengths.start and lengths.over"
        if lengths.reading == "bucket":
            why = f"every row had {lengths.seq_len:,} tokens; the documents are too long for lengths.mode=bucket"
        yield _idle(f"lengths={lengths.name}", data, why)


def _window(recipe: Recipe, data: Data) -> Iterator[str]:
    if recipe.lengths.name != "window" or data["planned"]["growing_steps"] < 2:
        return
    if data["windows"]["narrower"] == 0:
        why = f"attention always reached over all {recipe.lengths.seq_len:,} tokens of the row"
        yield _idle("lengths=window", data, f"{why}; look at lengths.start and lengths.over")
    unmasked = data["looks"].get("masks", {}).get("Causal", 0)
    if unmasked and not recipe.data.document_mask:
        yield (
            f"lengths=window enabled, but {unmasked:,} of the micro-batches looked at were attended to without a mask: "
            f"{FAULT}."
        )


def _sizes(recipe: Recipe, data: Data) -> Iterator[str]:
    if recipe.batch.schedule is None or not data["is_whole"] or data["planned"]["sizes"] < 2:
        return
    if len(data["sizes"]) == 1:
        yield _idle("batch.schedule", data, f"every step read {int(next(iter(data['sizes']))):,} positions; {FAULT}")


def _micro_batches(recipe: Recipe, data: Data) -> Iterator[str]:
    rows = recipe.batch.micro_rows
    is_split = rows is not None and recipe.batch.schedule is None and rows < recipe.rows_per_step
    if is_split and data["micro_batches"].keys() == {"1"}:
        yield _idle("batch.micro_rows", data, f"every step was one micro-batch; {FAULT}")


def _rate(recipe: Recipe, data: Data) -> Iterator[str]:
    schedule, planned = recipe.schedule, data["planned"]
    spreads = {name: group["factor"] for name, group in data["groups"].items()}
    still = [name for name, spread in spreads.items() if spread["max"] - spread["min"] <= SAME]
    is_flat = schedule.name == "constant" or getattr(schedule, "floor", 0.0) == 1
    is_flat = is_flat or (schedule.name == "custom" and planned["is_flat"])
    has_warmup = planned["warmup_steps"] >= 1 and schedule.warmup_start < 1 and data["steps"] > 1
    if still and data["is_whole"] and data["steps"] > 1 and not is_flat:
        of = "" if len(still) == len(spreads) else f" of {', '.join(still)}"
        rate = data["groups"][still[0]]["lr"]["last"]
        yield _idle(f"schedule={schedule.name}", data, f"the learning rate{of} was {rate:.3g} throughout; {FAULT}")
        return
    late = [name for name, spread in spreads.items() if spread["first"] >= spread["max"] * (1 - SAME)]
    if has_warmup and late:
        of = "" if len(late) == len(spreads) else f" of {', '.join(late)}"
        yield (
            f"schedule.warmup={schedule.warmup} enabled, but the learning rate{of} was never below where it began: "
            f"{FAULT}."
        )
    off = [name for name, spread in spreads.items() if abs(spread["last"] - planned["last_factor"]) > OFF_PLAN]
    if off and data["is_whole"]:
        yield (
            f"The learning rate of {', '.join(off)} ended at {spreads[off[0]]['last']:.3g} of its peak, and "
            f"schedule={schedule.name} plans {planned['last_factor']:.3g} for the last step: {FAULT}."
        )


def _beside(recipe: Recipe, data: Data) -> Iterator[str]:
    share = data["steps"] / max(data["total_steps"], data["steps"])
    for name in BESIDE:
        text = getattr(recipe.schedule, name)
        if text is None or len({parse(text)(share * point / 100) for point in range(100)}) == 1:
            continue
        spreads = [group[name] for group in data["groups"].values() if group.get(name, {}).get("max")]
        if data["steps"] > 1 and all(spread["min"] == spread["max"] for spread in spreads):
            what = "it was zero throughout" if not spreads else f"it was {spreads[0]['last']:.3g} throughout"
            advice = f"give optimizer.{name}, or leave the schedule out" if not spreads else FAULT
            yield _idle(f"schedule.{name}", data, f"{what}; {advice}")


def _decay(recipe: Recipe, data: Data) -> Iterator[str]:
    asked = recipe.optimizer.model_dump()
    was_zero = all(group["decay"]["max"] == 0 for group in data["groups"].values())
    if asked["weight_decay"] > 0 and not asked.get("hyperball") and was_zero:
        yield _idle("optimizer.weight_decay", data, f"it was zero in every group; {FAULT}")


def _clip(recipe: Recipe, data: Data) -> Iterator[str]:
    clip, steps = recipe.clip, data["steps"]
    if clip.name == "none":
        return
    clipped, above = (data["clip"][key] for key in ("clipped", "above"))
    told = ("max_norm", "max_value", "clipping", "threshold")
    limits = " and ".join(f"{key} {value:g}" for key, value in clip.model_dump().items() if key in told)
    is_chosen = clip != type(recipe).model_fields["clip"].default
    passed = data["looks"].get("clip", {}).get("passed", 0)
    if above > clipped:
        yield (
            f"clip enabled, acted on {clipped:,} of {steps:,} steps, and the gradient's norm was above {limits} on "
            f"{above:,} of them: {FAULT}."
        )
    elif passed:
        yield f"clip enabled, but on {passed:,} of the steps looked at its gradient was still above {limits}: {FAULT}."
    elif clipped == 0 and is_chosen:
        most = f" (the norm was at most {data['norm']['max']:.3g})" if data["norm"]["max"] else ""
        yield _idle("clip", data, f"{limits} was never reached{most}; give a lower limit, or clip=none")
    elif clip.name != "agc" and clipped == steps >= FEWEST_STEPS and is_chosen and data["norm"]["p95"] is not None:
        yield (
            f"clip acted on all {steps:,} steps: {limits} and not the gradient decided how large every gradient was "
            f"(the median norm was {data['norm']['p50']:.3g}); to clip only the exceptions give a limit of about "
            f"{data['norm']['p95']:.3g}."
        )


def _precision(recipe: Recipe, data: Data) -> Iterator[str]:
    wanted, seen = DTYPES.get(recipe.precision.name), data["looks"].get("matmuls", {})
    if wanted and seen and wanted not in seen:
        yield (
            f"precision={recipe.precision.name} enabled, but 0 of the {sum(seen.values()):,} matrix products looked at "
            f"were in {wanted} (they were in {', '.join(seen)}): {FAULT}."
        )


def _compilation(recipe: Recipe, data: Data) -> Iterator[str]:
    compiled = data["compile"]
    if not compiled:
        return
    if compiled["graphs"] == 0:
        yield (
            f"compile={recipe.compile} enabled, but no graph was compiled, so every step ran as without it: "
            "give compile=off, or report it."
        )
    elif compiled["recompiles"] >= FEWEST_RECOMPILES:
        yield (
            f"The model was compiled {compiled['recompiles']:,} more times while training, which costs more than it "
            "saves: give fewer lengths.sizes, or compile=off."
        )


def _documents(recipe: Recipe, data: Data) -> Iterator[str]:
    masks = data["looks"].get("masks", {})
    unmasked = sum(masks.get(name, 0) for name in ("Causal", "none"))
    if recipe.data.document_mask and unmasked:
        yield (
            f"data.document_mask enabled, but {unmasked:,} of {sum(masks.values()):,} micro-batches looked at were "
            f"attended to without a mask: {FAULT}."
        )


def _state(recipe: Recipe, data: Data) -> Iterator[str]:
    state = data["optimizer"]["state_bytes"]
    if recipe.optimizer.model_dump().get("state_format") == "8bit" and state and not {"int8", "uint8"} & set(state):
        yield (
            f"optimizer.state_format=8bit enabled, but all of the state is in {', '.join(state)}: matrices of fewer "
            "than 4,096 elements and vectors are kept in float32; leave it out, or take a larger model."
        )


def _weights(recipe: Recipe, data: Data) -> Iterator[str]:
    moved = {name: share for name, share in data["optimizer"]["moved"].items() if name != "all"}
    still = [name for name, share in moved.items() if share == 0 and data["groups"][name]["lr"]["max"] > 0]
    if not still:
        return
    of = "no weight" if len(still) == len(moved) else f"no weight of {', '.join(still)}"
    if data["skipped"] == data["steps"] and recipe.precision.name == "fp16":
        advice = "every step was skipped, because its gradients overflowed: give precision=bf16 or float32"
    else:
        advice = FAULT
    yield _idle(f"optimizer={recipe.optimizer.name}", data, f"{of} is other than it was at first; {advice}")


def _modifiers(recipe: Recipe, data: Data) -> Iterator[str]:
    # Not every optimizer has every modifier.
    asked, looks, known = recipe.optimizer.model_dump(), data["looks"], data["optimizer"]
    cautious = looks.get("cautious", {})
    if asked.get("cautious") and cautious.get("moved") and not cautious.get("still"):
        yield (
            f"optimizer.cautious enabled, but it left alone 0 of the {cautious['moved']:,} elements looked at: {FAULT}."
        )
    if asked.get("hyperball") and known["on_sphere"] == 0:
        yield _idle("optimizer.hyperball", data, f"it holds the norm of no matrix; {FAULT}")
    if asked.get("ema") and known["ema_is_first"]:
        yield _idle("optimizer.ema", data, f"the average is still the initial weights; {FAULT}")
    every = data["planned"]["estimate_every"]
    if 0 < every <= data["steps"] and "estimates" not in looks:
        yield _idle("optimizer.estimate_every", data, f"no extra pass was made; {FAULT}")

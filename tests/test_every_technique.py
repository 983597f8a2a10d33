"""Every technique proves that it acted: broken on purpose it is told, unbroken it is not, and its figures are right."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hasten import precision
from hasten.clip import AGC, ClipNorm, ClipReport, ClipValue, ZClip
from hasten.data.batches import Batches, Buffers
from hasten.data.lengths import BatchSizes, LengthSchedule, WindowSchedule
from hasten.loop import State, advance, prepare_for, start, steps
from hasten.loop import state as state_module
from hasten.loop.compiling import choose_compile
from hasten.loop.probing import probe
from hasten.loop.proving import Proof, note_first_weights, prove
from hasten.loop.telling import Teller
from hasten.model import Decoder
from hasten.model.attention import Causal
from hasten.optim import OPTIMIZERS, RuledOptimizer, elementwise, modifiers, shell
from hasten.proof import doubts, warnings_of
from hasten.recipe import resolve
from hasten.recipe.schedules import CosineChoices, ScheduleChoices
from hasten.schedules import apply, cosine, hold

STEPS = 16


@dataclass(frozen=True)
class Ran:
    """A finished run and what it says it did."""

    state: State
    proof: Proof

    def fact(self, name: str) -> str:
        return dict(self.proof.facts)[name]


@pytest.fixture(scope="module")
def documents(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents of different lengths, so that a row holds several."""
    path = tmp_path_factory.mktemp("documents") / "library.jsonl"
    lines = [line for line in library_text[:40_000].splitlines() if len(line) > 10]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def ran(documents: Path, tiny: tuple[str, ...]) -> Callable[..., Ran]:
    def run(*settings: str, budget: str = str(STEPS), hooks: tuple = ()) -> Ran:
        given = [f"data={documents}", *tiny, f"budget={budget}", "compile=off", *settings]
        recipe = resolve(None, [word for word in given if word != "compile=off" or "compile=on" not in settings]).recipe
        state = start(recipe, prepare_for(recipe))
        note_first_weights(state)
        choose_compile(state, Teller(()), None, None, probe)
        advance(state, state.total_steps, hooks=hooks)
        state.status = "finished"
        return Ran(state, prove(state))

    return run


@pytest.fixture(scope="module")
def known_to_be_quiet() -> set[tuple[str, ...]]:
    """Settings that were tried unbroken already."""
    return set()


def nothing(*given: object, **named: object) -> None:
    """Do nothing, in place of what was to be done."""


def _unclipped(self: object, parameters: list[torch.Tensor]) -> ClipReport:
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    return ClipReport(norm, torch.tensor(False))


def _pretending(self: object, parameters: list[torch.Tensor]) -> ClipReport:
    return ClipReport(_unclipped(self, parameters).norm, torch.tensor(True))


def _no_decay(optimizer: RuledOptimizer, schedules: dict, progress: float) -> None:
    apply(optimizer, schedules, progress)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0


def _half_of_the_way(optimizer: RuledOptimizer, schedules: dict, progress: float) -> None:
    apply(optimizer, schedules, min(progress, 0.5))


def _in_one_piece(source: object, *, micro_rows: int, **named: object) -> Batches:
    return Batches(source, micro_rows=4 * micro_rows, **named)


def _without_numbers(source: object, *, document_mask: bool, **named: object) -> Batches:
    return Batches(source, document_mask=False, **named)


def _no_buffers(document_mask: bool) -> Buffers:
    return Buffers(False)


# What is asked for, what is broken (an object, its attribute, what stands there instead), and what is then said.
BREAKS = {
    "clip": (["clip.max_norm=0.1"], (ClipNorm, "__call__", _unclipped), "clip enabled, acted on 0 of 16 steps"),
    "clip that only says so": (["clip.max_norm=0.1"], (ClipNorm, "__call__", _pretending), "was still above"),
    "clip by value": (["clip=value", "clip.max_value=0.001"], (ClipValue, "__call__", _pretending), "was still above"),
    "agc": (["clip=agc"], (AGC, "__call__", _pretending), "was still above"),
    "zclip": (
        ["clip=zclip", "clip.warmup_steps=4", "clip.threshold=0.5"],
        (ZClip, "__call__", _unclipped),
        "clip enabled, acted on 0 of 16 steps",
    ),
    "schedule": (
        ["schedule=cosine"],
        (CosineChoices, "build", lambda self, **run: hold()),
        "schedule=cosine enabled, acted on 0 of 16 steps: the learning rate was 0.005 throughout",
    ),
    "warm-up": (
        ["schedule.warmup=25%"],
        (CosineChoices, "build", lambda self, **run: cosine(floor=0.01)),
        "schedule.warmup=25% enabled, but the learning rate was never below",
    ),
    "end of a schedule": ([], (steps, "apply", _half_of_the_way), "ended at 0.521 of its peak"),
    "schedule of the decay": (
        ["schedule.weight_decay=linear(floor=0.1)"],
        (ScheduleChoices, "build_all", lambda self, **run: {"lr": self.build(**run)}),
        "schedule.weight_decay enabled, acted on 0 of 16 steps",
    ),
    "schedule of a beta": (
        ["schedule.beta1=warmup(0.5, start=0.9) | hold()"],
        (ScheduleChoices, "build_all", lambda self, **run: {"lr": self.build(**run)}),
        "schedule.beta1 enabled, acted on 0 of 16 steps",
    ),
    "decay": ([], (steps, "apply", _no_decay), "optimizer.weight_decay enabled, acted on 0 of 16 steps"),
    "lengths": (
        ["lengths=linear", "lengths.start=16"],
        (LengthSchedule, "__call__", lambda self, progress, step=0: self.seq_len),
        "lengths=linear enabled, acted on 0 of 16 steps: every row had 64 tokens",
    ),
    "window": (
        ["lengths=window", "lengths.start=8"],
        (WindowSchedule, "__call__", lambda self, progress: None),
        "lengths=window enabled, acted on 0 of 16 steps",
    ),
    "mask of a window": (
        ["lengths=window", "lengths.start=8", "data.document_mask=false"],
        (Decoder, "mask", lambda self, *given: Causal()),
        "lengths=window enabled, but 5 of the micro-batches",
    ),
    "batch sizes": (
        ["batch.schedule=stages((0, 0.25), (0.5, 1.0))", "batch.micro_rows=2"],
        (BatchSizes, "__call__", lambda self, progress: self.rows),
        "",  # what is planned is broken with it; the next one breaks what is trained with
    ),
    "micro-batches": (
        ["batch.micro_rows=2"],
        (state_module, "Batches", _in_one_piece),
        "batch.micro_rows enabled, acted on 0 of 16 steps",
    ),
    "precision": (
        ["precision=bf16"],
        (precision, "PRECISIONS", {**precision.PRECISIONS, "bf16": torch.float32}),
        "precision=bf16 enabled, but 0 of the 14 matrix products",
    ),
    "document mask": ([], (Decoder, "mask", lambda self, *given: Causal()), "data.document_mask enabled, but 5 of 5"),
    "document numbers": ([], (state_module, "Batches", _without_numbers), "data.document_mask enabled, but 5 of 5"),
    "optimizer": ([], (RuledOptimizer, "_update", nothing), "optimizer=adamw enabled, acted on 0 of 16 steps"),
    "8-bit state": (
        ["optimizer.state_format=8bit"],
        (elementwise, "can_pack", lambda parameter: False),
        "optimizer.state_format=8bit enabled, but all of the state is in float32",
    ),
    "cautious": (
        ["optimizer.cautious=true"],
        (shell, "is_modified", lambda *given: False),
        "optimizer.cautious enabled",
    ),
    "hyperball": (["optimizer.hyperball=true"], (shell, "is_modified", lambda *given: False), "optimizer.hyperball"),
    "average": (["optimizer.ema=0.9"], (modifiers, "AVERAGE", nothing), "optimizer.ema enabled, acted on 0"),
    "curvature": (
        ["optimizer=sophia"],
        (steps, "_estimate_is_due", lambda state: False),
        "optimizer.estimate_every enabled, acted on 0 of 16 steps",
    ),
}
every_break = pytest.mark.parametrize("name", [name for name, (_, _, said) in BREAKS.items() if said])


@every_break
def test_a_technique_that_does_nothing_is_told_and_one_that_works_is_not(name, ran, known_to_be_quiet, monkeypatch):
    settings, (where, attribute, instead), said = BREAKS[name]
    if tuple(settings) not in known_to_be_quiet:
        assert ran(*settings).proof.warnings == []
        known_to_be_quiet.add(tuple(settings))
    monkeypatch.setattr(where, attribute, instead)
    if name == "document numbers":
        monkeypatch.setattr(state_module, "Buffers", _no_buffers)
    (told,) = ran(*settings).proof.warnings
    assert said in told


def test_a_batch_schedule_that_is_not_followed_is_told(ran, monkeypatch):
    settings, _, _ = BREAKS["batch sizes"]
    assert ran(*settings).proof.warnings == []
    take = State.take
    monkeypatch.setattr(State, "shape", _with_all_rows(State.shape))
    assert State.take is take
    (told,) = ran(*settings).proof.warnings
    assert told.startswith("batch.schedule enabled, acted on 0 of 16 steps: every step read 512 positions")


def _with_all_rows(shape: Callable[[State], state_module.Shape]) -> Callable[[State], state_module.Shape]:
    def broken(state: State) -> state_module.Shape:
        return state_module.dataclasses.replace(shape(state), rows=8)

    return broken


# --- compilation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made as always, and run as they are: machine code would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compilation_that_takes_is_counted_in_graphs(ran, quick_compiler):
    done = ran("compile=on")
    assert done.proof.warnings == []
    assert done.proof.data["compile"] == {"graphs": 1, "recompiles": 0, "graph_breaks": 0}
    assert done.fact("Compilation") == "on: 1 graph, 0 graphs of them while training"


def test_compilation_that_compiles_nothing_is_told(ran, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **named: model)
    (told,) = ran("compile=on").proof.warnings
    assert told.startswith("compile=on enabled, but no graph was compiled")


def test_compiling_again_and_again_is_told(ran, quick_compiler, monkeypatch):
    monkeypatch.setattr(doubts, "FEWEST_RECOMPILES", 2)
    (told,) = ran("compile=on", budget="4", hooks=(lambda event: torch._dynamo.reset(),)).proof.warnings
    assert "compiled 2 more times while training" in told


# --- what is not held against a run ---------------------------------------------------------------------------------


def test_a_default_clip_that_never_acts_is_a_fact_and_one_that_was_chosen_a_warning(ran):
    quiet = ran("clip.max_norm=50")
    assert quiet.fact("Clipping") == "norm never acted in 16 steps"
    (told,) = quiet.proof.warnings
    assert told.startswith("clip enabled, acted on 0 of 16 steps: max_norm 50 was never reached")
    clip = {**quiet.proof.data["clip"], "clipped": 0, "above": 0}
    assert warnings_of(resolve().recipe, {**quiet.proof.data, "clip": clip}) == []


def test_a_clip_that_acts_on_every_step_is_worth_a_word(ran):
    done = ran("clip.max_norm=0.01", budget="20")
    (told,) = done.proof.warnings
    assert told.startswith("clip acted on all 20 steps: max_norm 0.01 and not the gradient")
    assert done.fact("Clipping") == "norm acted on every one of 20 steps"


def test_a_part_of_a_run_is_not_judged_by_what_comes_later(ran):
    recipe = ran("schedule=wsd").state.recipe
    state = start(recipe, prepare_for(recipe), horizon=1000)
    note_first_weights(state)
    advance(state, 40)
    state.status = "paused"
    assert prove(state).warnings == []


def test_what_was_told_before_the_first_step_is_not_said_again(ran):
    assert ran("schedule.warmup=1%").proof.warnings == []
    assert ran("lengths=linear", "lengths.start=16", "lengths.over=1").proof.warnings == []


# --- the figures, against counts of one's own -----------------------------------------------------------------------


@contextmanager
def fed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """Yield rows, tokens of a row and real targets of everything that a step trains on."""
    seen: list[tuple[int, int, int]] = []
    plain = steps.batch_loss

    def loss(state, batch, shape):
        seen.append((*batch.tokens_BT.shape, int((batch.labels_BT != -100).sum())))
        return plain(state, batch, shape)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "batch_loss", loss)
        yield seen


def test_lengths_tokens_padding_and_sizes_are_those_that_were_read(ran, monkeypatch):
    with fed(monkeypatch) as seen:
        done = ran("lengths=linear", "lengths.mode=bucket", "lengths.start=16", "batch.micro_rows=8")
    data = done.proof.data
    by_length: dict[str, list[int]] = {}
    for _, length, targets in seen:
        steps_tokens = by_length.setdefault(str(length), [0, 0])
        steps_tokens[0] += 1
        steps_tokens[1] += targets
    assert data["lengths"] == by_length
    assert len(by_length) > 1
    assert data["targets"] == done.state.tokens == sum(targets for *_, targets in seen)
    assert data["positions"] == sum(rows * length for rows, length, _ in seen) > data["targets"]


def test_windows_sizes_and_micro_batches_are_those_that_were_used(ran):
    window = ran("lengths=window", "lengths.start=4", "lengths.over=50%").proof.data["windows"]
    assert window == {"limited": 16, "narrower": 8, "min": 4, "max": 64}
    data = ran("batch.schedule=stages((0, 0.25), (0.5, 1.0))", "batch.micro_rows=2").proof.data
    assert (data["sizes"], data["micro_batches"]) == ({"128": 8, "512": 8}, {"1": 8, "4": 8})


def test_rates_and_decay_are_those_of_the_groups_in_each_step(ran):
    lived: list[dict[str, tuple[float, float]]] = []

    def watch(optimizer: RuledOptimizer, given: object, named: object) -> None:
        lived.append({g["name"]: (g["lr"], g["lr"] * g["weight_decay"]) for g in optimizer.param_groups})

    handle = register_optimizer_step_pre_hook(watch)
    done = ran("optimizer=muon", "schedule.weight_decay=linear(floor=0.5)")
    handle.remove()
    assert done.proof.warnings == []
    for name, group in done.proof.data["groups"].items():
        for place, setting in enumerate(("lr", "decay")):
            values = [step[name][place] for step in lived]
            spread = {"first": values[0], "min": min(values), "max": max(values), "last": values[-1]}
            assert group[setting] == pytest.approx(spread)


def test_clipped_steps_and_norms_are_those_of_the_record(ran):
    events: list[dict] = []
    done = ran("clip.max_norm=1.3", hooks=(lambda event: events.append(event.values),))
    data, norms = done.proof.data, sorted(values["grad_norm"] for values in events)
    assert data["clip"]["clipped"] == sum(norm > 1.3 for norm in norms)
    assert 0 < data["clip"]["clipped"] < STEPS
    assert data["norm"]["max"] == norms[-1]
    assert data["norm"]["p50"] == pytest.approx(norms[7], rel=0.03)


@pytest.mark.parametrize("name", ["float32", "bf16", "fp16"])
def test_matrix_products_are_in_the_format_asked_for(name, ran):
    done = ran(f"precision={name}")
    # Seven in each of two blocks.
    assert done.proof.data["looks"]["matmuls"] == {str(precision.PRECISIONS[name]).removeprefix("torch."): 14}
    assert done.proof.warnings == []
    assert ("Loss scale" in dict(done.proof.facts)) == (name == "fp16")


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_weights_moved_as_far_as_all_of_them_did(optimizer, ran):
    done = ran(f"optimizer={optimizer}")
    first, last = Decoder(done.state.config, seed=done.state.seed).state_dict(), done.state.model.state_dict()
    changes = sum(float((p - first[name]).square().sum()) for name, p in last.items())
    sizes = sum(float(p.square().sum()) for p in first.values())
    moved = done.proof.data["optimizer"]["moved"]
    assert moved["all"] == pytest.approx((changes / sizes) ** 0.5, rel=0.25)
    assert all(share > 0 for share in moved.values())


def test_state_is_told_in_the_bytes_that_it_takes(ran):
    for settings in ([], ["optimizer.state_format=8bit"]):
        done = ran(*settings)
        kept = [t for state in done.state.optimizer.state.values() for name, t in state.items() if name != "step"]
        told = done.proof.data["optimizer"]["state_bytes"]
        assert sum(told.values()) == sum(t.numel() * t.element_size() for t in kept)
        assert ("int8" in told) == bool(settings)


def test_modifiers_say_what_they_did(ran):
    done = ran("optimizer.cautious=true", "optimizer.ema=0.9")
    still, moved = (done.proof.data["looks"]["cautious"][key] for key in ("still", "moved"))
    assert 0.05 < still / (still + moved) < 0.8
    assert 0 < done.proof.data["optimizer"]["ema_distance"] < 1
    assert "estimated 1 time" in ran("optimizer=sophia").fact("Curvature")
    assert ran("optimizer.hyperball=true").proof.data["optimizer"]["on_sphere"] == 14


def test_documents_are_told_apart_by_a_mask(ran):
    assert "5 micro-batches with a mask of scores" in ran().fact("Documents")
    assert ran("data.document_mask=false").fact("Documents").startswith("of one row see each other")


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_no_optimizer_is_suspected_of_what_it_does_not_do(optimizer, ran):
    done = ran(f"optimizer={optimizer}", budget="4")
    assert done.proof.warnings == []
    assert done.fact("Optimizer").startswith(optimizer)

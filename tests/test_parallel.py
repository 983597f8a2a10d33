"""Several processes train as one does: the same losses, less memory in each, and any other number of them goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from training_ranks import STEPS, all_cases

import hasten

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs fork and gloo",
)

SECONDS = 580
GRID = [case.name for case in all_cases() if " ddp " in case.name or " fsdp " in case.name]
EVERY_TIME = [
    "adamw ddp 3 x4",
    "adamw fsdp 2 x4",
    "muon_64 fsdp 2 x4",
    "agc fsdp 2 x1",
    "bf16 ddp 2 x4",
]
LIGHT = [
    *dict.fromkeys(f"{name.split()[0]} alone" for name in EVERY_TIME),
    *EVERY_TIME,
    "saved by two",
    "gone on by 0",
    "gone on by 3",
    "broken numbers",
    "broken numbers alone",
    "told to stop",
    "gone on after a stop",
    "selective recomputing",
    "full recomputing",
]
# Largest difference of a loss over all steps. Sophia clips noise, and bf16 rounds it; for SOAP see docs/scaling.md.
BOUNDS = {"muon_64": 1e-9, "sophia": 1e-3, "bf16": 0.05, "soap": 0.05}


class Runs:
    """Trainings in a folder, done when they are asked for the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def done(self, *names: str) -> None:
        """Train those of the cases that were not trained yet."""
        missing = [name for name in names if not (self.folder / f"{name}.codes").exists()]
        if not missing:
            return
        script = Path(__file__).parent / "training_ranks.py"
        paths = [str(script.parent), str(Path(hasten.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")},
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }
        ranks = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-W",
                "ignore::DeprecationWarning",
                str(script),
                str(self.folder),
                *missing,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            print(ranks.communicate(timeout=SECONDS)[0])
        finally:
            if ranks.poll() is None:
                os.killpg(ranks.pid, signal.SIGKILL)
                ranks.wait()

    def ended(self, name: str) -> list[int]:
        """Return the exit codes of all ranks."""
        self.done(name)
        return json.loads((self.folder / f"{name}.codes").read_text())

    def steps(self, name: str) -> list[dict]:
        """Return the step lines of a run in which no rank failed."""
        if any(self.ended(name)):
            logs = [path.read_text()[-2000:] for path in sorted(self.folder.glob(f"{name}.*.log"))]
            pytest.fail("\n".join([f"{name}: exit codes {self.ended(name)}", *logs]))
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def result(self, name: str) -> dict:
        """Return the result of a run."""
        self.steps(name)
        return json.loads((self.folder / name / "result.json").read_text())

    def events(self, name: str, kind: str) -> list[dict]:
        """Return the events of a kind."""
        lines = (self.folder / name / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Runs:
    """Give the trainings of this file; those that are always wanted are done."""
    runs = Runs(tmp_path_factory.mktemp("parallel"))
    runs.done(*LIGHT)  # together: half of the time of such a training is that of importing torch
    return runs


def difference(some: list[dict], others: list[dict]) -> float:
    """Return the largest difference of a loss, step by step; both are whole."""
    assert [line["step"] for line in some] == [line["step"] for line in others] == list(range(1, STEPS + 1))
    assert [line["seq_len"] for line in some] == [line["seq_len"] for line in others]
    assert [line["tokens"] for line in some] == [line["tokens"] for line in others]
    pairs = [(float(one["loss"]), float(other["loss"])) for one, other in zip(some, others, strict=True)]
    return max(abs(one - other) for one, other in pairs if not math.isnan(one) or not math.isnan(other))


def check_same(runs: Runs, name: str) -> None:
    """The losses of a run are those of one process, and so is its evaluation."""
    technique = name.split()[0]
    alone = f"{technique} alone"
    runs.done(alone, name)
    bound = BOUNDS.get(technique, 1e-5)
    assert difference(runs.steps(name), runs.steps(alone)) <= bound
    assert abs(runs.result(name)["val_loss"] - runs.result(alone)["val_loss"]) <= bound


@pytest.mark.parametrize("name", EVERY_TIME)
def test_several_processes_have_the_losses_of_one(runs: Runs, name: str) -> None:
    check_same(runs, name)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in GRID if name not in EVERY_TIME])
def test_every_optimizer_and_clip_has_the_losses_of_one_process(runs: Runs, name: str) -> None:
    check_same(runs, name)


@pytest.mark.heavy
def test_copies_in_parts_have_the_losses_of_one_process(runs: Runs) -> None:
    check_same(runs, "adamw hsdp 4 x1")


def test_each_of_two_processes_holds_about_half_of_weights_and_optimizer(runs: Runs) -> None:
    runs.done("adamw alone", "adamw fsdp 2 x4")
    alone = int((runs.folder / "adamw alone.0.bytes").read_text())
    for rank in range(2):
        held = int((runs.folder / f"adamw fsdp 2 x4.{rank}.bytes").read_text())
        assert 0.4 * alone <= held <= 0.55 * alone


@pytest.mark.parametrize("world", [0, pytest.param(1, marks=pytest.mark.heavy), 3])
def test_another_number_of_processes_goes_on_with_the_same_losses(runs: Runs, world: int) -> None:
    runs.done("adamw alone", "saved by two", f"gone on by {world}")
    assert runs.result("saved by two")["status"] == "paused"
    assert difference(runs.steps(f"gone on by {world}"), runs.steps("adamw alone")) <= 1e-5
    assert runs.events(f"gone on by {world}", "resume")[0]["step"] == 20


def test_a_checkpoint_of_two_processes_has_half_of_it_from_each(runs: Runs) -> None:
    runs.done("saved by two")
    (saved,) = (runs.folder / "saved by two" / "checkpoints").glob("step-????????")
    sizes = [(saved / f"optimizer.0000{rank}.safetensors").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.4 * sum(sizes)


def test_a_loss_that_is_no_number_in_one_process_is_left_out_by_all(runs: Runs) -> None:
    runs.done("broken numbers", "broken numbers alone")
    bad = runs.events("broken numbers", "bad_step")
    assert [(event["cause"], event["spike"], event["step"]) for event in bad] == [
        ("loss", "nonfinite", 12),
        ("loss", "nonfinite", 31),
    ]
    assert difference(runs.steps("broken numbers"), runs.steps("broken numbers alone")) <= 1e-5


def test_a_signal_to_one_process_stops_all_at_one_step_and_the_run_goes_on_from_there(runs: Runs) -> None:
    runs.done("adamw alone", "told to stop", "gone on after a stop")
    assert runs.result("told to stop")["status"] == "stopped"
    assert runs.events("told to stop", "stop")[0]["reason"] == "SIGTERM"
    assert difference(runs.steps("gone on after a stop"), runs.steps("adamw alone")) <= 1e-5


@pytest.mark.parametrize("what", ["selective", "full"])
def test_activations_done_again_give_the_same_losses(runs: Runs, what: str) -> None:
    runs.done("adamw alone", f"{what} recomputing")
    assert difference(runs.steps(f"{what} recomputing"), runs.steps("adamw alone")) == 0.0

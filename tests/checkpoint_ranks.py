"""What several ranks make of checkpoints that they write and read together; a script.

``checkpoint_ranks.py FOLDER CASE ...`` runs the cases one after the other and adds a line for each rank of each to
``FOLDER/records.jsonl``. Torch is imported once: the ranks are forks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hasten import checkpoint
from hasten.distributed import Ranks, World

SECONDS = 40
STATE = {"step": 7, "loss": 1.25, "text": "é"}
Groups = dict[str, dict[str, Tensor]]
Action = Callable[[Ranks, Path], Iterator[dict[str, Any]]]


def all_tensors(seed: int = 0) -> Groups:
    """Return a little of everything: every kind of width, a scalar, nothing, a group of one and a group of none."""
    noise = torch.Generator().manual_seed(seed)
    model = {f"layers.{n}.w": torch.randn(5 + n, 3, generator=noise) for n in range(6)}
    model |= {"half": torch.randn(4, 2, generator=noise).bfloat16(), "none": torch.zeros(0, 3)}
    model |= {"tiny": torch.randn(8, 2, generator=noise).to(torch.float8_e4m3fn), "yes": torch.tensor([True, False])}
    optimizer = {f"state.{n}.exp_avg": torch.randn(5 + n, 3, generator=noise) for n in range(6)}
    optimizer |= {"state.0.step": torch.tensor(7.0), "wide": torch.arange(6, dtype=torch.int64).reshape(1, 2, 3)}
    return {"model": model, "optimizer": optimizer, "random": {"torch": torch.arange(9).byte()}, "guard": {}}


def owned(ranks: Ranks, groups: Groups) -> Groups:
    """Return the tensors that a rank hands over, spread by name; the last rank leaves a group out that it lacks."""
    mine = {
        group: {n: t for n, t in named.items() if zlib.crc32(n.encode()) % ranks.size == ranks.rank}
        for group, named in groups.items()
    }
    return {group: named for group, named in mine.items() if named or ranks.rank < ranks.size - 1 or ranks.size == 1}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are of one dtype, shape and content."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def same_groups(found: Groups, expected: Groups) -> bool:
    """Say whether two sets of groups are the same bit for bit, names and groups included."""
    names = {group: sorted(named) for group, named in found.items()}
    return names == {group: sorted(named) for group, named in expected.items()} and all(
        same_bits(found[group][name], tensor) for group, named in expected.items() for name, tensor in named.items()
    )


def save(ranks: Ranks, root: Path, step: int, tensors: Groups | None = None, *, keep: int = 3) -> Path:
    """Save a checkpoint whose tensors tell the step."""
    tensors = owned(ranks, all_tensors(step)) if tensors is None else tensors
    state = {**STATE, "step": step} if ranks.is_main else None
    return checkpoint.save(root, step, tensors, state, keep=keep, ranks=ranks)


def outcome(action: Callable[[], Any]) -> dict[str, Any]:
    """Return what became of something that may be refused."""
    try:
        return {"value": action()}
    except BaseException as error:
        return {"error": type(error).__name__, "text": str(error)}


def found_step(ranks: Ranks, root: Path) -> dict[str, Any]:
    """Return what `newest` says, and whether the tensors are those of the step."""

    def look() -> dict[str, Any]:
        loaded, notes = checkpoint.newest(root, ranks)
        if loaded is None:
            return {"step": None, "notes": notes}
        tensors = {
            group: {name: t.read() if ranks.size > 1 else t for name, t in named.items()}
            for group, named in loaded.tensors.items()
        }
        is_same = same_groups(tensors, all_tensors(loaded.step)) and loaded.state["step"] == loaded.step
        return {"step": loaded.step, "notes": notes, "is_same": is_same, "path": str(loaded.path)}

    return outcome(look)


def meet(ranks: Ranks, action: Callable[[], Any]) -> None:
    """Let the first rank do something once all are here, while the others wait."""
    ranks.share(None)
    if ranks.is_main:
        action()
    ranks.share(None)


def names_in(root: Path, ranks: Ranks) -> list[str]:
    """Return what is in a folder, once all ranks are through with it and before one goes on."""
    ranks.share(None)
    return ranks.from_main(sorted(path.name for path in root.iterdir()))


# Saved on some ranks, read on others.


def saving(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"what": "save", **outcome(lambda: str(save(ranks, folder / f"saved-{ranks.size}", 7)))}


def loading(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    for size in (1, 2, 3):
        yield {"what": f"from {size}", **found_step(ranks, folder / f"saved-{size}")}


def replacing(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    """The same step again from other ranks' parts, and older ones deleted."""
    root = folder / "replaced"
    for step in (1, 2, 3):
        save(ranks, root, step, keep=2)
    if ranks.is_main:
        checkpoint.save(root, 3, {"model": {"w": torch.zeros(2)}}, {}, keep=2)
    ranks.share(None)
    save(ranks, root, 3, keep=2)
    yield {"what": "replaced", **found_step(ranks, root), "names": names_in(root, ranks)}


# Damage.


def damages(path: Path, other: Path) -> dict[str, Callable[[], object]]:
    """Return what can become of the file `path`; `other` is another one."""
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    older = path.parent.parent / "step-00000001" / path.name
    found = {
        "flipped": lambda: path.write_bytes(flipped),
        "cut": lambda: os.truncate(path, len(data) - 3),
        "longer": lambda: path.write_bytes(data + b"x"),
        "missing": path.unlink,
        "swapped": lambda: (path.write_bytes(other.read_bytes()), other.write_bytes(data)),
    }
    # An empty group is the same in every checkpoint.
    return found if older.read_bytes() == data else {**found, "older": lambda: shutil.copy(older, path)}


def damaging(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    root, good = folder / f"damaged-{ranks.size}", folder / f"good-{ranks.size}"
    for step in (1, 2):
        save(ranks, root, step)
    newer = root / "step-00000002"
    meet(ranks, lambda: shutil.copytree(newer, good))
    names = sorted(path.name for path in good.iterdir())
    for number, name in enumerate(names):
        for what, damage in damages(newer / name, newer / names[number - 1]).items():
            meet(ranks, damage)
            yield {"what": f"{name} {what}", **found_step(ranks, root)}
            meet(ranks, lambda: shutil.rmtree(root / f"{newer.name}.bad"))
            meet(ranks, lambda: shutil.copytree(good, newer))
    meet(ranks, lambda: [(root / f"step-0000000{n}" / "state.json").unlink() for n in (1, 2)])
    yield {"what": "all damaged", **found_step(ranks, root)}
    yield {"what": "none", **found_step(ranks, folder / "absent")}


def unreadable(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    """A rank that cannot read, or does not see the folder, sets nothing aside."""
    root = folder / f"unreadable-{ranks.size}"
    save(ranks, root, 1)
    yield {"what": "elsewhere", **found_step(ranks, root if ranks.is_main else folder / "elsewhere")}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    answer = found_step(ranks, root)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    yield {"what": "too many open files", **answer}
    yield {"what": "after", **found_step(ranks, root)}


# What fails on one rank.


class Failing(dict[str, Tensor]):
    """A group that fails where its tensors are written: `end` is what happens then."""

    end: Callable[[], Any]

    def __iter__(self) -> Iterator[str]:
        self.end()
        return super().__iter__()


def failing(end: Callable[[], Any]) -> Groups:
    """Return a group of one tensor that fails when it is written."""
    group = Failing(late=torch.zeros(2))
    group.end = end
    return {"model": group}


def raising(error: BaseException) -> Callable[[], None]:
    """Return what raises an error."""

    def end() -> None:
        raise error

    return end


def bad_saves(ranks: Ranks, root: Path) -> dict[str, Callable[[], Any]]:
    """Return saves of which one rank's part cannot be; `spoil` is what that rank hands over."""

    def spoil(rank: int, tensors: Groups) -> Callable[[], Any]:
        return lambda: str(save(ranks, root, 2, tensors if ranks.rank == rank else None))

    def save_as(**changed: Any) -> Callable[[], Any]:
        settings = {"root": root, "step": 2, "tensors": owned(ranks, all_tensors()), "state": {}, "keep": 2}
        return lambda: str(checkpoint.save(**{**settings, **changed}, ranks=ranks))

    return {
        "tensor on 1": spoil(1, {"model": {"w": torch.zeros(3).to_sparse()}}),
        "name on 1": spoil(1, {"../model": {"w": torch.zeros(3)}}),
        "shared name": spoil(1, all_tensors()),
        "two at once": save_as(
            keep=0 if ranks.rank == 1 else 2, tensors={"": {}} if ranks.rank == 0 else owned(ranks, all_tensors())
        ),
        "no memory on 1": spoil(1, failing(raising(MemoryError()))),
        "fault on 1": spoil(1, failing(raising(TypeError("a\nfault")))),
        "fault on 0": spoil(0, failing(raising(ZeroDivisionError()))),
        "interrupt on 1": spoil(1, failing(raising(KeyboardInterrupt()))),
        "no memory to gather on 1": save_as(tensors=raising(MemoryError()) if ranks.rank == 1 else dict),
        "state on 0": save_as(state={"x": {1}}),
        "keep on 1": save_as(keep=0 if ranks.rank == 1 else 2),
        "other step on 1": save_as(step=2 + (ranks.rank == 1)),
        "other folder on 1": save_as(root=root.parent / "elsewhere" if ranks.rank == 1 else root),
        "a file on the way": save_as(root=root / "latest" / "state.json" / "x"),
    }


def refusing(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    root = folder / f"refused-{ranks.size}"
    save(ranks, root, 1)
    for what, action in bad_saves(ranks, root).items():
        yield {"what": what, **outcome(action), "names": names_in(root, ranks)}
    yield {"what": "after", **outcome(lambda: str(save(ranks, root, 2).name)), "found": found_step(ranks, root)}


def writing(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    """A thread of each rank, with a group of its own; one save that a rank spoils in between."""
    root = folder / f"written-{ranks.size}"
    own = Ranks(World(ranks.rank, ranks.size), dist.new_group(backend="gloo", timeout=timedelta(seconds=SECONDS)))
    bad = {"model": {"w": torch.zeros(3).to_sparse()}}
    with checkpoint.Writer(root, 2, own) as writer:
        for step in (1, 2, 3, 4):
            tensors = bad if step == 3 and ranks.rank == 1 else partial(owned, ranks, all_tensors(step))
            writer.write(step, tensors, {"step": step} if ranks.is_main else None)
            ranks.share(step)  # as training does meanwhile
        written = writer.wait()
    yield {"what": "written", "value": [(w.step, w.path and w.path.name, str(w.error)) for w in written]}
    yield {"what": "found", **found_step(ranks, root)}


def filling(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    """A disk that is full for the last rank alone, whose tensors are large."""
    root = folder / "disk" / "checkpoints"
    save(ranks, root, 1)
    # The others write nothing, which a disk that is full already would refuse too.
    large = {"model": {"large": torch.zeros(1 << 20)}} if ranks.rank == ranks.size - 1 else {}
    for step in (2, 3):
        answer = outcome(lambda step=step: str(save(ranks, root, step, large)))
        yield {"what": f"full {step}", **answer, "names": names_in(root, ranks)}
    yield {"what": "after", **found_step(ranks, root)}


def killing(victim: int) -> Action:
    """Return the case in which a rank is killed while it writes."""

    def action(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
        root = folder / f"killed-{victim}"
        save(ranks, root, 1)
        end = failing(lambda: os.kill(os.getpid(), signal.SIGKILL))
        yield {"what": "killed", **outcome(lambda: str(save(ranks, root, 2, end if ranks.rank == victim else None)))}

    return action


def endless(ranks: Ranks, folder: Path) -> Iterator[dict[str, Any]]:
    """Saves until another rank is gone; what it wrote is read by who killed it."""
    for step in range(1, 10_000):
        answer = outcome(lambda step=step: str(save(ranks, folder / "endless", step, keep=2)))
        if "error" in answer:
            yield {"what": "ended", **answer}
            return
        (folder / f"endless-{ranks.rank}").write_text(str(step))


CASES: dict[str, tuple[tuple[int, ...], Action]] = {
    "saving": ((1, 2, 3), saving),
    "loading": ((1, 2, 3), loading),
    "replacing": ((2,), replacing),
    "damaging": ((2, 3), damaging),
    "unreadable": ((2,), unreadable),
    "refusing": ((2, 3), refusing),
    "writing": ((2, 3), writing),
    "filling": ((2,), filling),
    **{f"killing {victim}": ((3,), killing(victim)) for victim in range(3)},
    "endless": ((2,), endless),
}


def rank_main(case: str, rank: int, size: int, folder: Path, store: str) -> None:
    """Run a case on one rank; whatever it leaves waiting ends with the process."""
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{store}", rank=rank, world_size=size, timeout=limit)
    with open(folder / "records.jsonl", "a", buffering=1, encoding="utf-8") as file:
        try:
            for record in CASES[case][1](Ranks(World(rank, size)), folder):
                file.write(json.dumps({"case": f"{case} on {size}", "rank": rank, **record}) + "\n")
        except Exception:
            file.write(json.dumps({"case": f"{case} on {size}", "rank": rank, "fault": traceback.format_exc()}) + "\n")
            raise
    os._exit(0)  # a group of which a rank was killed cannot be taken down in order


def start(case: str, size: int, folder: Path, store: str) -> list[Any]:
    """Start the ranks of a case."""
    context = multiprocessing.get_context("fork")
    arguments = [(case, rank, size, folder, store) for rank in range(size)]
    ranks = [context.Process(target=rank_main, args=a, daemon=True) for a in arguments]
    for process in ranks:
        process.start()
    return ranks


def kill_at_random(folder: Path) -> Iterator[dict[str, Any]]:
    """Kill one of two ranks at random moments of their saves, and read what is left in a process of its own."""
    chance = random.Random(0)
    for number in range(6):
        for rank in (0, 1):
            (folder / f"endless-{rank}").unlink(missing_ok=True)
        ranks = start("endless", 2, folder, f"endless-{number}.store")
        while not (folder / "endless-1").exists() and ranks[1].is_alive():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        victim = ranks[chance.randrange(2)]
        os.kill(victim.pid, signal.SIGKILL)
        for process in ranks:
            process.join()
        saved = max(int(path.read_text() or 0) for path in folder.glob("endless-?"))
        answer = found_step(Ranks(World(0, 1)), folder / "endless")
        shutil.rmtree(folder / "endless")
        yield {"what": f"kill {number}", **answer, "saved": saved, "codes": [process.exitcode for process in ranks]}


def main(folder: Path, cases: list[str]) -> None:
    """Run cases, each on all its numbers of ranks."""
    torch.set_num_threads(1)
    for case in cases:
        if case == "endless":
            with open(folder / "records.jsonl", "a", encoding="utf-8") as file:
                for record in kill_at_random(folder):
                    file.write(json.dumps({"case": "kills", "rank": 0, **record}) + "\n")
            continue
        for size in CASES[case][0]:
            for process in start(case, size, folder, f"{case}-{size}.store".replace(" ", "-")):
                process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or [case for case in CASES if case != "filling"])

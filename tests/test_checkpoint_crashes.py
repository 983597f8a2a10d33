"""A kill, a power cut or a full disk in the middle of a save leaves the state before it or the one after it, whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from hasten import checkpoint
from hasten.errors import CheckpointError, RunError

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="uses fork, signals and inode numbers"),
    # From Python 3.12 on, a fork is warned about when threads exist; the children here use none of them.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def save(root: Path, step: int, *, value: int | None = None, numel: int = 500, keep: int = 2) -> Path:
    value = step if value is None else value
    tensors = {
        "model": {"w": torch.full((numel,), float(value))},
        "optimizer": {"m": torch.full((numel,), -float(value))},
    }
    return checkpoint.save(root, step, tensors, {"value": value}, keep=keep)


def read(root: Path) -> tuple[int, int]:
    """Return step and value of the newest checkpoint, once all of it is of one save and nothing was passed over."""
    loaded, notes = checkpoint.newest(root)
    if loaded is None:
        return 0, 0
    value = loaded.state["value"]
    assert notes == []
    assert torch.all(loaded.tensors["model"]["w"] == value)
    assert torch.all(loaded.tensors["optimizer"]["m"] == -value)
    return loaded.step, value


# Kills.


def save_for_ever(root: Path, done: int, first: int) -> None:
    for step in range(first, 1_000_000):
        # Every third save is of the same step as the one before it, which takes the way of replacing.
        save(root, step - (step % 3 == 0), value=step, numel=60_000)
        os.write(done, step.to_bytes(4, "little"))


def kill_while_saving(root: Path, first: int, chance: random.Random) -> int:
    """Kill a forked child at a random moment of its saves; return the last value whose save it saw return."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            save_for_ever(root, writer, first)
        os._exit(1)
    os.close(writer)
    confirmed = os.read(reader, 4)  # the first save is through
    time.sleep(chance.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(reader, 4096):
        confirmed = more[-4:]
    os.close(reader)
    return int.from_bytes(confirmed, "little")


def test_a_kill_at_any_moment_leaves_the_last_finished_save_or_the_one_in_hand(tmp_path: Path) -> None:
    chance, value = random.Random(0), 0
    for _ in range(40):
        confirmed = kill_while_saving(tmp_path, value + 1, chance)
        step, value = read(tmp_path)
        for path in tmp_path.glob("step-????????"):
            checkpoint.load(path)  # older ones are whole too, or no longer have such a name
        assert value in (confirmed, confirmed + 1)
        assert step == value - (value % 3 == 0)
    save(tmp_path, value + 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) <= 3, names  # two kept and the link: nothing of the forty is left over


def test_an_interrupt_in_the_middle_of_a_save_leaves_nothing_half_written(tmp_path: Path) -> None:
    save(tmp_path, 1)

    class Interrupting(dict[str, torch.Tensor]):
        def items(self) -> object:
            raise KeyboardInterrupt

        __iter__ = items

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, {"model": {}, "optimizer": Interrupting()}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


# Power cuts. A disk is modelled as what POSIX promises: the content of a file is on it as of the last fsync of the
# file, the names in a folder as of the last fsync of the folder. Whatever happened since may or may not be there:
# content may be lost in part, and each folder may have any version of its names since then.


class Disk:
    """Watches a folder and rebuilds what a power cut at the last watched moment may leave of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: dict[int, int] = {}  # open descriptors, so that no inode number is used twice
        self._content: dict[int, bytes] = {}
        self._synced: dict[int, bytes] = {}
        self._names: dict[int, list[dict[str, tuple[str, int | str]]]] = {}
        self.look()
        self._synced.update(self._content)

    def look(self) -> None:
        """Take note of what the running system sees now."""
        for folder, _, _ in os.walk(self._root):
            names: dict[str, tuple[str, int | str]] = {}
            for entry in os.scandir(folder):
                number = entry.inode()
                if entry.is_symlink():
                    names[entry.name] = ("link", os.readlink(entry.path))
                    continue
                if number not in self._held:
                    self._held[number] = os.open(entry.path, os.O_RDONLY)
                names[entry.name] = ("folder" if entry.is_dir() else "file", number)
                if entry.is_file():
                    self._content[number] = Path(entry.path).read_bytes()
            versions = self._names.setdefault(os.stat(folder).st_ino, [names])
            if versions[-1] != names:
                versions.append(names)

    def sync(self, descriptor: int) -> None:
        """Take note that a file or a folder was forced to the disk."""
        number = os.fstat(descriptor).st_ino
        if number in self._names:
            del self._names[number][:-1]
        else:
            self._synced[number] = self._content[number]

    def rebuild(self, target: Path, chance: random.Random | None) -> None:
        """Write what may be left: at random, or (None) the least there can be."""
        self._rebuild(os.stat(self._root).st_ino, target, chance)

    def _rebuild(self, folder: int, target: Path, chance: random.Random | None) -> None:
        target.mkdir()
        # A new folder whose own names were never forced to the disk may be empty.
        versions = self._names.get(folder, [{}])
        for name, (kind, what) in (chance.choice(versions) if chance else versions[0]).items():
            if kind == "folder":
                self._rebuild(int(what), target / name, chance)
            elif kind == "link":
                (target / name).symlink_to(str(what))
            else:
                (target / name).write_bytes(self._left_of(int(what), chance))

    def _left_of(self, number: int, chance: random.Random | None) -> bytes:
        synced, content = self._synced.get(number, b""), self._content[number]
        if chance is None or synced == content:
            return synced
        torn = content[: chance.randrange(len(content) + 1)]
        return chance.choice([synced, content, torn, torn + bytes(len(content) - len(torn))])

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)


CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "symlink")


@contextmanager
def power_cuts(root: Path, target: Path, check: Callable[[Path], None]) -> Iterator[list[str]]:
    """While the body runs, cut the power before and after every call that changes the disk, and check what is left."""
    disk, calls, originals = Disk(root), [], {name: getattr(os, name) for name in (*CALLS, "fsync")}
    watching = [True]

    def cut() -> None:
        watching[0] = False
        disk.look()
        for chance in (None, *(random.Random(f"{len(calls)} {n}") for n in range(6))):
            disk.rebuild(target, chance)
            check(target)
            shutil.rmtree(target)
        watching[0] = True

    def watched(name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if not watching[0]:
                return originals[name](*arguments, **options)
            cut()
            result = originals[name](*arguments, **options)
            disk.look()
            if name == "fsync":
                disk.sync(int(str(arguments[0])))
            calls.append(name)
            cut()
            return result

        return call

    try:
        for name in originals:
            setattr(os, name, watched(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        disk.close()


@pytest.mark.parametrize(("step", "value"), [(3, 3), (2, 99)], ids=["a new step", "the same step again"])
def test_a_power_cut_at_any_moment_leaves_the_old_state_or_the_new_one(tmp_path: Path, step: int, value: int) -> None:
    root = tmp_path / "checkpoints"
    for older in (1, 2):
        save(root, older)
    seen: list[tuple[int, int]] = []
    with power_cuts(root, tmp_path / "left", lambda left: seen.append(read(left))) as calls:
        save(root, step, value=value)
        during = len(seen)
        os.symlink("anything", root / "a change after it")
    assert len(calls) >= 15
    assert set(seen[:during]) == {(2, 2), (step, value)}
    assert set(seen[during:]) == {(step, value)}  # once it has returned, nothing takes the new state away


def test_a_power_cut_during_the_first_save_leaves_nothing_or_the_new_state(tmp_path: Path) -> None:
    root, seen = tmp_path / "run", []
    root.mkdir()
    with power_cuts(root, tmp_path / "left", lambda left: seen.append(read(left / "checkpoints"))):
        save(root / "checkpoints", 7)
        during = len(seen)
        os.symlink("anything", root / "a change after it")
    assert set(seen[:during]) == {(0, 0), (7, 7)}
    assert set(seen[during:]) == {(7, 7)}


def test_the_model_of_a_disk_finds_a_save_that_forgets_to_force_its_data(tmp_path: Path) -> None:
    """The test above must be able to fail."""
    root = tmp_path / "checkpoints"
    save(root, 1)
    seen: list[object] = []

    def careless() -> None:
        (root / "step-00000002.tmp").mkdir()
        for path in (root / "step-00000001").iterdir():
            shutil.copy(path, root / "step-00000002.tmp" / path.name)
        os.rename(root / "step-00000002.tmp", root / "step-00000002")

    def check(left: Path) -> None:
        for path in left.glob("step-00000002"):
            try:
                seen.append(checkpoint.load(path))
            except CheckpointError as error:
                seen.append(str(error))

    with power_cuts(root, tmp_path / "left", check):
        careless()
    assert any("is missing" in str(what) or "is not JSON" in str(what) for what in seen)


# Full disks.


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes of a file fail, as on a disk that is full there."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_anywhere_is_one_sentence_and_leaves_the_older_state(tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in save(tmp_path, 1).iterdir())
    before = sorted(path.name for path in tmp_path.iterdir())
    for size in [*range(0, largest, 97), largest - 1]:
        with files_no_larger_than(size), pytest.raises(RunError, match=r"Could not save step 2 .* free or repair"):
            save(tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert read(tmp_path) == (1, 1)
    with files_no_larger_than(largest):
        save(tmp_path, 2)
    assert read(tmp_path) == (2, 2)


def test_a_full_disk_at_every_page_of_a_save_leaves_the_older_state_and_the_next_save_works(
    disk_of: Callable[[str], Path],
) -> None:
    small_disk = disk_of("64k")
    root = small_disk / "checkpoints"
    save(root, 1, numel=3000)
    failed = 0
    for pages in range(16):
        filler = small_disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with open(filler, "r+b") as file:
            file.truncate(max(0, filler.stat().st_size // 4096 - pages) * 4096)
        message = ""
        try:
            save(root, 2 + pages, numel=3000, keep=1)
        except RunError as error:
            message = str(error)
        filler.unlink()
        if not message:
            break
        failed += 1
        assert "No space left on device; free or repair the disk" in message
        assert len(list(root.iterdir())) == 2  # the older checkpoint and the link
        assert read(root) == (1, 1)
    assert read(root) == (2 + failed, 2 + failed)
    assert failed >= 5
    save(root, 50, numel=3000, keep=1)
    assert read(root)[0] == 50


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunError, match="Could not save step 1"):
        save(tmp_path / "checkpoints", 1)


def test_a_folder_that_refuses_deletion_does_not_stop_a_save(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    (tmp_path / "step-00000001.gone").touch()  # in the way of the rename that begins a deletion
    save(tmp_path, 2, keep=1)
    assert read(tmp_path) == (2, 2)

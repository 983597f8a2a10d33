"""A damaged or hostile checkpoint is found, named and passed over; nothing in it is believed or run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import size

from hasten import checkpoint
from hasten.errors import CheckpointError, RunError

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def save(root: Path, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(16, 8, generator=generator), "b": torch.zeros(0)},
        "optimizer": {"state.0.exp_avg": torch.randn(16, 8, generator=generator).bfloat16()},
    }
    return checkpoint.save(root, step, tensors, {"step": step, "loss": 1.25}, keep=3)


def is_refused(path: Path) -> bool:
    """Say whether `path` is refused, by the one error that says so, in one line that drives no terminal."""
    try:
        checkpoint.load(path)
    except CheckpointError as error:
        text = str(error)
        return text.isprintable() and len(text) < 500 and type(error) is CheckpointError
    return False


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1) / name
    chance = random.Random(name)
    for _ in range(100):
        position, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, position, bit)
        assert is_refused(path.parent), (name, position, bit)
        flip(path, position, bit)
    assert checkpoint.load(path.parent).step == 1


@pytest.mark.parametrize("name", FILES)
def test_every_cut_of_a_file_is_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1) / name
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, *range(0, len(whole), 13), len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert is_refused(path.parent), length
    for more in (b"\x00", b"\n", b" " * 5000):
        path.write_bytes(whole + more)
        assert is_refused(path.parent)


def falls_back(root: Path) -> bool:
    """Say whether the damaged step 2 is set aside, named in a line, and the older step 1 used."""
    loaded, notes = checkpoint.newest(root)
    bad = root / "step-00000002.bad"
    is_found = loaded.step == 1 and len(notes) == 1 and notes[0].endswith(f"renamed {bad.name}.") and bad.is_dir()
    return is_found and notes[0].isprintable()


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Return a folder with the checkpoints of steps 1 and 2, and a copy of the second."""
    root = tmp_path / "checkpoints"
    save(root, 1)
    shutil.copytree(save(root, 2), tmp_path / "good")
    return root, tmp_path / "good"


@pytest.mark.torture
def test_a_thousand_flipped_bits_of_a_thousand_are_found_and_the_older_one_used(two: tuple[Path, Path]) -> None:
    root, good = two
    chance = random.Random(5)
    places = [(name, at, bit) for name in FILES for at in range((good / name).stat().st_size) for bit in range(8)]
    flips = chance.sample(places, size(1000, len(places)))
    missed = []
    for name, position, bit in flips:
        flip(root / "step-00000002" / name, position, bit)
        if falls_back(root):
            (root / "step-00000002.bad").rename(root / "step-00000002")
        else:
            missed.append((name, position, bit))
        flip(root / "step-00000002" / name, position, bit)
    assert missed == []
    assert checkpoint.newest(root)[0].step == 2


def file_damages(good: Path, other: Path) -> list[tuple[str, Callable[[Path], object]]]:
    """Return what can become of the files of a checkpoint, other than single bits."""
    chance = random.Random(6)
    damages: list[tuple[str, Callable[[Path], object]]] = []
    content = {name: (good / name).read_bytes() for name in FILES}
    theirs = {name: (other / name).read_bytes() for name in FILES}
    for name, data in content.items():
        sizes = {0, 1, 8, len(data) - 1, *(chance.randrange(len(data)) for _ in range(40))}
        damages += [(f"{name} cut to {n}", lambda p, a=name, n=n: os.truncate(p / a, n)) for n in sorted(sizes)]
        damages += [(f"{name} missing", lambda p, a=name: (p / a).unlink())]
        damages += [(f"{name} zeroed", lambda p, a=name, d=data: (p / a).write_bytes(bytes(len(d))))]
        damages += [(f"{name} doubled", lambda p, a=name, d=data: (p / a).write_bytes(d + d))]
        damages += [(f"{name} with a byte more", lambda p, a=name, d=data: (p / a).write_bytes(d + b"\n"))]
        damages += [(f"{name} with a hole", lambda p, a=name, d=data: (p / a).write_bytes(d[:20] + d[28:]))]
        damages += [(f"extra copy of {name}", lambda p, a=name, d=data: (p / f"x-{a}").write_bytes(d))]
        damages += [
            (f"{name} is {b}", lambda p, a=name, d=content[b]: (p / a).write_bytes(d)) for b in FILES if b != name
        ]
        damages += [(f"{name} is {b} of step 1", lambda p, a=name, d=theirs[b]: (p / a).write_bytes(d)) for b in FILES]
    extra = ("zz.safetensors", "model.safetensors.tmp", "model.pt", "optimizer", "state.json~", "manifest.json.old")
    damages += [(f"extra {name}", lambda p, a=name: (p / a).write_bytes(b"x")) for name in extra]
    for one, two in itertools.combinations(FILES, 2):
        damages.append((f"{one} and {two} swapped", lambda p, a=one, b=two: swap(p / a, p / b)))
    for number in range(1, len(FILES) + 1):
        for gone in itertools.combinations(FILES, number):
            if number > 1:
                damages.append((f"{gone} missing", lambda p, gone=gone: [(p / name).unlink() for name in gone]))
    return damages


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def test_two_hundred_files_cut_missing_extra_or_swapped_are_found_and_the_older_one_used(
    two: tuple[Path, Path],
) -> None:
    root, good = two
    damages = file_damages(good, root / "step-00000001")
    assert len({name for name, _ in damages}) == len(damages) >= 200
    missed = []
    for name, damage in damages:
        damage(root / "step-00000002")
        if not falls_back(root):
            missed.append(name)
        shutil.rmtree(root / "step-00000002.bad", ignore_errors=True)
        shutil.copytree(good, root / "step-00000002", dirs_exist_ok=True)
    assert missed == []
    assert checkpoint.newest(root)[0].step == 2


def replaced_by(other: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        other(path)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit": lambda path: flip(path, path.stat().st_size // 2, 3),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "extra": lambda path: (path.parent / "zz.safetensors").write_bytes(b"x"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": replaced_by(lambda path: path.mkdir()),
    "a link": replaced_by(lambda path: path.symlink_to(path.parent.parent / "step-00000001" / path.name)),
    "a dangling link": replaced_by(lambda path: path.symlink_to("nowhere")),
    "a pipe": replaced_by(lambda path: os.mkfifo(path)),
    "from another step": lambda path: shutil.copy(path.parent.parent / "step-00000001" / path.name, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_the_older_one_is_used_and_the_damaged_one_renamed_and_named(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    DAMAGES[damage](save(tmp_path, 2) / name)
    loaded, notes = checkpoint.newest(tmp_path)
    assert (loaded.step, loaded.state["step"]) == (1, 1)
    assert len(notes) == 1
    assert "\n" not in notes[0]
    assert notes[0].startswith("Checkpoint step-00000002 is damaged (")
    assert notes[0].endswith("renamed step-00000002.bad.")
    assert (tmp_path / "step-00000002.bad").is_dir()
    assert (tmp_path / "latest").resolve() == tmp_path / "step-00000001"
    assert checkpoint.newest(tmp_path)[1] == []


def test_the_damaged_file_is_the_one_that_is_named(tmp_path: Path) -> None:
    for name in FILES:
        path = save(tmp_path, 2)
        flip(path / name, 5, 0)
        with pytest.raises(CheckpointError, match=rf"step-00000002 is damaged \({name}"):
            checkpoint.load(path)


def test_a_whole_checkpoint_under_the_name_of_another_step_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    two = save(tmp_path, 2)
    shutil.rmtree(two)
    shutil.copytree(tmp_path / "step-00000001", two)
    loaded, notes = checkpoint.newest(tmp_path)
    assert loaded.step == 1
    assert "is of step 1" in notes[0]


def test_files_that_desktops_hide_in_folders_are_no_damage(tmp_path: Path) -> None:
    (save(tmp_path, 1) / ".DS_Store").write_bytes(b"icons")
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_several_damaged_ones_are_passed_over_in_order(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = save(tmp_path, step)
        if step > 1:
            flip(path / "model.safetensors", 300, 1)
    loaded, notes = checkpoint.newest(tmp_path)
    assert loaded.step == 1
    assert [note.split()[1] for note in notes] == ["step-00000003", "step-00000002"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_good_one_it_is_an_error_every_time_and_never_a_fresh_start(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    DAMAGES[damage](tmp_path / "step-00000002" / "model.safetensors")
    DAMAGES["bit" if damage == "from another step" else damage](tmp_path / "step-00000001" / "model.safetensors")
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be trusted: .*step-00000001.* delete that"):
            checkpoint.newest(tmp_path)


def test_the_same_step_damaged_twice_keeps_both(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for _ in range(3):
        flip(save(tmp_path, 2) / "state.json", 3, 3)
        assert checkpoint.newest(tmp_path)[0].step == 1
    bad = sorted(path.name for path in tmp_path.glob("*.bad*"))
    assert bad == ["step-00000002.bad", "step-00000002.bad-2", "step-00000002.bad-3"]


def test_a_file_in_place_of_a_checkpoint_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002").write_text("not a folder")
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_too_many_open_files_is_not_taken_for_damage(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(RunError, match="Too many open files"):
            checkpoint.newest(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert path.is_dir()
    assert checkpoint.newest(tmp_path)[0].step == 1


# Hostile checkpoints: the attacker knows the format and gets every size and sha256 right.


def forge(folder: Path, contents: dict[str, bytes], /, **manifest: Any) -> Path:
    """Write a checkpoint folder with the given file contents and a manifest whose hashes all fit."""
    folder.mkdir(parents=True)
    entries = {}
    for name, data in contents.items():
        if "/" not in name:
            (folder / name).write_bytes(data)
        entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {"format": 1, "step": 1, "files": entries, **manifest}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": digest}, indent=1) + "\n")
    return folder


def tensor_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_forged_checkpoint_with_nothing_wrong_loads(tmp_path: Path) -> None:
    model = tensor_file({"w": entry()}, struct.pack("<f", 1.5))
    loaded = checkpoint.load(forge(tmp_path / "c", {"state.json": b"{}", "model.safetensors": model}))
    assert loaded.tensors["model"]["w"].tolist() == [1.5]


HOSTILE_TENSORS = {
    "nothing": b"",
    "a length and no header": tensor_file(b"", length=0),
    "a giant header": tensor_file(b"{}", length=2**63),
    "the largest header": tensor_file(b"{}", length=2**64 - 1),
    "a header longer than the file": tensor_file(b"{}", length=3),
    "a long header of spaces": tensor_file(b" " * ((16 << 20) + 8)),
    "a header that is a list": tensor_file([1]),
    "a header that is not UTF-8": tensor_file(b'{"\xff": 1}'),
    "a header without end": tensor_file(b'{"a":' * 100_000),
    "a name twice": tensor_file(b'{"w":%s,"w":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "an entry that is a list": tensor_file({"w": []}),
    "an entry with more": tensor_file({"w": {**entry(), "call": "os.system"}}, bytes(4)),
    "an unknown dtype": tensor_file({"w": entry("os.system")}, bytes(4)),
    "a dtype that is a list": tensor_file({"w": entry(["F32"])}, bytes(4)),
    "a negative size": tensor_file({"w": entry(shape=(-1,), offsets=(4, 0))}, bytes(4)),
    "two negative sizes": tensor_file({"w": entry(shape=(-1, -1))}, bytes(4)),
    "a size that is true": tensor_file({"w": entry(shape=(True,))}, bytes(4)),
    "a size that is a fraction": tensor_file({"w": entry(shape=(1.0,))}, bytes(4)),
    "sizes that overflow": tensor_file({"w": entry(shape=(2**33, 2**33), offsets=(0, 4))}, bytes(4)),
    "a giant empty tensor": tensor_file({"w": entry(shape=(2**62, 0), offsets=(0, 0))}),
    "an endless number": tensor_file(
        b'{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 99_999), bytes(4)
    ),
    "a thousand dimensions": tensor_file({"w": entry(shape=(1,) * 1000)}, bytes(4)),
    "a terabyte that is not there": tensor_file({"w": entry(shape=(2**38,), offsets=(0, 2**40))}),
    "tensors that overlap": tensor_file({"a": entry(), "b": entry(offsets=(0, 4))}, bytes(4)),
    "tensors that overlap in part": tensor_file({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
    "a gap": tensor_file({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)),
    "bytes behind the tensors": tensor_file({"a": entry()}, bytes(5)),
    "too few bytes": tensor_file({"a": entry()}, bytes(3)),
    "a shape that is too small": tensor_file({"a": entry(shape=())}, bytes(4)[:2]),
    "offsets backwards": tensor_file({"a": entry(offsets=(4, 0))}, bytes(4)),
    "three offsets": tensor_file({"a": entry(offsets=(0, 4, 8))}, bytes(4)),
    "offsets that are text": tensor_file({"a": entry(offsets="04")}, bytes(4)),
    "a zip": b"PK\x03\x04" + bytes(200),
}


@pytest.mark.parametrize("what", HOSTILE_TENSORS)
def test_a_hostile_file_of_tensors_is_refused(tmp_path: Path, what: str) -> None:
    assert is_refused(forge(tmp_path / "c", {"state.json": b"{}", "model.safetensors": HOSTILE_TENSORS[what]}))


HOSTILE_STATES = {
    "nothing": b"",
    "a list": b"[]",
    "endless lists": b"[" * 1_000_000,
    "endless objects": b'{"a":' * 1_000_000,
    "closed endless lists": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "an endless number": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "bytes": bytes(range(256)),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("what", HOSTILE_STATES)
def test_a_hostile_state_is_refused(tmp_path: Path, what: str) -> None:
    assert is_refused(forge(tmp_path / "c", {"state.json": HOSTILE_STATES[what]}))


@pytest.mark.parametrize(
    "name",
    [
        "../step-00000009/model.safetensors",
        "/etc/passwd",
        "..",
        "a/b.safetensors",
        "model.pkl",
        "model.safetensors\n",
        "\x1b[31m.safetensors",
        ".safetensors",
        "C:model.safetensors",
        "..\\model.safetensors",
        "x" * 300 + ".safetensors",
    ],
)
def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000009" / "model.safetensors").write_bytes(tensor_file({}))
    folder = forge(tmp_path / "c", {"state.json": b"{}"})
    data = tensor_file({})
    fitting = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files = {**json.loads((folder / "manifest.json").read_text())["files"], name: fitting}
    shutil.rmtree(folder)
    assert is_refused(forge(folder, {"state.json": b"{}"}, files=files))


@pytest.mark.parametrize(
    "manifest",
    [
        {"files": {}},
        {"files": []},
        {"files": None},
        {"step": "1"},
        {"step": -1},
        {"step": True},
        {"more": 1},
        {"files": {"state.json": None}},
        {"files": {"state.json": {"size": "2", "sha256": "0" * 64}}},
        {"files": {"state.json": {"size": 2, "sha256": "../../etc"}}},
        {"files": {"state.json": {"size": 2, "sha256": ["0" * 64]}}},
        {"files": {"state.json": {"size": 1e400, "sha256": "0" * 64}}},
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, manifest: dict[str, Any]) -> None:
    assert is_refused(forge(tmp_path / "c", {"state.json": b"{}"}, **manifest))


def test_a_manifest_without_end_is_refused(tmp_path: Path) -> None:
    for text in (b"[" * 1_000_000, b'{"a":' * 100_000, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", b"null"):
        path = save(tmp_path, 1)
        (path / "manifest.json").write_bytes(text)
        assert is_refused(path)


def test_a_checkpoint_of_a_later_format_is_refused_and_not_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    later = forge(tmp_path / "step-00000002", {"state.json": b"{}"}, format=2, step=2)
    with pytest.raises(CheckpointError, match="has format 2, this hasten reads 1; use the hasten that wrote it"):
        checkpoint.newest(tmp_path)
    assert later.is_dir()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors", "rng.pkl"])
def test_a_pickle_is_never_run(tmp_path: Path, name: str) -> None:
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    folder = forge(tmp_path / "c", {"state.json": b"{}", "model.safetensors": tensor_file({}), name: payload})
    if name == "manifest.json":
        (folder / name).write_bytes(payload)
    assert is_refused(folder)
    torch.save({"w": Payload(tmp_path / "ran")}, folder / "model.safetensors")
    assert is_refused(folder)
    assert not (tmp_path / "ran").exists()


def test_random_bytes_and_random_edits_are_refused_and_never_crash(tmp_path: Path) -> None:
    chance = random.Random(0)
    good = tensor_file({"a": entry(), "b": entry("F16", (2, 2), (4, 12))}, bytes(12))
    for _ in range(300):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data) - 12)] = chance.randrange(256)
        folder = forge(tmp_path / "c", {"state.json": b"{}", "model.safetensors": bytes(data)})
        try:
            loaded = checkpoint.load(folder).tensors["model"].values()
            assert sum(t.numel() * t.element_size() for t in loaded) == 12  # an edit of a name or a like dtype
        except CheckpointError:
            pass
        shutil.rmtree(folder)

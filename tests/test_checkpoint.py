"""A checkpoint comes back bit for bit, is pruned in order, and takes optimizers apart and together again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten import checkpoint
from hasten.checkpoint.tensors import DTYPES
from hasten.errors import CheckpointError


def save(root: Path, step: int, *, keep: int = 2, value: float | None = None) -> Path:
    tensors = {"model": {"w": torch.full((5, 7), float(step if value is None else value))}}
    return checkpoint.save(root, step, tensors, {"step": step}, keep=keep)


def round_trip(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    path = checkpoint.save(tmp_path, 1, {"model": tensors}, {}, keep=1)
    return checkpoint.load(path).tensors["model"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (6, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensors = {name: noise.clone().view(dtype) for name, dtype in DTYPES.items() if dtype != torch.bool}
    tensors["BOOL"] = noise > 100
    loaded = round_trip(tmp_path, tensors)
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)


def test_nan_payloads_infinities_and_negative_zero_keep_their_bits(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800000, -0x80000000, 1], dtype=torch.int32)
    assert same_bits(round_trip(tmp_path, {"w": bits.view(torch.float32)})["w"], bits.view(torch.float32))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4, 5)])
def test_every_shape_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert same_bits(round_trip(tmp_path, {"w": tensor})["w"], tensor)


def test_strided_expanded_negated_and_parameter_tensors_are_saved_as_what_they_mean(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "conjugate": torch.full((2,), 1 + 2j, dtype=torch.complex64).conj(),
        "negated": torch.full((2,), 1 + 2j, dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(base),
    }
    loaded = round_trip(tmp_path, tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_shared_tensor_is_saved_under_each_of_its_names(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    loaded = round_trip(tmp_path, {"embed": tied, "head": tied})
    assert torch.equal(loaded["embed"], tied)
    assert torch.equal(loaded["head"], tied)


def test_loaded_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    loaded = round_trip(tmp_path, {"a": torch.zeros(8), "b": torch.zeros(8)})
    loaded["a"].add_(1)
    assert loaded["b"].sum() == 0


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"odd": torch.randn(3).half(), "wide": torch.randn(2, 2).double(), "byte": torch.tensor([1, 2, 3]).byte()}
    path = checkpoint.save(tmp_path, 1, {"model": tensors}, {}, keep=1)
    read = safetensors.torch.load_file(path / "model.safetensors")
    assert all(same_bits(read[name], tensors[name]) for name in tensors)


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    from hasten.checkpoint.tensors import hash_file, read_tensors

    tensors = {"a": torch.randn(3, 2).bfloat16(), "b": torch.randn(7), "e": torch.zeros(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_tensors(tmp_path / "x.safetensors", hash_file(tmp_path / "x.safetensors"))
    assert all(same_bits(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("tensor", [torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")])
def test_a_tensor_without_plain_memory_is_refused_and_leaves_nothing(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="cannot be saved"):
        checkpoint.save(tmp_path / "c", 1, {"model": {"w": tensor}}, {}, keep=1)
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("group", ["", "../model", "a/b", "a.b", "x" * 65])
def test_a_group_name_that_is_no_file_name_is_refused(tmp_path: Path, group: str) -> None:
    with pytest.raises(CheckpointError, match="cannot name a group"):
        checkpoint.save(tmp_path, 1, {group: {}}, {}, keep=1)


@pytest.mark.parametrize("state", [{"w": torch.zeros(2)}, {"x": {1, 2}}, {("a", "b"): 1}])
def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, state: dict) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        checkpoint.save(tmp_path / "c", 1, {}, state, keep=1)
    assert not (tmp_path / "c").exists()


def test_state_comes_back_with_non_finite_numbers_and_any_text(tmp_path: Path) -> None:
    state = {"inf": math.inf, "text": "\x1b[31m\ud800 é\u2028", "big": 2**70, "none": None, "deep": [[{"a": []}]]}
    path = checkpoint.save(tmp_path, 3, {}, {**state, "nan": math.nan}, keep=1)
    loaded = checkpoint.load(path)
    assert math.isnan(loaded.state.pop("nan"))
    assert (loaded.state, loaded.step, loaded.tensors, loaded.path) == (state, 3, {}, path)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != "latest")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (1, 20, 300, 4000):
        save(tmp_path, step, keep=keep)
    kept = [1, 20, 300, 4000][-keep:]
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]
    assert (tmp_path / "latest").resolve().name == "step-00004000"


@pytest.mark.parametrize(("step", "keep"), [(1, 0), (-1, 1)])
def test_keeping_nothing_and_negative_steps_are_refused(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(CheckpointError, match="give keep"):
        checkpoint.save(tmp_path, step, {}, {}, keep=keep)


def test_a_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 5, value=1.0)
    save(tmp_path, 5, value=2.0)
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoint.newest(tmp_path)[0].tensors["model"]["w"].unique().item() == 2.0


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") == (None, [])
    assert checkpoint.newest(tmp_path) == (None, [])


def test_left_overs_of_a_cut_off_save_are_not_read_and_go_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("step-00000002.tmp", "step-00000000.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path)[0].step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_step_that_was_being_replaced_is_found_under_its_old_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-00000002.old")
    loaded, notes = checkpoint.newest(tmp_path)
    assert (loaded.step, notes) == (2, [])
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_can_be_moved_to_another_folder(tmp_path: Path) -> None:
    moved = save(tmp_path / "a", 7).rename(tmp_path / "my copy")
    assert checkpoint.load(moved).step == 7


def test_other_files_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-mine.tmp").mkdir()
    save(tmp_path, 1)
    assert names(tmp_path) == ["notes.txt", "step-00000001", "step-mine.tmp"]


def build(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), fused=True),
        "amsgrad": lambda: torch.optim.AdamW(parameters, lr=torch.tensor(1e-2), amsgrad=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
        "adafactor": lambda: torch.optim.Adafactor(parameters, lr=1e-2),
        "lbfgs": lambda: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
    }[name]()


def train(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        inputs = torch.randn(4, 6)

        def loss(inputs: torch.Tensor = inputs) -> torch.Tensor:
            optimizer.zero_grad()
            value = (inputs @ parameters[0] + parameters[1]).square().mean()
            value.backward()
            return value

        optimizer.step(loss)


@pytest.mark.parametrize("name", ["adamw", "amsgrad", "sgd", "adafactor", "lbfgs"])
def test_training_goes_on_bit_for_bit_after_pack_save_load_unpack(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(6, 3)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = build(name, parameters)
    train(parameters, optimizer, range(5))
    tensors, layout = checkpoint.pack(optimizer.state_dict())
    weights = {str(i): p for i, p in enumerate(parameters)}
    path = checkpoint.save(tmp_path, 5, {"model": weights, "optimizer": tensors}, {"optimizer": layout}, keep=1)
    train(parameters, optimizer, range(5, 12))

    loaded = checkpoint.load(path)
    again = [torch.nn.Parameter(loaded.tensors["model"][str(i)]) for i in range(2)]
    resumed = build(name, again)
    resumed.load_state_dict(checkpoint.unpack(loaded.tensors["optimizer"], loaded.state["optimizer"]))
    train(again, resumed, range(5, 12))
    assert all(same_bits(a, b) for a, b in zip(parameters, again))


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text(max_size=4) | st.integers() | st.sampled_from(["$tuple", "$", "a.b"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(nested)
def test_unpack_undoes_pack_types_and_all(value: object) -> None:
    tensors, layout = checkpoint.pack(value)
    assert tensors == {}
    back = checkpoint.unpack({}, json.loads(json.dumps(layout)))
    assert repr(back) == repr(value)


def test_tensors_are_named_by_their_place_and_never_collide() -> None:
    a, b, c = (torch.tensor(float(i)) for i in range(3))
    value = {"a.b": a, "a": {"b": b}, "list": [c, c]}
    tensors, layout = checkpoint.pack(value)
    assert list(tensors) == ["a.b", "a.b'", "list.0"]
    back = checkpoint.unpack(tensors, layout)
    assert (back["a.b"].item(), back["a"]["b"].item()) == (0.0, 1.0)
    assert back["list"][0] is back["list"][1]


@pytest.mark.parametrize("value", [object(), {"a": {1.5: 2}}, {1, 2}, b"bytes", {"x": [torch.float32]}])
def test_pack_names_the_place_of_what_it_cannot_hold(value: object) -> None:
    with pytest.raises(CheckpointError, match="which a checkpoint cannot hold"):
        checkpoint.pack(value)


@pytest.mark.parametrize(
    "layout",
    [
        {"$call": "os.system"},
        {"$tensor": "absent"},
        {"$tensor": ["w"]},
        {"$tensor": "w", "more": 1},
        {"$tuple": 5},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$dict": 3},
    ],
)
def test_unpack_refuses_what_pack_did_not_make(layout: object) -> None:
    with pytest.raises(CheckpointError, match="use another checkpoint"):
        checkpoint.unpack({"w": torch.zeros(1)}, layout)


def test_unpack_refuses_endless_nesting() -> None:
    layout: list = []
    for _ in range(100_000):
        layout = [layout]
    with pytest.raises(CheckpointError, match="malformed"):
        checkpoint.unpack({}, layout)

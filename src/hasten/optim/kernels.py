"""One element-wise update, written once as a PyTorch function and run as fast as the device allows.

On a CPU it becomes one C function (`hasten.optim.native`), on CUDA a kernel of `torch.compile`; where there is no
compiler PyTorch runs the function over blocks that fit a cache. All three give the same numbers.
"""

from __future__ import annotations

import array
import functools
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.optim import native
from hasten.optim.blocks import NEAREST, Rounding, Stored, run_in_blocks, wide
from hasten.optim.storage import Packed
from hasten.optim.tracing import trace

Path = Literal["auto", "compiled", "eager", "native"]

# Tensors of fewer elements are put together on CUDA, where a launch would cost more than the work.
CUDA_SMALL = 65536

_PATH: ContextVar[Path] = ContextVar("path", default="auto")


@contextmanager
def use(path: Path) -> Iterator[None]:
    """Run updates one way inside the block, to compare the ways: ``native``, ``compiled``, ``eager``; or ``auto``."""
    token = _PATH.set(path)
    try:
        yield
    finally:
        _PATH.reset(token)


@dataclass(frozen=True, eq=False)
class Kernel:
    """An element-wise update.

    Args:
        function: takes `tensors` and `scalars` by name and returns new values by name. A name of `tensors` is written;
            any other name is summed over each tensor. Only what `hasten.optim.tracing` knows.
        tensors: names of the tensors; ``p`` is the weight and may be rounded, the others are gradients and state.
        scalars: names of the numbers.
        by_row: those of `tensors` that have one element for each row: [..., rows, 1].
        by_column: those that have one for each column of every matrix: [..., 1, columns].

    Example:
        >>> def sgd(p, g, *, lr):
        ...     return {"p": p - lr * g, "squares": g * g}
        >>> p, g = torch.ones(2), torch.tensor([1.0, 2.0])
        >>> Kernel(sgd, ("p", "g"), ("lr",))({"p": [p], "g": [g]}, {"lr": 0.5})["squares"].tolist(), p.tolist()
        ([5.0], [0.5, 0.0])
    """

    function: Callable[..., Mapping[str, Any]]
    tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    by_row: tuple[str, ...] = ()
    by_column: tuple[str, ...] = ()

    @cached_property
    def _traced(self) -> tuple[list[str], dict[str, str]]:
        return trace(self.function, self.tensors, self.scalars)

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Names of the tensors that get new values."""
        return tuple(name for name in self._traced[1] if name in self.tensors)

    @cached_property
    def sums(self) -> tuple[str, ...]:
        """Names of the values that are summed over each tensor."""
        return tuple(name for name in self._traced[1] if name not in self.tensors)

    def __call__(
        self,
        tensors: Mapping[str, Sequence[Stored]],
        scalars: Mapping[str, float | Tensor],
        *,
        rounding: Rounding = NEAREST,
        low: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Update every tensor of the lists; return each sum as float64, one number per tensor.

        Args:
            tensors: for each name a list, all of one length; local tensors, never a `DTensor`.
            scalars: numbers, or tensors with one number for each position in the lists.
            rounding: of a bfloat16 ``p``.
            low: the remainders of ``p``, with ``kahan``.
        """
        lists = [tensors[name] for name in self.tensors]
        if not lists[0]:
            return {name: torch.zeros(0, dtype=torch.float64) for name in self.sums}
        common = _common_signature(lists) if rounding.mode == "nearest" else None
        if common is not None:
            return self._run(common, lists, scalars, rounding, low)
        storage = [_signature(row, rounding, self.tensors) for row in zip(*lists, strict=True)]
        found = {name: torch.zeros(len(storage), dtype=torch.float64) for name in self.sums}
        for kind in dict.fromkeys(storage):
            places = [place for place, other in enumerate(storage) if other == kind]
            part = self._run(
                kind,
                [[values[place] for place in places] for values in lists],
                {name: v[places] if isinstance(v, Tensor) else v for name, v in scalars.items()},
                rounding,
                None if low is None else [low[place] for place in places],
            )
            for name, values in part.items():
                found[name] = found[name].to(values.device)
                found[name][places] = values
        return found

    def each(self, parts: Sequence[tuple[Mapping[str, Sequence[Tensor]], Mapping[str, float]]]) -> None:
        """Update several lists of tensors, each with numbers of its own, and sum nothing.

        On a CPU that is one call of machine code where all are stored alike: for few small tensors a call costs more
        than its work.

        Args:
            parts: tensors and scalars as for a call.
        """
        if len(parts) > 1 and _PATH.get() in ("auto", "native"):
            lists = [[tensor for tensors, _ in parts for tensor in tensors[name]] for name in self.tensors]
            common = _common_signature(lists)
            run = _native(self, common[:-1]) if common is not None and common[-1] == "cpu" else None
            if run is not None:
                numbers, pointers = array.array("d"), array.array("Q")
                for tensors, scalars in parts:
                    row = [scalars[name] for name in self.scalars]
                    numbers.extend(row * len(tensors[self.tensors[0]]))
                for values in lists:
                    pointers.extend(map(Tensor.data_ptr, values))
                self._call(run, self._shapes(common, lists), pointers, numbers, len(self.scalars))
                return
        for tensors, scalars in parts:
            self(tensors, scalars)

    def _run(
        self,
        storage: tuple[str, ...],
        lists: list[Sequence[Stored]],
        scalars: Mapping[str, float | Tensor],
        rounding: Rounding,
        low: Sequence[Tensor] | None,
    ) -> dict[str, Tensor]:
        *kinds, device = storage
        path = _PATH.get()
        if device == "cpu" and path in ("auto", "native"):
            run = _native(self, tuple(kinds))
            if run is not None:
                return self._run_native(run, kinds, lists, scalars, rounding, low)
        plain = all(kind in ("float32", "float64", "bfloat16") for kind in kinds)
        plain = plain and not self.by_row and not self.by_column
        if plain and (path == "compiled" or (path == "auto" and device == "cuda" and _has_triton())):
            return self._run_compiled(tuple(kinds), lists, scalars)
        return run_in_blocks(self, lists, scalars, rounding, low)

    # --- machine code -----------------------------------------------------------------------------------------------

    def _run_native(
        self,
        run: Callable[..., None],
        kinds: Sequence[str],
        lists: list[Sequence[Stored]],
        scalars: Mapping[str, float | Tensor],
        rounding: Rounding,
        low: Sequence[Tensor] | None,
    ) -> dict[str, Tensor]:
        count = len(lists[0])
        pointers = array.array("Q")
        for kind, values in zip(kinds, lists, strict=True):
            if kind in _PACKED:
                pointers.extend([v.codes.data_ptr() for v in values] + [v.scales.data_ptr() for v in values])
            else:
                pointers.extend(map(Tensor.data_ptr, values))
            if kind == "kahan":
                assert low is not None
                pointers.extend(map(Tensor.data_ptr, low))
        stride = 0
        if any(type(value) is Tensor for value in scalars.values()):
            stride = len(self.scalars)
            given = [scalars[name] for name in self.scalars]
            table = [v.tolist() if isinstance(v, Tensor) else [v] * count for v in given]
            numbers = array.array("d", [x for row in zip(*table, strict=True) for x in row])
        else:
            numbers = array.array("d", [scalars[name] for name in self.scalars])
        return self._call(run, self._shapes(kinds, lists), pointers, numbers, stride, rounding.seed)

    def _call(
        self,
        run: Callable[..., None],
        shapes: tuple[int, int, array.array],
        pointers: array.array,
        numbers: array.array,
        stride: int,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Run machine code.

        Args:
            run: from `native.load`.
            shapes: number of tensors, number of elements, and rows, columns and rows of one matrix of every tensor.
            pointers: to the tensors, list by list.
            numbers: the scalars.
            stride: how many numbers further those of the next tensor are; 0 where all have the same.
            seed: of the random numbers.
        """
        count, elements, shape = shapes
        sums = torch.empty(count, len(self.sums), dtype=torch.float64) if self.sums else None
        run(
            count,
            shape.buffer_info()[0],
            pointers.buffer_info()[0],
            numbers.buffer_info()[0],
            stride,
            None if sums is None else sums.data_ptr(),
            seed & 0xFFFFFFFF,
            torch.get_num_threads() if elements > 2 * native.BLOCK else 1,
        )
        return {} if sums is None else {name: sums[:, place] for place, name in enumerate(self.sums)}

    def _shapes(self, kinds: Sequence[str], lists: list[Sequence[Stored]]) -> tuple[int, int, array.array]:
        """Return the number of tensors, of elements, and of every tensor its rows, columns and rows of one matrix."""
        packed = next((values for kind, values in zip(kinds, lists, strict=False) if kind in _PACKED), None)
        if packed is None and not self.by_row:
            return _flat_shapes(tuple(map(Tensor.numel, lists[0])))
        shapes = [v.shape for v in lists[0]] if packed is None else [v.codes.shape for v in packed]
        rows = [(s.numel() // s[-1] if s[-1] else 0, s[-1], s[-2] if len(s) > 1 else 1) for s in shapes]
        numbers = array.array("q", [number for row in rows for number in row])
        return len(shapes), sum(s.numel() for s in shapes), numbers

    # --- torch.compile ----------------------------------------------------------------------------------------------

    def _run_compiled(
        self, kinds: tuple[str, ...], lists: list[Sequence[Tensor]], scalars: Mapping[str, float | Tensor]
    ) -> dict[str, Tensor]:
        device = lists[0][0].device
        totals = torch.zeros(len(lists[0]), len(self.sums), dtype=torch.float64, device=device)
        rows = list(zip(*lists, strict=True))
        per_tensor = any(isinstance(value, Tensor) for value in scalars.values())
        small = [] if per_tensor or self.sums else [k for k, row in enumerate(rows) if row[0].numel() < CUDA_SMALL]
        if len(small) > 1:
            self._run_together([rows[k] for k in small], scalars)
        done = set(small) if len(small) > 1 else set()
        shared = None if per_tensor else self._numbers(scalars, None, lists[0][0])
        run = _compiled(self, kinds)
        for k, row in enumerate(rows):
            if k in done or row[0].numel() == 0:
                continue
            numbers = self._numbers(scalars, k, row[0]) if shared is None else shared
            flat = [tensor.view(-1) for tensor in row]
            # One element would be compiled for by itself.
            sums = run(numbers, *flat) if flat[0].numel() > 1 else _in_place(self, numbers, *flat)
            if self.sums:
                totals[k] = sums
        return {name: totals[:, place] for place, name in enumerate(self.sums)}

    def _numbers(self, scalars: Mapping[str, float | Tensor], place: int | None, like: Tensor) -> Tensor:
        """Return the numbers as one tensor, so that a new learning rate compiles nothing anew."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        values = [scalars[name] for name in self.scalars]
        if place is None:
            return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)
        picked = [
            v[place].to(like.device, dtype) if isinstance(v, Tensor) else torch.tensor(v, dtype=dtype) for v in values
        ]
        return torch.stack([v.to(like.device, non_blocking=True) for v in picked])

    def _run_together(self, rows: list[tuple[Tensor, ...]], scalars: Mapping[str, float | Tensor]) -> None:
        """Update small tensors as one long one."""
        columns = list(zip(*rows, strict=True))
        joined = {
            name: wide(torch.cat([t.view(-1) for t in tensors]))
            for name, tensors in zip(self.tensors, columns, strict=True)
        }
        new = self.function(**joined, **scalars)
        sizes = [tensor.numel() for tensor in columns[0]]
        for name, tensors in zip(self.tensors, columns, strict=True):
            if name in self.writes:
                torch._foreach_copy_([t.view(-1) for t in tensors], list(new[name].split(sizes)))


def _common_signature(lists: Sequence[Sequence[Stored]]) -> tuple[str, ...] | None:
    """Return the signature that all rows have, looked up column by column; None where rows may differ.

    The usual case, and most of what a step of few small tensors costs: hence `map` and no calls of Python functions.
    """
    kinds = []
    for values in lists:
        if Packed in set(map(type, values)):
            return None
        dtypes = set(map(_dtype, values))
        if len(dtypes) > 1 or not all(map(Tensor.is_contiguous, values)):
            return None
        kinds.append(_DTYPES.get(dtypes.pop(), "other"))
    if all(map(_is_cpu, lists[0])):
        return (*kinds, "cpu")
    devices = {tensor.device for tensor in lists[0]}
    return (*kinds, devices.pop().type) if len(devices) == 1 else None


def _signature(row: Sequence[Stored], rounding: Rounding, names: Sequence[str]) -> tuple[str, ...]:
    """Return how each tensor of a row is stored, then the device; ``strided`` rows are left to PyTorch."""
    kinds = []
    for name, tensor in zip(names, row, strict=True):
        if isinstance(tensor, Packed):
            kinds.append(tensor.kind if tensor.codes.is_contiguous() else "strided")
            device = tensor.codes.device.type
            continue
        kind = _DTYPES.get(tensor.dtype, "other")
        if name == "p" and kind == "bfloat16" and rounding.mode != "nearest":
            kind = rounding.mode
        kinds.append(kind if tensor.is_contiguous() else "strided")
        device = tensor.device.type
    return (*kinds, device)


_dtype, _is_cpu = operator.attrgetter("dtype"), operator.attrgetter("is_cpu")
_PACKED = ("signed8", "unsigned8")
_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


@functools.lru_cache(256)
def _flat_shapes(sizes: tuple[int, ...]) -> tuple[int, int, array.array]:
    return len(sizes), sum(sizes), array.array("q", [number for size in sizes for number in (1, size, 1)])


@functools.cache
def _native(kernel: Kernel, kinds: tuple[str, ...]) -> Callable[..., None] | None:
    if "other" in kinds or "strided" in kinds:
        return None
    lines, results = kernel._traced
    storage = dict(zip(kernel.tensors, kinds, strict=True))
    ways = {"by_row": kernel.by_row, "by_column": kernel.by_column}
    return native.load(native.source(lines, results, storage, kernel.scalars, **ways))


@functools.cache
def _compiled(kernel: Kernel, kinds: tuple[str, ...]) -> Callable[..., Tensor]:
    def flat(numbers: Tensor, *tensors: Tensor) -> Tensor:
        return _in_place(kernel, numbers, *tensors)

    # A code object of its own: Dynamo counts recompilations per code object, and all kernels share this one.
    own = types.FunctionType(flat.__code__.replace(), flat.__globals__, f"{kinds}", None, flat.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _in_place(kernel: Kernel, numbers: Tensor, *tensors: Tensor) -> Tensor:
    """Update the tensors of one parameter and return the sums."""
    scalars = dict(zip(kernel.scalars, numbers.unbind(), strict=True))
    named = dict(zip(kernel.tensors, tensors, strict=True))
    new = kernel.function(**{name: wide(tensor) for name, tensor in named.items()}, **scalars)
    for name in kernel.writes:
        named[name].copy_(new[name])
    return torch.stack([numbers.sum(dtype=torch.float64) * 0, *(new[s].double().sum() for s in kernel.sums)])[1:]


@functools.cache
def _has_triton() -> bool:
    return torch.utils._triton.has_triton()

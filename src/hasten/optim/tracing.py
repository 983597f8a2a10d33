"""An element-wise PyTorch function, followed with symbols instead of tensors and written down as C.

The function stays the only source of an update: PyTorch runs it as it is, and the C text has the same operations in the
same order. Without contraction into fused multiply-adds both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Operand = Any  # A Symbol, or a Python number.


class Listing:
    """The C statements of one function, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, expression: str, kind: str = "T") -> Symbol:
        """Append ``const kind tN = expression`` and return the symbol that stands for it."""
        name = f"t{len(self.lines)}"
        self.lines.append(f"const {kind} {name} = {expression};")
        return Symbol(self, name)


class Symbol:
    """A number of which only the name is known; arithmetic with it writes a line of C."""

    def __init__(self, listing: Listing, name: str) -> None:
        self.listing = listing
        self.name = name

    def _binary(self, sign: str, left: Operand, right: Operand, kind: str = "T") -> Symbol:
        return self.listing.add(f"{_text(left)} {sign} {_text(right)}", kind)

    def __add__(self, other: Operand) -> Symbol:
        return self._binary("+", self, other)

    def __radd__(self, other: Operand) -> Symbol:
        return self._binary("+", other, self)

    def __sub__(self, other: Operand) -> Symbol:
        return self._binary("-", self, other)

    def __rsub__(self, other: Operand) -> Symbol:
        return self._binary("-", other, self)

    def __mul__(self, other: Operand) -> Symbol:
        return self._binary("*", self, other)

    def __rmul__(self, other: Operand) -> Symbol:
        return self._binary("*", other, self)

    def __truediv__(self, other: Operand) -> Symbol:
        return self._binary("/", self, other)

    def __rtruediv__(self, other: Operand) -> Symbol:
        return self._binary("/", other, self)

    def __neg__(self) -> Symbol:
        return self.listing.add(f"-{self.name}")

    def __gt__(self, other: Operand) -> Symbol:
        return self._binary(">", self, other, "int")

    def __lt__(self, other: Operand) -> Symbol:
        return self._binary("<", self, other, "int")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Symbol:
        """Answer ``torch.sqrt(symbol)`` and its like."""
        listing = next(value.listing for value in args if isinstance(value, Symbol))
        return listing.add(_FUNCTIONS[function](*(_text(value) for value in args)))


def _text(value: Operand) -> str:
    return value.name if isinstance(value, Symbol) else f"(T){float(value)!r}"


# What an update may call, as C. A value that is not a number stays one, as in PyTorch.
_FUNCTIONS: dict[Callable[..., Any], Callable[..., str]] = {
    torch.sqrt: lambda x: f"SQRT({x})",
    torch.abs: lambda x: f"FABS({x})",
    torch.sign: lambda x: f"(T)(({x} > (T)0) - ({x} < (T)0))",
    torch.maximum: lambda x, y: f"({x} > {y} || {x} != {x}) ? {x} : {y}",
    torch.minimum: lambda x, y: f"({x} < {y} || {x} != {x}) ? {x} : {y}",
    torch.clamp_min: lambda x, low: f"({x} < {low}) ? {low} : {x}",
    torch.clamp_max: lambda x, high: f"({x} > {high}) ? {high} : {x}",
    torch.where: lambda condition, x, y: f"{condition} ? {x} : {y}",
}


def trace(
    function: Callable[..., Mapping[str, Any]], tensors: Sequence[str], scalars: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the C statements of `function`, and which C name holds each of the values that it returns.

    Args:
        function: takes `tensors` and `scalars` by name and returns new values by name; arithmetic, comparisons and the
            functions of `_FUNCTIONS` only, no branch on a value.
        tensors, scalars: names of its arguments; each is ``in_<name>`` in C.

    Example:
        >>> def average(p, g, *, beta):
        ...     return {"p": beta * p + torch.sqrt(g)}
        >>> trace(average, ["p", "g"], ["beta"])
        (['const T t0 = in_beta * in_p;', 'const T t1 = SQRT(in_g);', 'const T t2 = t0 + t1;'], {'p': 't2'})
    """
    listing = Listing()
    values = function(**{name: Symbol(listing, f"in_{name}") for name in (*tensors, *scalars)})
    return listing.lines, {name: _text(value) for name, value in values.items()}

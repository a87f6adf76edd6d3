"""Sizes and numbers that are symbolic in a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


def size_hint(size: int | torch.SymInt) -> int | None:
    """Return a size; a dynamic one as it was at compilation, None if it depends on data."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if isinstance(hint, int) else None


class Size(NamedTuple):
    """Stands for a number that may be symbolic.

    Attributes:
        number: its position among several.
    """

    number: int


class Description(NamedTuple):
    """A tensor without its values.

    Attributes:
        strides: None if the tensor is contiguous.
    """

    shape: tuple[int | Size, ...]
    strides: tuple[int | Size, ...] | None
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor, size: Callable[[int], int | Size]) -> Description:
        """Return the description of a tensor, with `size` of its sizes and strides."""
        return cls(
            shape=tuple(map(size, tensor.shape)),
            strides=None if tensor.is_contiguous() else tuple(map(size, tensor.stride())),
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
        )

    def example(self, numbers: Sequence[Any]) -> Tensor:
        """Return a tensor with these properties, given what each `Size` stands for."""
        kind: Any = {
            "dtype": self.dtype,
            "device": self.device,
            "requires_grad": self.requires_grad,
        }
        shape, strides = (
            None if sizes is None else [_value(size, numbers) for size in sizes]
            for sizes in (self.shape, self.strides)
        )
        if strides is None:
            return torch.empty(shape, **kind)
        return torch.empty_strided(shape, strides, **kind)


def _value(size: int | Size, numbers: Sequence[Any]) -> Any:
    return numbers[size.number] if isinstance(size, Size) else size


class Term(NamedTuple):
    """A number that is known from others: their product, times a number, plus a number.

    Attributes:
        factors: the positions of the others, which come before it.
    """

    factors: tuple[int, ...]
    scale: int = 1
    offset: int = 0

    def of(self, numbers: Sequence[int | torch.SymInt]) -> int | torch.SymInt:
        return math.prod(numbers[at] for at in self.factors) * self.scale + self.offset


Terms = Sequence[Term | None]
"""What each of several numbers is; None for one that is not known from others."""


class _Symbols:
    """Symbols for numbers, and what a compiler concludes from their values.

    Attributes:
        environment: the environment of the symbols.
        numbers: the symbols, and what is known from them.
    """

    def __init__(self, values: Sequence[int], terms: Terms):
        self.environment = ShapeEnv()
        self.numbers: list[int | torch.SymInt] = []
        for value, term in zip(values, terms, strict=True):
            self.numbers.append(self._symbol(value) if term is None else term.of(self.numbers))

    def _symbol(self, value: int) -> int | torch.SymInt:
        source = ConstantSource(f"number_{len(self.numbers)}")
        symbol = self.environment.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
        return self.environment.create_symintnode(symbol, hint=value, source=source)

    def guard(self) -> Callable[[tuple[int, ...]], bool]:
        """Return whether all that has been concluded until now is true of other values."""
        environment = self.environment
        text = environment.produce_guards_expression(self.numbers, ignore_static=False)
        code = compile(text or "True", "<guard>", "eval")  # it is evaluated in every call

        def holds(values: tuple[int, ...]) -> bool:
            return bool(environment.evaluate_guards_expression(code, values))

        return holds


Made = TypeVar("Made")


class _Version(NamedTuple, Generic[Made]):
    """What was made, and the numbers that it is right for."""

    holds: Callable[[tuple[int, ...]], bool]
    made: Made | None


class Versions(Generic[Made]):
    """What is made for numbers, like sizes, and serves other numbers as well.

    As with `torch.compile`, the first version is for the first numbers alone, which costs least.
    If there are others, the next version is made with symbols in their place, and what was
    concluded from the symbols is guarded. If nothing can be made with symbols, each of the numbers
    has a version.

    Args:
        terms: what the numbers are. Those that get a symbol are greater than 1.
        make: returns what is made, None if it cannot be. Its arguments are the numbers, which may
            be symbols, and the environment of the symbols, which may be None.
    """

    def __init__(
        self,
        terms: Terms,
        make: Callable[[Sequence[int | torch.SymInt], ShapeEnv | None], Made | None],
    ):
        self._terms = terms
        self._make = make
        self._takes_symbols = True
        self._versions: tuple[_Version[Made], ...] = ()

    def get(self, numbers: tuple[int, ...]) -> Made | None:
        """Return what is made for some numbers, None if it cannot be."""
        for version in self._versions:
            if version.holds(numbers):
                return version.made
        version = self._version(numbers)
        self._versions = (version, *self._versions[: _MOST_VERSIONS - 1])
        return version.made

    def _version(self, numbers: tuple[int, ...]) -> _Version[Made]:
        if self._versions and self._takes_symbols:
            symbols = _Symbols(numbers, self._terms)
            made = self._make(symbols.numbers, symbols.environment)
            if made is not None or self._versions[-1].made is None:
                return _Version(symbols.guard(), made)
            self._takes_symbols = False
        return _Version(numbers.__eq__, self._make(numbers, None))


_MOST_VERSIONS = 64

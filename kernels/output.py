"""The last statements of a program, like ``logsumexp(t2)``: their results are the operator's."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from cce_inductor.kernels.names import Name


@dataclasses.dataclass(frozen=True)
class Output(abc.ABC):
    """One statement ``name(*args)``. The first arguments are the values that it reads.

    A subclass with a name, ``class Sum(Statistic, name="sum")``, can be parsed.
    """

    args: tuple[Any, ...]

    name: ClassVar[str]
    by_name: ClassVar[dict[str, type[Output]]] = {}

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            if name in Output.by_name:
                raise ValueError(f"there is already an output {name!r}")
            cls.name = name
            Output.by_name[name] = cls

    @property
    @abc.abstractmethod
    def values(self) -> tuple[Name, ...]:
        """The program's values that the statement reads."""

    @property
    def value(self) -> Name:
        """The first of `values`."""
        return self.values[0]

    def __str__(self) -> str:
        return call_text(self.name, self.args, ())


class Block(Output, name="block"):
    """``block(x)``: the block of `x` itself, as an output of a gradient's program.

    ``block(x, y, r0, ...)`` is `y`, which equals `x` except in the columns that the indices r0, ...
    name in each row.
    """

    @property
    def values(self) -> tuple[Name, ...]:
        return tuple(self.args[:2])

    @property
    def indices(self) -> tuple[Name, ...]:
        return tuple(self.args[2:])


def call_text(target: str, args: Iterable[Any], kwargs: Iterable[tuple[str, Any]]) -> str:
    """Return a call as text of a program."""
    shown = [*map(_text, args), *(f"{name}={_text(value)}" for name, value in kwargs)]
    return f"{target}({', '.join(shown)})"


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Name) else repr(value)

"""What is computed from a logit, written down: a pointwise function, then reductions over the row.

A program is text, so that it can be an operator's argument, a cache key and a line that a person
reads. Cross-entropy under a softcap of 30 is

    t0 = div.Tensor(z, 30.0); t1 = tanh(t0); t2 = mul.Tensor(t1, 30.0);
    logsumexp(t2); target(t2, r0, -100)

Each statement before the reductions applies one pointwise ATen operator. Names:

- ``z``: the logit; ``j``: its place in the vocabulary
- ``r0``: operand 0, which has one value (or some, for an index) a row; ``c0``: one value a
  vocabulary entry; ``s0``: one value; ``b0``: one value a logit
- ``t0``: the result of a statement

Reductions, whose results are the operator's, one after another:

- ``logsumexp(x)``, ``sum(x)``: over the vocabulary
- ``mean(x, y)``: of `y` under the probabilities ``softmax(x)``; `x` is also under a logsumexp
- ``dot(q, y)``: the sum of ``q * y``; `q` is also under a sum
- ``gather(x, r0)``: `x` at the indices r0, [rows, k]
- ``index(x, r0)``: the same for [rows], where a negative index counts from the end
- ``target(x, r0, ignore_index)``: the same for class indices [rows]; 0 where one is ignored
- ``max(x)``: two results, the greatest value and its first index
- ``topk(x, k)``: two results, [rows, k] each, greatest first
- ``block(x)``: `x` itself; only in what `kernels.gradient` writes
- ``block(x, y, r0, ...)``: `y`, which is `x` but in the columns of a row's indices r0, ...
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

OPERAND_KINDS = "rcsb"
_CONSTANTS = {"inf": math.inf, "nan": math.nan}
_OUTPUTS = {"max": 2, "topk": 2}
WEIGHTED = {"mean": "logsumexp", "dot": "sum"}
"""Weighted sums, and how their weights are reduced."""
TOPK_LIMIT = 1024
"""The largest k of ``topk``."""


class Name(str):
    """A value in a program, as opposed to a string constant."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """``name = target(*args, **kwargs)``; `target` names an ATen overload, "div.Tensor"."""

    name: Name
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def uses(self) -> list[Name]:
        return [a for a in (*self.args, *dict(self.kwargs).values()) if isinstance(a, Name)]

    @property
    def call(self) -> str:
        return _call_text(self.target, self.args, self.kwargs)

    def run(self, values: Mapping[Any, Tensor], dtype: torch.dtype) -> Tensor:
        """Its result from those it uses; a number where the operator wants a tensor has `dtype`."""
        args = [
            values[a] if isinstance(a, Name) else tensor_if(wanted, a, dtype)
            for a, wanted in zip(self.args, tensor_arguments(self.target), strict=False)
        ]
        kwargs = {key: values[a] if isinstance(a, Name) else a for key, a in self.kwargs}
        result: Tensor = overload(self.target)(*args, **kwargs)
        return result

    def __str__(self) -> str:
        return f"{self.name} = {self.call}"


@dataclasses.dataclass(frozen=True)
class Reduction:
    """``kind(*args)``; the first argument is the value that is reduced."""

    kind: str
    args: tuple[Any, ...]

    @property
    def value(self) -> Name:
        return Name(self.args[0])

    @property
    def values(self) -> tuple[Name, ...]:
        return self.args[: 2 if self.kind in (*WEIGHTED, "block") else 1]

    @property
    def outputs(self) -> int:
        return _OUTPUTS.get(self.kind, 1)

    @property
    def weights(self) -> Reduction:
        """For one in `WEIGHTED`, the reduction of its weights, which the program has as well."""
        return Reduction(WEIGHTED[self.kind], (self.value,))

    def __str__(self) -> str:
        return _call_text(self.kind, self.args, ())


def _call_text(target: str, args: Iterable[Any], kwargs: Iterable[tuple[str, Any]]) -> str:
    shown = [*map(_text, args), *(f"{name}={_text(value)}" for name, value in kwargs)]
    return f"{target}({', '.join(shown)})"


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Name) else repr(value)


@dataclasses.dataclass(frozen=True)
class Program:
    """Pointwise steps in order, then reductions of what they made."""

    steps: tuple[Step, ...]
    reductions: tuple[Reduction, ...]

    @classmethod
    def parse(cls, text: str) -> Program:
        """The inverse of ``str``.

        Raises:
            ValueError: `text` is not a program.
        """
        return _parse(text)

    def __str__(self) -> str:
        return "; ".join(map(str, (*self.steps, *self.reductions)))

    @property
    def roots(self) -> tuple[Name, ...]:
        """The values that are reduced, each once."""
        return tuple(dict.fromkeys(v for reduction in self.reductions for v in reduction.values))

    @property
    def outputs(self) -> list[tuple[int, Reduction]]:
        """Every reduction, with the position of its first result."""
        counts = [reduction.outputs for reduction in self.reductions]
        return list(zip(itertools.accumulate(counts, initial=0), self.reductions, strict=False))

    @property
    def is_plain(self) -> bool:
        """Whether what is reduced are the logits themselves."""
        return not self.steps and set(self.roots) == {"z"}

    @functools.cached_property
    def operands(self) -> dict[Name, int]:
        """Operands that the steps read, and their position in the list of operands."""
        uses = [use for step in self.steps for use in step.uses]
        return {use: position(use) for use in (*uses, *self.roots) if use[0] in OPERAND_KINDS}

    @functools.cached_property
    def reads_columns(self) -> bool:
        """Whether an entry's place in the vocabulary matters."""
        return "j" in self.roots or any("j" in step.uses for step in self.steps)

    def reached(self, outputs: Iterable[bool]) -> set[Name]:
        """What has a gradient if these of the program's outputs do: no path to it is detached."""
        found: set[Name] = set()
        wanted = iter(outputs)
        for reduction in self.reductions:
            of_reduction = [next(wanted) for _ in range(reduction.outputs)]
            if True in of_reduction:
                found.update(reduction.values)
        for step in reversed(self.steps):
            if step.name in found and step.target != "detach":
                found.update(step.uses)
        return found


def position(operand: Name) -> int:
    """An operand's position in the list of operands, which its name ends with."""
    return int(operand[1:])


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Program:
    steps: list[Step] = []
    reductions: list[Reduction] = []
    try:
        for statement in ast.parse(text.replace(";", "\n").replace("\n ", "\n").strip()).body:
            if isinstance(statement, ast.Assign):
                (variable,) = statement.targets
                assert isinstance(variable, ast.Name)
                target, args, kwargs = _call(statement.value)
                overload(target)
                steps.append(Step(Name(variable.id), target, args, kwargs))
            else:
                assert isinstance(statement, ast.Expr)
                kind, args, _ = _call(statement.value)
                reductions.append(Reduction(kind, args))
    except (AssertionError, AttributeError, KeyError, SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not a program over logits: {error}") from None
    unknown = {r.kind for r in reductions} - set(REDUCTIONS)
    if unknown or not reductions:
        raise ValueError(f"{text!r} is not a program over logits: reductions are {REDUCTIONS}")
    return Program(tuple(steps), tuple(reductions))


INDEXED = ("gather", "index", "target")
REDUCTIONS = ("logsumexp", "sum", "mean", "dot", *INDEXED, "max", "topk", "block")


def _call(node: ast.expr) -> tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    assert isinstance(node, ast.Call)
    args = tuple(_value(argument) for argument in node.args)
    kwargs = tuple((str(keyword.arg), _value(keyword.value)) for keyword in node.keywords)
    return ast.unparse(node.func), args, kwargs


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _CONSTANTS[node.id] if node.id in _CONSTANTS else Name(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Name):
        return -_CONSTANTS[node.operand.id]
    return ast.literal_eval(node)


def overload(target: str) -> Any:
    """The ATen operator that a step names."""
    name, _, overload_name = target.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload_name or "default")


@functools.cache
def tensor_arguments(target: str) -> tuple[bool, ...]:
    """For each positional argument of a step's operator whether it must be a tensor."""
    schema = overload(target)._schema
    return tuple("Tensor" in str(argument.type) for argument in schema.arguments)


def tensor_if(wanted: bool, number: Any, dtype: torch.dtype | None = None) -> Any:
    """A number as a tensor without dimensions, whose dtype gives way to any block's if none is
    asked for."""
    if not wanted or number is None:
        return number
    if dtype is None and isinstance(number, float):
        dtype = torch.float64
    return torch.tensor(number, dtype=dtype)


def step_target(operator: Any) -> str:
    """How a step names an ATen operator."""
    return str(operator).removeprefix("aten.").removesuffix(".default")


def names_in(values: Iterable[Any]) -> tuple[Name, ...]:
    return tuple(value for value in values if isinstance(value, Name))


def needed(steps: list[Step], results: tuple[Name, ...]) -> list[Step]:
    wanted = set(results)
    kept = []
    for step in reversed(steps):
        if step.name in wanted:
            kept.append(step)
            wanted.update(step.uses)
    return kept[::-1]

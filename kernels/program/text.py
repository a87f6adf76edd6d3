"""A program: the text that says what is computed from each logit.

A program is text, so that it can be an operator's argument, a cache key and a line that a person
reads. Cross-entropy under a softcap of 30 is

    t0 = div.Tensor(z, 30.0); t1 = tanh(t0); t2 = mul.Tensor(t1, 30.0);
    logsumexp(t2); target(t2, r0, -100)

The first statements are *steps*: each applies one pointwise ATen operator. The last statements are
*outputs*: `kernels.statistics` has one file for each statistic of a row, and `output.Block` ends
the program of a gradient. Names of values:

- ``z``: the logit; ``j``: its place in the vocabulary
- ``r0``, ``c0``, ``s0``, ``b0``: operand 0; the letter is its `OperandKind`
- ``p0``: the product of operands 0 and 1; ``q0``: the same with operand 2 as a bias
- ``t0``: the result of a step
- ``g0``: in a derivative, the cotangent of the first value that an output reads
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import cce_inductor.kernels.statistics  # noqa: F401  (so that every statistic can be parsed)
from cce_inductor.kernels.names import COLUMN, LOGIT, Name, OperandKind
from cce_inductor.kernels.output import Block, Output, call_text
from cce_inductor.kernels.statistics.base import Statistic
from cce_inductor.kernels.statistics.indexed import Indexed
from cce_inductor.kernels.statistics.logsumexp import LogSumExp

_CONSTANTS = {"inf": math.inf, "nan": math.nan}


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
        return call_text(self.target, self.args, self.kwargs)

    def arguments(
        self, values: Mapping[Any, Any], dtype: torch.dtype
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the operator's arguments.

        Args:
            values: the values by name.
            dtype: the dtype of a floating-point number where the operator takes a tensor.
        """

        def argument(value: Any, is_tensor: bool) -> Any:
            if isinstance(value, Name):
                return values[value]
            if not is_tensor or value is None:
                return value
            return torch.full((), value, dtype=dtype if isinstance(value, float) else None)

        args = [
            argument(value, is_tensor)
            for value, is_tensor in zip(self.args, tensor_arguments(self.target), strict=False)
        ]
        return args, {key: argument(value, False) for key, value in self.kwargs}

    def run(self, values: Mapping[Any, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the result; the arguments are those of `arguments`."""
        args, kwargs = self.arguments(values, dtype)
        result: Tensor = overload(self.target)(*args, **kwargs)
        return result

    def __str__(self) -> str:
        return f"{self.name} = {self.call}"


@dataclasses.dataclass(frozen=True)
class Program:
    """Pointwise steps in order, then the outputs that read their results.

    Attributes:
        steps: each after those that it uses.
        outputs: the statistics of a forward program, or the blocks of a gradient's program.
    """

    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]

    @classmethod
    def parse(cls, text: str) -> Program:
        """Parse the text of a program, the inverse of ``str``.

        Raises:
            ValueError: `text` is not a program.
        """
        return _parse(text)

    def __str__(self) -> str:
        return "; ".join(map(str, (*self.steps, *self.outputs)))

    @functools.cached_property
    def statistics(self) -> tuple[Statistic, ...]:
        """The outputs of a forward program."""
        return tuple(each for each in self.outputs if isinstance(each, Statistic))

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The outputs of a gradient's program."""
        return tuple(each for each in self.outputs if isinstance(each, Block))

    @functools.cached_property
    def indexed(self) -> tuple[Indexed, ...]:
        """The statistics that read values at indices."""
        return tuple(each for each in self.outputs if isinstance(each, Indexed))

    @property
    def roots(self) -> tuple[Name, ...]:
        """The values that the outputs read, each once."""
        return tuple(dict.fromkeys(value for output in self.outputs for value in output.values))

    @property
    def places(self) -> list[tuple[slice, Statistic]]:
        """The slice of each statistic's results among all results, and the statistic."""
        counts = [len(statistic.result_dtypes) for statistic in self.statistics]
        starts = itertools.accumulate(counts, initial=0)
        return [
            (slice(start, start + count), statistic)
            for start, count, statistic in zip(starts, counts, self.statistics, strict=False)
        ]

    @property
    def is_plain(self) -> bool:
        """Whether the outputs read the logits themselves, and nothing else."""
        return not self.steps and set(self.roots) == {LOGIT}

    @functools.cached_property
    def operands(self) -> dict[Name, OperandKind]:
        """The operands that steps and statistics read as values, each with its kind."""
        uses = [use for step in self.steps for use in step.uses]
        return {use: use.kind for use in (*uses, *self.roots) if use.kind is not None}

    @property
    def result_count(self) -> int:
        """The number of results of all statistics."""
        return sum(len(each.result_dtypes) for each in self.statistics)

    @functools.cached_property
    def products(self) -> tuple[Name, ...]:
        """The operands that are the logits of other heads."""
        return tuple(name for name, kind in self.operands.items() if kind.is_product)

    @functools.cached_property
    def normalizers(self) -> tuple[LogSumExp, ...]:
        """The logsumexps, each once. Kernels store their parts of each tile, too."""
        every = (each for each in self.statistics if isinstance(each, LogSumExp))
        return tuple(dict.fromkeys(every))

    @functools.cached_property
    def reads_columns(self) -> bool:
        """Whether the program reads the logit's place in the vocabulary."""
        return COLUMN in self.roots or any(COLUMN in step.uses for step in self.steps)

    def with_gradient(self, results: Sequence[bool]) -> Program:
        """Return the program of the statistics that have a gradient, and of those they require.

        Args:
            results: whether each result has one.
        """
        wanted = [statistic for place, statistic in self.places if any(results[place])]
        required = [each for statistic in wanted for each in statistic.requirements]
        outputs = tuple(dict.fromkeys([*required, *wanted]))
        values = tuple(value for output in outputs for value in output.values)
        return Program(tuple(needed(list(self.steps), values)), outputs)

    def reached(self, results: Sequence[bool]) -> set[Name]:
        """Return the values that have a gradient if these of the statistics' results have one:
        those that a path without ``detach`` leads to."""
        reached: set[Name] = set()
        for place, statistic in self.places:
            if any(results[place]):
                reached.update(statistic.values)
        for step in reversed(self.steps):
            if step.name in reached and step.target != "detach":
                reached.update(step.uses)
        return reached


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Program:
    steps: list[Step] = []
    outputs: list[Output] = []
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
                outputs.append(Output.by_name[kind](args))
    except (AssertionError, AttributeError, KeyError, SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not a program over logits: {error}") from None
    if not outputs:
        raise ValueError(f"{text!r} is not a program over logits: it has no output")
    for output in outputs:
        for required in output.requirements if isinstance(output, Statistic) else ():
            if required not in outputs:
                raise ValueError(
                    f"{text!r} is not a program over logits: {output} needs {required}"
                )
    return Program(tuple(steps), tuple(outputs))


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
    """Return the ATen operator that a step names."""
    name, _, overload_name = target.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload_name or "default")


@functools.lru_cache(maxsize=1024)
def tensor_arguments(target: str) -> tuple[bool, ...]:
    """Return for each positional argument of a step's operator whether it must be a tensor."""
    schema = overload(target)._schema
    return tuple("Tensor" in str(argument.type) for argument in schema.arguments)


def step_target(operator: Any) -> str:
    """Return the name of an ATen operator in a step."""
    return str(operator).removeprefix("aten.").removesuffix(".default")


def names_in(values: Iterable[Any]) -> tuple[Name, ...]:
    """Return the names among values and numbers."""
    return tuple(value for value in values if isinstance(value, Name))


def needed(steps: list[Step], results: tuple[Name, ...]) -> list[Step]:
    """Return the steps that the results depend on."""
    wanted = set(results)
    kept = []
    for step in reversed(steps):
        if step.name in wanted:
            kept.append(step)
            wanted.update(step.uses)
    return kept[::-1]

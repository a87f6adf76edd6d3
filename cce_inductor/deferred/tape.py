"""Operations as a list of calls, which can be compared, cached, run again and added to a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from cce_inductor.deferred.lazy import spelled
from cce_inductor.patterns.language.examples import example
from cce_inductor.recipe.operation import Operation, project
from cce_inductor.recipe.stale import Guarded
from cce_inductor.rewriting.build import computing_examples
from cce_inductor.rewriting.returned import ARRIVED
from cce_inductor.torch_internals.symbols import Size

aten = torch.ops.aten


class Ref(NamedTuple):
    """A tensor on a tape: one that the calls read, or the result of a call."""

    kind: str
    number: int


@dataclasses.dataclass(frozen=True)
class Number:
    """A number on a tape. 1, 1.0 and True are equal as keys in Python, but not here."""

    value: float = dataclasses.field(compare=False)
    text: str


class Call(NamedTuple):
    """A call on a tape, with `Ref` in the place of tensors and `Number` in that of numbers.

    Calls of a `form.Form` also have `Size`, for numbers that depend on the number of rows.
    """

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class Tape:
    """Records operations as calls. Two tapes have equal calls if they compute the same function.

    Args:
        read: returns the tensor of a `Guarded`.

    Attributes:
        calls: the calls, each after those whose results it reads.
        tensors: the tensors that the calls read, each once.
    """

    def __init__(self, read: Callable[[Guarded], Tensor] = Guarded.read) -> None:
        self._read = read
        self.calls: list[Call] = []
        self.tensors: list[Tensor] = []
        self._refs: dict[int, Ref] = {}
        self._alive: list[Operation] = []  # so that no other object takes a recorded identity

    def record(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref:
        """Add a call, after the operations among its arguments."""
        named = tuple((name, self.argument(value)) for name, value in kwargs.items())
        self.calls.append(Call(function, self.argument(args), named))
        return Ref("call", len(self.calls) - 1)

    def argument(self, value: Any) -> Any:
        """Return an argument as it is on the tape. An operation is recorded."""
        if isinstance(value, (list, tuple)):
            return tuple(map(self.argument, value))
        if isinstance(value, Guarded):
            value = self._read(value)
        if isinstance(value, Tensor):
            if id(value) not in self._refs:
                self._refs[id(value)] = Ref("tensor", len(self.tensors))
                self.tensors.append(value)
            return self._refs[id(value)]
        if isinstance(value, Operation):
            if id(value) not in self._refs:
                self._record_history(value)
            return self._refs[id(value)]
        return Number(value, repr(value)) if isinstance(value, (int, float)) else value

    def ref_of(self, operation: Operation) -> Ref | None:
        """Return the result of an operation on the tape, None if it is not there."""
        return self._refs.get(id(operation))

    def _record_history(self, last: Operation) -> None:
        """Record an operation and those before it.

        An operation without gradient becomes a ``detach`` if the one with gradient is recorded too.
        """
        recorded = self._refs.keys() | {id(operation) for operation in last.history()}

        def is_detached(operation: Operation) -> bool:
            return id(operation.with_gradient()) in recorded

        for operation in last.history(is_detached):
            if id(operation) not in self._refs:
                self._alive.append(operation)
                self._refs[id(operation)] = (
                    self.record(aten.detach.default, (operation.with_gradient(),), {})
                    if is_detached(operation)
                    else self.record(operation.function, operation.args, operation.kwargs)
                )


def replay(
    calls: tuple[Call, ...],
    tensors: list[Tensor],
    functions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> dict[Ref, Any]:
    """Run the calls and return all results.

    Args:
        calls: the calls of a tape.
        tensors: the tensors that they read.
        functions: what is called in the place of some of the functions.
    """
    values = {Ref("tensor", number): tensor for number, tensor in enumerate(tensors)}
    for number, call in enumerate(calls):
        args, kwargs = _filled((call.args, dict(call.kwargs)), values)
        function = functions.get(call.function) or _function(call)
        values[Ref("call", number)] = function(*args, **kwargs)
    return values


def add_calls(
    graph: Graph, calls: tuple[Call, ...], tensors: Sequence[Node], sizes: Sequence[Node] = ()
) -> Node:
    """Add the calls to a graph, as Dynamo would have captured them.

    Args:
        graph: nodes are added at its insertion point.
        calls: the calls of a tape or a form.
        tensors: a node for each tensor of the tape, with an example value. The fake mode of the
            examples must be in force.
        sizes: a node for each number that a `Size` stands for.

    Returns:
        The node of the last call.
    """
    values: dict[Any, Node] = {Ref("tensor", number): node for number, node in enumerate(tensors)}
    values.update((Size(number), node) for number, node in enumerate(sizes))
    for number, call in enumerate(calls):
        args, kwargs = _filled((call.args, dict(call.kwargs)), values)
        target, node_args, node_kwargs = spelled(call.function, args, kwargs)
        op = "call_method" if isinstance(target, str) else "call_function"
        node = graph.create_node(op, target, node_args, node_kwargs)
        function = _function(call)
        examples = torch.fx.map_arg((args, kwargs), example)
        with computing_examples():
            node.meta["example_value"] = function(*examples[0], **examples[1])
        if function is project:
            node.meta[ARRIVED] = True
        values[Ref("call", number)] = node
    return node


def _function(call: Call) -> Callable[..., Any]:
    function = call.function
    return getattr(torch.Tensor, function) if isinstance(function, str) else function


def _filled(value: Any, values: Mapping[Any, Any]) -> Any:
    """Return an argument with the values of its references, sizes and numbers."""
    if isinstance(value, Ref | Size):
        return values[value]
    if isinstance(value, Number):
        return value.value
    if isinstance(value, dict):
        return {name: _filled(each, values) for name, each in value.items()}
    return tuple(_filled(each, values) for each in value) if isinstance(value, tuple) else value

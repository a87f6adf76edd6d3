"""Deferred logits as arguments of compiled functions.

A function that receives them is compiled for the tensors that they are computed from (their
operands: hidden state, weight, ...). The operations that compute them become part of its graph,
where the pass finds them like any others.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from cce_inductor.deferred.autograd import to_plain
from cce_inductor.deferred.connection import Connection
from cce_inductor.deferred.flatten import (
    PREFIX,
    depends_on_sizes,
    operation_for_graph,
    over_rows,
)
from cce_inductor.deferred.tape import Call, Tape, add_calls
from cce_inductor.deferred.tensor import DeferredLogits
from cce_inductor.patterns.language.examples import example
from cce_inductor.recipe.operation import Operation
from cce_inductor.recipe.stale import StaleLogitsError
from cce_inductor.rewriting.mutation import is_random, mutated_storages, storage_of
from cce_inductor.rewriting.returned import ARRIVED
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.inputs import (
    add_part,
    copy_graph,
    disable_autocast,
    module_like,
    use_symbols_of_part,
)

_log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
Compiler = Callable[[GraphModule, Sequence[Any]], Compiled]


def any_deferred(values: Sequence[Any]) -> bool:
    """Whether any of the values is a `DeferredLogits`."""
    return any(isinstance(value, DeferredLogits) for value in values)


def with_plain_arguments(compiled: Compiled) -> Compiled:
    """Return a function that computes deferred arguments before it calls `compiled`."""

    def call(*arguments: Any) -> Any:
        return compiled(*map(_plain, arguments))

    return call


def _plain(value: Any) -> Any:
    return to_plain(value) if isinstance(value, DeferredLogits) else value


def compile_for_any_backend(
    compiler: Compiler, module: GraphModule, example_inputs: Sequence[Any]
) -> Compiled:
    """Return ``compiler(module, example_inputs)``, which may be given deferred logits.

    Args:
        compiler: a backend of `torch.compile`, possibly one that `compile_for_operands` serves.
        module: what Dynamo captured.
        example_inputs: its inputs.
    """
    compiled = compiler(module, example_inputs)
    if not any_deferred(example_inputs) or isinstance(compiled, _TakesDeferred):
        return compiled
    if _shares_memory_of_deferred(module, example_inputs):
        return _TakesDeferred(module)

    def call(*arguments: Any) -> Any:
        try:
            plain = list(map(_plain, arguments))
        except StaleLogitsError:
            return module(*arguments)  # raises the error if it needs the values
        return compiled(*plain)

    return call


def _shares_memory_of_deferred(module: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether the graph modifies deferred logits in place or returns a tensor in their memory.

    Then it must be given the deferred tensor itself.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    deferred = {
        storage_of(node)
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, DeferredLogits)
    }
    returned = {storage_of(node) for node in module.graph.output_node().all_input_nodes}
    modified = {storage for node in module.graph.nodes for storage in mutated_storages(node)}
    return not deferred.isdisjoint(returned | modified)


class _TakesDeferred:
    """A function that takes deferred logits. `compile_for_any_backend` does not wrap it again."""

    def __init__(self, call: Compiled):
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


@dataclasses.dataclass(frozen=True)
class _Written:
    """How one deferred argument is computed.

    Attributes:
        position: its position among the arguments.
        calls: the calls that compute it.
        places: the positions in `_Operands.values` of the tensors that the calls read.
    """

    position: int
    calls: tuple[Call, ...]
    places: tuple[int, ...]


@dataclasses.dataclass
class _Operands:
    """Arguments of a function, with the operands of deferred ones in their place.

    Attributes:
        values: the arguments that are not deferred, in order, then the operands of those that are,
            each once.
        written: how each deferred argument is computed.
        count: the number of arguments that are not deferred.
    """

    values: list[Any]
    written: list[_Written]
    count: int

    @classmethod
    def of(cls, arguments: Sequence[Any], connected: Mapping[int, Operation]) -> _Operands:
        """Return the operands of some arguments.

        Args:
            arguments: the arguments.
            connected: in the place of the operation of some deferred arguments, by their identity.
        """
        deferred: list[tuple[int, Operation]] = []
        values: list[Any] = []
        for position, value in enumerate(arguments):
            operation = None
            if isinstance(value, DeferredLogits):
                operation = connected.get(id(value)) or operation_for_graph(value)
            if operation is None:
                values.append(_plain(value))
            else:
                deferred.append((position, operation))
        count = len(values)
        places = {id(value): place for place, value in enumerate(values)}
        written = []
        for position, operation in deferred:
            tape = Tape()
            tape.argument(operation)
            for tensor in tape.tensors:
                if id(tensor) not in places:
                    places[id(tensor)] = len(values)
                    values.append(tensor)
            read = tuple(places[id(tensor)] for tensor in tape.tensors)
            written.append(_Written(position, tuple(tape.calls), read))
        return cls(values, written, count)


def compile_for_operands(
    compiler: Compiler, module: GraphModule, example_inputs: Sequence[Any]
) -> Compiled:
    """Compile a graph that takes the operands of its deferred arguments.

    Args:
        compiler: compiles the graph with the operands as inputs.
        module: what Dynamo captured.
        example_inputs: its inputs, some of them deferred.

    Returns:
        A function of the arguments of `module`.
    """
    if _shares_memory_of_deferred(module, example_inputs):
        _log.info(
            "a graph runs without being compiled: it modifies deferred logits or returns views of "
            "them"
        )
        return _TakesDeferred(module)
    if any(map(is_random, module.graph.nodes)):
        _log.info(
            "a graph of deferred logits runs without being compiled: it draws random numbers, and "
            "a second call, which computes the gradient of the logits, would draw others"
        )
        return _TakesDeferred(module)
    try:
        changed = _changed_arguments(module)
        operands = _Operands.of(example_inputs, {})
        inner = _graph_of_operands(module, example_inputs, operands)
    except StaleLogitsError:
        return _TakesDeferred(module)  # raises the error if it needs the values
    except Exception:
        surprised("a graph with deferred logits among its arguments runs without being compiled")
        return _TakesDeferred(module)
    compiled = compiler(inner, operands.values)
    fakes = [example(node) for node in inner.graph.find_nodes(op="placeholder")]
    written = operands.written
    del operands, example_inputs  # the compiled function must not keep them alive

    def call(*arguments: Any) -> Any:
        try:
            connection, connected = _connect(arguments)
            given = _Operands.of(arguments, connected)
        except StaleLogitsError:
            return module(*arguments)  # raises the error if it needs the values
        new = range(given.count, len(given.values))
        if given.written != written or not all(
            _fits(given.values[place], fakes[place]) for place in new
        ):
            return module(*arguments)  # Dynamo has no guards for these, so it runs uncompiled
        if connection is None:
            return compiled(*given.values)
        before = [each.clone() if at in changed else each for at, each in enumerate(arguments)]
        return connection.watched(compiled(*given.values), module, before, {})

    return _TakesDeferred(call)


def _changed_arguments(module: GraphModule) -> set[int]:
    """Return the positions of the arguments that a graph changes in place."""
    changed = {storage for node in module.graph.nodes for storage in mutated_storages(node)}
    placeholders = enumerate(module.graph.find_nodes(op="placeholder"))
    return {
        at
        for at, node in placeholders
        if isinstance(example(node), Tensor) and storage_of(node) in changed
    }


def _connect(arguments: Sequence[Any]) -> tuple[Connection | None, dict[int, Operation]]:
    """Connect the deferred arguments that require a gradient with what is computed from them.

    Returns:
        The operations of such arguments in terms of aliases, by the identity of the argument.
    """
    trained = [
        each
        for each in {id(each): each for each in arguments}.values()
        if isinstance(each, DeferredLogits)
        and (operation := operation_for_graph(each)) is not None
        and operation.requires_grad
    ]
    if not trained:
        return None, {}
    connected = {}
    with torch.enable_grad():  # the function may enable gradients itself
        connection = Connection(trained)
        aliased = connection.operations_on_aliases(trained)
        for each, operation in zip(trained, aliased, strict=True):
            if depends_on_sizes(operation):
                by_rows = over_rows(type(each), operation)
                assert by_rows is not None, "operation_for_graph has returned one"
                operation = by_rows
            connected[id(each)] = operation
    return connection, connected


def _fits(tensor: Tensor, fake: Tensor) -> bool:
    """Whether code that was compiled for `fake` may be given `tensor`."""
    same = (tensor.dtype, tensor.device, tensor.requires_grad, tensor.dim()) == (
        (fake.dtype, fake.device, fake.requires_grad, fake.dim())
    )
    sizes = zip((*tensor.shape, *tensor.stride()), (*fake.shape, *fake.stride()), strict=same)
    return same and all(
        actual == expected for actual, expected in sizes if isinstance(expected, int)
    )


def _graph_of_operands(
    module: GraphModule, example_inputs: Sequence[Any], operands: _Operands
) -> GraphModule:
    """Return the graph with `operands.values` as its inputs."""
    graph, old = copy_graph(module)
    deferred = {each.position for each in operands.written}
    inputs = [node for position, node in enumerate(old) if position not in deferred]
    others = (value for at, value in enumerate(example_inputs) if at not in deferred)
    for value, passed in zip(others, operands.values[: operands.count], strict=True):
        if value is not passed:  # deferred logits whose values are needed
            use_symbols_of_part(passed, value, f"{PREFIX}0")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        for each in operands.written:
            logits = example_inputs[each.position]
            for number, place in enumerate(each.places):
                if place == len(inputs):
                    tensor = operands.values[place]
                    inputs.append(add_part(old[each.position], logits, f"{PREFIX}{number}", tensor))
        for each in operands.written:
            tensors = [inputs[place] for place in each.places]
            with example(old[each.position]).fake_mode:
                result = add_calls(graph, each.calls, tensors)
            old[each.position].replace_all_uses_with(result)
            graph.erase_node(old[each.position])
    for node in graph.nodes:
        if ARRIVED in node.meta:
            _keep_dtype(node)
    graph.lint()
    return module_like(module, graph)


def _keep_dtype(linear: Node) -> None:
    """Compute a projection in the dtype of its logits, whatever autocast the graph runs under."""
    graph, value = linear.graph, example(linear)
    device, dtype = value.device.type, value.dtype
    operands = [node for node in linear.args if isinstance(node, Node)]
    if not torch.is_autocast_enabled(device) and all(example(o).dtype == dtype for o in operands):
        return
    disable_autocast(linear, device)
    with graph.inserting_before(linear):
        for operand in operands:
            if example(operand).dtype != dtype:
                cast = graph.call_method("to", (operand, dtype))
                cast.meta["example_value"] = example(operand).to(dtype)
                linear.replace_input_with(operand, cast)

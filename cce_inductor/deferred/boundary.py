"""Where compiled functions begin and end: deferred logits go in and come out.

A graph returns the hidden state in the place of logits (`returned`); the function around it makes
`DeferredLogits` of that. One that takes them is compiled for what they are computed from, with the
operations that do so in its graph, where the pass finds them like any others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import AttrSource
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node

from cce_inductor.deferred import eager
from cce_inductor.deferred.tensor import DeferredLogits, defer, with_strides
from cce_inductor.deferred.type_tables import join_type_tables
from cce_inductor.patterns.language.examples import example
from cce_inductor.recipe.operation import Operation, strided
from cce_inductor.recipe.sharded import is_freed_after_forward, is_sharded
from cce_inductor.recipe.stale import StaleLogitsError
from cce_inductor.reporting import reasons
from cce_inductor.rewriting.mutation import mutated_storages, storage_of
from cce_inductor.rewriting.returned import ARRIVED, Deferral, DeferredOutput
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.patches import wrap_backends
from cce_inductor.torch_internals.versions import saves_compiled

_log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
Compiler = Callable[[GraphModule, Sequence[Any]], Compiled]


class _Compilations(threading.local):
    """Those that are under way in this thread, innermost last."""

    def __init__(self) -> None:
        self.open: list[tuple[GraphModule, Deferral]] = []


_compilations = _Compilations()


def deferral_for(module: object) -> Deferral | None:
    """What takes the logits that a graph need not return, None if its caller expects them all."""
    compiled, deferral = _compilations.open[-1] if _compilations.open else (None, None)
    return deferral if compiled is module else None


def compile_with_deferral(
    compiler: Compiler, module: GraphModule, example_inputs: Sequence[Any]
) -> Compiled:
    """``compiler(module, example_inputs)`` for what Dynamo captured, with deferred logits as
    arguments and results.

    Args:
        compiler: runs the pass with `deferral_for` the module it is given.
        module: what Dynamo captured.
        example_inputs: its inputs.
    """
    if _some_deferred(example_inputs):
        join_type_tables()
        return _compiled_for_tensors(compiler, module, example_inputs)
    compiled = _compiled_with_outputs(compiler, module, example_inputs)
    return compiled if _is_whole(module) else _with_plain_arguments(compiled)


def _compiled_with_outputs(
    compiler: Compiler, module: GraphModule, example_inputs: Sequence[Any]
) -> Compiled:
    deferral = Deferral(arguments=example_inputs)
    if saves_compiled():
        deferral.why_not = reasons.FUNCTION_IS_SAVED
    _compilations.open.append((module, deferral))
    try:
        compiled = compiler(module, example_inputs)
    finally:
        _compilations.open.pop()
    deferral.arguments = ()  # what is compiled outlives them
    if deferral.outputs is None:
        return compiled
    join_type_tables()
    _tell_dynamo()
    return _deferring(compiled, deferral.outputs, is_sharded(example_inputs))


@functools.cache
def _tell_dynamo() -> None:
    """From the first deferred logits on, what any backend compiles can be given some."""
    wrap_backends(_compiled_by_any)


def _compiled_by_any(
    compiler: Compiler, module: GraphModule, example_inputs: Sequence[Any]
) -> Compiled:
    compiled = compiler(module, example_inputs)
    if not _some_deferred(example_inputs) or isinstance(compiled, _TakesDeferred):
        return compiled
    if _shares_deferred(module, example_inputs):
        return _TakesDeferred(module)

    def call(*arguments: Any) -> Any:
        try:
            plain = list(map(_plain, arguments))
        except StaleLogitsError:
            return module(*arguments)  # which raises that if it needs the numbers
        return compiled(*plain)

    return call


def _some_deferred(values: Sequence[Any]) -> bool:
    return any(isinstance(value, DeferredLogits) for value in values)


def _shares_deferred(module: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether the graph changes deferred logits in place, or returns what shares their memory: it
    must be them, and not something else in their place."""
    placeholders = module.graph.find_nodes(op="placeholder")
    deferred = {
        storage_of(node)
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, DeferredLogits)
    }
    returned = {storage_of(node) for node in module.graph.output_node().all_input_nodes}
    changed = {storage for node in module.graph.nodes for storage in mutated_storages(node)}
    return not deferred.isdisjoint(returned | changed)


class _TakesDeferred:
    """A function that takes deferred logits as they are; `_compiled_by_any` leaves it alone."""

    def __init__(self, call: Compiled):
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def _is_whole(module: GraphModule) -> bool:
    """Whether it is all that Dynamo captured. Parts, as DistributedDataParallel makes them, take
    each other's results, which Dynamo's guards do not see."""
    context = torch._guards.TracingContext.try_get()
    return getattr(context, "ddp_optimizer_ctx", None) is None and hasattr(
        module, "compile_subgraph_reason"
    )


def _deferring(
    compiled: Compiled, outputs: list[int | DeferredOutput], may_be_freed: bool
) -> Compiled:
    def call(*arguments: Any) -> tuple[Any, ...]:
        results = compiled(*arguments)
        # No guard of Dynamo's sees the options of FSDP, which may change.
        stored = may_be_freed and is_freed_after_forward(arguments)
        return tuple(
            results[output]
            if isinstance(output, int)
            else _made(output, arguments, results, stored)
            for output in outputs
        )

    return call


def _made(
    output: DeferredOutput, arguments: Sequence[Any], results: Sequence[Any], stored: bool
) -> Tensor:
    formula = output.formula
    if any(isinstance(value, FakeTensor) for value in results):
        return output.make(arguments, results)  # a compiler runs it, for the shapes
    if stored:
        logits = output.make(arguments, results)
        return logits if formula.strides is None else strided(logits, formula.strides)
    logits = output.make(arguments, results, product=defer)
    return logits if formula.strides is None else with_strides(logits, formula.strides)


def _with_plain_arguments(compiled: Compiled) -> Compiled:
    def call(*arguments: Any) -> Any:
        return compiled(*map(_plain, arguments))

    return call


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, DeferredLogits) else value


@dataclasses.dataclass
class _Unpacked:
    """Arguments of a function as those of a graph that takes no deferred logits.

    Attributes:
        values: the other arguments in order, then each tensor that deferred ones are computed from
            and that is not among them.
        written: for each deferred argument its position, the calls that compute it, and the
            positions in `values` of the tensors that they read.
        operations: how the deferred arguments are computed.
        count: of the other arguments.
    """

    values: list[Any]
    written: list[tuple[int, tuple[eager.Call, ...], tuple[int, ...]]]
    operations: list[Operation]
    count: int

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> _Unpacked:
        waiting: list[tuple[int, Operation]] = []
        operations: list[Operation] = []
        values: list[Any] = []
        for position, value in enumerate(arguments):
            operation = value.as_argument() if isinstance(value, DeferredLogits) else None
            if operation is None:
                values.append(_plain(value))
            else:
                waiting.append((position, operation))
                operations.append(value._operation)
        count = len(values)
        places = {id(value): place for place, value in enumerate(values)}
        written = []
        for position, operation in waiting:
            writing = eager.Writing()
            writing.argument(operation)
            for tensor in writing.tensors:
                if id(tensor) not in places:
                    places[id(tensor)] = len(values)
                    values.append(tensor)
            read = tuple(places[id(tensor)] for tensor in writing.tensors)
            written.append((position, tuple(writing.calls), read))
        return cls(values, written, operations, count)


def _compiled_for_tensors(
    compiler: Compiler, module: GraphModule, example_inputs: Sequence[Any]
) -> Compiled:
    """Compiles a graph for what its deferred arguments are computed from."""
    if _shares_deferred(module, example_inputs):
        _log.info("a graph that changes deferred logits, or returns views of them, is not compiled")
        return _TakesDeferred(module)
    try:
        unpacked = _Unpacked.of(example_inputs)
        inner = _accepting(module, example_inputs, unpacked)
    except StaleLogitsError:
        return _TakesDeferred(module)  # which raises that if it needs the numbers
    except Exception:
        surprised("a graph with deferred logits among its arguments runs without being compiled")
        return _TakesDeferred(module)
    compiled = _compiled_with_outputs(compiler, inner, unpacked.values)
    fakes = [example(node) for node in inner.graph.find_nodes(op="placeholder")]
    written = unpacked.written
    placeholders = module.graph.find_nodes(op="placeholder")
    skips = [_reaches_results(placeholders[position]) for position, *_ in written]
    del unpacked, example_inputs, placeholders  # what is compiled outlives them

    def call(*arguments: Any) -> Any:
        try:
            given = _Unpacked.of(arguments)
        except StaleLogitsError:
            return module(*arguments)  # which raises that if it needs the numbers
        new = range(given.count, len(given.values))
        if given.written != written or not all(
            _fits(given.values[place], fakes[place]) for place in new
        ):
            return module(*arguments)  # where nothing depends on how they are computed
        results = compiled(*given.values)
        eager.skip(list(itertools.compress(given.operations, skips)), results)
        return results

    return _TakesDeferred(call)


def _reaches_results(node: Node) -> bool:
    """Whether a result of the graph has a gradient that passes to `node`."""
    reached, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            if user not in reached and _has_gradient(user):
                reached.add(user)
                pending.append(user)
    return False


def _has_gradient(node: Node) -> bool:
    """Whether it is a tensor with a gradient, or something else of which nobody knows."""
    value = example(node)
    return not isinstance(value, Tensor) or value.requires_grad


def _fits(tensor: Tensor, fake: Tensor) -> bool:
    """Whether code that was compiled for `fake` may be given `tensor`."""
    same = (tensor.dtype, tensor.device, tensor.requires_grad, tensor.dim()) == (
        (fake.dtype, fake.device, fake.requires_grad, fake.dim())
    )
    numbers = zip((*tensor.shape, *tensor.stride()), (*fake.shape, *fake.stride()), strict=same)
    return same and all(
        actual == expected for actual, expected in numbers if isinstance(expected, int)
    )


def _accepting(
    module: GraphModule, example_inputs: Sequence[Any], unpacked: _Unpacked
) -> GraphModule:
    """The graph with the arguments of `unpacked`."""
    graph = Graph()
    copies: dict[Node, Node] = {}  # Dynamo goes on using the placeholders of its own graph
    graph.output(graph.graph_copy(module.graph, copies))
    old = [copies[node] for node in module.graph.find_nodes(op="placeholder")]
    for node, copied in copies.items():
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    context = torch._guards.TracingContext.get()
    deferred = {position for position, *_ in unpacked.written}
    arguments = [node for position, node in enumerate(old) if position not in deferred]
    plain = (value for at, value in enumerate(example_inputs) if at not in deferred)
    for value, passed in zip(plain, unpacked.values[: unpacked.count], strict=True):
        if value is not passed:
            context.tensor_to_context[passed] = _symbols(context, value)["_tensor0"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        for position, _, places in unpacked.written:
            fake_mode = example(old[position]).fake_mode
            symbols = _symbols(context, example_inputs[position])
            for number, place in enumerate(places):
                if place < len(arguments):
                    continue
                tensor, name = unpacked.values[place], f"_tensor{number}"
                node = graph.placeholder(f"{old[position].name}{name}")
                node.meta["example_value"] = fake_mode.from_tensor(tensor)
                node._dynamo_source = AttrSource(old[position]._dynamo_source, name)
                context.tensor_to_context[tensor] = symbols[name]
                arguments.append(node)
        for position, calls, places in unpacked.written:
            tensors = [arguments[place] for place in places]
            with example(old[position]).fake_mode:
                logits = eager.add_calls(graph, calls, tensors)
            old[position].replace_all_uses_with(logits)
            graph.erase_node(old[position])
    for node in graph.nodes:
        if ARRIVED in node.meta:
            _compute_in_its_dtype(node)
    graph.lint()
    inner = GraphModule(module, graph)
    inner.meta.update(module.meta)
    for name in ("compile_subgraph_reason", "_param_name_to_source"):
        if hasattr(module, name):
            setattr(inner, name, getattr(module, name))
    return inner


def _compute_in_its_dtype(linear: Node) -> None:
    """Has a projection computed as it would have been where its logits come from: its graph may
    be under another autocast."""
    graph, value = linear.graph, example(linear)
    device, dtype = value.device.type, value.dtype
    operands = [node for node in linear.args if isinstance(node, Node)]
    if not torch.is_autocast_enabled(device) and all(example(o).dtype == dtype for o in operands):
        return
    with graph.inserting_before(linear):
        disabled = graph.call_function(_enter_autocast, (device, None, False, None))
        for operand in operands:
            if example(operand).dtype != dtype:
                cast = graph.call_method("to", (operand, dtype))
                cast.meta["example_value"] = example(operand).to(dtype)
                linear.replace_input_with(operand, cast)
    with graph.inserting_after(linear):
        graph.call_function(_exit_autocast, (disabled,))


def _symbols(context: Any, logits: DeferredLogits) -> dict[str, Any]:
    """The symbols of dynamic sizes that Dynamo chose for what deferred logits are computed from, by
    the names of ``__tensor_flatten__``."""
    found: dict[str, Any] = context.tensor_to_context[logits].inner_contexts
    return found

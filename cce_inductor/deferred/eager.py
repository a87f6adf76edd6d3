"""Reductions of deferred logits: a graph of how they come about, and the pass run on it.

What `patterns` knows about a compiled loss is all there is to know about one that is taken in eager
code. The rewritten graph of a reduction is kept for the next one that looks the same.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from cce_inductor.deferred.lazy import spelled
from cce_inductor.options import Options, options_in_force
from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.tables import loss, reduction
from cce_inductor.recipe.operation import Operation, product
from cce_inductor.recipe.stale import Guarded
from cce_inductor.rewriting.build import computing_examples
from cce_inductor.rewriting.mutation import storage_of
from cce_inductor.rewriting.returned import ARRIVED, Deferral, DeferredOutput
from cce_inductor.rewriting.rewrite import reduce_all, rewrite
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.capture import ThreadFakeTensorMode

aten = torch.ops.aten


class Ref(NamedTuple):
    """A value in a written operation: a tensor that it reads, or the result of a call."""

    kind: str
    number: int


@dataclasses.dataclass(frozen=True)
class Number:
    """A number in a written operation: 1, 1.0 and True are equal, but not the same."""

    value: float = dataclasses.field(compare=False)
    text: str


class Call(NamedTuple):
    """A call in a written operation, with `Ref` for tensors."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class Writing:
    """Operations as calls in order, which compare equal if they do the same.

    Args:
        read: what reads a guarded tensor.

    Attributes:
        calls: each after those that it reads.
        tensors: what they read, each once.
    """

    def __init__(self, read: Callable[[Guarded], Tensor] = Guarded.read) -> None:
        self._read = read
        self.calls: list[Call] = []
        self.tensors: list[Tensor] = []
        self._refs: dict[int, Ref] = {}
        self._operations: list[Operation] = []  # their identities stay theirs

    def argument(self, value: Any) -> Any:
        """An argument with `Ref` in the place of tensors."""
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
            if id(value) in self._refs:
                return self._refs[id(value)]
            met = self._refs.keys() | {id(operation) for operation in value.history()}

            def is_detached(operation: Operation) -> bool:
                return id(operation.with_gradient()) in met

            for operation in value.history(is_detached):
                if id(operation) not in self._refs:
                    self._operations.append(operation)
                    self._refs[id(operation)] = (
                        self.call(aten.detach.default, (operation.with_gradient(),), {})
                        if is_detached(operation)
                        else self.call(operation.function, operation.args, operation.kwargs)
                    )
            return self._refs[id(value)]
        return Number(value, repr(value)) if isinstance(value, (int, float)) else value

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref:
        named = tuple((name, self.argument(value)) for name, value in kwargs.items())
        self.calls.append(Call(function, self.argument(args), named))
        return Ref("call", len(self.calls) - 1)


def replay(calls: tuple[Call, ...], tensors: list[Tensor]) -> Any:
    """The result of the last call."""
    values = {Ref("tensor", number): tensor for number, tensor in enumerate(tensors)}
    for number, call in enumerate(calls):
        args, kwargs = _filled((call.args, dict(call.kwargs)), values)
        values[Ref("call", number)] = _function(call)(*args, **kwargs)
    return values[Ref("call", len(calls) - 1)]


def spelling(func: Any) -> Any | None:
    """What Dynamo calls a function that reduces rows, None if it is not known to."""
    name = getattr(func, "__name__", "")
    method = getattr(torch.Tensor, name, None) is func
    target = name if method else func
    known = target in loss or (target in reduction and func is not torch.Tensor.size)
    return target if known else None


def reduce(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``target(*args, **kwargs)``, with `Operation` for deferred logits.

    Returns:
        Its result, or NotImplemented if that needs the numbers.
    """
    leaves = tree_leaves((args, kwargs))
    operations = [each for each in leaves if isinstance(each, Operation)]
    others = [each for each in leaves if isinstance(each, Tensor)]
    if not all(each.is_floating_point() or each.dtype in _INDICES for each in others):
        return NotImplemented
    writing = Writing()
    writing.call(target, args, kwargs)
    calls = tuple(writing.calls)
    try:
        hash(calls)
    except TypeError:  # an argument that cannot be hashed is no number or dtype
        return NotImplemented
    fused = _reduction(calls, _Situation.now(writing))
    if fused is None:
        return NotImplemented
    result = fused(*writing.tensors)
    skip(operations, result)
    return result


_INDICES = (torch.int64, torch.bool)
"""What every function takes as indices or masks; of others each has its own opinion."""


def skip(operations: list[Operation], results: Any) -> None:
    """Remembers that the gradients of results, if they have any, do not pass by operations."""
    if any(each.requires_grad for each in tree_leaves(results) if isinstance(each, Tensor)):
        for operation in operations:
            for each in operation.history():
                each.is_skipped = True


def few_rows(operation: Operation) -> Tensor | None:
    """The numbers of logits that are a part of those that were deferred, without computing the
    others; None if the pass does not know how."""
    return of_rows(operation, product)


def of_rows(operation: Operation, product: Callable[..., Tensor]) -> Tensor | None:
    """The result of `operation` from the `product` of the rows of the hidden state that it is made
    of and the weight; None if the pass does not know how."""
    writing = Writing()
    writing.argument(operation)
    found = _rows(tuple(writing.calls), _Situation.now(writing))
    if found is None:
        return None
    module, output = found
    return output.make(writing.tensors, module(*writing.tensors), product)


class Description(NamedTuple):
    """All of a tensor but its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def _describe(tensor: Tensor) -> Description:
    return Description(
        tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
    )


class _Situation(NamedTuple):
    """What a graph depends on besides its calls."""

    tensors: tuple[Description, ...]
    grad_enabled: bool
    default_dtype: torch.dtype
    autocast_device: str
    autocast_dtype: torch.dtype | None
    workspace_bytes: int

    @classmethod
    def now(cls, writing: Writing) -> _Situation:
        device = writing.tensors[0].device.type
        return cls(
            tensors=tuple(map(_describe, writing.tensors)),
            grad_enabled=torch.is_grad_enabled(),
            default_dtype=torch.get_default_dtype(),
            autocast_device=device,
            autocast_dtype=(
                torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            ),
            workspace_bytes=options_in_force().workspace_bytes,
        )

    @property
    def options(self) -> Options:
        return Options(min_logits_bytes=0, workspace_bytes=self.workspace_bytes, on_error="raise")


@functools.lru_cache(maxsize=256)
def _reduction(calls: tuple[Call, ...], situation: _Situation) -> Callable[..., Any] | None:
    """The last call, from the tensors, without the numbers of the others; None if it needs them."""
    try:
        captured = _captured(calls, situation.tensors)
        if captured is None:
            return None
        module, kind = captured
        if _is_view(module.graph) or not reduce_all(module.graph, situation.options):
            return None
    except Exception:
        surprised("a reduction of deferred logits computes them all")
        return None
    run = _forgetting(module)
    return lambda *tensors: kind(run(*tensors))


@functools.lru_cache(maxsize=256)
def _rows(
    calls: tuple[Call, ...], situation: _Situation
) -> tuple[Callable[..., Any], DeferredOutput] | None:
    """What the last call's logits are made of, from the tensors; None if the pass cannot say."""
    deferral = Deferral()
    try:
        captured = _captured(calls, situation.tensors)
        if captured is None:
            return None
        module, _ = captured
        rewrite(module, situation.options, deferral=deferral)
    except Exception:
        surprised("rows of deferred logits are computed with the others")
        return None
    if deferral.outputs is None or isinstance(deferral.outputs[0], int):
        return None
    return _forgetting(module), deferral.outputs[0]


def _is_view(graph: Graph) -> bool:
    """Whether the result shares the memory of logits, so that changes of one are seen in the
    other."""
    output = graph.output_node()
    returned = {storage_of(node) for node in output.all_input_nodes}
    ends = {output, *output.all_input_nodes}
    return any(storage_of(node) in returned for node in graph.nodes if node not in ends)


def _forgetting(module: GraphModule) -> Callable[..., Any]:
    """What the graph does; examples are of no use any more."""
    for node in module.graph.nodes:
        node.meta.clear()
    module.recompile()
    return module.forward


PYTORCH_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
"""What PyTorch's functions raise for arguments that do not fit, and for results that depend on
numbers."""


def _captured(
    calls: tuple[Call, ...], tensors: tuple[Description, ...]
) -> tuple[GraphModule, Callable[[Any], Any]] | None:
    """`_graph`, None if the calls raise an error without the numbers: with them they raise their
    own, or none."""
    try:
        return _graph(calls, tensors)
    except PYTORCH_ERRORS:
        return None


def _graph(
    calls: tuple[Call, ...], tensors: tuple[Description, ...]
) -> tuple[GraphModule, Callable[[Any], Any]]:
    """A graph that ends with the last call, and what makes its result of the graph's."""
    graph = Graph()
    nodes = []
    with ThreadFakeTensorMode():
        for number, tensor in enumerate(tensors):
            nodes.append(graph.placeholder(f"tensor_{number}"))
            nodes[-1].meta["example_value"] = torch.empty_strided(
                tensor.shape,
                tensor.strides,
                dtype=tensor.dtype,
                device=tensor.device,
                requires_grad=tensor.requires_grad,
            )
        result = add_calls(graph, calls, nodes)
    value = example(result)
    if isinstance(value, Tensor):
        graph.output((result,))
        return GraphModule({}, graph), operator.itemgetter(0)
    parts = []
    for number, part in enumerate(value):
        node = graph.call_function(operator.getitem, (result, number))
        node.meta["example_value"] = part
        parts.append(node)
    graph.output(tuple(parts))
    return GraphModule({}, graph), type(value)


def add_calls(graph: Graph, calls: tuple[Call, ...], tensors: list[Node]) -> Node:
    """Adds calls to a graph as Dynamo would have captured them; returns the last.

    Args:
        graph: to which they are added, where it is being inserted.
        calls: with `Ref` to `tensors` and to each other.
        tensors: nodes with examples, in whose mode this is called.
    """
    values = {Ref("tensor", number): node for number, node in enumerate(tensors)}
    for number, call in enumerate(calls):
        args, kwargs = _filled((call.args, dict(call.kwargs)), values)
        target, node_args, node_kwargs = spelled(call.function, args, kwargs)
        op = "call_method" if isinstance(target, str) else "call_function"
        node = graph.create_node(op, target, node_args, node_kwargs)
        function = _function(call)
        examples = torch.fx.map_arg((args, kwargs), example)
        with computing_examples():
            node.meta["example_value"] = function(*examples[0], **examples[1])
        if function is product:
            node.meta[ARRIVED] = True
        values[Ref("call", number)] = node
    return node


def _function(call: Call) -> Callable[..., Any]:
    function = call.function
    return getattr(torch.Tensor, function) if isinstance(function, str) else function


def _filled(value: Any, values: Mapping[Ref, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value]
    if isinstance(value, Number):
        return value.value
    if isinstance(value, dict):
        return {name: _filled(each, values) for name, each in value.items()}
    return tuple(_filled(each, values) for each in value) if isinstance(value, tuple) else value

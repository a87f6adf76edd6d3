"""Reductions of deferred logits in eager code: the pass, run on a graph of one reduction.

The graph contains the operations that the logits are computed with, and then the reduction, as if
Dynamo had captured them. So all rules of `patterns` apply in eager code too. The rewritten graph is
cached for reductions of the same form.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from cce_inductor.deferred.tape import Call, Tape, add_calls
from cce_inductor.options import Options, options_in_force
from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.tables import loss, reduction
from cce_inductor.recipe.operation import Operation, leaves_of, project
from cce_inductor.rewriting.mutation import storage_of
from cce_inductor.rewriting.returned import Deferral, DeferredOutput
from cce_inductor.rewriting.rewrite import rewrite, rewrite_reductions
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.capture import ThreadFakeTensorMode


def spelling(func: Any) -> Any | None:
    """Return Dynamo's call target for a function that reduces rows, None if no rule knows it."""
    name = getattr(func, "__name__", "")
    method = getattr(torch.Tensor, name, None) is func
    target = name if method else func
    known = target in loss or (target in reduction and func is not torch.Tensor.size)
    return target if known else None


def compute_reduction(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``target(*args, **kwargs)``, computed in blocks.

    Args:
        target: a result of `spelling`.
        args, kwargs: the arguments, with `Operation` in the place of deferred logits.

    Returns:
        NotImplemented if the pass cannot rewrite it.
    """
    others = [each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor)]
    if not all(each.is_floating_point() or each.dtype in _INDEX_DTYPES for each in others):
        return NotImplemented
    tape = Tape()
    tape.record(target, args, kwargs)
    calls = tuple(tape.calls)
    try:
        hash(calls)
    except TypeError:  # an argument is of a type that no rule knows
        return NotImplemented
    fused = _reduction(calls, _Situation.now(tape))
    if fused is None:
        return NotImplemented
    return fused(*tape.tensors)


_INDEX_DTYPES = (torch.int64, torch.bool)
"""Dtypes that every function accepts as indices or masks. Functions differ in the others."""


def few_rows(operation: Operation) -> Tensor | None:
    """Return the values of some rows of logits without computing the other rows.

    Returns:
        None if the pass cannot trace the rows back to rows of the hidden state.
    """
    return from_rows(operation, project)


def from_rows(operation: Operation, project: Callable[..., Tensor]) -> Tensor | None:
    """Return an operation's result as a function of the rows of the hidden state that it needs.

    Args:
        operation: the operation.
        project: multiplies those rows by the weight, like `recipe.operation.project`.

    Returns:
        None if the pass cannot trace the result back to rows of the hidden state.
    """
    tape = Tape()
    tape.argument(operation)
    rows = _rows(tuple(tape.calls), _Situation.now(tape))
    if rows is None:
        return None
    module, output = rows
    return output.make(tape.tensors, module(*tape.tensors), project)


class _Description(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Description:
        return cls(
            tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
        )

    def example(self) -> Tensor:
        return torch.empty_strided(
            self.shape,
            self.strides,
            dtype=self.dtype,
            device=self.device,
            requires_grad=self.requires_grad,
        )


class _Situation(NamedTuple):
    """All that a rewritten graph depends on besides the calls on the tape."""

    tensors: tuple[_Description, ...]
    grad_enabled: bool
    default_dtype: torch.dtype
    autocast_device: str
    autocast_dtype: torch.dtype | None
    workspace_bytes: int

    @classmethod
    def now(cls, tape: Tape) -> _Situation:
        device = tape.tensors[0].device.type
        return cls(
            tensors=tuple(map(_Description.of, tape.tensors)),
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
    """Return a function from the tape's tensors to the result of its last call.

    Returns:
        None if the pass cannot rewrite all of its reductions.
    """
    try:
        captured = _captured(calls, situation.tensors)
        if captured is None:
            return None
        module, kind = captured
        if _returns_view(module.graph) or not rewrite_reductions(module.graph, situation.options):
            return None
    except Exception:
        surprised("a reduction of deferred logits computes all of the logits")
        return None
    run = _without_examples(module)
    return lambda *tensors: kind(run(*tensors))


@functools.lru_cache(maxsize=256)
def _rows(
    calls: tuple[Call, ...], situation: _Situation
) -> tuple[Callable[..., Any], DeferredOutput] | None:
    """Return how to compute the last call's logits, as a graph and what it returns.

    Returns:
        None if the pass cannot defer them.
    """
    deferral = Deferral()
    try:
        captured = _captured(calls, situation.tensors)
        if captured is None:
            return None
        module, _ = captured
        rewrite(module, situation.options, deferral=deferral)
    except Exception:
        surprised("some rows of deferred logits are computed together with all others")
        return None
    if deferral.outputs is None or isinstance(deferral.outputs[0], int):
        return None
    return _without_examples(module), deferral.outputs[0]


def _returns_view(graph: Graph) -> bool:
    """Whether the result shares the memory of logits, so that a change of either changes both."""
    output = graph.output_node()
    returned = {storage_of(node) for node in output.all_input_nodes}
    ends = {output, *output.all_input_nodes}
    return any(storage_of(node) in returned for node in graph.nodes if node not in ends)


def _without_examples(module: GraphModule) -> Callable[..., Any]:
    """Return the function of a graph, after removing what only the pass needs."""
    for node in module.graph.nodes:
        node.meta.clear()
    module.recompile()
    return module.forward


PYTORCH_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
"""Raised by functions of PyTorch for wrong arguments, and for results that depend on values."""


def _captured(
    calls: tuple[Call, ...], tensors: tuple[_Description, ...]
) -> tuple[GraphModule, Callable[[Any], Any]] | None:
    """Return the calls as a graph, and the type of its result.

    Returns:
        None if a call raises an error on example values. On real values it raises its own error,
        or none.
    """
    try:
        return _graph(calls, tensors)
    except PYTORCH_ERRORS:
        return None


def _graph(
    calls: tuple[Call, ...], tensors: tuple[_Description, ...]
) -> tuple[GraphModule, Callable[[Any], Any]]:
    graph = Graph()
    nodes = []
    with ThreadFakeTensorMode():
        for number, tensor in enumerate(tensors):
            nodes.append(graph.placeholder(f"tensor_{number}"))
            nodes[-1].meta["example_value"] = tensor.example()
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

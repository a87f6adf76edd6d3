"""Puts one fused operator in the place of each loss that the walk can explain.

The graph is changed only after every new node has been built, so that an error leaves it as it was.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from . import ops as _ops  # noqa: F401  (registers torch.ops.cce_inductor)
from .options import DEFAULT_WORKSPACE_BYTES, Options
from .patterns import HERE, CrossEntropy, Logits, example
from .report import LossReport, format_bytes, logits_bytes, loss_report
from .walk import FoundLoss, Walk, walk

_log = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda")
_DONE = "cce_inductor"  # key in GraphModule.meta of a graph that the pass has seen


def rewrite(module: GraphModule, options: Options) -> list[LossReport]:
    """Rewrites the losses in `module` and in the subgraphs it calls, in place.

    Does nothing to a graph that it has seen before. An unexpected exception leaves that graph as
    it was and becomes the reason of its losses, or is raised with ``options.on_error="raise"``.

    Returns:
        One report for each loss found.
    """
    reports: list[LossReport] = []
    for graph_module in _with_subgraphs(module):
        if graph_module.meta.get(_DONE):
            continue
        graph_module.meta[_DONE] = True
        reports += _rewrite_graph(graph_module, options)
    return reports


def _with_subgraphs(module: GraphModule) -> list[GraphModule]:
    """`module` and every graph that its nodes refer to, innermost first."""
    inner = [
        child
        for node in module.graph.find_nodes(op="get_attr")
        if isinstance(child := getattr(module, str(node.target), None), GraphModule)
    ]
    nested = [graph for child in dict.fromkeys(inner) for graph in _with_subgraphs(child)]
    return [*dict.fromkeys(nested), module]


def _rewrite_graph(module: GraphModule, options: Options) -> list[LossReport]:
    found = Walk()
    try:
        found = walk(module.graph)
        reasons = [_reason_to_keep(each, options) for each in found.losses]
        chosen = [
            each for each, reason in zip(found.losses, reasons, strict=True) if reason is None
        ]
        if chosen:
            _replace(module.graph, chosen, found, options)
            module.graph.lint()
            module.recompile()
    except Exception as error:
        if options.on_error == "raise":
            raise
        _warn_once(type(error).__name__, str(error))
        reason = f"the pass failed with {type(error).__name__}: {error}"
        reasons = [each.reason or reason for each in found.losses]
    return [loss_report(each, why) for each, why in zip(found.losses, reasons, strict=True)]


@functools.cache
def _warn_once(kind: str, message: str) -> None:
    """Logs the exception being handled, the first time that one like it is."""
    _log.warning(
        "cce_inductor left a graph as it was because of an unexpected error. The model compiles "
        "and runs as without cce_inductor; please report this with the traceback.",
        exc_info=True,
    )


def _reason_to_keep(found: FoundLoss, options: Options) -> str | None:
    if found.reason is not None:
        return found.reason
    assert found.logits is not None
    device = example(found.logits.projection).device.type
    if device not in DEVICES:
        return f"there is no kernel for the device {device!r}"
    size = logits_bytes(found)
    if size < options.min_logits_bytes:
        return (
            f"the logits are small ({format_bytes(size)}, and "
            f"min_logits_bytes is {format_bytes(options.min_logits_bytes)})"
        )
    return None


def _replace(graph: Graph, chosen: list[FoundLoss], found: Walk, options: Options) -> None:
    builder = _Builder(graph)
    try:
        new = [(each.node, builder.loss(each, options)) for each in chosen]
    except Exception:
        builder.undo()
        raise
    for old, node in new:
        old.replace_all_uses_with(node)
        graph.erase_node(old)
    projections = {each.logits.projection for each in chosen if each.logits is not None}
    for node, logits in reversed(found.logits.items()):
        if logits.projection in projections and not node.users:
            graph.erase_node(node)
            for absorbed in logits.absorbed:
                if not absorbed.users and absorbed in graph.nodes:
                    graph.erase_node(absorbed)


def _fake_mode(*values: Any) -> contextlib.AbstractContextManager[Any]:
    """The mode of the example values, in which new tensors are examples too."""
    for value in torch.utils._pytree.tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return contextlib.nullcontext()


class _Builder:
    """Inserts nodes, with example values, and can take them out again."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.built: list[Node] = []

    def undo(self) -> None:
        for node in reversed(self.built):
            self.graph.erase_node(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        name = getattr(target, "_opname", None)  # without the overload's: "linear_cross_entropy"
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.built.append(node)
        values, named_values = torch.fx.map_arg((args, kwargs), example)
        with _fake_mode(values, named_values):
            node.meta["example_value"] = target(*values, **named_values)
        return node

    def loss(self, found: FoundLoss, options: Options) -> Node:
        """The fused operator for a loss, right before it."""
        assert found.replacement is not None
        with self.graph.inserting_before(found.node):
            first = len(self.built)
            node = self._linear_cross_entropy(found.replacement, found.node, options)
            for built in self.built[first:]:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                    if key in found.node.meta:
                        built.meta[key] = found.node.meta[key]
        return node

    def _linear_cross_entropy(self, loss: CrossEntropy, replaced: Node, options: Options) -> Node:
        logits, result = loss.logits, example(replaced)
        input = self._rows(logits)
        weight = logits.linear_weight
        if logits.transposed:
            weight = self.call(torch.t, weight)
        bias = logits.linear_bias
        if bias is not None and example(bias).dim() > 1:
            bias = self.call(torch.reshape, bias, (-1,))
        arguments = {
            "linear_bias": (bias, None),
            "weight": (loss.weight, None),
            "reduction": (loss.reduction, "mean"),
            "ignore_index": (loss.ignore_index, -100),
            "label_smoothing": (loss.label_smoothing, 0.0),
            "modification": (str(logits.modification), ""),
            "compute_dtype": (logits.compute_dtype, example(input).dtype),
            "result_dtype": (result.dtype, example(input).dtype),
            "workspace_bytes": (options.workspace_bytes, DEFAULT_WORKSPACE_BYTES),
        }
        given = {
            name: value
            for name, (value, default) in arguments.items()
            if isinstance(value, Node) or value != default
        }
        node = self.call(
            torch.ops.cce_inductor.linear_cross_entropy.default,
            input,
            weight,
            loss.target,
            **given,
        )
        computed = example(node)
        if (computed.shape, computed.dtype) != (result.shape, result.dtype):
            raise AssertionError(
                f"the fused loss is {computed.dtype} {tuple(computed.shape)}, "
                f"the replaced one {result.dtype} {tuple(result.shape)}"
            )
        node.meta["example_value"] = result
        return node

    def _rows(self, logits: Logits) -> Node:
        """The projection's input after the row operations, hidden last."""
        node = logits.input
        for operation in logits.row_operations:
            args = [node if argument is HERE else argument for argument in operation.args]
            node = self.call(operation.target, *args, **operation.kwargs)
        if logits.vocabulary_dim != example(node).dim() - 1:
            node = self.call(torch.movedim, node, logits.vocabulary_dim, -1)
        return node

"""Escapes, and why the input of a loss is not known to be logits.

An escape is an operation that reads logits and has no rule. What is computed from its result is not
followed; a loss of it is reported with the reason of the escape.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from cce_inductor.patterns.language.examples import example, same_shape
from cce_inductor.patterns.language.tables import loss, projection, transform
from cce_inductor.patterns.operations import is_softmax
from cce_inductor.reporting import reasons
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.mutation import called_graphs
from cce_inductor.torch_internals.symbols import size_hint


@dataclasses.dataclass(frozen=True)
class Escape:
    """Why a node does not hold logits although it is computed from some.

    Attributes:
        reason: of the operation that has no rule.
        vocabulary: the vocabulary size of the logits it read, None if only data tells it.
        node: that operation, or the last of the transforms that follow it.
    """

    reason: Reason
    vocabulary: int | None
    node: Node


class Escapes:
    """The escape that each node is computed from, if any."""

    def __init__(self, *, is_inner: bool):
        """Start without escapes.

        Args:
            is_inner: whether another graph calls this one.
        """
        self._is_inner = is_inner
        self._of: dict[Node, Escape] = {}

    def __contains__(self, node: Node) -> bool:
        return node in self._of

    def add(self, node: Node, reason: Reason, vocabulary: int | None) -> None:
        self._of[node] = Escape(reason, vocabulary, node)

    def inherit(self, node: Node) -> None:
        """Record that a node is computed from an escape, if one of its arguments is."""
        escape = next((self._of[a] for a in node.all_input_nodes if a in self._of), None)
        if escape is None:
            return
        if escape.node in node.all_input_nodes and is_transform(node):
            escape = dataclasses.replace(escape, node=node)
        self._of[node] = escape

    def reason_without_logits(self, input: object) -> Reason:
        """Return why `input`, the input of a loss, does not hold logits."""
        if isinstance(input, Node) and input in self._of:
            escape = self._of[input]
            # Almost every node of a model descends from some early escape. It is to blame only if
            # it makes this very input, or if its vocabulary size is found in the input's shape.
            if escape.node is input or escape.vocabulary in map(size_hint, example(input).shape):
                return escape.reason
        source = input
        while isinstance(source, Node) and (is_transform(source) or _may_be_pointwise(source)):
            source = max(source.all_input_nodes, key=_rank)
        if not isinstance(source, Node):
            return reasons.FROM_NO_TENSOR
        if source.op != "placeholder":
            return reasons.made_by(source)
        if isinstance(example(source), torch.nn.Parameter):
            return reasons.from_parameter(source)
        if self._is_inner:
            return reasons.FROM_CALLING_GRAPH
        return reasons.from_outside(source)


def holds_softmax(node: Node, vocabulary: int | None) -> bool:
    """Return whether a node calls a graph with a softmax over `vocabulary` classes in it.

    An autograd.Function is such a graph. A graph that contains a loss by its name does not count,
    because that loss is reported by itself.
    """
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    inner = [each for graph in called_graphs(node) for each in graph.graph.nodes]
    if any(loss.get(each) is not None for each in inner):
        return False
    read = [example(argument) for e in inner if is_softmax(e) for argument in e.all_input_nodes]
    sizes = [size for value in read for size in getattr(value, "shape", ())]
    return vocabulary in [size for size in sizes if isinstance(size, int)]


def is_transform(node: Node) -> bool:
    """Return whether a node has a transform rule and reads other nodes."""
    return transform.get(node) is not None and bool(node.all_input_nodes)


def _may_be_pointwise(node: Node) -> bool:
    """Return whether a node that is not a projection keeps the shape of an argument."""
    value = example(node)
    inputs = [example(argument) for argument in node.all_input_nodes]
    if projection.get(node) is not None:
        return False
    return isinstance(value, torch.Tensor) and any(
        isinstance(each, torch.Tensor) and same_shape(each.shape, value.shape) for each in inputs
    )


def _rank(node: Node) -> int:
    value = example(node)
    return value.dim() if isinstance(value, torch.Tensor) else -1

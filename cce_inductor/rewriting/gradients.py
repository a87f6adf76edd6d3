"""Whether the result of a node had a gradient where it was made.

The example of a tensor shows its state at the end of the graph: by then something with a gradient
may have been written into it, or it may have been detached in place.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from cce_inductor.patterns.language.examples import HAD_GRADIENT, example, had_gradient
from cce_inductor.patterns.language.expression import detach_expression
from cce_inductor.patterns.language.logits import Logits, Value, each_logits
from cce_inductor.patterns.language.rows import Row, detach_row, nodes_of, nodes_of_projection
from cce_inductor.patterns.operations import detaches, detaches_in_place
from cce_inductor.rewriting.findings import Consumer, Findings

Rows = TypeVar("Rows", Row, tuple[Row, ...])


class Gradients:
    """Follows the gradient mode, and marks nodes whose example says something else."""

    def __init__(self, graph: Graph, findings: Findings):
        self._findings = findings
        self._mode: object = "ambient"
        self._detached_later = {
            id(example(argument))
            for node in graph.nodes
            if detaches_in_place(node)
            for argument in node.all_input_nodes
        }

    @property
    def are_enabled(self) -> bool:
        """Whether gradients are enabled, as far as the graph says."""
        return self._mode is not False

    def visit(self, node: Node) -> None:
        """Record the gradient mode of a node, and whether its result had a gradient."""
        self._findings.gradient_mode[node] = self._mode
        if node.target is torch._C._set_grad_enabled:
            self._mode = node.args[0]
        if self._is_made_without(node):
            node.meta[HAD_GRADIENT] = False
        elif id(example(node)) in self._detached_later and not detaches_in_place(node):
            node.meta[HAD_GRADIENT] = True

    def _is_made_without(self, node: Node) -> bool:
        """Return whether a result has no gradient, whatever is written into it later."""
        if detaches(node):
            return True
        if self.are_enabled or not node.op.startswith("call"):
            return False
        # A node that changes a tensor in place returns that tensor.
        return not any(example(argument) is example(node) for argument in node.all_input_nodes)


def requires_grad(node: Node) -> bool:
    """Return whether the example of a node is a tensor that requires a gradient."""
    value = example(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def trains(of: Logits | Consumer) -> bool:
    """Return whether a projection reads a tensor that requires a gradient."""
    nodes = (node for each in of.projections for node in nodes_of_projection(each))
    return any(map(requires_grad, nodes))


def detach_like(node: Node, value: Value) -> Value:
    """Return what a node holds, detached if its result has no gradient in the user's graph.

    Args:
        node: the node.
        value: what the rule says that the node holds.
    """
    if had_gradient(node) or not _has_tensors(node):
        return value
    if not any(map(requires_grad, node.all_input_nodes)):
        return value
    return each_logits(value, lambda v: v.replace(expression=detach_expression(v.expression)))


def detach_rows_like(node: Node, result: Rows) -> Rows:
    """Return what replaces a node, detached if the node has no gradient in the user's graph."""
    if had_gradient(node) or not _has_tensors(node):
        return result
    rows = result if isinstance(result, tuple) else (result,)
    if not any(requires_grad(read) for row in rows for read in nodes_of(row)):
        return result
    if isinstance(result, tuple):
        return tuple(detach_row(row) for row in result)
    return detach_row(result)


def _has_tensors(node: Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(example(node)))

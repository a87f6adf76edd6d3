"""Regions of a graph in which nothing is rewritten."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from cce_inductor.patterns.language.tables import UnsupportedError
from cce_inductor.reporting import reasons
from cce_inductor.reporting.location import operation
from cce_inductor.reporting.reasons import Reason


class Regions:
    """Follows which regions the walk is inside of: inference mode and torch.func transforms.

    A graph that takes derivatives itself is such a region as a whole.
    """

    def __init__(self, graph: Graph):
        self._depth = {reasons.INSIDE_TRANSFORM: 0, reasons.INSIDE_INFERENCE_MODE: 0}
        derivatives = (node for node in graph.nodes if node.target is torch.autograd.grad)
        derivative = next(derivatives, None)
        self._of_graph = None if derivative is None else reasons.takes_derivatives(derivative)

    def visit(self, node: Node) -> None:
        """Enter or leave a region if the node does."""
        module = getattr(node.target, "__module__", None) or ""
        name = operation(node)
        if name in ("_enter_inference_mode", "_exit_inference_mode"):
            self._depth[reasons.INSIDE_INFERENCE_MODE] += (
                1 if name == "_enter_inference_mode" else -1
            )
        elif node.op == "call_function" and "functorch" in module:
            self._depth[reasons.INSIDE_TRANSFORM] += name.endswith("_increment_nesting")
            self._depth[reasons.INSIDE_TRANSFORM] -= name.endswith("_decrement_nesting")

    @property
    def reason(self) -> Reason | None:
        """Why nothing can be rewritten at the node that was visited last, None if it can."""
        if self._of_graph is not None:
            return self._of_graph
        return next((reason for reason, depth in self._depth.items() if depth), None)

    def check(self) -> None:
        """Check that operations can be rewritten here.

        Raises:
            UnsupportedError: they cannot.
        """
        reason = self.reason
        if reason is not None:
            raise UnsupportedError(reason)

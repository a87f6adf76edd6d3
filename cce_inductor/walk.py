"""One walk over a graph in order, with logits as abstract values.

The walk knows no operation by itself: `patterns` says what makes logits, what keeps them and what
consumes them. Whatever has no rule is an escape, and keeps the projection as it is.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.fx import Graph, Node

from .location import at, describe, operation
from .mutation import UNKNOWN, mutated_storages, storage_of
from .patterns import (
    CrossEntropy,
    Logits,
    Site,
    UnsupportedError,
    example,
    loss,
    projection,
    transform,
)


@dataclasses.dataclass
class FoundLoss:
    """A node with a loss rule.

    Attributes:
        node: the loss in the user's graph.
        logits: what its input was followed back to, None if that is no projection in this graph.
        replacement: what may stand in its place, None if nothing may.
        reason: why it is left alone, None while there is no reason to.
    """

    node: Node
    logits: Logits | None
    replacement: CrossEntropy | None
    reason: str | None


@dataclasses.dataclass
class Walk:
    """What a walk over a graph found.

    Attributes:
        losses: in the graph's order.
        logits: every node that holds logits.
    """

    losses: list[FoundLoss] = dataclasses.field(default_factory=list)
    logits: dict[Node, Logits] = dataclasses.field(default_factory=dict)


def walk(graph: Graph) -> Walk:
    """Finds every loss in `graph` and follows its logits back to their projection."""
    return _Walker(graph).run()


class _Walker:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.found = Walk()
        self.kept: dict[Node, str] = {}  # projection -> why it stays
        # Node made from logits by an operation without a rule -> why, the vocabulary's size, and
        # that operation; transforms of its result count as it.
        self.lost: dict[Node, tuple[str, object, Node]] = {}
        self.mutations: list[tuple[int, object, Node]] = []
        self.position: dict[Node, int] = {}
        self.gradient_mode: dict[Node, object] = {}
        self.in_transform = any(_is_functorch(node) for node in graph.nodes)

    def run(self) -> Walk:
        gradient_mode: object = "ambient"
        for position, node in enumerate(self.graph.nodes):
            self.position[node] = position
            self.gradient_mode[node] = gradient_mode
            if node.target is torch._C._set_grad_enabled:
                gradient_mode = node.args[0]
            used = [a for a in node.all_input_nodes if a in self.found.logits]
            if loss.get(node) is not None:
                self._visit_loss(node, used)
            elif used:
                self._visit_use(node, used)
            else:
                self._visit_other(node)
            self.mutations += [(position, storage, node) for storage in mutated_storages(node)]
        for found in self.found.losses:
            if found.reason is None:
                self._check_unchanged(found)
        for found in self.found.losses:
            if found.reason is None and found.logits is not None:
                found.reason = self.kept.get(found.logits.projection)
        return self.found

    def _visit_other(self, node: Node) -> None:
        inherited = next((self.lost[a] for a in node.all_input_nodes if a in self.lost), None)
        if inherited is not None:
            reason, vocabulary, escape = inherited
            same = escape in node.all_input_nodes and transform.get(node) is not None
            self.lost[node] = (reason, vocabulary, node if same else escape)
        self._visit_projection(node)

    def _visit_projection(self, node: Node) -> None:
        rule = projection.get(node)
        if rule is None:
            return
        try:
            logits = Site(node, self.found.logits).apply(rule)
        except UnsupportedError as why:
            reason = f"{operation(node)}{at(node)} is no projection that is known: {why}"
            self.lost[node] = (reason, example(node).shape[-1], node)
            return
        if logits is None:
            return
        if self.in_transform:
            reason = "the graph is inside a torch.func transform"
            self.lost[node] = (reason, example(node).shape[-1], node)
            return
        self.found.logits[node] = logits.replace(path=(describe(node),))

    def _visit_use(self, node: Node, used: list[Node]) -> None:
        """A transform, or an escape."""
        try:
            rule = transform.get(node)
            if rule is None:
                raise UnsupportedError("")
            if len(used) > 1:
                raise UnsupportedError("it combines logits with logits")
            logits: Logits = Site(node, self.found.logits).apply(rule)
            self._check_gradient(node, used)
            if len(node.all_input_nodes) > 1:
                self._check_gradient_mode(node, logits)
        except UnsupportedError as why:
            self._escape(node, used, str(why))
            self._visit_projection(node)  # what one projection made may be another's input
        else:
            self.found.logits[node] = logits.replace(path=(*logits.path, describe(node)))

    def _escape(self, node: Node, used: list[Node], why: str) -> None:
        if node.op == "output":
            reason = "the logits are returned by the compiled function, so they must be stored"
        else:
            reason = f"the logits are used by {operation(node)}{at(node)}"
            if why:
                reason += f": {why}"
        logits = self.found.logits[used[0]]
        self.lost[node] = (reason, example(logits.projection).shape[-1], node)
        for argument in used:
            self.kept.setdefault(self.found.logits[argument].projection, reason)

    def _visit_loss(self, node: Node, used: list[Node]) -> None:
        input = node.kwargs.get("input", node.args[0] if node.args else None)
        logits = self.found.logits.get(input) if isinstance(input, Node) else None
        found = FoundLoss(node, logits, None, None)
        self.found.losses.append(found)
        if logits is None:
            found.reason = self._reason_without_logits(input)
            if used:  # as the target, say
                self._escape(node, used, "it is not the input of the loss")
            return
        try:
            rule = loss.get(node)
            assert rule is not None
            found.replacement = Site(node, self.found.logits).apply(rule)
            self._check_gradient(node, used)
            if not (_requires_grad(node) and _requires_grad(logits.projection)):
                self._check_gradient_mode(node, logits)
        except UnsupportedError as why:
            found.reason = f"{operation(node)} cannot be rewritten: {why}"
            for argument in used:
                self.kept.setdefault(self.found.logits[argument].projection, found.reason)

    def _reason_without_logits(self, input: object) -> str:
        if isinstance(input, Node) and input in self.lost:
            reason, vocabulary, escaped = self.lost[input]
            # Every later node of a model is made from its first projections; of the one before
            # this loss are those with its classes, and what came out of the escape itself.
            if escaped is input or vocabulary in example(input).shape:
                return reason
        source = input
        while isinstance(source, Node) and transform.get(source) is not None:
            source = source.all_input_nodes[0] if source.all_input_nodes else None
        if not isinstance(source, Node):
            return "its input is made from no tensor"
        if source.op == "placeholder":
            return (
                f"its logits come into this graph from outside, as {source.name!r}, "
                "so their projection is not in it"
            )
        made_by = f"{operation(source)}{at(source)}"
        return f"its input is made by {made_by}, which is no projection that is known"

    def _check_gradient(self, node: Node, used: list[Node]) -> None:
        """What the node makes of logits with a gradient must have one."""
        if any(_requires_grad(argument) for argument in used) and not _requires_grad(node):
            raise UnsupportedError("it cuts the gradient")

    def _check_gradient_mode(self, node: Node, logits: Logits) -> None:
        """What else the node reads must get a gradient if the projection's operands do."""
        if self.gradient_mode[node] != self.gradient_mode[logits.projection]:
            raise UnsupportedError("gradients are enabled or disabled between projection and loss")

    def _check_unchanged(self, found: FoundLoss) -> None:
        """What the loss will read, and keep for its backward, must be what the projection read."""
        assert found.logits is not None
        captured = {storage_of(argument) for argument in found.logits.captured}
        first = self.position[found.logits.projection]
        last = math.inf if _requires_grad(found.node) else self.position[found.node]
        for position, storage, mutation in self.mutations:
            if first < position < last and (storage in captured or storage is UNKNOWN):
                found.reason = (
                    f"{operation(found.node)} cannot be rewritten: {operation(mutation)}"
                    f"{at(mutation)} may change what the projection read"
                )
                self.kept.setdefault(found.logits.projection, found.reason)
                return


def _requires_grad(node: Node) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_functorch(node: Node) -> bool:
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and "functorch" in module

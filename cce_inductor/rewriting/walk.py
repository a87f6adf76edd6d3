"""One walk over a graph in order, with logits as abstract values.

The walk knows no operation by itself. The tables of `patterns` say what makes logits, what keeps
them and what consumes them (`patterns.language.protocol` describes what rules return). An operation
on logits that has no rule is an escape, and its projection stays as it is.
"""

from __future__ import annotations

import math

from torch.fx import Graph, Node

from cce_inductor.patterns.language.examples import arguments_of, example, had_gradient
from cce_inductor.patterns.language.expression import detach_expression
from cce_inductor.patterns.language.logits import Logits, Value, each_logits
from cce_inductor.patterns.language.pointwise import pointwise
from cce_inductor.patterns.language.protocol import (
    LossResult,
    ProjectionResult,
    ReductionResult,
    TransformResult,
)
from cce_inductor.patterns.language.site import Site
from cce_inductor.patterns.language.tables import (
    UnsupportedError,
    loss,
    projection,
    reduction,
    transform,
)
from cce_inductor.patterns.losses.unfused import is_unfused
from cce_inductor.patterns.transforms.stack import through_stack
from cce_inductor.reporting import reasons
from cce_inductor.reporting.location import describe
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.escapes import Escapes, holds_softmax
from cce_inductor.rewriting.findings import Consumer, Findings
from cce_inductor.rewriting.gradients import Gradients, detach_like, detach_rows_like, trains
from cce_inductor.rewriting.in_place import InPlaceChanges
from cce_inductor.rewriting.mutation import mutated_storages, storage_of
from cce_inductor.rewriting.regions import Regions
from cce_inductor.rewriting.routers import drop_without_loss
from cce_inductor.torch_internals.symbols import size_hint


def walk(
    graph: Graph,
    *,
    without_loss: bool = False,
    is_inner: bool = False,
    stored: frozenset[Node] = frozenset(),
) -> Findings:
    """Find every loss in `graph`, and follow its logits back to their projection.

    Args:
        graph: a graph before autograd.
        without_loss: whether to keep reductions of projections without a loss.
        is_inner: whether another graph calls this one.
        stored: the projections whose logits other logits read as a stored tensor.
    """
    return _Walker(graph, stored, is_inner=is_inner).run(without_loss=without_loss)


class _Walker:
    def __init__(self, graph: Graph, stored: frozenset[Node], *, is_inner: bool):
        self.graph = graph
        self.findings = Findings(stored)
        self.values = self.findings.values
        self.regions = Regions(graph)
        self.gradients = Gradients(graph, self.findings)
        self.changes = InPlaceChanges(self.findings, self.regions)
        self.escapes = Escapes(is_inner=is_inner)

    def run(self, *, without_loss: bool) -> Findings:
        findings = self.findings
        for position, node in enumerate(self.graph.nodes):
            findings.position[node] = position
            self.gradients.visit(node)
            self.regions.visit(node)
            self.changes.enter(node, grad_enabled=self.gradients.are_enabled)
            self._visit(node)
            self.changes.leave(node)
            # What is computed from a reduction remembers the projections of what was reduced.
            reduced = {p for a in node.all_input_nodes for p in findings.reduced.get(a, ())}
            if reduced and node not in self.values:
                findings.reduced[node] = findings.reduced.get(node, set()) | reduced
        self.changes.drop_unread_row_views()
        for consumer in findings.consumers:
            if consumer.reason is None:
                self._check_unchanged(consumer)
        self._add_unreduced_losses()
        if not without_loss:
            drop_without_loss(findings)
        for consumer in findings.consumers:
            if consumer.reason is None and consumer.logits is not None:
                consumer.reason = findings.kept.reason(consumer)
        return findings

    def _visit(self, node: Node) -> None:
        arguments = [a for a in node.all_input_nodes if a in self.values]
        changed_row_views = self.changes.changed_row_views(node)
        if loss.get(node) is not None:
            self._visit_loss(node, arguments)
        elif node.op == "output":
            self.findings.returned += arguments
        elif arguments:
            self._visit_use(node, arguments)
        elif changed_row_views:
            self.changes.visit_change_of_row_view(node, changed_row_views)
        else:
            self.escapes.inherit(node)
            self._visit_projection(node)

    def _visit_projection(self, node: Node) -> None:
        """Visit a node that may make logits."""
        rule = projection.get(node)
        if rule is None:
            return
        try:
            logits: ProjectionResult = self.findings.site(node).apply(rule)
        except UnsupportedError as error:
            self._escape_projection(node, reasons.projection_unsupported(node, error.reason))
            return
        if logits is None:
            return
        if self.regions.reason is not None:
            reason = reasons.projection_not_followed(node, self.regions.reason)
            self._escape_projection(node, reason)
            return
        if not had_gradient(node) and trains(logits):
            logits = logits.replace(expression=detach_expression(logits.expression))
        self.values[node] = logits.replace(path=(describe(node),))

    def _escape_projection(self, node: Node, reason: Reason) -> None:
        """Record why the result of a projection is not followed, unless it has no vocabulary: the
        product of two vectors is a single number."""
        shape = example(node).shape
        if shape:
            self.escapes.add(node, reason, size_hint(shape[-1]))

    def _visit_use(self, node: Node, arguments: list[Node]) -> None:
        """Visit a reduction, a transform, or an escape.

        Args:
            node: the node.
            arguments: those of its arguments that hold logits.
        """
        site = self.findings.site(node)
        try:
            self.regions.check()
            self.changes.check_only(arguments)
            stacked = next((a for a in arguments if site.stack(a) is not None), None)
            if stacked is not None:
                rule = transform.get(node)
                self._visit_result(
                    site, arguments, through_stack(site, stacked, rule, self._pointwise)
                )
            elif not self._visit_reduction(site, arguments):
                self._visit_transform(site, arguments)
        except UnsupportedError as error:
            if not self.changes.written and _is_unused(node):
                self.findings.unused.append(node)
                return
            self._escape(node, arguments, error.reason)
            # The node may also be a projection, of a hidden state that happens to be logits.
            self._visit_projection(node)

    def _visit_reduction(self, site: Site, arguments: list[Node]) -> bool:
        """Apply the node's reduction rule; return whether there is one that applies."""
        node = site.node
        rule = reduction.get(node)
        result: ReductionResult = None if rule is None else site.apply(rule)
        if result is None:
            return False
        if isinstance(result, Logits):
            self._record_value(node, detach_like(node, result))
            return True
        if self.changes.written:
            raise UnsupportedError(reasons.REDUCES_AND_CHANGES)
        logits = self.findings.first_logits(arguments[0])
        self.findings.add(
            Consumer(node, is_loss=False, logits=logits, result=detach_rows_like(node, result))
        )
        self.changes.add_reduction(node, arguments)
        return True

    def _visit_transform(self, site: Site, arguments: list[Node]) -> None:
        """Apply the node's transform rule, or capture it as a pointwise function."""
        rule = transform.get(site.node)
        value: TransformResult = site.apply(rule) if rule is not None else self._pointwise(site)
        self._visit_result(site, arguments, value)

    def _visit_result(self, site: Site, arguments: list[Node], value: Value) -> None:
        """Record logits that a node computes from logits, or writes into them."""
        node = site.node
        value = detach_like(node, value)
        changed = [a for a in arguments if storage_of(a) in self.changes.written]
        if len(changed) > 1:
            raise UnsupportedError(reasons.CHANGES_SEVERAL_LOGITS)
        if changed:
            self.changes.assign(node, changed[0], value)
        self._keep_stored(site)
        if changed and example(node) is None:
            self.findings.assignments[node] = value
        else:
            self._record_value(node, value)

    def _pointwise(self, site: Site) -> Logits:
        node = site.node
        args, kwargs = arguments_of(node)
        value = pointwise(site, site.function, *args, **kwargs)
        for argument in node.all_input_nodes:
            before = self.values.get(argument)
            unchanged = isinstance(before, Logits) and value.expression is before.expression
            # On one element the function is the identity, but it may transpose a matrix.
            if unchanged and _layout(node) != _layout(argument):
                raise UnsupportedError(reasons.MOVES_ELEMENTS)
        return value

    def _visit_loss(self, node: Node, arguments: list[Node]) -> None:
        """Visit a node that has a loss rule.

        Args:
            node: the node.
            arguments: those of its arguments that hold logits.
        """
        input = node.kwargs.get("input", node.args[0] if node.args else None)
        if (
            isinstance(input, Node)
            and input in self.findings.reduced
            and input not in self.escapes
            and not self._has_classes(input)
        ):
            return  # its input has one value for each row
        consumer = Consumer(node, is_loss=True)
        if not arguments:
            consumer.reason = self.escapes.reason_without_logits(input)
            self.findings.consumers.append(consumer)
            return
        rule = loss.get(node)
        assert rule is not None
        consumer.logits = self.findings.first_logits(arguments[0])
        site = self.findings.site(node)
        try:
            self.regions.check()
            result: LossResult = site.apply(rule)
            self._keep_stored(site)
            if isinstance(result, Logits):
                self._record_value(node, detach_like(node, result))
                return
            consumer.result = detach_rows_like(node, result)
        except UnsupportedError as error:
            consumer.reason = reasons.loss_unsupported(node, error.reason)
            self.findings.keep(arguments, consumer.reason)
            if isinstance(input, Node) and input not in self.values:
                consumer.logits = None
                consumer.reason = self.escapes.reason_without_logits(input)
                self._escape(node, arguments, reasons.NOT_THE_LOSS_INPUT)
        self.findings.add(consumer)

    def _has_classes(self, node: Node) -> bool:
        """Return whether a value computed from a reduction is again as wide as the logits."""
        origins = self.findings.reduced[node]
        vocabularies = {size_hint(example(origin).shape[-1]) for origin in origins}
        return not vocabularies.isdisjoint({*map(size_hint, example(node).shape)} - {None})

    def _escape(self, node: Node, arguments: list[Node], cause: Reason) -> None:
        """Record that a node reads the logits in `arguments` and cannot be followed."""
        is_loss = is_unfused(node)
        reason = reasons.used_by(node, reasons.LOSS_WITHOUT_RULE if is_loss else cause)
        logits = self.findings.first_logits(arguments[0])
        self.escapes.add(node, reason, logits.projection.classes)
        self.findings.keep(arguments, reason)
        if is_loss or holds_softmax(node, size_hint(logits.vocabulary)):
            self.findings.add(Consumer(node, is_loss=True, logits=logits, reason=reason))

    def _keep_stored(self, site: Site) -> None:
        """Keep the logits that a rule reads as a stored tensor."""
        if site.stored:
            self.findings.keep(site.stored, reasons.used_with_other_logits(site.node))

    def _record_value(self, node: Node, value: Value) -> None:
        """Record the logits that a node's result stands for, and add the node to their path."""
        self.values[node] = each_logits(
            value, lambda logits: logits.replace(path=(*logits.path, describe(node)))
        )

    def _check_unchanged(self, consumer: Consumer) -> None:
        """Leave a consumer alone if a tensor that it reads is changed before it will be read.

        The user's graph reads every tensor where the projection is. The rewritten graph reads it
        where the loss is, and again in the backward.
        """
        here = self.findings.position[consumer.place]
        assert consumer.result is not None
        # One backward may serve several losses, so any later change counts.
        last = math.inf if trains(consumer) else here
        mutation = self.findings.changed_before(consumer.result, here, last)
        if mutation is not None:
            cause = reasons.may_change_operand(mutation)
            consumer.reason = reasons.loss_unsupported(consumer.node, cause)
            self.findings.kept.add(consumer, consumer.reason)

    def _add_unreduced_losses(self) -> None:
        """Add losses that are themselves logits: ``kl_div(reduction="none")``, for example.

        They are reported only if their logits are stored.
        """
        for node in self.values:
            if loss.get(node) is not None:
                consumer = Consumer(node, is_loss=True, logits=self.findings.first_logits(node))
                self.findings.consumers.append(consumer)


def _layout(node: Node) -> tuple[str, str]:
    value = example(node)
    return str(tuple(value.shape)), str(value.stride())


def _is_unused(node: Node) -> bool:
    """Return whether nobody reads the result of a node, and the node has no other effect.

    Only operations with a rule are known to have no effect.
    """
    known = transform.get(node) is not None or reduction.get(node) is not None
    if not known or mutated_storages(node):
        return False
    return all(_is_unused(user) for user in node.users)

"""Changes of logits in place, also through views of them.

Several nodes may hold the memory of the same logits: views, and the results of functions that
change their argument in place. They are *aliases* of each other. A change through one of them gives
each alias that is read later a new value.

A reduction may return a view, too: ``logits.diagonal()`` has one value for each row. Such a view is
a `Row`, so it is computed again after each change, by a `Consumer` with `after` set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cce_inductor.patterns.language.examples import example
from cce_inductor.patterns.language.expression import Operand, leaves
from cce_inductor.patterns.language.logits import Logits, Value
from cce_inductor.patterns.language.ranges import begins_vocabulary, expression_after_change
from cce_inductor.patterns.language.row_views import changed_through_view
from cce_inductor.patterns.language.rows import Row
from cce_inductor.patterns.language.tables import UnsupportedError, reduction
from cce_inductor.reporting import reasons
from cce_inductor.reporting.location import describe
from cce_inductor.rewriting.findings import Consumer, Findings
from cce_inductor.rewriting.gradients import detach_rows_like, requires_grad
from cce_inductor.rewriting.mutation import mutated_storages, storage_of, storages_of
from cce_inductor.rewriting.regions import Regions


class InPlaceChanges:
    """Follows which nodes share the memory of logits, and what they hold after each change.

    Attributes:
        written: the storages that the current node changes.
    """

    def __init__(self, findings: Findings, regions: Regions):
        self._findings = findings
        self._regions = regions
        self.written: frozenset[object] = frozenset()
        # The storages among `written` whose aliases have their new values already.
        self._followed: set[object] = set()
        # Every node that holds a tensor of a storage, in order.
        self._aliases: dict[object, list[Node]] = {}
        # For each alias of a view that is a `Row`, the reduction that made the view.
        self._row_views: dict[Node, Node] = {}

    def enter(self, node: Node, *, grad_enabled: bool) -> None:
        """Begin with a node: find out what it changes."""
        self.written = mutated_storages(node, grad_enabled=grad_enabled)
        self._followed = set()

    def leave(self, node: Node) -> None:
        """End with a node: keep logits that it changed in a way that was not followed."""
        for storage in self.written - self._followed:
            holders = [n for n in self._aliases.get(storage, ()) if n in self._findings.values]
            self._findings.keep(holders, reasons.changed_through_view(node))
        position = self._findings.position[node]
        self._findings.mutations += [(position, storage, node) for storage in self.written]
        for storage in storages_of(node):
            self._aliases.setdefault(storage, []).append(node)

    def changed_row_views(self, node: Node) -> list[Node]:
        """Return the arguments of the current node that are row views and that it changes."""
        views = [a for a in node.all_input_nodes if a in self._row_views]
        return [view for view in views if storage_of(view) in self.written]

    def add_reduction(self, node: Node, arguments: Sequence[Node]) -> None:
        """Record a reduction of `arguments`, which is a row view if it shares their memory."""
        if storages_of(node) & {storage_of(argument) for argument in arguments}:
            self._row_views[node] = node

    def check_only(self, arguments: Sequence[Node]) -> None:
        """Check that the current node changes nothing but `arguments`.

        Raises:
            UnsupportedError: it does.
        """
        if not self.written <= {storage_of(argument) for argument in arguments}:
            raise UnsupportedError(reasons.CHANGES_ANOTHER_TENSOR)

    def assign(self, node: Node, changed: Node, value: Value) -> None:
        """Give every alias of the changed memory its new value.

        Args:
            node: the node that changes it.
            changed: the argument through which it does.
            value: what `changed` holds afterwards.

        Raises:
            UnsupportedError: the new value of an alias is not known.
        """
        findings = self._findings
        if not isinstance(value, Logits):
            raise UnsupportedError(reasons.CHANGES_SEVERAL_LOGITS)
        if findings.gradient_mode[node] is False and requires_grad(changed):
            raise UnsupportedError(reasons.HIDDEN_FROM_GRADIENT)
        before = findings.first_logits(changed)
        aliases = self._aliases[storage_of(changed)]
        read = [alias for alias in aliases if self._is_read_after(alias, node)]
        row_views = [alias for alias in read if alias in self._row_views]
        read += [_viewed(self._row_views[alias]) for alias in row_views]
        updated: dict[Node, Value] = {changed: value.replace(path=(*before.path, describe(node)))}
        is_whole = _has_rows_of(changed, aliases[0], findings.values)
        for alias in dict.fromkeys(read):
            if alias not in updated and alias not in row_views:
                old = findings.values.get(alias)
                updated[alias] = _changed_alias(old, before, value, is_whole=is_whole)
        findings.values.update(updated)
        self._followed.add(storage_of(changed))
        for alias in row_views:
            self._read_again(alias, after=node)

    def visit_change_of_row_view(self, node: Node, changed: list[Node]) -> None:
        """Follow a node that changes logits through row views of them.

        Args:
            node: the node.
            changed: its arguments that are row views.
        """
        findings = self._findings
        made = self._row_views[changed[0]]
        matrix = self._matrix_of(made)
        logits = findings.first_logits(matrix)
        try:
            self._regions.check()
            if len(changed) > 1 or self.written != {storage_of(made)}:
                raise UnsupportedError(reasons.CHANGES_ANOTHER_TENSOR)
            site = findings.site(node)
            value = changed_through_view(site, changed[0], self._row_of(made), logits)
            self.assign(node, matrix, value)
        except UnsupportedError as error:
            findings.keep([matrix], reasons.used_by(node, error.reason))
            return
        findings.assignments[node] = value
        if node.users:
            self._row_views[node] = made
            self._read_again(node)

    def drop_unread_row_views(self) -> None:
        """Forget the values of row views that nothing reads: they are only there to be changed."""
        findings = self._findings
        position = findings.position
        for number, consumer in reversed(list(enumerate(findings.consumers))):
            if consumer.node not in self._row_views:
                continue
            here = position[consumer.place]
            later = [
                position[each.place]
                for each in findings.consumers
                if each.node is consumer.node and position[each.place] > here
            ]
            last = min(later, default=math.inf)
            read = [
                user
                for user in consumer.node.users
                if here < position[user] <= last and user not in findings.assignments
            ]
            if not read and consumer.logits is not None:
                del findings.consumers[number]
                findings.assignments.setdefault(consumer.node, consumer.logits)

    def _is_read_after(self, alias: Node, node: Node) -> bool:
        """Return whether a node that has not been visited yet reads an alias."""
        return any(user is not node and user not in self._findings.position for user in alias.users)

    def _matrix_of(self, view: Node) -> Node:
        """Return the logits whose diagonal a row view is.

        The first alias of their memory is preferred to the tensor that the view was made of, which
        may be the transpose or a part of it.
        """
        values = self._findings.values
        argument = _viewed(view)
        first = self._aliases[storage_of(argument)][0]
        if not _has_rows_of(argument, first, values) or example(first).dim() != 2:
            return argument
        viewed, whole = self._findings.first_logits(argument), self._findings.first_logits(first)
        same_values = whole.expression is viewed.expression
        return first if same_values and begins_vocabulary(viewed, whole) else argument

    def _row_of(self, view: Node) -> Row:
        """Return what a row view holds now."""
        rule = reduction.get(view)
        assert rule is not None, "a row view is made by a reduction"
        row: Row = self._findings.site(view).apply(rule)
        return detach_rows_like(view, row)

    def _read_again(self, alias: Node, after: Node | None = None) -> None:
        """Record a consumer that gives an alias of a row view its present value."""
        made = self._row_views[alias]
        logits = self._findings.first_logits(_viewed(made))
        self._findings.add(
            Consumer(alias, is_loss=False, logits=logits, result=self._row_of(made), after=after)
        )


def _viewed(view: Node) -> Node:
    """Return the logits that a row view was made of."""
    return view.all_input_nodes[0]


def _has_rows_of(part: Node, whole: Node, values: dict[Node, Value]) -> bool:
    """Return whether an alias of logits has all of their rows."""
    held, held_by_whole = values.get(part), values.get(whole)
    if not isinstance(held, Logits) or not isinstance(held_by_whole, Logits):
        return False
    rows = _row_count(example(part), held.vocabulary_dim)
    return statically_known_true(rows == _row_count(example(whole), held_by_whole.vocabulary_dim))


def _row_count(value: torch.Tensor, vocabulary_dim: int) -> Any:
    """Return the number of rows of logits, also if their vocabulary is empty."""
    return math.prod(size for dim, size in enumerate(value.shape) if dim != vocabulary_dim)


def _changed_alias(old: Value | None, before: Logits, value: Logits, *, is_whole: bool) -> Logits:
    """Return what an alias of changed logits holds.

    Args:
        old: what it held before.
        before: what the alias through which they were changed held before.
        value: what that one holds now.
        is_whole: whether that one has all rows of the logits.

    Raises:
        UnsupportedError: it is not known.
    """
    if not isinstance(old, Logits) or old.expression is not before.expression:
        raise UnsupportedError(reasons.ALSO_READ_AS_VIEW)
    if value.projection != before.projection:
        raise UnsupportedError(reasons.ALSO_READ_AS_VIEW)
    known = list(leaves(before.expression))
    new = [
        leaf
        for leaf in leaves(value.expression)
        if isinstance(leaf, Operand) and leaf not in known and leaf.kind.varies_over_rows
    ]
    is_derived = old.row_operations[: len(before.row_operations)] == before.row_operations
    if not is_derived and not is_whole:
        raise UnsupportedError(reasons.CHANGES_PART)
    if not is_derived and new:  # these operands have the rows of the other alias
        raise UnsupportedError(reasons.ALSO_READ_AS_VIEW)
    expression = expression_after_change(old, before, value.expression)
    if expression is None:
        raise UnsupportedError(reasons.CHANGES_PART)
    return old.replace(expression=expression, compute_dtype=value.compute_dtype)

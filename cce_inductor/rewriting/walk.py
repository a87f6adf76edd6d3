"""One walk over a graph in order, with logits as abstract values.

The walk knows no operation by itself: `patterns` says what makes logits, what keeps them and what
consumes them. Whatever has no rule is an escape, and keeps the projection as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from cce_inductor.patterns.language.examples import HAD_GRADIENT, example, had_gradient, same_shape
from cce_inductor.patterns.language.expression import Operand, detach_expression, leaves
from cce_inductor.patterns.language.logits import Logits, all_logits, each_logits
from cce_inductor.patterns.language.pointwise import pointwise
from cce_inductor.patterns.language.ranges import begins_vocabulary, expression_after_change
from cce_inductor.patterns.language.row_views import changed_through_view
from cce_inductor.patterns.language.rows import (
    Row,
    Statistic,
    detach_row,
    nodes_of,
    nodes_of_projection,
    parts,
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
from cce_inductor.reporting.location import describe, operation
from cce_inductor.reporting.reasons import Reason
from cce_inductor.rewriting.found import FoundLoss, Walk
from cce_inductor.rewriting.mutation import (
    called_graphs,
    mutated_storages,
    storage_of,
    storages_of,
)
from cce_inductor.torch_internals.capture import get_data
from cce_inductor.torch_internals.symbols import size_hint


def walk(graph: Graph, *, without_loss: bool = False, is_inner: bool = False) -> Walk:
    """Finds every loss in `graph` and follows its logits back to their projection.

    Args:
        graph: a graph before autograd.
        without_loss: also finds reductions of projections of which there is no loss.
        is_inner: whether another graph calls this one.
    """
    return _Walker(graph, without_loss, is_inner).run()


class _Walker:
    def __init__(self, graph: Graph, without_loss: bool, is_inner: bool):
        self.graph = graph
        self.without_loss = without_loss
        self.is_inner = is_inner
        self.found = Walk()
        self.kept = self.found.kept
        # Node made from logits by an operation without a rule -> why, the vocabulary's size, and
        # that operation; transforms of its result count as it.
        self.lost: dict[Node, tuple[Reason, int | None, Node]] = {}
        # Node computed from a reduction -> the projections of what was reduced.
        self.reduced: dict[Node, set[Node]] = {}
        # Every node that holds a tensor of a storage, in order.
        self.sharing: dict[object, list[Node]] = {}
        # Every name of a view of logits that is a value of rows -> the reduction that made it.
        self.views: dict[Node, Node] = {}
        # The storages that the node which is being visited changes, and those of them whose logits
        # have their new values.
        self.written: frozenset[object] = frozenset()
        self.assigned: set[object] = set()
        # How many of each region the walk is inside of, by the reason that they give.
        self.open = dict.fromkeys(_REGIONS, 0)
        derivatives = (node for node in graph.nodes if node.target is torch.autograd.grad)
        self.derivative = next(derivatives, None)

    def run(self) -> Walk:
        gradient_mode: object = "ambient"
        detached_later = {
            id(example(argument))
            for node in self.graph.nodes
            if node.target in _DETACHING_IN_PLACE
            for argument in node.all_input_nodes
        }
        for position, node in enumerate(self.graph.nodes):
            self.found.position[node] = position
            self.found.gradient_mode[node] = gradient_mode
            if node.target is torch._C._set_grad_enabled:
                gradient_mode = node.args[0]
            self._count_open(node)
            if _is_cut(node, gradient_mode):
                node.meta[HAD_GRADIENT] = False
            elif id(example(node)) in detached_later and node.target not in _DETACHING_IN_PLACE:
                node.meta[HAD_GRADIENT] = True
            enabled = gradient_mode is not False
            self.written = mutated_storages(node, grad_enabled=enabled)
            self.assigned = set()
            used = [a for a in node.all_input_nodes if a in self.found.values]
            changed_views = [a for a in node.all_input_nodes if self._changes_view(a)]
            if loss.get(node) is not None:
                self._visit_loss(node, used)
            elif used:
                self._visit_use(node, used)
            elif changed_views:
                self._visit_change_of_view(node, changed_views)
            else:
                self._visit_other(node)
            self._keep_changed(node)
            self.found.mutations += [(position, storage, node) for storage in self.written]
            for storage in storages_of(node):
                self.sharing.setdefault(storage, []).append(node)
            made_of = {p for a in node.all_input_nodes for p in self.reduced.get(a, ())}
            if made_of and node not in self.found.values:
                self.reduced[node] = self.reduced.get(node, set()) | made_of
        self._drop_unread_views()
        for found in self.found.losses:
            if found.reason is None:
                self._check_unchanged(found)
        self._add_unreduced()
        if not self.without_loss:
            self._drop_without_loss()
        for found in self.found.losses:
            if found.reason is None and found.logits is not None:
                found.reason = self.kept.reason(found.logits)
        return self.found

    def _site(self, node: Node) -> Site:
        site = Site(node, self.found.values, self._is_late, self._is_changed)
        site.looked_through = self.found.looked_through
        return site

    def _is_late(self, node: Node, logits: Logits) -> bool:
        return not self.reduced.get(node, set()).isdisjoint(logits.projection.origins)

    def _is_changed(self, node: Node) -> bool:
        return self.found.mutation_between(node, self.found.position[node], math.inf) is not None

    def _visit_other(self, node: Node) -> None:
        inherited = next((self.lost[a] for a in node.all_input_nodes if a in self.lost), None)
        if inherited is not None:
            reason, vocabulary, escape = inherited
            same = escape in node.all_input_nodes and _is_transform(node)
            self.lost[node] = (reason, vocabulary, node if same else escape)
        self._visit_projection(node)

    def _visit_projection(self, node: Node) -> None:
        rule = projection.get(node)
        if rule is None:
            return
        try:
            logits = self._site(node).apply(rule)
        except UnsupportedError as why:
            reason = reasons.projection_unsupported(node, why.reason)
            self.lost[node] = (reason, size_hint(example(node).shape[-1]), node)
            return
        if logits is None:
            return
        inside = self._inside()
        if inside is not None:
            reason = reasons.projection_not_followed(node, inside)
            self.lost[node] = (reason, size_hint(example(node).shape[-1]), node)
            return
        if not had_gradient(node) and any(
            map(_requires_grad, nodes_of_projection(logits.projection))
        ):
            logits = logits.replace(expression=detach_expression(logits.expression))
        self.found.values[node] = logits.replace(path=(describe(node),))

    def _visit_use(self, node: Node, used: list[Node]) -> None:
        """A reduction, a transform, or an escape."""
        if node.op == "output":
            self.found.returned += used
            return
        site = self._site(node)
        try:
            self._check_transforms()
            self._check_others_unchanged(node, used)
            rule = reduction.get(node)
            result = None if rule is None else site.apply(rule)
            if isinstance(result, Logits):
                result = self._detached_if_cut(node, used, result)
                self.found.values[node] = _with_path(result, node)
                return
            if result is not None:
                if self.written:
                    raise UnsupportedError(reasons.REDUCES_AND_CHANGES)
                found = FoundLoss(node, False, self._first(used), self._row(node, used, result))
                self._record(found)
                if storages_of(node) & {storage_of(argument) for argument in used}:
                    self.views[node] = node
                return
            rule = transform.get(node)
            stacked = next((a for a in used if site.stack(a) is not None), None)
            if stacked is not None:
                value = through_stack(site, stacked, rule, self._pointwise)
            else:
                value = site.apply(rule) if rule is not None else self._pointwise(site)
            value = self._detached_if_cut(node, used, value)
            mutated = [a for a in used if storage_of(a) in self.written]
            if len(mutated) > 1:
                raise UnsupportedError(reasons.CHANGES_SEVERAL_LOGITS)
            if mutated:
                self._assign(node, mutated[0], value)
        except UnsupportedError as why:
            if not self.written and _is_unused(node):
                self.found.unused.append(node)
                return
            self._escape(node, used, why.reason)
            self._visit_projection(node)  # what one projection made may be another's input
        else:
            self._keep_stored(node, site)
            if example(node) is None and mutated:
                self.found.assignments[node] = value
            else:
                self.found.values[node] = _with_path(value, node)

    def _check_transforms(self) -> None:
        inside = self._inside()
        if inside is not None:
            raise UnsupportedError(inside)

    def _inside(self) -> Reason | None:
        """What makes that nothing can be rewritten here, None if nothing does."""
        if self.derivative is not None:
            return reasons.takes_derivatives(self.derivative)
        return next((region for region, count in self.open.items() if count), None)

    def _count_open(self, node: Node) -> None:
        module = getattr(node.target, "__module__", None) or ""
        name = operation(node)
        if name in ("_enter_inference_mode", "_exit_inference_mode"):
            self.open[reasons.INSIDE_INFERENCE_MODE] += 1 if name == "_enter_inference_mode" else -1
        elif node.op == "call_function" and "functorch" in module:
            self.open[reasons.INSIDE_TRANSFORM] += name.endswith("_increment_nesting")
            self.open[reasons.INSIDE_TRANSFORM] -= name.endswith("_decrement_nesting")

    def _check_others_unchanged(self, node: Node, used: list[Node]) -> None:
        if not self.written <= {storage_of(argument) for argument in used}:
            raise UnsupportedError(reasons.CHANGES_ANOTHER_TENSOR)

    def _pointwise(self, site: Site) -> Logits:
        node = site.node
        value = pointwise(site, site.function, *node.args, **node.kwargs)
        for argument in node.all_input_nodes:
            before = self.found.values.get(argument)
            same = isinstance(before, Logits) and value.expression is before.expression
            # Nothing happens to a scalar, but a matrix may be transposed.
            if same and _places(node) != _places(argument):
                raise UnsupportedError(reasons.MOVES_ELEMENTS)
        return value

    def _keep_stored(self, node: Node, site: Site) -> None:
        for stored in site.stored:
            self._keep([stored], reasons.used_with_other_logits(node))

    def _detached_if_cut(self, node: Node, used: list[Node], value: Any) -> Any:
        """What has no gradient in the user's graph has none here."""
        if had_gradient(node) or not _has_tensors(node) or not any(map(_requires_grad, used)):
            return value
        return each_logits(value, lambda v: v.replace(expression=detach_expression(v.expression)))

    def _assign(self, node: Node, changed: Node, value: Any) -> None:
        """Gives every name of the changed memory its new value.

        Args:
            node: what changes it.
            changed: the logits as the node knows them.
            value: what `changed` holds afterwards.
        """
        if not isinstance(value, Logits):
            raise UnsupportedError(reasons.CHANGES_SEVERAL_LOGITS)
        if self.found.gradient_mode[node] is False and _requires_grad(changed):
            raise UnsupportedError(reasons.HIDDEN_FROM_GRADIENT)
        before = self.found.values[changed]
        names = self.sharing[storage_of(changed)]
        read = [name for name in names if self._is_read_after(name, node)]
        views = [name for name in read if name in self.views]
        read += [_viewed(self.views[name]) for name in views]
        updated = {changed: value.replace(path=(*before.path, describe(node)))}
        is_whole = _has_rows_of(changed, names[0], self.found.values)
        for name in dict.fromkeys(read):
            if name not in updated and name not in views:
                old = self.found.values.get(name)
                updated[name] = _seen_as(old, before, value, is_whole)
        self.found.values.update(updated)
        self.assigned.add(storage_of(changed))
        for name in views:
            self._read_again(name, after=node)

    def _keep_changed(self, node: Node) -> None:
        """Keeps the logits whose memory the node changes in a way that was not followed: through
        a view of a view that is a value of rows, say."""
        for storage in self.written - self.assigned:
            names = [n for n in self.sharing.get(storage, ()) if n in self.found.values]
            self._keep(names, reasons.changed_through_view(node))

    def _is_read_after(self, name: Node, node: Node) -> bool:
        return any(self._is_after(user, node) for user in name.users)

    def _changes_view(self, name: Node) -> bool:
        return name in self.views and storage_of(name) in self.written

    def _visit_change_of_view(self, node: Node, changed: list[Node]) -> None:
        """A change in place of what is a value of rows, and whose memory is that of logits."""
        made = self.views[changed[0]]
        argument = self._matrix_of(made)
        logits = self.found.values[argument]
        try:
            self._check_transforms()
            if len(changed) > 1 or self.written != {storage_of(made)}:
                raise UnsupportedError(reasons.CHANGES_ANOTHER_TENSOR)
            site = self._site(node)
            row = self._row_of(made)
            value = changed_through_view(site, changed[0], row, logits)
            self._assign(node, argument, value)
        except UnsupportedError as why:
            self._keep([argument], reasons.used_by(node, why.reason))
        else:
            self.found.assignments[node] = value
            if node.users:
                self.views[node] = made
                self._read_again(node)

    def _matrix_of(self, view: Node) -> Node:
        """The logits whose diagonal a view is: the first name of their memory, or the one that
        the view was made of, which may be the transpose of that or a part of it."""
        argument = _viewed(view)
        first = self.sharing[storage_of(argument)][0]
        values = self.found.values
        if not _has_rows_of(argument, first, values) or example(first).dim() != 2:
            return argument
        same_values = values[first].expression is values[argument].expression
        same_places = begins_vocabulary(values[argument], values[first])
        return first if same_values and same_places else argument

    def _row_of(self, view: Node) -> Row:
        """What a view that is a value of rows holds now."""
        rule = reduction.get(view)
        assert rule is not None, "only reductions make values of rows"
        row = self._site(view).apply(rule)
        return self._row(view, [_viewed(view)], row)

    def _read_again(self, name: Node, after: Node | None = None) -> None:
        """Gives a name of such a view the value that it has now."""
        made = self.views[name]
        logits = self.found.values[_viewed(made)]
        self._record(FoundLoss(name, False, logits, self._row_of(made), after=after))

    def _drop_unread_views(self) -> None:
        """Forgets views of which nothing is read: they were only made to be changed."""
        position = self.found.position
        for number, found in reversed(list(enumerate(self.found.losses))):
            if found.node not in self.views:
                continue
            later = [
                position[each.place]
                for each in self.found.losses
                if each.node is found.node and position[each.place] > position[found.place]
            ]
            last = min(later, default=math.inf)
            read = [
                user
                for user in found.node.users
                if position[found.place] < position[user] <= last
                and user not in self.found.assignments
            ]
            if not read and found.logits is not None:
                del self.found.losses[number]
                self.found.assignments.setdefault(found.node, found.logits)

    def _is_after(self, user: Node, node: Node) -> bool:
        return user is not node and user not in self.found.position

    def _first(self, used: list[Node]) -> Logits:
        return all_logits(self.found.values[used[0]])[0]

    def _escape(self, node: Node, used: list[Node], cause: Reason) -> None:
        is_loss = is_unfused(node)
        if is_loss:
            cause = reasons.LOSS_WITHOUT_RULE
        reason = reasons.used_by(node, cause)
        logits = self._first(used)
        self.lost[node] = (reason, logits.projection.classes, node)
        self._keep(used, reason)
        if is_loss or _holds_softmax(node, size_hint(logits.vocabulary)):
            self._record(FoundLoss(node, True, logits, reason=reason))

    def _keep(self, used: list[Node], reason: Reason) -> None:
        for argument in used:
            for logits in all_logits(self.found.values[argument]):
                self.kept.add(logits, reason)

    def _record(self, found: FoundLoss) -> None:
        self.found.losses.append(found)
        for part in parts(found.result):
            if isinstance(part, Statistic):
                origins = part.logits.projection.origins
                self.reduced.setdefault(found.node, set()).update(origins)

    def _row(self, node: Node, used: list[Node], result: Any) -> Any:
        """The result, without gradient where the user's graph has none."""
        rows = result if isinstance(result, tuple) else (result,)
        if had_gradient(node) or not _has_tensors(node):
            return result
        if not any(_requires_grad(read) for row in rows for read in nodes_of(row)):
            return result
        if isinstance(result, tuple):
            return tuple(detach_row(each) for each in result)
        return detach_row(result)

    def _visit_loss(self, node: Node, used: list[Node]) -> None:
        input = node.kwargs.get("input", node.args[0] if node.args else None)
        found = FoundLoss(node, True)
        rule = loss.get(node)
        assert rule is not None
        is_of_rows = isinstance(input, Node) and input in self.reduced and input not in self.lost
        if is_of_rows and not self._has_classes(input):
            return  # of one value a row, not of logits
        if not used:
            found.reason = self._reason_without_logits(input)
            self.found.losses.append(found)
            return
        found.logits = self._first(used)
        site = self._site(node)
        try:
            self._check_transforms()
            result = site.apply(rule)
            self._keep_stored(node, site)
            if isinstance(result, Logits):
                self.found.values[node] = _with_path(
                    self._detached_if_cut(node, used, result), node
                )
                return
            found.result = self._row(node, used, result)
        except UnsupportedError as why:
            found.reason = reasons.loss_unsupported(node, why.reason)
            self._keep(used, found.reason)
            if isinstance(input, Node) and input not in self.found.values:
                found.logits = None
                found.reason = self._reason_without_logits(input)
                self._escape(node, used, reasons.NOT_THE_LOSS_INPUT)
        self._record(found)

    def _has_classes(self, node: Node) -> bool:
        """Whether what is computed from a reduction is as wide as the logits again."""
        vocabularies = {size_hint(example(origin).shape[-1]) for origin in self.reduced[node]}
        return not vocabularies.isdisjoint({*map(size_hint, example(node).shape)} - {None})

    def _reason_without_logits(self, input: object) -> Reason:
        if isinstance(input, Node) and input in self.lost:
            reason, vocabulary, escaped = self.lost[input]
            # Every later node of a model is made from its first projections; of the one before
            # this loss are those with its classes, and what came out of the escape itself.
            if escaped is input or vocabulary in map(size_hint, example(input).shape):
                return reason
        source = input
        while isinstance(source, Node) and (_is_transform(source) or _keeps_shape(source)):
            source = max(source.all_input_nodes, key=_rank)
        if not isinstance(source, Node):
            return reasons.FROM_NO_TENSOR
        if source.op == "placeholder" and isinstance(example(source), torch.nn.Parameter):
            return reasons.from_parameter(source)
        if source.op == "placeholder" and self.is_inner:
            return reasons.FROM_CALLING_GRAPH
        if source.op == "placeholder":
            return reasons.from_outside(source)
        return reasons.made_by(source)

    def _check_unchanged(self, found: FoundLoss) -> None:
        """What will be read where the loss is, and kept for its backward, must be what was read
        where the user's graph reads it."""
        here = self.found.position[found.place]
        assert found.logits is not None
        # One backward may serve several losses.
        trained = any(map(_requires_grad, nodes_of_projection(found.logits.projection)))
        last = math.inf if trained else here
        mutation = self.found.changed_before(found.result, here, last)
        if mutation is not None:
            cause = reasons.may_change_operand(mutation)
            found.reason = reasons.loss_unsupported(found.node, cause)
            self.kept.add(found.logits, found.reason)

    def _add_unreduced(self) -> None:
        """Losses that are themselves logits, like ``kl_div(reduction="none")``, of which there is
        something to report only if they are stored."""
        for node, value in self.found.values.items():
            if loss.get(node) is not None:
                self.found.losses.append(FoundLoss(node, True, all_logits(value)[0]))

    def _drop_without_loss(self) -> None:
        """Forgets projections from which no loss is computed: what is summed or compared there is
        something else than logits."""
        of_classes = [
            found.logits.projection
            for found in self.found.losses
            if found.logits is not None and (found.is_loss or _is_written_by_hand(found))
        ]
        nodes = {origin for projection in of_classes for origin in projection.origins}
        # Of the same vocabulary is a teacher whose labels are an argmax.
        vocabularies = {projection.classes for projection in of_classes}
        every, self.found.losses = self.found.losses, []
        for found in every:
            if (
                found.logits is None
                or not nodes.isdisjoint(found.logits.projection.origins)
                or found.logits.projection.classes in vocabularies
            ):
                self.found.losses.append(found)
            elif found.has_softmax:
                found.reason = self.kept.reason(found.logits) or reasons.taken_for_router(
                    found.logits.projection.classes, found.logits.projection.hidden
                )
                self.found.dropped.append(found)


def _viewed(view: Node) -> Node:
    """The logits that a view which is a value of rows was made of."""
    return view.all_input_nodes[0]


def _has_rows_of(part: Node, whole: Node, values: dict[Node, Any]) -> bool:
    """Whether a view of logits has all of their rows."""
    if not all(isinstance(values.get(node), Logits) for node in (part, whole)):
        return False
    rows = [_rows(example(node), values[node].vocabulary_dim) for node in (part, whole)]
    return statically_known_true(rows[0] == rows[1])


def _rows(value: torch.Tensor, vocabulary_dim: int) -> Any:
    """How many rows logits have, also where the vocabulary is empty."""
    return math.prod(size for dim, size in enumerate(value.shape) if dim != vocabulary_dim)


def _seen_as(old: Any, before: Logits, value: Logits, is_whole: bool) -> Logits:
    """What another name of changed logits holds.

    Args:
        old: what it held.
        before, value: what the name held by which they were changed, and what it holds now.
        is_whole: whether that name has all of the rows.
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
    if not is_derived and new:  # whose rows are those of the name that was changed
        raise UnsupportedError(reasons.ALSO_READ_AS_VIEW)
    expression = expression_after_change(old, before, value.expression)
    if expression is None:
        raise UnsupportedError(reasons.CHANGES_PART)
    return old.replace(expression=expression, compute_dtype=value.compute_dtype)


def _is_written_by_hand(found: FoundLoss) -> bool:
    """Whether it may be a loss without having its name. The router of a mixture of experts has a
    softmax too, but fewer experts than hidden units: storing its logits costs next to nothing."""
    assert found.logits is not None
    projection = found.logits.projection
    return found.has_softmax and projection.has_more_classes


def _holds_softmax(node: Node, vocabulary: int | None) -> bool:
    """Whether it calls a graph, as an autograd.Function is one, that has a softmax over so many
    classes in it, and no loss that is reported by itself."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    inner = [each for graph in called_graphs(node) for each in graph.graph.nodes]
    if any(loss.get(each) is not None for each in inner):
        return False
    softmaxes = [each for each in inner if operation(each) in _SOFTMAXES]
    read = [example(argument) for each in softmaxes for argument in each.all_input_nodes]
    sizes = [size for value in read for size in getattr(value, "shape", ())]
    return vocabulary in [size for size in sizes if isinstance(size, int)]


_SOFTMAXES = ("logsumexp", "log_softmax", "softmax")


def _keeps_shape(node: Node) -> bool:
    """Whether it may be pointwise."""
    value = example(node)
    inputs = [example(argument) for argument in node.all_input_nodes]
    if projection.get(node) is not None:
        return False
    return isinstance(value, torch.Tensor) and any(
        isinstance(each, torch.Tensor) and same_shape(each.shape, value.shape) for each in inputs
    )


def _places(node: Node) -> tuple[str, str]:
    value = example(node)
    return str(tuple(value.shape)), str(value.stride())


def _rank(node: Node) -> int:
    value = example(node)
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _is_transform(node: Node) -> bool:
    rule = transform.get(node)
    return rule is not None and bool(node.all_input_nodes)


def _with_path(value: Any, node: Node) -> Any:
    return each_logits(value, lambda v: v.replace(path=(*v.path, describe(node))))


def _has_tensors(node: Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(example(node)))


def _is_cut(node: Node, gradient_mode: object) -> bool:
    """Whether what a node makes has no gradient, whatever is written into it later."""
    if node.target in _DETACHING:
        return True
    if gradient_mode is not False or not node.op.startswith("call"):
        return False
    # What changes a tensor in place returns the tensor itself.
    return not any(example(argument) is example(node) for argument in node.all_input_nodes)


_DETACHING = (
    *("detach", torch.detach, torch.Tensor.detach, torch.ops.aten.detach.default),
    get_data,
)
_DETACHING_IN_PLACE = ("detach_", torch.detach_, torch.Tensor.detach_)


def _requires_grad(node: Node) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_unused(node: Node) -> bool:
    """Whether nobody reads what a node makes, which does nothing else: only such operations are
    meant as have a rule, for one without users may well have an effect."""
    known = transform.get(node) is not None or reduction.get(node) is not None
    if not known or mutated_storages(node):
        return False
    return all(_is_unused(user) for user in node.users)


_REGIONS = (reasons.INSIDE_TRANSFORM, reasons.INSIDE_INFERENCE_MODE)

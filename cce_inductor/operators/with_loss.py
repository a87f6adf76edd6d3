"""Gradients that are made with the loss: a pass over joint graphs of forward and backward.

The gradient of a training loss is usually known up to one factor before the loss is computed: that
of a row's logsumexp is ``1 / tokens``, times the gradient of the loss. Then
`reduce_rows_with_gradients` computes the gradients in the forward, for a loss whose gradient is 1,
and the backward multiplies them by the factor. So no logits are computed twice. Inductor multiplies
in the memory of the gradient, unless the graph is retained for another backward.

Before Inductor divides a graph into forward and backward, its gradients are functions of
*tangents*, the gradients of the graph's results. The pass looks for a `reduce_rows_backward` whose
upstream gradients are one scalar tangent times something that is known in the forward.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from cce_inductor.kernels import sampling
from cce_inductor.kernels.blockwise.with_gradients import rows_at_once
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.stored import stored_bytes
from cce_inductor.operators.fingerprint import sources
from cce_inductor.reporting.location import location
from cce_inductor.reporting.log import log
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.passes import AddedPass
from cce_inductor.torch_internals.versions import backward_takes_memory

_aten, _prims = torch.ops.aten, torch.ops.prims

_LINEAR = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.div.Scalar,
    _aten.expand.default,
    _aten.mul.Scalar,
    _aten.neg.default,
    _aten.permute.default,
    _aten.reshape.default,
    _aten.select_backward.default,
    _aten.slice.Tensor,
    _aten.slice_backward.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.view.default,
}
"""Operators that are linear in their first argument and have no other tensor."""

_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}


class WithLossPass(AddedPass):
    """Runs `make_gradients_with_losses`."""

    def run(self, graph: Graph) -> None:
        log.gradients_with_losses(make_gradients_with_losses(graph))

    def key(self) -> str:
        return sources()


def make_gradients_with_losses(graph: Graph) -> set[str | None]:
    """Replace every forward and backward of logits that can be computed together.

    Returns:
        The places of their losses in the user's code.
    """
    places = set()
    target = torch.ops.cce_inductor.reduce_rows_backward.default
    for backward in graph.find_nodes(op="call_function", target=target):
        try:
            forward = _forward_of(backward)
            if forward is not None and _Joint(graph, forward, backward).join():
                places.add(location(forward))
        except Exception:
            surprised("the logits of a loss are computed again for its gradient")
    return places


def _forward_of(backward: Node) -> Node | None:
    """Return the `reduce_rows` whose gradient a node computes; None if it is not found."""
    _, results, *arguments = backward.args
    sources = {_source(result) for result in results}
    (source,) = sources if len(sources) == 1 else (None,)
    is_forward = (
        isinstance(source, Node)
        and source.target is torch.ops.cce_inductor.reduce_rows.default
        and list(source.args) == arguments[:-1]
    )
    return source if is_forward else None


def _source(result: Any) -> Any:
    """Return the node whose result a node takes, through aliases."""
    while isinstance(result, Node) and result.target in (_aten.alias.default, operator.getitem):
        result = result.args[0]
    return result


def _value(node: Node) -> Any:
    return node.meta["val"]


class _Joint:
    """A forward and a backward that may be joined.

    Args:
        graph: their graph.
        forward, backward: the nodes.
    """

    def __init__(self, graph: Graph, forward: Node, backward: Node):
        self._graph, self._forward, self._backward = graph, forward, backward
        self._input, *arguments = torch.fx.map_arg(forward.args, _value)
        head = Head.of(*arguments)
        # Instead of logits for the backward, the workspace holds those of some rows.
        whole = head.workspace_bytes + stored_bytes(head, self._input.shape[0])
        self._head = dataclasses.replace(head, workspace_bytes=whole, stored_tiles=0)
        self._tangents: set[Node] = set()
        self._copies: dict[Node, Node] = {}

    @functools.cached_property
    def _place(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self._graph.nodes)}

    @functools.cached_property
    def _of_tangents(self) -> set[Node]:
        return _downstream(node for node in self._graph.nodes if _is_tangent(node))

    @functools.cached_property
    def _of_forward(self) -> set[Node]:
        return _downstream([self._forward])

    def join(self) -> bool:
        """Join them, if the kernels can compute both together and the upstream gradients are one
        tangent times what is known before.

        Returns:
            Whether they are joined.
        """
        graph, forward, backward = self._graph, self._forward, self._backward
        if not self._is_computed_together():
            return False
        upstream = [grad for grad in backward.args[0] if grad is not None]
        if not all(map(self._is_linear, upstream)) or len(self._tangents) != 1:
            return False
        (tangent,) = self._tangents
        with graph.inserting_before(forward):
            made, count = self._joined(tangent)
        for user in list(forward.users):
            if user.args[1] < count:
                _replace(user, _item(made, user.args[1], user))
        for user in list(backward.users):
            gradient = _item(made, count + user.args[1], user)
            with graph.inserting_before(user):
                product = graph.call_function(_aten.mul.Tensor, (gradient, tangent))
            product.meta = dict(user.meta)
            _replace(user, product)
        _erase_unused(backward)
        for user in list(forward.users):
            _erase_unused(user)
        return True

    def _is_computed_together(self) -> bool:
        """Whether the kernels can compute both together, in the workspace and as precisely.

        A gradient that is narrower than its sum would be rounded before it is multiplied by the
        factor, and once more after it.
        """
        head, (grads, *_, mask) = self._head, self._backward.args
        program = head.program.with_gradient([grad is not None for grad in grads])
        tensors = [self._input, head.linear_weight, head.linear_bias]
        dtypes = {each.dtype for each in tensors if each is not None}
        return (
            self._input.device.type == "cpu"
            and isinstance(head.vocabulary, int)
            and dtypes == {head.compute_dtype} == {head.logit_dtype}
            and not head.program.products
            and bool(program.normalizers)
            and not sampling.applies(head)
            and not any(mask[3:])
            and rows_at_once(head) > 0
            and (backward_takes_memory() or self._weight_bytes() <= head.workspace_bytes)
        )

    def _weight_bytes(self) -> int:
        """Return the bytes of a copy of the gradient of the weight, 0 if it is not asked for."""
        weight, (*_, mask) = self._head.linear_weight, self._backward.args
        return weight.numel() * weight.itemsize if mask[1] else 0

    def _joined(self, tangent: Node) -> tuple[Node, int]:
        """Build the operator that computes both, and return it with its number of statistics."""
        value = _value(tangent)
        one = self._graph.call_function(
            _aten.full.default, ([], 1.0), {"dtype": value.dtype, "device": value.device}
        )
        one.meta["val"] = value.new_ones(())
        self._copies[tangent] = one
        count = self._head.program.result_count
        *others, _, sample_below, _ = self._forward.args
        grads = [grad and self._copy(grad) for grad in self._backward.args[0][:count]]
        made = self._graph.call_function(
            torch.ops.cce_inductor.reduce_rows_with_gradients.default,
            (grads, *others, self._head.workspace_bytes, sample_below, 0, self._backward.args[-1]),
        )
        made.meta = _forward_meta(self._forward)
        # Inductor compares the memory of these values: a gradient is not its product.
        with _value(self._forward)[0].fake_mode:
            values = [
                *_value(self._forward)[:count],
                *map(torch.empty_like, _value(self._backward)),
            ]
        made.meta["val"] = values
        return made, count

    def _is_linear(self, node: Any) -> bool:
        """Whether a node is a scalar tangent times something that is known in the forward."""
        if not isinstance(node, Node) or node not in self._of_tangents:
            return False
        if node.op == "placeholder":
            self._tangents.add(node)
            return _value(node).shape == ()
        args, target = node.args, node.target
        if target in _LINEAR:
            return self._is_linear(args[0])
        if target is _prims.convert_element_type.default:
            return self._is_linear(args[0]) and args[1].is_floating_point
        if target is _aten.div.Tensor:
            return self._is_linear(args[0]) and self._is_known(args[1])
        if target is _aten.mul.Tensor:
            first, second = sorted(args[:2], key=self._is_known)
            return self._is_linear(first) and self._is_known(second)
        if target in _SUMS:
            return all(map(self._is_linear, args[:2]))
        if target is _aten.where.self:
            condition, *values = args
            return self._is_known(condition) and all(
                _is_zero(each) or self._is_linear(each) for each in values
            )
        return False

    def _is_known(self, argument: Any) -> bool:
        """Whether an argument can be computed before the forward, as often as one likes."""
        if not isinstance(argument, Node) or self._is_before(argument):
            return True
        if argument in self._of_tangents or argument in self._of_forward:
            return False
        target = argument.target
        is_pure = isinstance(target, torch._ops.OpOverload) and not (
            target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
        )
        return is_pure and all(map(self._is_known, argument.all_input_nodes))

    def _is_before(self, node: Node) -> bool:
        return self._place[node] < self._place[self._forward] and node not in self._of_tangents

    def _copy(self, node: Node) -> Node:
        """Return a node's value for a tangent of 1, as a node before the forward."""
        if self._is_before(node):
            return node
        if node not in self._copies:
            copy = self._graph.node_copy(node, self._copy)
            copy.meta = _forward_meta(node)
            self._copies[node] = copy
        return self._copies[node]


def _downstream(sources: Iterable[Node]) -> set[Node]:
    """Return nodes, and all that depend on them."""
    found, left = set[Node](), list(sources)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left.extend(node.users)
    return found


def _is_tangent(node: Node) -> bool:
    return node.op == "placeholder" and "tangents" in str(node.target)


def _is_zero(argument: Any) -> bool:
    """Whether an argument is a new tensor of zeros."""
    if not isinstance(argument, Node):
        return False
    position = {_aten.scalar_tensor.default: 0, _aten.full.default: 1}.get(argument.target)
    return position is not None and argument.args[position] == 0


def _forward_meta(node: Node) -> dict[str, Any]:
    """Return what of a node's `meta` holds for a node in the forward, too."""
    return {key: node.meta[key] for key in ("val", "stack_trace") if key in node.meta}


def _item(made: Node, position: int, like: Node) -> Node:
    """Return a node for an item of a result, before the node that it is like."""
    with made.graph.inserting_after(made):
        item = made.graph.call_function(operator.getitem, (made, position))
    item.meta = _forward_meta(like)
    item.meta["val"] = made.meta["val"][position]
    return item


def _replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _erase_unused(node: Node) -> None:
    """Erase a node that nothing uses, and those that it alone used."""
    if node.users or node.op == "placeholder":
        return
    read = node.all_input_nodes
    node.graph.erase_node(node)
    for each in read:
        _erase_unused(each)

"""Blocks: arguments as large as the logits, which are computed from smaller tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from cce_inductor.kernels.names import OperandKind
from cce_inductor.patterns.language.capture import captured
from cce_inductor.patterns.language.examples import (
    arguments_of,
    had_gradient,
    requires_grad,
    same_shape,
    tensor_example,
)
from cce_inductor.patterns.language.expression import (
    COLUMN,
    Apply,
    Expression,
    Operand,
    detach_expression,
    leaves,
    operands_of,
)
from cce_inductor.patterns.language.heads import beside
from cce_inductor.patterns.language.logits import Logits, same_logits
from cce_inductor.patterns.language.operands import broadcast_operand
from cce_inductor.patterns.language.rows import parts
from cce_inductor.patterns.language.site import Site
from cce_inductor.patterns.language.tables import UnsupportedError, block
from cce_inductor.reporting import reasons


def read(
    site: Site, argument: Node, logits: Logits, shape: tuple[Any, ...] | None = None
) -> Expression:
    """Return an argument as an expression of `logits`.

    Args:
        site: the node.
        argument: the same logits after other pointwise functions, logits of another head, or a
            tensor that broadcasts to them. A tensor as large as the logits is computed from smaller
            ones if it can be, and is otherwise read as it is stored.
        logits: the logits in whose expression the argument stands.
        shape: their shape, None for that of the node's argument which holds them.

    Raises:
        UnsupportedError: the argument does not broadcast to the logits.
    """
    shape = site.shape_of(logits) if shape is None else shape
    if site.is_logits(argument):
        other = site.logits(argument)
        has_shape = same_shape(tensor_example(argument).shape, shape)
        if has_shape and same_logits(other, logits):
            return other.expression
        if has_shape and not site.is_stored(other):
            expression = beside(site, other, logits)
            if expression is not None:
                return expression
        if set(other.origins) & set(logits.origins):
            site.unsupported(reasons.OTHER_ROWS_OF_SAME_LOGITS)
        site.stored.append(argument)
    elif site.holds_logits(argument):
        site.unsupported(reasons.TUPLE_OF_LOGITS)
    made = _block(site, argument, logits, shape)
    if made is None or not (COLUMN in leaves(made) or tensor_example(argument).requires_grad):
        return broadcast_operand(site, argument, logits, shape)
    # A rule's operation may also check its argument, so it stays in the graph.
    site.looked_through += [
        node for node, expression in site.blocks.items() if expression and not block.get(node)
    ]
    return made


def _block(site: Site, argument: Node, logits: Logits, shape: tuple[Any, ...]) -> Expression | None:
    """Return how a tensor as large as the logits is computed from smaller tensors.

    It is computed by `block` rules and pointwise functions. None if it is not.
    """
    if (
        not same_shape(tensor_example(argument).shape, shape)
        or site.holds_logits(argument)
        or site.is_changed(argument)
    ):
        return None
    if argument not in site.blocks:
        inner = site.at_argument(argument, logits, shape)
        rule = block.get(argument)
        try:
            if rule is not None:
                made = inner.apply(rule, logits)
            else:
                made = _pointwise_block(inner, logits, shape)
            sources = [part for each in operands_of(made) for part in parts(each.source)]
            is_cut = any(map(requires_grad, sources)) and not had_gradient(argument)
            site.blocks[argument] = detach_expression(made) if is_cut else made
        except UnsupportedError:
            site.blocks[argument] = None
    return site.blocks[argument]


def _pointwise_block(site: Site, logits: Logits, shape: tuple[Any, ...]) -> Expression:
    node = site.node
    if node.op not in ("call_function", "call_method") or "out" in node.kwargs:
        site.unsupported(reasons.NOTHING_MAKES_IT)
    if any(_may_move_elements(site, argument) for argument in node.all_input_nodes):
        site.unsupported(reasons.MOVES_ELEMENTS)
    by_method = node.op == "call_method"
    function = getattr(torch.Tensor, node.target) if by_method else node.target

    def meaning(argument: Node) -> tuple[Expression, torch.dtype]:
        made = _block(site, argument, logits, shape)
        if made is None:
            made = broadcast_operand(site, argument, logits, shape)
            if site.holds_logits(argument) or made.kind is OperandKind.LOGIT:
                site.unsupported(reasons.MADE_OF_LARGE)
        return made, tensor_example(argument).dtype

    args, kwargs = arguments_of(node)
    expression = captured(site, function, args, kwargs, logits, meaning)
    if not isinstance(expression, (Apply, Operand)):
        site.unsupported(reasons.CONSTANT)
    return _simplified(expression)


def _may_move_elements(site: Site, argument: Node) -> bool:
    """Whether the node may be a view of an argument with its elements in other places."""
    before, after = tensor_example(argument), site.example
    return before.numel() == after.numel() and before.stride() != after.stride()


def _simplified(expression: Expression) -> Expression:
    """Replace a conversion of a choice between two integers by a choice between two floats."""
    if isinstance(expression, Apply) and expression.target == "div.Tensor":
        chosen, divisor = expression.args
        if isinstance(chosen, Apply) and chosen.target == "where.Scalar" and divisor == 1:
            condition, *numbers = chosen.args
            return Apply("where.Scalar", (condition, *map(float, numbers)))
    return expression

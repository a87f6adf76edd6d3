"""What has been done to a logit since the projection: a graph of pointwise ATen operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeGuard

from torch.fx import Node

from cce_inductor.kernels import names
from cce_inductor.kernels.names import OperandKind


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """The logit, or its place in the vocabulary.

    Attributes:
        name: its name in a program.
    """

    name: names.Name


LOGIT, COLUMN = Leaf(names.LOGIT), Leaf(names.COLUMN)


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """A tensor that a pointwise operator reads beside the logits.

    Attributes:
        kind: the dimensions of the logits over which it varies.
        source: a node, a value computed from statistics of the same logits, or for a product the
            `Logits` that it makes.
        row_operations: those of the logits when it was read.
        vocabulary_dim: the vocabulary's dimension at that time.
        reader: the node that read it.
    """

    kind: OperandKind
    source: Any
    row_operations: tuple[Any, ...]
    vocabulary_dim: int
    reader: Node


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """``target(*args, **kwargs)``, where `target` names an ATen overload, "div.Tensor"."""

    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


Expression: TypeAlias = Leaf | Operand | Apply


def leaves(
    expression: Any, *, through: Callable[[Apply], bool] = lambda _: True
) -> Iterator[Leaf | Operand]:
    """Yield each leaf of an expression once.

    Args:
        through: whether the leaves below a call are wanted.
    """
    seen: set[int] = set()
    pending = [expression]
    while pending:
        item = pending.pop()
        if id(item) in seen or not isinstance(item, Expression):
            continue
        seen.add(id(item))
        if not isinstance(item, Apply):
            yield item
        elif through(item):
            pending += [*item.args, *(value for _, value in item.kwargs)]


def operands_of(expression: Any) -> list[Operand]:
    """Return each operand of an expression once."""
    return [leaf for leaf in leaves(expression) if isinstance(leaf, Operand)]


def detach_expression(expression: Any) -> Apply:
    """Return the same value without a gradient."""
    return Apply("detach", (expression,))


def is_detached(expression: Any) -> TypeGuard[Apply]:
    """Return whether an expression is another one without its gradient."""
    return isinstance(expression, Apply) and expression.target == "detach"


def is_differentiable(expression: Any) -> bool:
    """Whether an expression has a derivative by a logit: reads one, and not only detached."""
    return any(
        leaf is LOGIT or (isinstance(leaf, Operand) and leaf.kind.is_product)
        for leaf in leaves(expression, through=lambda call: call.target != "detach")
    )


def depends_on_column(expression: Any) -> bool:
    """Whether an expression reads the place in the vocabulary, or a value for each place."""
    return any(
        leaf is COLUMN or (isinstance(leaf, Operand) and leaf.kind.varies_over_columns)
        for leaf in leaves(expression)
    )


def is_constant_over_row(expression: Any) -> bool:
    """Whether an expression has the same value in every column: it reads no logit either."""
    return not any(
        isinstance(leaf, Leaf) or leaf.kind.varies_over_columns for leaf in leaves(expression)
    )


def where(mask: Any, new: Any, old: Any) -> Apply:
    """Return `new` where a mask is true and `old` elsewhere.

    Args:
        mask: a boolean expression.
        new: a function of `old`, or a number.
        old: an expression.
    """
    if isinstance(new, (int, float)):
        return Apply("where.ScalarSelf", (mask, new, old))
    return Apply("where.self", (mask, under_mask(mask, new, old), old))


def under_mask(mask: Any, function: Any, argument: Any) -> Any:
    """Return a function whose value is read only where a mask is true.

    Elsewhere it is evaluated at 0.5 instead of `argument`, where its derivative might be infinite
    and would make the gradient NaN.

    Args:
        mask: a boolean expression.
        function: an expression that reads `argument`.
        argument: an expression.
    """
    if _is_polynomial(function, argument):
        return function
    inside = Apply("where.ScalarOther", (mask, argument, 0.5))
    return substituted(function, {id(argument): inside})


_RING = ("add.Tensor", "sub.Tensor", "mul.Tensor", "neg")


def _is_polynomial(function: Any, argument: Any) -> bool:
    """Whether a function and its derivative are finite wherever `argument` is."""
    if function is argument or not isinstance(function, Apply):
        return True
    parts = function.args
    if function.target == "div.Tensor" and isinstance(parts[1], (int, float, Operand)):
        parts = parts[:1]
    elif function.target not in _RING:
        return False
    return all(_is_polynomial(part, argument) for part in parts)


def substituted(expression: Any, new: dict[int, Any]) -> Any:
    """Return the expression with other parts.

    Args:
        new: what stands in the place of a part, by the identity of that part.
    """
    made = dict(new)

    def visit(item: Any) -> Any:
        if id(item) in made or not isinstance(item, Apply):
            return made.get(id(item), item)
        args = tuple(map(visit, item.args))
        named = tuple((key, visit(value)) for key, value in item.kwargs)
        made[id(item)] = Apply(item.target, args, named)
        return made[id(item)]

    return visit(expression)

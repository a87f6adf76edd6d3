"""What has been done to a logit since the projection: a graph of pointwise ATen operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx import Node


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """``z``, the logit, or ``j``, its place in the vocabulary."""

    name: str


LOGIT, COLUMN = Leaf("z"), Leaf("j")


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """A tensor that a pointwise operator read beside the logits.

    Attributes:
        kind: ``"r"``: one value a row, ``"c"``: one a vocabulary entry, ``"s"``: one, ``"b"``:
            one a logit.
        source: a node, or a value made of statistics of the same logits.
        row_operations: those of the logits when it was read.
        vocabulary_dim: the dimension that counted the vocabulary then.
        reader: the node that read it.
    """

    kind: str
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


Expression = Leaf | Operand | Apply


def leaves(
    expression: Any, *, through: Callable[[Apply], bool] = lambda _: True
) -> Iterator[Leaf | Operand]:
    """Each leaf of an expression, once; what is below a call only if it leads `through`."""
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


def trains(expression: Any) -> bool:
    """Whether it has a derivative by the logit: reads it, and not only detached."""
    return LOGIT in leaves(expression, through=lambda call: call.target != "detach")


def is_constant_over_row(expression: Any) -> bool:
    """Whether every entry of a row has the same value: no logit and nothing of its column."""
    return not any(isinstance(leaf, Leaf) or leaf.kind in ("c", "b") for leaf in leaves(expression))


def where(inside: Any, new: Any, old: Any) -> Apply:
    """A logit that is `new`, a function of `old` or a number, where `inside` is true, else `old`.

    Nobody computes `new` elsewhere: there its derivative, which may be infinite or NaN, is that at
    a number that hardly any function minds.
    """
    if isinstance(new, (int, float)):
        return Apply("where.ScalarSelf", (inside, new, old))
    return Apply("where.self", (inside, only_where(inside, new, old), old))


def only_where(inside: Any, function: Any, argument: Any) -> Any:
    """A function of `argument` that is read only where `inside` is true."""
    if _is_polynomial(function, argument):
        return function
    return _substituted(function, argument, Apply("where.ScalarOther", (inside, argument, 0.5)))


_RING = ("add.Tensor", "sub.Tensor", "mul.Tensor", "neg")


def _is_polynomial(function: Any, argument: Any) -> bool:
    """Whether it is finite, and its derivative too, wherever `argument` is."""
    if function is argument or not isinstance(function, Apply):
        return True
    parts = function.args
    if function.target == "div.Tensor" and isinstance(parts[1], (int, float, Operand)):
        parts = parts[:1]
    elif function.target not in _RING:
        return False
    return all(_is_polynomial(part, argument) for part in parts)


def _substituted(expression: Any, old: Any, new: Any) -> Any:
    """The same with `new` in the place of `old`."""
    made: dict[int, Any] = {id(old): new}

    def visit(item: Any) -> Any:
        if id(item) in made or not isinstance(item, Apply):
            return made.get(id(item), item)
        args = tuple(map(visit, item.args))
        named = tuple((key, visit(value)) for key, value in item.kwargs)
        made[id(item)] = Apply(item.target, args, named)
        return made[id(item)]

    return visit(expression)

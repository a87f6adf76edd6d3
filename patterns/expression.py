"""What has been done to a logit since the projection: a graph of pointwise ATen operators.

Nothing is known about an operator but that it is pointwise, which ATen says of itself: any
function of PyTorch made of such operators can be captured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import Node
from torch.utils._pytree import tree_map

from ..kernels.program import (
    Name,
    NotPointwiseError,
    Program,
    Reduction,
    Step,
    differentiated,
    record,
)


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


def capture(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operand_of: Callable[[Node], tuple[Any, torch.dtype]],
    *,
    numbers_as_tensors: bool = False,
) -> Any:
    """What ``function(*args, **kwargs)`` does to each element.

    Args:
        function: anything that works on tensors; an in-place one counts as the function of the
            same name that is not.
        args, kwargs: its arguments, with nodes for tensors.
        numbers_as_tensors: whether it is given its constants as tensors.
        operand_of: for a node, the expression that it stands for, and its dtype.

    Returns:
        An `Expression`, or a number.

    Raises:
        NotPointwiseError: it mixes elements, draws random numbers or returns something else than
            one tensor.
    """
    nodes: list[Node] = []
    torch.fx.map_arg((args, kwargs), nodes.append)
    slots = {node: _Slot(number) for number, node in enumerate(dict.fromkeys(nodes))}
    meanings = [operand_of(node) for node in slots]
    args, kwargs = torch.fx.map_arg((args, kwargs), slots.__getitem__)
    dtypes = tuple(_wide(dtype) for _, dtype in meanings)
    # 0.0 and -0.0, 1 and True are equal, but not the same constants.
    constants = repr((args, kwargs))
    given = (tuple(args), tuple(kwargs.items()))
    question = (function, *given, dtypes, constants, numbers_as_tensors)
    traced = _trace(*question) if _is_hashable(question) else _trace.__wrapped__(*question)
    if isinstance(traced, NotPointwiseError):
        raise type(traced)(*traced.args)
    steps, result = traced
    made: dict[Any, Any] = {_name(slot): meanings[slot.number][0] for slot in slots.values()}
    for step in steps:
        operands = tuple(made[a] if isinstance(a, Name) else a for a in step.args)
        named = tuple((k, made[a] if isinstance(a, Name) else a) for k, a in step.kwargs)
        made[step.name] = Apply(step.target, operands, named)
    return made[result] if isinstance(result, Name) else result


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands in arguments for a tensor."""

    number: int


def _name(slot: _Slot) -> Name:
    return Name(f"r{slot.number}")


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: tuple[tuple[str, Any], ...],
    dtypes: tuple[torch.dtype, ...],
    constants: str,
    numbers_as_tensors: bool,
) -> tuple[tuple[Step, ...], Any] | NotPointwiseError:
    """The steps of a function and its result, or why it is not pointwise."""
    names = [_name(_Slot(number)) for number in range(len(dtypes))]

    def on_scalars(*values: Tensor) -> Any:
        # 0-d tensors have no elements to mix.
        def fill(argument: Any) -> Any:
            if numbers_as_tensors and type(argument) in (int, float):
                return torch.tensor(argument, dtype=torch.float64)
            return values[argument.number] if isinstance(argument, _Slot) else argument

        given, named = tree_map(fill, (args, dict(kwargs)))
        try:
            return function(*given, **named)
        except Exception as error:  # it wants something else than 0-d tensors
            raise NotPointwiseError() from error

    inputs = dict(zip(names, dtypes, strict=True))
    try:
        steps, results = record(on_scalars, inputs, decompositions=_UNTAGGED, keeps_detach=True)
        if len(results) != 1:
            return NotPointwiseError("it returns several tensors")
        if steps:
            alone = Program(tuple(steps), (Reduction("sum", (results[0],)),))
            differentiated(alone, dtypes)
    except NotPointwiseError as error:
        return type(error)(*error.args)  # without the frames that it has come through
    return tuple(steps), results[0]


def _masked_fill(input: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value, input)


def _masked_fill_(input: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return input.copy_(_masked_fill(input, mask, value))


_MAY_BE_UNTAGGED = (
    torch.ops.aten.hardswish,
    torch.ops.aten.hardswish_,
    torch.ops.aten.log_sigmoid_forward,
    torch.ops.aten.rsub,
)
_UNTAGGED = {
    operator: function
    for operator, function in get_decompositions(_MAY_BE_UNTAGGED).items()
    if torch.Tag.pointwise not in operator.tags
}
_UNTAGGED[torch.ops.aten.masked_fill.Tensor] = _masked_fill
_UNTAGGED[torch.ops.aten.masked_fill_.Tensor] = _masked_fill_
"""Pointwise operators that ATen does not call so in every version, by others."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """One dtype for all floating operands, so that a trace shows no conversions."""
    return torch.float64 if dtype.is_floating_point else dtype

"""What a function of PyTorch does to each element, as an expression.

Nothing is known about an operator but that it is pointwise, which ATen says of itself: any
function of PyTorch made of such operators can be captured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import Node
from torch.utils._pytree import tree_map

from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.text import Name, Program, Reduction, Step
from cce_inductor.kernels.program.tracing import NotPointwiseError, record
from cce_inductor.patterns.language.expression import Apply


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
            derivative(alone, [torch.empty((), dtype=dtype) for dtype in dtypes])
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

"""What a function of PyTorch does to each element, as an expression.

ATen tags its pointwise operators. Any function that is composed of such operators can be captured,
and nothing else is known about them.
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

from cce_inductor.kernels.names import Name
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.text import Program, Step
from cce_inductor.kernels.program.tracing import NotPointwiseError, RandomError, record
from cce_inductor.kernels.statistics.sum import Sum
from cce_inductor.patterns.language.examples import is_symbol
from cce_inductor.patterns.language.expression import Apply
from cce_inductor.patterns.language.logits import Logits
from cce_inductor.patterns.language.operands import number_operand
from cce_inductor.patterns.language.site import Site
from cce_inductor.patterns.language.tables import UnsupportedError
from cce_inductor.reporting import reasons


def capture(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operand_of: Callable[[Node], tuple[Any, torch.dtype]],
    *,
    numbers_as_tensors: bool = False,
) -> Any:
    """Return what ``function(*args, **kwargs)`` does to each element.

    Args:
        function: any function of tensors. A function that works in place is captured as its
            out-of-place form.
        args, kwargs: its arguments, with nodes for tensors.
        operand_of: returns the expression that a node stands for, and its dtype.
        numbers_as_tensors: whether numbers among the arguments are passed as tensors.

    Returns:
        An `Expression`, or a number.

    Raises:
        NotPointwiseError: the function mixes elements, draws random numbers or does not return
            exactly one tensor.
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


def captured(
    site: Site,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    logits: Logits,
    meaning: Callable[[Node], tuple[Any, torch.dtype]],
) -> Any:
    """Return the expression of a pointwise function that a node calls, or a number.

    Args:
        site: the node.
        function, args, kwargs: see `capture`.
        logits: the logits that the expression is a function of.
        meaning: returns the expression that a tensor stands for, and its dtype.

    Raises:
        UnsupportedError: the function is not pointwise.
    """
    numbers: list[Node] = []

    def operand_of(node: Node) -> tuple[Any, torch.dtype]:
        if not is_symbol(node):
            return meaning(node)
        numbers.append(node)
        return number_operand(site, node, logits), torch.float64

    try:
        return capture(function, args, kwargs, operand_of)
    except NotPointwiseError as error:
        if isinstance(error, RandomError) or _is_random(function):
            raise UnsupportedError(reasons.RANDOM) from None
        if not numbers:
            raise UnsupportedError(reasons.not_pointwise(str(error))) from None
    try:  # some functions accept no mixture of numbers and tensors
        return capture(function, args, kwargs, operand_of, numbers_as_tensors=True)
    except NotPointwiseError:
        raise UnsupportedError(reasons.NUMBER_MAY_DIFFER) from None


def _is_random(function: Callable[..., Any]) -> bool:
    """Whether an ATen operator of that name draws random numbers."""
    packet = getattr(torch.ops.aten, getattr(function, "__name__", ""), None)
    overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a tensor among the arguments."""

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
    """Return the steps of a function and its result, or why it is not pointwise."""
    names = [_name(_Slot(number)) for number in range(len(dtypes))]

    def on_scalars(*values: Tensor) -> Any:
        # Tensors without dimensions have no elements to mix.
        def fill(argument: Any) -> Any:
            if numbers_as_tensors and type(argument) in (int, float):
                return torch.tensor(argument, dtype=torch.float64)
            return values[argument.number] if isinstance(argument, _Slot) else argument

        given, named = tree_map(fill, (args, dict(kwargs)))
        try:
            return function(*given, **named)
        except Exception as error:  # it does not accept tensors without dimensions
            raise NotPointwiseError() from error

    inputs = dict(zip(names, dtypes, strict=True))
    try:
        steps, results = record(on_scalars, inputs, decompositions=_UNTAGGED, keeps_detach=True)
        if len(results) != 1:
            return NotPointwiseError("it returns several tensors")
        if steps:
            alone = Program(tuple(steps), (Sum((results[0],)),))
            derivative(alone, [torch.empty((), dtype=dtype) for dtype in dtypes])
    except NotPointwiseError as error:
        return type(error)(*error.args)  # without its traceback, which holds the frames
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
"""Decompositions of pointwise operators that some versions of ATen do not tag."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return one dtype for all floating operands, so that a trace has no conversions."""
    return torch.float64 if dtype.is_floating_point else dtype

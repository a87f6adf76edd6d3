"""Which ATen operators have deferred results, and how a call of one is written in a graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cce_inductor.patterns.spellings import SPELLINGS, Spelled
from cce_inductor.recipe.operation import Operation, project, strided

aten = torch.ops.aten


def stays_deferred(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator's result on deferred logits can be deferred as well."""
    if func is aten._to_copy.default:
        return only_casts(args[0], **kwargs)
    return func in SPELLINGS or is_pointwise(func)


@functools.lru_cache(maxsize=1024)
def is_pointwise(func: torch._ops.OpOverload) -> bool:
    """Whether each element of an operator's result is a function of its arguments' elements there.

    Random functions, functions that change an argument and those with several results do not count.
    """
    schema = func._schema
    return (
        func not in SPELLINGS
        and (torch.Tag.pointwise in func.tags or func in _POINTWISE_WITHOUT_TAG)
        and torch.Tag.nondeterministic_seeded not in func.tags
        and not schema.is_mutable
        and [str(result.type) for result in schema.returns] == ["Tensor"]
    )


_POINTWISE_WITHOUT_TAG = (aten.masked_fill.Tensor, aten.rsub.Tensor)


@functools.lru_cache(maxsize=1024)
def is_view(func: torch._ops.OpOverload) -> bool:
    """Whether an operator's results share the memory of its first argument."""
    return any(result.alias_info is not None for result in func._schema.returns)


def scalars_to_tensors(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return a call of a pointwise operator with its numbers as tensors without dimensions.

    What is compiled or cached for the call then serves other numbers too. Such tensors take no part
    in type promotion, so the result has the same dtype.
    """
    tensors = _overload_for_tensors(func) or func
    arguments = tensors._schema.arguments

    def converted(value: Any, kind: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or "Tensor" not in kind:
            return value
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)

    positional = [argument for argument in arguments if not argument.kwarg_only]
    # rsub.Scalar takes alpha by position, rsub.Tensor by keyword.
    named = zip(arguments[len(positional) :], args[len(positional) :], strict=False)
    kwargs = {**kwargs, **{argument.name: value for argument, value in named}}
    kinds = {argument.name: str(argument.type) for argument in arguments}
    new_args = tuple(converted(v, kinds[a.name]) for a, v in zip(positional, args, strict=False))
    return tensors, new_args, {name: converted(v, kinds[name]) for name, v in kwargs.items()}


@functools.lru_cache(maxsize=1024)
def _overload_for_tensors(func: Any) -> Any | None:
    """Return the overload of an operator that takes tensors where `func` takes numbers."""
    if func._schema.name == "aten::pow":  # pow is more exact with a number like 2
        return None
    packet = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::"))
    arguments = func._schema.arguments
    for name in packet.overloads():
        overload = getattr(packet, name)
        others = overload._schema.arguments
        if overload is not func and len(others) == len(arguments):
            pairs = list(zip(arguments, others, strict=True))
            same_names = all(mine.name == other.name for mine, other in pairs)
            kinds = [(_kind(mine), _kind(other)) for mine, other in pairs]
            if same_names and all(a == b or (a, b) == ("Scalar", "Tensor") for a, b in kinds):
                return overload
    return None


def _kind(argument: Any) -> str:
    return (
        str(argument.type).removeprefix("Optional[").removesuffix("]").replace("number", "Scalar")
    )


def depends_on_sizes(operation: Operation) -> bool:
    """Whether an operation's arguments or strides depend on the number of rows."""
    if operation.function is project:
        return not operation.args[0].tensor.is_contiguous()
    return operation.function in _DEPENDS_ON_SIZES


_DEPENDS_ON_SIZES = {
    *{func for func in SPELLINGS if is_view(func)} - {aten.alias.default, aten.detach.default},
    aten._unsafe_view.default,
    aten.index.Tensor,
    aten.index_select.default,
    strided,
    operator.getitem,
}


def only_casts(input: Tensor, *, dtype: Any = None, device: Any = None, **others: Any) -> bool:
    """Whether ``_to_copy`` with these arguments changes nothing but the dtype."""
    moves = device is not None and torch.device(device) != input.device
    memory_format = others.pop("memory_format", None)
    kept = memory_format in (None, torch.preserve_format)
    others.pop("non_blocking", None)
    layout = others.pop("layout", None) in (None, torch.strided)
    return dtype is not None and not moves and kept and layout and not any(others.values())


def spelled(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelled:
    """Return a call as Dynamo would have captured it."""
    spell = _OWN_SPELLINGS.get(function) or SPELLINGS.get(function)
    return (function, args, kwargs) if spell is None else spell(*args, **kwargs)


def _linear(input: Any, weight: Any, bias: Any, dtype: torch.dtype) -> Spelled:
    return torch.nn.functional.linear, (input, weight, bias), {}


_OWN_SPELLINGS: dict[Any, Callable[..., Spelled]] = {
    project: _linear,
    strided: lambda input, strides: ("clone", (input,), {}),
    operator.getitem: lambda input, index: (operator.getitem, (input, index), {}),
}
"""For functions of an `Operation` that are not ATen's."""

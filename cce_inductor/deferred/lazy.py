"""Operations that can wait: which ATen operators make deferred logits of deferred logits.

Each is known by the spelling that `patterns` has rules for, as Dynamo would have seen it.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cce_inductor.recipe.operation import Operation, product, strided

aten = torch.ops.aten

Spelled = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A function or the name of a method, and its arguments."""


def _method(name: str) -> Callable[..., Spelled]:
    return lambda *args, **kwargs: (name, args, kwargs)


def _slice(input: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Spelled:
    entry = slice(start, None if end == sys.maxsize else end, None if step == 1 else step)
    if dim < 0:
        return operator.getitem, (input, (Ellipsis, entry, *[slice(None)] * (-dim - 1))), {}
    return operator.getitem, (input, (*[slice(None)] * dim, entry)), {}


def _index(input: Any, indices: Any) -> Spelled:
    entries = tuple(slice(None) if index is None else index for index in indices)
    return operator.getitem, (input, entries), {}


def _cast(input: Any, *, dtype: torch.dtype, **_: Any) -> Spelled:
    return "to", (input, dtype), {}


def _softmax(function: Any) -> Callable[..., Spelled]:
    def spell(input: Any, dim: int, half_to_float: bool) -> Spelled:
        return function, (input, dim), {"dtype": torch.float32} if half_to_float else {}

    return spell


def _linear(input: Any, weight: Any, bias: Any, dtype: torch.dtype) -> Spelled:
    return torch.nn.functional.linear, (input, weight, bias), {}


VIEWS: dict[Any, Callable[..., Spelled]] = {
    aten.view.default: _method("view"),
    aten.alias.default: lambda input: ("view_as", (input, input), {}),
    aten.detach.default: _method("detach"),
    aten.select.int: _method("select"),
    aten.slice.Tensor: _slice,
    aten.transpose.int: _method("transpose"),
    aten.permute.default: _method("permute"),
    aten.t.default: _method("t"),
    aten.unsqueeze.default: _method("unsqueeze"),
    aten.squeeze.default: _method("squeeze"),
    aten.squeeze.dim: _method("squeeze"),
    aten.squeeze.dims: _method("squeeze"),
    aten.expand.default: _method("expand"),
    aten.unbind.int: _method("unbind"),
    aten.split.Tensor: _method("split"),
    aten.split_with_sizes.default: _method("split"),
}
"""They share the memory of their argument."""

COPIES: dict[Any, Callable[..., Spelled]] = {
    aten._unsafe_view.default: _method("view"),
    aten.clone.default: lambda input, **_: ("clone", (input,), {}),
    aten._to_copy.default: _cast,
    aten._log_softmax.default: _softmax(torch.log_softmax),
    aten._softmax.default: _softmax(torch.softmax),
    aten.index.Tensor: _index,
    aten.index_select.default: _method("index_select"),
}
"""They have memory of their own."""

_OTHERS: dict[Any, Callable[..., Spelled]] = {
    product: _linear,
    strided: lambda input, strides: ("clone", (input,), {}),
    operator.getitem: lambda input, index: (operator.getitem, (input, index), {}),
}


def can_wait(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `func` makes deferred logits of the first argument, or is a pointwise function."""
    if func is aten._to_copy.default:
        return _only_casts(args[0], **kwargs)
    if func in VIEWS or func in COPIES:
        return True
    schema = func._schema
    return (
        torch.Tag.pointwise in func.tags
        and torch.Tag.nondeterministic_seeded not in func.tags
        and not schema.is_mutable
        and [str(result.type) for result in schema.returns] == ["Tensor"]
    )


def numbers_as_tensors(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A call of a pointwise operator with its numbers as tensors without dimensions, which have no
    say in the result's dtype either: what is compiled, or kept, for the call then fits others
    with other numbers."""
    tensors = _with_tensors(func) or func
    arguments = tensors._schema.arguments

    def given(value: Any, kind: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or "Tensor" not in kind:
            return value
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)

    positional = [argument for argument in arguments if not argument.kwarg_only]
    # rsub.Scalar takes its alpha by position, rsub.Tensor does not.
    named = zip(arguments[len(positional) :], args[len(positional) :], strict=False)
    kwargs = {**kwargs, **{argument.name: value for argument, value in named}}
    kinds = {argument.name: str(argument.type) for argument in arguments}
    new_args = tuple(given(v, kinds[a.name]) for a, v in zip(positional, args, strict=False))
    return tensors, new_args, {name: given(v, kinds[name]) for name, v in kwargs.items()}


@functools.cache
def _with_tensors(func: Any) -> Any | None:
    """The overload of an operator that takes tensors where `func` takes numbers."""
    if func._schema.name == "aten::pow":  # exact where the exponent is the number 2, say
        return None
    packet = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::"))
    arguments = func._schema.arguments
    for name in packet.overloads():
        found = getattr(packet, name)
        others = found._schema.arguments
        if found is not func and len(others) == len(arguments):
            pairs = list(zip(arguments, others, strict=True))
            same_names = all(mine.name == other.name for mine, other in pairs)
            kinds = [(_kind(mine), _kind(other)) for mine, other in pairs]
            if same_names and all(a == b or (a, b) == ("Scalar", "Tensor") for a, b in kinds):
                return found
    return None


def _kind(argument: Any) -> str:
    return (
        str(argument.type).removeprefix("Optional[").removesuffix("]").replace("number", "Scalar")
    )


def depends_on_sizes(operation: Operation) -> bool:
    """Whether it is one that does something else for logits with another number of rows, or reads
    rows whose strides depend on that."""
    if operation.function is product:
        return not operation.args[0].tensor.is_contiguous()
    return operation.function in _OF_SIZES


_OF_SIZES = {
    *VIEWS.keys() - {aten.alias.default, aten.detach.default},
    aten._unsafe_view.default,
    aten.index.Tensor,
    aten.index_select.default,
    strided,
    operator.getitem,
}


def _only_casts(input: Tensor, *, dtype: Any = None, device: Any = None, **others: Any) -> bool:
    moves = device is not None and torch.device(device) != input.device
    memory_format = others.pop("memory_format", None)
    kept = memory_format in (None, torch.preserve_format)
    others.pop("non_blocking", None)
    layout = others.pop("layout", None) in (None, torch.strided)
    return dtype is not None and not moves and kept and layout and not any(others.values())


def spelled(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelled:
    """An operation as a person would have written it; itself if it has no spelling of its own."""
    for table in (VIEWS, COPIES, _OTHERS):
        if function in table:
            return table[function](*args, **kwargs)
    return function, args, kwargs

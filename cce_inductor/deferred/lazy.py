"""Operations that can wait: which ATen operators make deferred logits of deferred logits.

Each is known by the spelling that `patterns` has rules for, as Dynamo would have seen it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operation import Operation, product, strided

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

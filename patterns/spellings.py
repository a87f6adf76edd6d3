"""ATen operators, and how a person writes them.

Rules know functions and methods as Dynamo captures them. In eager code, deferred logits meet ATen
operators instead (``z[:, -1]`` arrives as ``aten.slice`` and ``aten.select``). To fuse a reduction
with them, `deferred` rebuilds the graph that Dynamo would have captured, with this table. It is in
this folder because it must be extended together with the rules: a transform also applies in eager
code if its ATen operator is listed here. Pointwise operators need no entry.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch

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


SPELLINGS: dict[Any, Callable[..., Spelled]] = {
    # Views
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
    # Copies
    aten._unsafe_view.default: _method("view"),
    aten.clone.default: lambda input, **_: ("clone", (input,), {}),
    aten._to_copy.default: _cast,
    aten._log_softmax.default: _softmax(torch.log_softmax),
    aten._softmax.default: _softmax(torch.softmax),
    aten.index.Tensor: _index,
    aten.index_select.default: _method("index_select"),
    aten.stack.default: lambda tensors, dim=0: (torch.stack, (tensors, dim), {}),
}
"""For each operator, the function that returns the spelling of a call of it."""

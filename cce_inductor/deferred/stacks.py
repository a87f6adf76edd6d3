"""Stacks of deferred logits that are reduced over the new dimension.

``torch.logsumexp(torch.stack([a, b]), 0)`` is ``torch.logaddexp(a, b)``, a pointwise function whose
result and gradient are deferred. The logarithm of a mixture of two models is such a function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.torch_internals.tensors import version_of


def remember_parts(stack: Any, tensors: Any) -> Any:
    """Note the parts of a deferred stack, and return the stack."""
    if isinstance(stack, DeferredTensor):
        stack._parts = tuple((each, _version(each)) for each in tensors)
    return stack


def _version(tensor: Tensor) -> int | None:
    """Return a number that differs after a change, None if changes are not counted.

    Deferred logits are computed when they are changed.
    """
    if isinstance(tensor, DeferredTensor):
        return 0 if tensor._is_as_recorded else None
    return version_of(tensor)


def reduced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a reduction of a stack over its new dimension as a function of its parts.

    Returns:
        NotImplemented if it is not such a reduction, if the stack or a part has changed, or if
        somebody will look at the gradient of the stack.
    """
    try:
        stack, dim, keepdim = _arguments(*args, **kwargs)
    except TypeError:
        return NotImplemented
    noted = stack._parts if isinstance(stack, DeferredTensor) else ()
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not noted or len(dims) != 1 or not isinstance(dims[0], int):
        return NotImplemented
    place = stack._operation.args[1] if len(stack._operation.args) > 1 else 0
    rank = stack.dim()
    if not -rank <= dims[0] < rank or dims[0] % rank != place % rank:
        return NotImplemented
    if not stack._is_as_recorded or not stack.requires_grad:
        return NotImplemented
    if stack._backward_hooks or stack.retains_grad:
        return NotImplemented
    if any(version is None or version != _version(part) for part, version in noted):
        return NotImplemented
    result = REDUCTIONS[func](tuple(part for part, _ in noted))
    return result.unsqueeze(place) if keepdim else result


def _arguments(input: Any, dim: Any, keepdim: bool = False) -> tuple[Any, Any, bool]:
    return input, dim, keepdim


def _folded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.partial(functools.reduce, function)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return _folded(torch.add)([part / len(parts) for part in parts])


REDUCTIONS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.sum, Tensor.sum), _folded(torch.add)),
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys(
        (torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp), _folded(torch.logaddexp)
    ),
}
"""Reductions, as functions of the parts of a stack."""

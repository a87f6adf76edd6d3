"""Deferred logits above autograd: PyTorch's functions, as they reach ``__torch_function__``.

A reduction over the vocabulary is fused with the projection, so neither the logits nor their
gradient are computed. Functions that are not ATen operators, like `Tensor.numpy` and `Tensor.data`,
have an entry in `_OVERRIDES`. All others continue to autograd, and then to `dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cce_inductor.deferred import eager
from cce_inductor.deferred.autograd import fusable_operation, observe_gradient, to_plain
from cce_inductor.deferred.base import DeferredTensor, deferred_among
from cce_inductor.torch_internals.callers import (
    is_about_memory,
    is_compiler_asking,
    is_torch_asking,
    is_tracing_transform,
)
from cce_inductor.torch_internals.tensors import without_torch_function

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def override(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Return ``func(*args, **kwargs)``."""
    if func in _OVERRIDES:
        return _OVERRIDES[func](func, args, kwargs)
    target = eager.spelling(func)
    if target is not None:
        result = _fused(target, args, kwargs)
        if result is not NotImplemented:
            return result
    return _as_tensor(func, args, kwargs)


def _fused(target: Any, args: Args, kwargs: Kwargs) -> Any:
    """Return a reduction that does not compute the logits, NotImplemented if it must."""
    if is_tracing_transform():
        return NotImplemented
    with torch.set_grad_enabled(torch.is_grad_enabled() and target not in _WITHOUT_GRADIENT):
        needs_gradient = torch.is_grad_enabled()
        operations = {
            id(logits): fusable_operation(logits, needs_gradient=needs_gradient)
            for logits in deferred_among((args, kwargs))
        }
        if not operations or None in operations.values():
            return NotImplemented
        return eager.compute_reduction(
            target,
            *tree_map_only(DeferredTensor, lambda each: operations[id(each)], (args, kwargs)),
        )


_WITHOUT_GRADIENT = (torch.argmax, "argmax", torch.argmin, "argmin")


# What an override does


def _as_tensor(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Call a function as for any tensor: autograd and `dispatch` are next."""
    try:
        with without_torch_function():
            return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if not is_about_memory(error):
            raise
    return _on_plain(func, args, kwargs)


def _on_plain(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Call a function that reads or modifies memory directly."""
    args, kwargs = tree_map_only(DeferredTensor, to_plain, (args, kwargs))
    return func(*args, **kwargs)


def _on_plain_in_place(func: Function, args: Args, kwargs: Kwargs) -> Any:
    _on_plain(func, args, kwargs)
    return args[0]


def _on_copy(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Call a function that copies the values elsewhere. Few rows are computed without the rest."""
    logits, *others = args
    return func(to_plain(logits, is_shared=False), *others, **kwargs)


def _on_memory(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Call a function that gives access to the memory and ignores gradients."""
    return func(args[0]._materialize().detach(), *args[1:], **kwargs)


def _on_values(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Call a function that reads the values and ignores gradients."""
    return func(args[0]._values().detach(), *args[1:], **kwargs)


def _untyped_storage(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Return the tensor's own, empty storage to PyTorch, and the storage of the values to a user.

    PyTorch compares storages to find out which tensors share memory.
    """
    return (_as_tensor if is_torch_asking() else _on_memory)(func, args, kwargs)


def _data(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Return ``.data``. Dynamo reads it to describe it, which must not compute the values."""
    return args[0].detach() if is_compiler_asking() else _on_plain(func, args, kwargs)


def _set_data(func: Function, args: Args, kwargs: Kwargs) -> None:
    logits, value = args
    like = (logits.shape, logits.stride(), logits.dtype, logits.device)
    if (value.shape, value.stride(), value.dtype, value.device) != like:
        raise RuntimeError(
            "cce_inductor: what is assigned to .data of deferred logits must have the same shape, "
            "strides, dtype and device"
        )
    plain = to_plain(value) if isinstance(value, DeferredTensor) else value
    logits._memory.replace(plain.detach())


def _grad_fn(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Return ``grad_fn``. A user may register a hook on the node; a compiler does not."""
    if not is_compiler_asking():
        args[0]._operation.gradient_is_observed = True
    return _as_tensor(func, args, kwargs)


def _is_view(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Whether it is a view. A compiler gets False: it would otherwise rebuild it from its base."""
    return False if is_compiler_asking() else _as_tensor(func, args, kwargs)


def _observing_gradient(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Call a function that asks for the gradient of the logits."""
    wanted = kwargs.get("inputs", args[1:2]) if func is torch.autograd.grad else (args, kwargs)
    for each in deferred_among(wanted):
        observe_gradient(each)
    return _as_tensor(func, args, kwargs)


def _text(func: Function, args: Args, kwargs: Kwargs) -> str:
    logits = args[0]
    if not logits.is_deferred:
        return str(func(to_plain(logits, is_shared=False), *args[1:], **kwargs))
    if func is Tensor.__format__:
        return object.__format__(logits, *args[1:], **kwargs)  # the same text; refuses a format
    grad = ", requires_grad=True" if logits.requires_grad else ""
    return (
        f"DeferredLogits(shape={tuple(logits.shape)}, dtype={logits.dtype}, "
        f"device='{logits.device}'{grad}, not computed)"
    )


_OVERRIDES: dict[Any, Callable[[Function, Args, Kwargs], Any]] = {
    Tensor.__repr__: _text,
    Tensor.__format__: _text,
    # Memory
    Tensor.apply_: _on_plain_in_place,
    Tensor.map_: _on_plain_in_place,
    Tensor.map2_: _on_plain_in_place,
    Tensor.share_memory_: _on_plain_in_place,
    Tensor.data_ptr: _on_memory,
    **({Tensor.const_data_ptr: _on_memory} if hasattr(Tensor, "const_data_ptr") else {}),
    Tensor.storage: _on_memory,
    Tensor.untyped_storage: _untyped_storage,
    Tensor.data.__get__: _data,
    Tensor.data.__set__: _set_data,
    Tensor._is_view: _is_view,
    # Copies
    Tensor.numpy: _on_copy,
    Tensor.__array__: _on_copy,
    Tensor.cpu: _on_copy,
    Tensor.__deepcopy__: _on_copy,
    Tensor.__reduce_ex__: _on_copy,
    Tensor.__dlpack__: _on_copy,
    Tensor.pin_memory: _on_copy,
    Tensor.tolist: _on_values,
    # Gradients
    Tensor.grad_fn.__get__: _grad_fn,
    Tensor.register_hook: _observing_gradient,
    Tensor.retain_grad: _observing_gradient,
    Tensor.register_post_accumulate_grad_hook: _observing_gradient,
    Tensor.requires_grad_: _observing_gradient,
    Tensor.requires_grad.__set__: _observing_gradient,
    torch.autograd.grad: _observing_gradient,
}
"""Functions that are neither reductions nor ATen operators, and the override of each."""

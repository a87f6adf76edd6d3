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

from cce_inductor.deferred import eager, stacks
from cce_inductor.deferred.autograd import fusable_operation, to_plain
from cce_inductor.deferred.base import DeferredTensor, deferred_among
from cce_inductor.deferred.connection import Connection
from cce_inductor.recipe.operation import Operation, map_arguments, map_only
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
    if func in stacks.REDUCTIONS:
        result = stacks.reduced(func, args, kwargs)
        if result is not NotImplemented:
            return result
    target = eager.spelling(func)
    if target is not None:
        result = _fused(func, target, args, kwargs)
        if result is not NotImplemented:
            return result
    return _as_tensor(func, args, kwargs)


def _fused(func: Function, target: Any, args: Args, kwargs: Kwargs) -> Any:
    """Return a reduction that does not compute the logits, NotImplemented if it must."""
    if is_tracing_transform():
        return NotImplemented
    logits = list({id(each): each for each in deferred_among((args, kwargs))}.values())
    with torch.set_grad_enabled(torch.is_grad_enabled() and target not in _WITHOUT_GRADIENT):
        operations = {
            id(each): fusable_operation(each, needs_gradient=torch.is_grad_enabled())
            for each in logits
        }
        if not logits or None in operations.values():
            return NotImplemented
        trained = [each for each in logits if _requires_grad(operations[id(each)])]
        connection = Connection(trained) if trained else None
        if connection is not None:
            aliased = connection.operations_on_aliases(trained)
            operations.update(zip(map(id, trained), aliased, strict=True))
        result = eager.compute_reduction(
            target,
            *map_arguments(lambda each: operations.get(id(each), each), (args, kwargs)),
        )
        if connection is None or result is NotImplemented:
            return result
        return connection.watched(result, func, args, kwargs)


def _requires_grad(operation: Operation | None) -> bool:
    return operation is not None and operation.requires_grad


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
    args, kwargs = map_only(DeferredTensor, to_plain, (args, kwargs))
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


def _is_view(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Whether it is a view. A compiler gets False: it would otherwise rebuild it from its base."""
    return False if is_compiler_asking() else _as_tensor(func, args, kwargs)


def _getitem(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Index with the positions that a mask selects, so that autograd keeps those, too."""
    logits, index = args
    entries = index if isinstance(index, tuple) else (index,)
    if not isinstance(logits, DeferredTensor) or not any(map(_is_mask, entries)):
        return _as_tensor(func, args, kwargs)
    dim, positions = 0, []
    for entry in entries:
        if entry is Ellipsis or (
            _is_mask(entry) and entry.shape != logits.shape[dim:][: entry.dim()]
        ):
            return _as_tensor(func, args, kwargs)
        if _is_mask(entry):
            dim += entry.dim()
            positions += entry.nonzero().unbind(1)
        else:
            dim += entry is not None
            positions.append(entry)
    return _as_tensor(func, (logits, tuple(positions)), kwargs)


def _is_mask(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype == torch.bool and entry.dim() > 0


def _split(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Return the parts as slices: the gradient of one part then needs no zeros for the others."""
    if not args:
        return _as_tensor(func, args, kwargs)
    logits, *others = args
    with torch.no_grad():
        parts = func(torch.empty(logits.shape, device="meta"), *others, **kwargs)
    dim = kwargs.get("dim", others[1] if len(others) > 1 else 0)
    start, slices = 0, []
    for part in parts:
        slices.append(logits.narrow(dim, start, part.shape[dim]))
        start += part.shape[dim]
    return tuple(slices)


def _unbind(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Return the parts as single selections, as `_split` does."""
    if not args:
        return _as_tensor(func, args, kwargs)
    logits = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return tuple(logits.select(dim, number) for number in range(logits.shape[dim]))


def _iterate(func: Function, args: Args, kwargs: Kwargs) -> Any:
    return iter(args[0].unbind(0)) if args[0].dim() else func(to_plain(args[0]))


def _stack(func: Function, args: Args, kwargs: Kwargs) -> Any:
    tensors = args[0] if args else kwargs["tensors"]
    return stacks.remember_parts(_as_tensor(func, args, kwargs), tensors)


def _clamp(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Call with bounds that are tensors, as an operation keeps them: the derivative differs."""
    if not args:
        return _as_tensor(func, args, kwargs)
    logits, *bounds = args
    if isinstance(logits, DeferredTensor) and logits.is_floating_point():
        args = (logits, *map(_as_bound, bounds))
        kwargs = {name: _as_bound(value) for name, value in kwargs.items()}
    return _as_tensor(func, args, kwargs)


def _as_bound(value: Any) -> Any:
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else value


def _text(func: Function, args: Args, kwargs: Kwargs) -> str:
    logits = args[0]
    if not logits.is_deferred:
        return str(func(to_plain(logits, is_shared=False), *args[1:], **kwargs))
    if func is Tensor.__format__:
        return object.__format__(logits, *args[1:], **kwargs)  # the same text; refuses a format
    grad = ", requires_grad=True" if logits.requires_grad else ""
    return (
        f"{type(logits).__name__}(shape={tuple(logits.shape)}, dtype={logits.dtype}, "
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
    # Derivatives
    **dict.fromkeys(
        (
            *(torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max),
            *(Tensor.clamp, Tensor.clip, Tensor.clamp_min, Tensor.clamp_max),
        ),
        _clamp,
    ),
    # Parts
    torch.stack: _stack,
    Tensor.__getitem__: _getitem,
    **dict.fromkeys((Tensor.split, torch.split, Tensor.chunk, torch.chunk), _split),
    **dict.fromkeys((Tensor.unbind, torch.unbind), _unbind),
    Tensor.__iter__: _iterate,
}
"""Functions that are neither reductions nor ATen operators, and the override of each."""

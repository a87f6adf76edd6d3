"""Deferred logits below autograd: ATen operators, as they reach ``__torch_dispatch__``.

An operator's result is deferred as well if it is a view, a copy or a pointwise function of deferred
logits. For any other operator the values are computed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from cce_inductor.deferred import lazy
from cce_inductor.deferred.autograd import operation_with_gradient
from cce_inductor.deferred.base import DeferredTensor, deferred_among
from cce_inductor.deferred.form import PYTORCH_ERRORS
from cce_inductor.recipe.operation import Operation, leaves_of, map_arguments, map_only
from cce_inductor.recipe.stale import Guarded
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.callers import is_torch_asking
from cce_inductor.torch_internals.tensors import in_backward, is_composite

aten = torch.ops.aten


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``func(*args, **kwargs)``, deferred if possible."""
    result = _deferred(func, args, kwargs)
    if result is NotImplemented and isinstance(func, torch._ops.OpOverload):
        result = _decomposed(func, args, kwargs)
    return computed(func, args, kwargs) if result is NotImplemented else result


# The result is deferred


def _deferred(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result as deferred logits, NotImplemented if it must be computed."""
    if not isinstance(func, torch._ops.OpOverload) or not lazy.stays_deferred(func, args, kwargs):
        return NotImplemented
    logits = deferred_among((args, kwargs))
    if not all(each.is_deferred and each._operation.is_plain for each in logits):
        return NotImplemented
    if func in _BY_INDEX:
        if not _selects_rows(func, *args, **kwargs):
            return NotImplemented
        if func is aten.index.Tensor:
            args = (args[0], _masks_as_indices(args[1]))
    like_args, like_kwargs = map_only(Tensor, on_meta, (args, kwargs))
    try:
        like = func(*like_args, **like_kwargs)
    except PYTORCH_ERRORS:
        return NotImplemented  # on values, the operator raises its own error
    except Exception:
        surprised("deferred logits are computed")
        return NotImplemented
    if lazy.is_pointwise(func):
        if not _is_worth_deferring(logits, like, (args, kwargs)):
            return NotImplemented
        single_args, single_kwargs = map_only(Tensor, _single_element, (args, kwargs))
        func(*single_args, **single_kwargs)  # raises the operator's errors about dtypes
        if all(each.is_floating_point() and each.dim() for each in logits):
            func, args, kwargs = lazy.scalars_to_tensors(func, args, kwargs)
    elif func is aten.stack.default:
        if not _is_stack_worth_deferring(logits, like, args):
            return NotImplemented
    elif args[0] is not logits[0] or len(logits) > 1:
        return NotImplemented
    operation = _operation(func, args, kwargs)
    if lazy.is_view(func):
        return _views(func, args, kwargs, like, operation)
    return type(logits[0])(like, operation, logits[0].device)


_BY_INDEX = (aten.index.Tensor, aten.index_select.default)


def _operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    """Return a call as an operation, with a gradient if autograd records the call."""
    has_gradient = torch.is_grad_enabled() and func is not aten.detach.default

    def operand(tensor: Tensor) -> Operation | Guarded:
        if isinstance(tensor, DeferredTensor):
            if has_gradient:
                return operation_with_gradient(tensor)
            return tensor._operation.without_gradient
        # In a backward, autograd has saved the operand or has just computed it: nothing else writes
        # to it. Any other tensor without gradient may be modified before it is read.
        if tensor.requires_grad or (in_backward() and is_torch_asking()):
            return Guarded(tensor, "an operand")
        return Guarded(tensor.clone(), "an operand", copy_of=tensor)

    return Operation(func, *map_only(Tensor, operand, (args, kwargs)))


def _views(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any, operation: Operation
) -> Any:
    """Return the view, or the list of views, that an operator makes of its first argument."""
    logits, *others = args  # the functions below must not keep the logits alive
    if isinstance(like, Tensor):
        return logits._view(like, operation, lambda parent: func(parent, *others, **kwargs))

    def part_of(parent: Tensor, number: int) -> Any:
        return func(parent, *others, **kwargs)[number]

    return [
        logits._view(
            part,
            Operation(operator.getitem, (operation, number)),
            functools.partial(part_of, number=number),
        )
        for number, part in enumerate(like)
    ]


def _selects_rows(func: Any, logits: DeferredTensor, *indices: Any) -> bool:
    """Whether the indices leave the last dimension as it is.

    Bounds errors must be raised now, so the indices are checked on a small tensor.
    """
    of_masks = func is aten.index.Tensor
    last = len(_masks_as_indices(indices[0])) if of_masks else indices[0] % logits.dim() + 1
    if last >= logits.dim():
        return False
    shape = (*logits.shape[:last], *[1] * (logits.dim() - last))
    func(torch.empty(shape, dtype=torch.bool, device=logits.device), *indices)
    return True


def _masks_as_indices(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return indices with each mask replaced by the positions that it selects."""
    result: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            result += index.nonzero().unbind(1)
        else:
            result.append(index)
    return result


_MOST_PRODUCTS = 8
"""How many projections a deferred tensor may depend on.

Each keeps a hidden state alive, and is multiplied again in every reduction.
"""


def _is_worth_deferring(logits: list[DeferredTensor], like: Tensor, arguments: Any) -> bool:
    """Whether it saves memory to defer a function.

    It depends on few projections, and the tensors that are copied for it are at most half as large
    as its result, as masks are. In training they may be as large as the result, as a stored
    teacher's logits are, because autograd would keep several tensors of that size.
    """
    products = {id(each) for one in logits for each in one._operation.products()}
    if len(products) > _MOST_PRODUCTS or any(like.shape != each.shape for each in logits):
        return False
    others = [
        each
        for each in leaves_of(arguments)
        if isinstance(each, Tensor) and not isinstance(each, DeferredTensor)
    ]
    large = [each for each in others if 2 * each.nbytes > like.nbytes]
    return not large or (
        (_trains(logits) or in_backward())
        and like.is_floating_point()
        and all(e.shape == like.shape and e.nbytes <= like.nbytes for e in large)
        and not any(each.requires_grad for each in large)
    )


def _is_stack_worth_deferring(logits: list[DeferredTensor], like: Tensor, args: Any) -> bool:
    """Whether to defer a stack. In an evaluation, people collect logits, and may read them after
    the weight has changed."""
    part = like.select(args[1] if len(args) > 1 else 0, 0)
    return _trains(logits) and _is_worth_deferring(logits, part, args)


def _trains(logits: list[DeferredTensor]) -> bool:
    """Whether autograd records a function of logits."""
    return torch.is_grad_enabled() and any(each._operation.requires_grad for each in logits)


# The operator is composed of others


def _decomposed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of an operator that is implemented by others, NotImplemented for the rest.

    Such operators arrive here undivided only in inference mode.
    """
    if torch.is_inference_mode_enabled() and is_composite(func):
        return func.decompose(*args, **kwargs)
    return NotImplemented


# The values are computed


class _Aliases(NamedTuple):
    """The deferred arguments whose memory matters to an operator.

    Attributes:
        shared: the identities of those that it modifies, or whose memory its results share.
        modified: those that it modifies, by the name of their memory in its schema.
    """

    shared: set[int]
    modified: dict[str, DeferredTensor]

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Aliases:
        shared: set[int] = set()
        modified: dict[str, DeferredTensor] = {}
        arguments = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else ()
        for position, argument in enumerate(arguments):
            if argument.alias_info is None:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for each in deferred_among(value):
                shared.add(id(each))
                if argument.alias_info.is_write:
                    modified[next(iter(argument.alias_info.before_set), argument.name)] = each
        return cls(shared, modified)


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of an operator on values, which are kept."""
    aliases = _Aliases.of(func, args, kwargs)

    def values(logits: DeferredTensor) -> Tensor:
        if func in _WITHOUT_VALUES:
            return _WITHOUT_VALUES[func](logits)
        return logits._materialize() if id(logits) in aliases.shared else logits._values()

    reshapes = aliases.modified and torch.Tag.inplace_view in func.tags
    if reshapes:
        (logits,) = aliases.modified.values()
        logits._memory.replace(logits._materialize().detach())
    plain_args, plain_kwargs = map_only(DeferredTensor, values, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if not aliases.modified:
        given = {id(a) for a in leaves_of((plain_args, plain_kwargs)) if isinstance(a, Tensor)}
        # An operator may return its argument. Autograd sets the grad_fn of the returned tensor,
        # which therefore must not be the tensor that is kept.
        return map_arguments(lambda t: t.detach() if id(t) in given else t, result)
    if reshapes:
        with no_dispatch():  # changes the shape of the deferred tensor, too
            func(*args, **kwargs)
    return _with_modified(func, result, aliases.modified)


def _with_modified(func: Any, result: Any, modified: dict[str, DeferredTensor]) -> Any:
    """Return the result of an operator, with the arguments that it modified and returns."""
    returns = func._schema.returns
    if not returns:
        return result
    results = [result] if len(returns) == 1 else list(result)
    results = [
        modified.get(next(iter(r.alias_info.before_set)), each) if r.alias_info else each
        for r, each in zip(returns, results, strict=True)
    ]
    return results[0] if len(returns) == 1 else tuple(results)


# Tensors that stand for deferred logits


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor on the meta device with the same shape, strides and dtype."""
    return _uninitialized(tensor, "meta")


def _single_element(tensor: Tensor) -> Tensor:
    return torch.ones((1,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)


def _empty(logits: DeferredTensor) -> Tensor:
    return torch.empty(0, dtype=logits.dtype, device=logits.device)


def _uninitialized(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device
    )


_WITHOUT_VALUES: dict[Any, Callable[[DeferredTensor], Tensor]] = {
    **dict.fromkeys(
        (
            aten.new_empty.default,
            aten.new_empty_strided.default,
            aten.new_full.default,
            aten.new_ones.default,
            aten.new_zeros.default,
        ),
        _empty,
    ),
    **dict.fromkeys(
        (
            aten.empty_like.default,
            aten.full_like.default,
            aten.ones_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.zeros_like.default,
        ),
        _uninitialized,
    ),
}
"""Operators that create a tensor and read no values, with what stands for the logits in them."""

"""Deferred gradients below autograd: ATen operators, as they reach ``__torch_dispatch__``.

The result of an operator that is linear in a deferred gradient is a deferred gradient, too. These
are the operators of which autograd's nodes for views, casts and pointwise functions consist. In a
hook, any pointwise function of a large gradient is deferred as well, and `gradient_reductions` has
the reductions that are computed by blocks. For any other operator the values are computed.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from cce_inductor.deferred import lazy
from cce_inductor.deferred.base import DeferredTensor, deferred_among
from cce_inductor.deferred.dispatch import computed, on_meta
from cce_inductor.deferred.form import PYTORCH_ERRORS
from cce_inductor.deferred.gradient import (
    IDENTITIES,
    FusedBackward,
    GradientTensor,
    Recorder,
    added,
    terms_by_source,
)
from cce_inductor.deferred.gradient_reductions import is_large, reduced
from cce_inductor.deferred.memory import Memory
from cce_inductor.recipe.operation import Operation, leaves_of, map_arguments, map_only
from cce_inductor.recipe.stale import Guarded
from cce_inductor.torch_internals.callers import is_autograd_asking, is_torch_asking
from cce_inductor.torch_internals.tensors import at_end_of_backward, detached, in_backward

aten = torch.ops.aten


def dispatch_gradient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``func(*args, **kwargs)`` where a deferred gradient is among the arguments."""
    gradients = [e for e in deferred_among((args, kwargs)) if isinstance(e, GradientTensor)]
    result = NotImplemented
    if all(each._is_as_recorded for each in gradients):
        result = _passed_on(func, args, kwargs, gradients)
        if result is NotImplemented and lazy.is_pointwise(func):
            result = _pointwise(func, args, kwargs, gradients)
        if result is NotImplemented:
            result = reduced(func, args, kwargs)
    return computed(func, args, kwargs) if result is NotImplemented else result


def _passed_on(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: list[GradientTensor]
) -> Any:
    """Return what autograd's nodes make of gradients, each term by itself."""
    if func is aten.add.Tensor and not kwargs:
        return _sum_of(*args)
    if func is aten.new_zeros.default:
        return _zeros(*args, **kwargs)
    if func in _SUMS:
        return _summed(func, args, kwargs)
    if func in _INTO_ZEROS:
        return _into_zeros(func, args, kwargs)
    if func is aten.where.self:
        return _where(*args)
    if _is_linear(func, args, kwargs) and len(gradients) == 1:
        return _linear(func, args, kwargs, gradients[0])
    return NotImplemented


def _sum_of(one: Tensor, other: Any) -> Any:
    """Return the sum of two gradients, one of which may have values."""
    same = isinstance(other, Tensor) and (one.shape, one.dtype, one.device) == (
        (other.shape, other.dtype, other.device)
    )
    if not same:
        return NotImplemented
    terms: list[Operation] = []
    for each in (one, other):
        if isinstance(each, GradientTensor):
            terms += each._terms
        else:
            terms.append(Operation(aten.detach.default, (_plain_operand(each),)))
    gradient = one if isinstance(one, GradientTensor) else other
    return type(gradient)._of(on_meta(gradient), terms, gradient.device)


def _zeros(
    gradient: GradientTensor, size: Any, *, dtype: Any = None, device: Any = None, **others: Any
) -> Any:
    if others.pop("layout", None) not in (None, torch.strided) or any(others.values()):
        return NotImplemented
    like = torch.empty(size, dtype=dtype or gradient.dtype, device="meta")
    return type(gradient)._of(like, (), torch.device(device or gradient.device))


_SUMS = (aten.sum.default, aten.sum.dim_IntList)


def _summed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the gradient of an operand that autograd sums over rows and columns."""
    gradient = args[0]
    terms = [Operation(func, (term, *args[1:]), kwargs) for term in gradient._terms]
    like = func(on_meta(gradient), *args[1:], **kwargs)
    by_source = terms_by_source(terms)
    if any(isinstance(source, Recorder) for source in by_source):
        return type(gradient)._of(like, terms, gradient.device)
    total = None
    for source, its_terms in by_source.items():
        part = source.of_operand(its_terms) if isinstance(source, FusedBackward) else None
        if part is None:
            return NotImplemented
        total = added(total, part)
    # A copy, because a hook may sum a gradient as well, and change what it gets.
    return NotImplemented if total is None else total.reshape(like.shape).clone()


_INTO_ZEROS = {
    aten.index_put.default: 2,
    aten.index_add_.default: 3,
}
"""Operators that write a gradient into zeros, with its position among the arguments."""


def _into_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    zeros, position = args[0], _INTO_ZEROS[func]
    gradient = args[position]
    if not isinstance(zeros, GradientTensor) or zeros._terms or kwargs:
        return NotImplemented
    if func is aten.index_add_.default and not zeros._is_unused:
        return NotImplemented
    if not isinstance(gradient, GradientTensor):
        return NotImplemented
    shape, dtype, device = tuple(zeros.shape), zeros.dtype, zeros.device
    functional = aten.index_add.default if func is aten.index_add_.default else func
    given = (None if number in (0, position) else each for number, each in enumerate(args))
    arguments = map_arguments(_operand, list(given))
    terms = []
    for term in gradient._terms:
        arguments[0] = Operation(torch.zeros, (shape,), {"dtype": dtype, "device": device})
        arguments[position] = term
        terms.append(Operation(functional, tuple(arguments)))
    made = type(zeros)._of(on_meta(zeros), terms, device)
    if func is aten.index_add_.default:
        zeros._become(made)
        return zeros
    return made


def _where(condition: Tensor, *branches: Tensor) -> Any:
    """Return a choice between gradients and zeros, as a sum of choices between each and zero."""
    gradients = [each for each in branches if isinstance(each, GradientTensor)]
    if not all(isinstance(each, GradientTensor) or _is_zero(each) for each in branches):
        return NotImplemented
    if len({(each.shape, each.dtype) for each in gradients}) > 1:
        return NotImplemented
    shape = gradients[0].shape
    if condition.dim() > len(shape) or torch.broadcast_shapes(condition.shape, shape) != shape:
        return NotImplemented
    zero = Guarded(torch.zeros((), dtype=gradients[0].dtype), "zero")
    chosen = _operand(condition)
    terms = [
        Operation(aten.where.self, (chosen, term, zero) if at == 0 else (chosen, zero, term))
        for at, branch in enumerate(branches)
        if isinstance(branch, GradientTensor)
        for term in branch._terms
    ]
    return type(gradients[0])._of(on_meta(gradients[0]), terms, gradients[0].device)


def _linear(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: GradientTensor
) -> Any:
    """Return a function of a gradient that is linear in it."""
    if func is aten._to_copy.default:
        if not lazy.only_casts(gradient, **kwargs) or not kwargs["dtype"].is_floating_point:
            return NotImplemented
        kwargs = {"dtype": kwargs["dtype"]}
    like = _like_result(func, args, kwargs, gradient)
    if like is None:
        return NotImplemented
    if gradient.is_floating_point():
        func, args, kwargs = lazy.scalars_to_tensors(func, args, kwargs)
    is_view = lazy.is_view(func)
    if func is aten.view.default:
        func = aten.reshape.default  # the values may have other strides
        args = (args[0], list(like.shape))
    operands, named = map_arguments(
        lambda a: _PLACE if a is gradient else _operand(a), (args, kwargs)
    )
    is_same = func in _COPIES or (func in _RESHAPES and like.shape == gradient.shape)

    def after(term: Operation) -> Operation:
        if is_same:
            return term
        placed = map_arguments(lambda a: term if a is _PLACE else a, (operands, named))
        return Operation(func, *placed)

    terms = map(after, gradient._terms)
    if is_view:
        others = args[1:]
        return gradient._part(like, terms, lambda parent: func(parent, *others, **kwargs))
    return type(gradient)._of(like, terms, gradient.device)


def _pointwise(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: list[GradientTensor]
) -> Any:
    """Return a function of large gradients, which a hook may reduce next.

    If the result still exists when the backward has finished, its values are computed. After that,
    the weight may change.
    """
    if not in_backward() or is_autograd_asking() or not all(map(is_large, gradients)):
        return NotImplemented
    try:
        like_args, like_kwargs = map_only(Tensor, on_meta, (args, kwargs))
        like = func(*like_args, **like_kwargs)
    except PYTORCH_ERRORS:
        return NotImplemented  # on values, the operator raises its own error
    tensors = [each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor)]
    deferred = [each for each in tensors if isinstance(each, DeferredTensor)]
    plain = [each for each in tensors if not isinstance(each, DeferredTensor)]
    if any(each.shape != like.shape for each in deferred):
        return NotImplemented
    if any(2 * each.nbytes > like.nbytes for each in plain):
        return NotImplemented
    operation = Operation(func, *map_arguments(_operand, (args, kwargs)))
    made = type(gradients[0])._of(like, (operation,), gradients[0].device)
    at_end_of_backward(functools.partial(_compute_if_alive, weakref.ref(made._memory)))
    return made


def _compute_if_alive(reference: weakref.ref[Memory]) -> None:
    memory = reference()
    if memory is not None:
        memory.values()


_PLACE = object()
"""Stands for the gradient among the arguments of an operator."""


def _like_result(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: GradientTensor
) -> Tensor | None:
    """Return a tensor on the meta device like the result of a call, None if it is an error."""
    like = on_meta(gradient)
    if all(each is gradient or not isinstance(each, Tensor) for each in args):
        description = (like.shape, like.stride(), like.dtype)
        others = tuple(tuple(each) if isinstance(each, list) else each for each in args[1:])
        if args[0] is gradient:
            return _cached_like(func, *description, others, tuple(kwargs.items()))
    try:
        like_args, like_kwargs = map_only(Tensor, on_meta, (args, kwargs))
        made: Tensor = func(*like_args, **like_kwargs)
    except PYTORCH_ERRORS:
        return None
    return made


@functools.lru_cache(maxsize=1024)
def _cached_like(
    func: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    others: tuple[Any, ...],
    kwargs: tuple[tuple[str, Any], ...],
) -> Tensor | None:
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    try:
        made: Tensor = func(like, *others, **dict(kwargs))
    except PYTORCH_ERRORS:
        return None
    return made


def _operand(value: Any) -> Any:
    """Return an argument as an operation has it."""
    if isinstance(value, DeferredTensor) and not value._is_as_recorded:
        value = value._values()
    if isinstance(value, DeferredTensor):
        return value._operation.without_gradient
    return _plain_operand(value) if isinstance(value, Tensor) else value


def _plain_operand(tensor: Tensor) -> Guarded:
    """Return a tensor as an operation has it.

    What autograd has saved or made is not copied. What a hook multiplies a gradient by, or adds to
    it, may change after the call.
    """
    if is_torch_asking():
        return Guarded(detached(tensor), "a tensor of the backward")
    return Guarded(tensor.detach().clone(), "a tensor of a hook", copy_of=detached(tensor))


def _is_linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator is linear in the gradient among its arguments."""
    if not isinstance(func, torch._ops.OpOverload) or not args:
        return False
    if func is aten.mul.Tensor:
        return True
    if func is aten.masked_fill.Scalar:
        return isinstance(args[0], GradientTensor) and args[2] == 0
    first = isinstance(args[0], GradientTensor)
    return first and (func in _LINEAR_IN_FIRST or _is_backward(func))


def _is_zero(value: Any) -> bool:
    """Whether a tensor without dimensions is zero."""
    plain = isinstance(value, Tensor) and not isinstance(value, DeferredTensor)
    return plain and value.dim() == 0 and value.device.type == "cpu" and bool(value == 0)


def _is_backward(func: torch._ops.OpOverload) -> bool:
    """Whether an operator is the derivative of a pointwise one, linear in its first argument."""
    arguments = func._schema.arguments
    return (
        torch.Tag.pointwise in func.tags
        and arguments[0].name == "grad_output"
        and not func._schema.is_mutable
    )


_COPIES = (*IDENTITIES, aten.clone.default)
_RESHAPES = (aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
_LINEAR_IN_FIRST = {
    aten.div.Tensor,
    aten.div.Scalar,
    aten.mul.Scalar,
    aten.neg.default,
    # Views and their derivatives
    aten.view.default,
    aten.alias.default,
    aten.detach.default,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.select_backward.default,
    aten.slice_backward.default,
    # Copies
    aten._unsafe_view.default,
    aten.clone.default,
    aten._to_copy.default,
    # Derivatives
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
}
"""Operators that are linear in their first argument, if the others are given."""

"""Deferred logits in autograd: the functions that make them, and what becomes of their gradient.

Autograd records deferred logits as it does any tensor. The gradient of a fused loss bypasses them:
it goes directly to the hidden state and the weight. That is only right if no hook and no function
of the user's observes the gradient of the logits on its way. `fusable_operation` decides that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.recipe.operation import Operation, project, strided
from cce_inductor.recipe.stale import Guarded
from cce_inductor.torch_internals.callers import is_builtin_node
from cce_inductor.torch_internals.tensors import without_torch_function


def deferred_product(
    kind: type[DeferredTensor],
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return `recipe.operation.project` as a deferred tensor of class `kind`."""
    made: Tensor = _Product.apply(kind, input, linear_weight, linear_bias, dtype)
    return made


def with_strides(logits: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return logits with other strides, deferred if `logits` are."""
    if logits.stride() == strides:
        return logits
    if not isinstance(logits, DeferredTensor):
        return strided(logits, strides)
    made: Tensor = _Strided.apply(logits, strides)
    return made


def to_plain(logits: DeferredTensor, *, is_shared: bool = True) -> Tensor:
    """Return a plain tensor with the same gradient.

    Args:
        logits: the deferred logits.
        is_shared: whether the result must share their memory. Otherwise, if they are some rows of
            others, those are not computed.
    """
    made: Tensor = _Plain.apply(logits, is_shared)
    return made


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: type[DeferredTensor],
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(input, linear_weight)
        ctx.dtype = dtype
        ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype
        bias = None if linear_bias is None else Guarded(linear_bias, "the bias")
        operands = Guarded(input, "the hidden state"), Guarded(linear_weight, "the weight"), bias
        shape = (*input.shape[:-1], linear_weight.shape[0])
        like = torch.empty(shape, dtype=dtype, device="meta")
        return kind(like, Operation(project, (*operands, dtype), size=like.numel()), input.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, linear_weight = ctx.saved_tensors
        _, need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        count = math.prod(grad.shape[:-1])
        rows = grad.reshape(count, grad.shape[-1])
        d_input = d_weight = d_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if need_input:
                d_input = (rows @ linear_weight.to(ctx.dtype)).view(input.shape).to(input.dtype)
            if need_weight:
                flat = input.reshape(count, input.shape[-1]).to(ctx.dtype)
                d_weight = (rows.t() @ flat).to(linear_weight.dtype)
            if need_bias:
                d_bias = rows.sum(0).to(ctx.bias_dtype)
        return None, d_input, d_weight, d_bias, None


class _Strided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: DeferredTensor, strides: tuple[int, ...]) -> Tensor:
        like = torch.empty_strided(logits.shape, strides, dtype=logits.dtype, device="meta")
        argument = operation_with_gradient(logits)
        operation = Operation(strided, (argument, strides), grad_fns=grad_fns_of([logits]))
        return type(logits)(like, operation, logits.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: DeferredTensor, is_shared: bool) -> Tensor:
        if logits._memory.is_partial and not is_shared:
            return logits._values().clone()
        return logits._materialize().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


_NODES: dict[Any, Any] = {project: _Product, strided: _Strided}
"""The functions of an `Operation` that are autograd functions of this module."""


def fusable_operation(logits: DeferredTensor, *, needs_gradient: bool) -> Operation | None:
    """Return how logits are computed, for a reduction that does not compute them.

    Args:
        logits: the deferred logits.
        needs_gradient: whether the reduction has a gradient if the logits have one.

    Returns:
        None if the reduction must compute them: they have been computed already, a tensor that
        they are computed from is not plain, or their gradient is observed.
    """
    if not logits.is_deferred or not logits._operation.is_plain:
        return None
    if not logits.requires_grad or not needs_gradient:
        return logits._operation.without_gradient
    operation = operation_with_gradient(logits)
    is_observed = any(each.gradient_is_observed for each in operation.history())
    return None if is_observed else operation


def operation_with_gradient(logits: DeferredTensor) -> Operation:
    """Return how logits are computed, if their gradient is needed.

    Autograd may have recorded something else: a user's autograd function has returned these logits
    as its own, or they are a leaf, like a view that was taken under ``no_grad``. Then their
    gradient counts as observed, so that it is computed.
    """
    operation = logits._operation
    if not logits.requires_grad:
        return operation.without_gradient
    node = _grad_fn(logits)
    if operation.function in _NODES:
        is_recorded = type(node) is _NODES[operation.function]._backward_cls
    else:
        is_recorded = is_builtin_node(node)
    if is_recorded and operation.grad_fns:
        before = [function for function, _ in node.next_functions]
        is_recorded = all(any(each is one for one in before) for each in operation.grad_fns)
    operation.gradient_is_observed |= not is_recorded
    return operation


def observe_gradient(logits: DeferredTensor) -> None:
    """Note that the gradient of logits is observed, so that no loss bypasses them from now on.

    Raises:
        RuntimeError: a loss has already bypassed it.
    """
    if logits._operation.gradient_is_bypassed and logits._version == 0:
        raise RuntimeError(
            "cce_inductor: the gradient of these logits is requested, but a loss of them has "
            "already been fused with their projection, so that it has no gradient with respect to "
            "them. Request it (retain_grad, register_hook) before the loss is computed, or pass "
            'defer_logits="never".'
        )
    logits._operation.gradient_is_observed = True


def grad_fns_of(tensors: list[DeferredTensor]) -> tuple[Any, ...]:
    """Return the autograd nodes of those tensors that require a gradient."""
    return tuple(_grad_fn(logits) for logits in tensors if logits.requires_grad)


def _grad_fn(logits: DeferredTensor) -> Any:
    with without_torch_function():
        return logits.grad_fn

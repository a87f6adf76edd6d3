"""Deferred logits in autograd: the functions that make them, and what they do with a gradient.

Autograd records deferred logits as it does any tensor. The gradient that reaches the projection is
plain, or it is a `gradient.GradientTensor`; then the projection returns what the fused losses have
computed, if nothing has interfered with the gradient on its way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cce_inductor.deferred.base import DeferredTensor
from cce_inductor.deferred.gradient import Gradients, GradientTensor, added, fused_gradients
from cce_inductor.recipe.operation import Operation, project, strided
from cce_inductor.recipe.stale import Guarded
from cce_inductor.torch_internals.tensors import (
    compiles_backwards,
    keeps_graph,
    without_torch_function,
)


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
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, linear_weight)
        ctx.dtype = dtype
        ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype
        bias = None if linear_bias is None else Guarded(linear_bias, "the bias")
        operands = Guarded(input, "the hidden state"), Guarded(linear_weight, "the weight"), bias
        shape = (*input.shape[:-1], linear_weight.shape[0])
        like = torch.empty(shape, dtype=dtype, device="meta")
        ctx.operation = Operation(project, (*operands, dtype), size=like.numel())
        return kind(like, ctx.operation, input.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        operation = ctx.operation
        if not keeps_graph():
            ctx.operation = None  # it keeps the hidden state alive
        if not isinstance(grad, GradientTensor):
            return None, *_gradients(ctx, grad), None
        fused = fused_gradients(grad, operation)
        if fused is None:
            return None, *_gradients(ctx, to_plain(grad)), None
        gradients, rest = fused
        if rest is not None:
            gradients = Gradients(*map(added, gradients, _gradients(ctx, rest)))
        return None, *gradients, None


def _gradients(ctx: Any, grad: Tensor) -> Gradients:
    """Return the gradients of a projection, from that of its result."""
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
    return Gradients(d_input, d_weight, d_bias)


class _Strided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: DeferredTensor, strides: tuple[int, ...]) -> Tensor:
        like = torch.empty_strided(logits.shape, strides, dtype=logits.dtype, device="meta")
        operation = Operation(strided, (operation_with_gradient(logits), strides))
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


def fusable_operation(logits: DeferredTensor, *, needs_gradient: bool) -> Operation | None:
    """Return how logits are computed, for a reduction that does not compute them.

    Args:
        logits: the deferred logits.
        needs_gradient: whether the reduction has a gradient if the logits have one.

    Returns:
        None if the reduction must compute them: they have been computed already, a tensor that
        they are computed from is not plain, they are a leaf, whose gradient ends there, or the
        backward will be compiled ("compiled autograd"), in which no gradient can be deferred.
    """
    if not logits.is_deferred or not logits._operation.is_plain:
        return None
    if isinstance(logits, GradientTensor):
        return None
    if not logits.requires_grad or not needs_gradient:
        return logits._operation.without_gradient
    if compiles_backwards():
        return None
    operation = operation_with_gradient(logits)
    return operation if operation.requires_grad else None


def operation_with_gradient(logits: DeferredTensor) -> Operation:
    """Return how logits are computed, with a gradient if they require one.

    An autograd function of the user's, or of a library like DistributedDataParallel, that returns
    its argument runs without gradients, and its result requires one. The operation is then that of
    the projection that autograd has recorded before it. If the function changes the gradient, the
    projection will notice.

    Returns:
        An operation that does not require a gradient, too, if the logits are a leaf.
    """
    if not logits.requires_grad:
        return logits._operation.without_gradient
    if not logits._operation.requires_grad:
        projections = {
            id(each.without_gradient): each for each in _projections_before(_grad_fn(logits))
        }
        made = {
            id(each): projections[id(each)]
            for each in logits._operation.products()
            if id(each) in projections
        }
        if made:
            logits._operation = logits._operation.with_tensors({}, made)
    return logits._operation


def hasten(logits: DeferredTensor, number: int) -> None:
    """Have a backward go on to the projections of logits before it runs another loss.

    Of the nodes that could run next, autograd takes the one with the highest number. Otherwise, the
    gradients of several losses, each as large as the weight, would wait for their projections.

    Args:
        logits: deferred logits that a loss reads.
        number: the number of the loss's node, which is higher than those of all nodes before.
    """
    for node in _nodes_before(_grad_fn(logits)):
        node._set_sequence_nr(number)


def _projections_before(node: Any) -> list[Operation]:
    """Return the nearest projections that autograd has recorded before a node."""
    nodes = [each for each in _nodes_before(node) if isinstance(each, _Product._backward_cls)]
    return [each.operation for each in nodes if each.operation is not None]


_MOST_NODES = 100
"""How many nodes `_nodes_before` visits. Few operators are applied to logits."""


def _nodes_before(node: Any) -> list[Any]:
    """Return what autograd has recorded from a node back to the nearest projections."""
    found: list[Any] = []
    pending = [node]
    while pending and len(found) < _MOST_NODES:
        node, *pending = pending
        if node is None or any(node is each for each in found):
            continue
        found.append(node)
        if not isinstance(node, _Product._backward_cls):
            pending += [function for function, _ in node.next_functions]
    return found


def _grad_fn(logits: DeferredTensor) -> Any:
    with without_torch_function():
        return logits.grad_fn

"""``logits + bias``, and the sum of two projections.

A bias with one value for each vocabulary entry is that of the projection if nothing stands between.
The sum of two products is one product of joined inputs and joined weights, as low-rank adapters
compute it. Every other addition is a pointwise function.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language import (
    COMPUTE_DTYPES,
    LOGIT,
    Apply,
    Call,
    Logits,
    Operand,
    OperandKind,
    Site,
    is_reduced,
    is_tensor,
    joined_product,
    pointwise,
    same_shape,
    same_size,
    tensor_example,
    transform,
    weight_of,
)


@transform(operator.add, torch.add, "add", "__add__", "__radd__", operator.iadd, "add_")
def add(site: Site, input: Any, other: Any, *, alpha: Any = 1) -> Logits:
    if alpha == 1:
        if site.is_logits(input) and site.is_logits(other):
            first, second = site.logits(input), site.logits(other)
            same = same_shape(tensor_example(input).shape, tensor_example(other).shape)
            if first.projection.node is not second.projection.node and same:
                joined = _summed(site, first, second)
                if joined is not None:
                    return joined
        for logits_node, bias in ((input, other), (other, input)):
            if site.is_logits(logits_node) and is_tensor(bias) and not site.is_logits(bias):
                logits = site.logits(logits_node)
                if _is_bias(site, logits, logits_node, bias):
                    projection = logits.projection.replace(linear_bias=bias)
                    return logits.replace(projection=projection)
    return pointwise(site, torch.add, input, other, alpha=alpha)


def _is_bias(site: Site, logits: Logits, logits_node: Node, bias: Node) -> bool:
    before, value = tensor_example(logits_node), tensor_example(bias)
    return (
        logits.expression is LOGIT
        and logits.projection.linear_bias is None
        and same_size(logits.vocabulary, logits.projection.vocabulary)
        and site.example.dtype != torch.float64
        and value.dtype in COMPUTE_DTYPES
        and logits.vocabulary_dim == before.dim() - 1
        and same_shape(site.example.shape, before.shape)
        and value.dim() > 0
        and same_size(value.shape[-1], logits.vocabulary)
        and same_size(value.numel(), logits.vocabulary)
    )


def _summed(site: Site, first: Logits, second: Logits) -> Logits | None:
    """Return the sum of two projections as one, None if they are not two products of one form."""
    parts = [first, second]
    factors = [factor for part in parts if (factor := _factor(part.expression)) is not None]
    if (
        len(factors) != len(parts)
        or first.row_operations != second.row_operations
        or first.vocabulary_dim != second.vocabulary_dim
        or not same_size(first.vocabulary, second.vocabulary)
        or first.compute_dtype != second.compute_dtype
        or any(part.projection.linear_bias is not None for part in parts)
        or any(not isinstance(part.projection.input, Node) for part in parts)
        or first.projection.vocabulary_dim != second.projection.vocabulary_dim
    ):
        return None
    inputs = []
    for part, (factor, target) in zip(parts, factors, strict=True):
        source = part.projection.input
        inputs.append(source if target is None else Call(target, (source, factor)))
    shapes = [tensor_example(part.projection.input).shape for part in parts]
    dim = first.projection.vocabulary_dim
    if any(a != b for at, (a, b) in enumerate(zip(*shapes, strict=True)) if at != dim):
        return None
    return joined_product(
        site,
        parts,
        Call(torch.cat, (tuple(inputs), dim)),
        Call(torch.cat, (tuple(weight_of(part.projection) for part in parts), 1)),
        hidden=sum(part.projection.hidden for part in parts),
        vocabulary=first.vocabulary,
    )


_FACTORS = {"mul.Tensor": torch.mul, "div.Tensor": torch.div}


def _factor(expression: Any) -> tuple[Any, Any] | None:
    """Return a factor of the logit and the function that applies it.

    Both are None for the logit itself. None for every other expression.
    """
    if expression is LOGIT:
        return None, None
    if isinstance(expression, Apply) and expression.target in _FACTORS:
        x, factor = expression.args
        if x is not LOGIT and expression.target == "mul.Tensor":
            x, factor = factor, x
        if x is LOGIT and isinstance(factor, (int, float)):
            return factor, _FACTORS[expression.target]
        is_scalar = isinstance(factor, Operand) and factor.kind is OperandKind.SCALAR
        if x is LOGIT and is_scalar and not is_reduced(factor.source):
            return factor.source, _FACTORS[expression.target]
    return None

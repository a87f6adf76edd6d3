"""Logits of several projections that become one: ``torch.cat`` of them, and their sum.

Rows one after another are those of the inputs one after another; entries of the vocabulary those
of the weights. A sum is one product with inputs and weights side by side, as low-rank adapters
have it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..expression import LOGIT, Apply, Operand
from ..logits import Call, Logits, Projection, applied
from ..rules import Site, dimension, tensor_example, transform


@transform(torch.cat, torch.concat, torch.concatenate)
def cat(site: Site, tensors: Any, dim: Any = 0, *, axis: Any = None) -> Logits:
    if not all(site.is_logits(tensor) for tensor in tensors):
        site.unsupported("it joins logits with something else")
    parts = [site.logits(tensor) for tensor in tensors]
    dim = dimension(dim if axis is None else axis, site.example.dim())
    first = parts[0]
    if any(
        part.vocabulary_dim != first.vocabulary_dim or part.compute_dtype != first.compute_dtype
        for part in parts
    ):
        site.unsupported("it joins logits of several forms")
    if dim == first.vocabulary_dim:
        return _vocabularies(site, parts)
    return _rows(site, parts, dim)


def _rows(site: Site, parts: list[Logits], dim: int) -> Logits:
    first = parts[0].projection
    for part in parts:
        projection = part.projection
        same_weight = (
            projection.linear_weight is first.linear_weight
            and projection.weight_operations == first.weight_operations
            and projection.linear_bias is first.linear_bias
            and projection.bias_operations == first.bias_operations
            and part.vocabulary == parts[0].vocabulary
        )
        if not same_weight or not _same(part.expression, parts[0].expression):
            site.unsupported("it joins logits of several weights")
    inputs = tuple(_input(part) for part in parts)
    return parts[0].replace(
        projection=first.replace(
            node=site.node,
            input=Call(torch.cat, (inputs, dim)),
            vocabulary_dim=parts[0].vocabulary_dim,
            joined=tuple(part.projection for part in parts),
        ),
        row_operations=(),
    )


def _vocabularies(site: Site, parts: list[Logits]) -> Logits:
    first = parts[0]
    biases = [part.projection.linear_bias for part in parts]
    for part in parts:
        same_rows = (
            part.projection.input is first.projection.input
            and part.row_operations == first.row_operations
        )
        if not same_rows or part.expression is not LOGIT or any(b is not None for b in biases):
            site.unsupported("it joins logits of several inputs, with a bias or a function of them")
    return _product(
        site,
        parts,
        first.projection.input,
        Call(torch.cat, (tuple(_weight(part.projection) for part in parts), 0)),
        hidden=first.projection.hidden,
        vocabulary=sum(part.vocabulary for part in parts),
    )


def summed(site: Site, first: Logits, second: Logits) -> Logits | None:
    """The sum of two projections, None if it is not that of two products."""
    parts = [first, second]
    factors = [factor for part in parts if (factor := _factor(part.expression)) is not None]
    if (
        len(factors) != len(parts)
        or first.row_operations != second.row_operations
        or first.vocabulary_dim != second.vocabulary_dim
        or first.vocabulary != second.vocabulary
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
    return _product(
        site,
        parts,
        Call(torch.cat, (tuple(inputs), dim)),
        Call(torch.cat, (tuple(_weight(part.projection) for part in parts), 1)),
        hidden=sum(part.projection.hidden for part in parts),
        vocabulary=first.vocabulary,
    )


def _product(
    site: Site, parts: list[Logits], input: Any, weight: Any, *, hidden: int, vocabulary: int
) -> Logits:
    projection = Projection(
        node=site.node,
        input=input,
        linear_weight=weight,
        weight_operations=(),
        linear_bias=None,
        vocabulary=vocabulary,
        hidden=hidden,
        vocabulary_dim=parts[0].projection.vocabulary_dim,
        joined=tuple(part.projection for part in parts),
    )
    return parts[0].replace(projection=projection, vocabulary=vocabulary, expression=LOGIT)


def _input(logits: Logits) -> Any:
    projection = logits.projection
    return applied(projection.input, logits.row_operations, projection.hidden)


def _weight(projection: Projection) -> Any:
    return applied(projection.linear_weight, projection.weight_operations, 0)


_FACTORS = {"mul.Tensor": torch.mul, "div.Tensor": torch.div}


def _factor(expression: Any) -> tuple[Any, Any] | None:
    """What multiplies or divides the logit, and which of both; None for another expression."""
    if expression is LOGIT:
        return None, None
    if isinstance(expression, Apply) and expression.target in _FACTORS:
        x, factor = expression.args
        if x is not LOGIT and expression.target == "mul.Tensor":
            x, factor = factor, x
        if x is LOGIT and isinstance(factor, (int, float)):
            return factor, _FACTORS[expression.target]
        is_scalar = isinstance(factor, Operand) and factor.kind == "s"
        if x is LOGIT and is_scalar and isinstance(factor.source, Node):
            return factor.source, _FACTORS[expression.target]
    return None


def _same(first: Any, second: Any) -> bool:
    """Whether two expressions are the same function, with no operand but scalars."""
    if isinstance(first, Apply) and isinstance(second, Apply):
        return (
            first.target == second.target
            and len(first.args) == len(second.args)
            and all(map(_same, first.args, second.args))
            and dict(first.kwargs) == dict(second.kwargs)
        )
    if isinstance(first, Operand) and isinstance(second, Operand):
        return first.kind == second.kind == "s" and first.source is second.source
    return first is second or (type(first) is type(second) and first == second)

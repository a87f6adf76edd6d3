"""``torch.cat`` of the logits of several projections, which makes one projection of them.

Logits joined along their rows have joined inputs; logits joined along the vocabulary have joined
weights. Between the latter may stand columns of one value a row, as the similarity to a positive
example stands before those to the negatives.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from cce_inductor.patterns.language import (
    LOGIT,
    Apply,
    Call,
    Logits,
    Operand,
    OperandKind,
    Site,
    applied,
    call,
    column_mask,
    depends_on_column,
    dimension,
    is_reduced,
    is_tensor,
    joined_product,
    operands_of,
    read,
    same_shape,
    same_size,
    tensor_example,
    transform,
    under_mask,
    weight_of,
)
from cce_inductor.reporting import reasons


@transform(torch.cat, torch.concat, torch.concatenate)
def cat(site: Site, tensors: Any, dim: Any = 0) -> Logits:
    parts = [site.logits(tensor) for tensor in tensors if site.is_logits(tensor)]
    dim = dimension(dim, site.example.dim())
    if len(tensors) == len(parts) == 1:
        return parts[0]
    first = parts[0]
    if any(
        part.vocabulary_dim != first.vocabulary_dim or part.compute_dtype != first.compute_dtype
        for part in parts
    ):
        site.unsupported(reasons.JOINS_SEVERAL_FORMS)
    if dim == first.vocabulary_dim:
        return _vocabularies(site, tensors, parts)
    if len(parts) < len(tensors):
        site.unsupported(reasons.JOINS_WITH_SOMETHING_ELSE)
    return _rows(site, parts, dim)


@transform(torch.hstack)
def hstack(site: Site, tensors: Any) -> Logits:
    return cat(site, tensors, 0 if site.example.dim() == 1 else 1)


def _rows(site: Site, parts: list[Logits], dim: int) -> Logits:
    """Join logits of one weight along their rows."""
    first = parts[0].projection
    for part in parts:
        projection = part.projection
        same_weight = (
            projection.linear_weight is first.linear_weight
            and projection.weight_operations == first.weight_operations
            and projection.linear_bias is first.linear_bias
            and projection.bias_operations == first.bias_operations
            and same_size(part.vocabulary, parts[0].vocabulary)
        )
        if not same_weight or not _same(site, part.expression, parts[0].expression):
            site.unsupported(reasons.JOINS_SEVERAL_WEIGHTS)
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


def _vocabularies(site: Site, tensors: Any, parts: list[Logits]) -> Logits:
    """Join logits of one input, and columns of one value a row, along the vocabulary.

    The joined weight has rows of zeros for the columns.
    """
    first = parts[0]
    biases = [part.projection.linear_bias for part in parts]
    for part in parts:
        same_rows = (
            _are_equal(site, part.projection.input, first.projection.input)
            and part.row_operations == first.row_operations
        )
        same_function = part is first or _same(site, part.expression, first.expression)
        if not same_rows or not same_function or any(bias is not None for bias in biases):
            site.unsupported(reasons.JOINS_SEVERAL_INPUTS)
    if not _depends_on_logit_alone(first.expression):
        site.unsupported(reasons.JOINS_AFTER_FUNCTION_OF_PLACE)
    weights, columns, place = [], [], 0
    for tensor in tensors:
        if site.is_logits(tensor):
            part = site.logits(tensor)
            weights.append(weight_of(part.projection))
            place += part.vocabulary
        else:
            _check_column(site, tensor, tensors, first)
            weights.append(None)
            if not isinstance(place, int):
                site.unsupported(reasons.JOINS_AFTER_DYNAMIC_VOCABULARY)
            columns.append((place, tensor))
            place += 1
    filled = next(weight for weight in weights if weight is not None)
    zeros = call(torch.Tensor.new_zeros, filled, (1, first.projection.hidden))
    logits = joined_product(
        site,
        parts,
        first.projection.input,
        call(torch.cat, tuple(zeros if w is None else w for w in weights), 0),
        hidden=first.projection.hidden,
        vocabulary=place,
    )
    if site.example.dtype == torch.float64:
        logits = logits.replace(compute_dtype=torch.float64)
    values = [read(site, column, logits, tuple(site.example.shape)) for _, column in columns]
    masks = [column_mask(place) for place, _ in columns]
    joined = first.expression
    for mask in masks:
        joined = under_mask(Apply("logical_not", (mask,)), joined, LOGIT)
    for mask, value in zip(masks, values, strict=True):
        joined = Apply("where.self", (mask, value, joined))
    return logits.replace(expression=joined)


def _check_column(site: Site, tensor: Node, tensors: Any, logits: Logits) -> None:
    of_logits = next(other for other in tensors if site.is_logits(other))
    shape = list(tensor_example(of_logits).shape)
    shape[logits.vocabulary_dim] = 1
    value = tensor_example(tensor)
    if not same_shape(value.shape, shape):
        site.unsupported(reasons.JOINS_WITH_NO_COLUMN)
    if not value.dtype.is_floating_point:
        site.unsupported(reasons.JOINS_WITH_INTEGERS)


def _depends_on_logit_alone(expression: Any) -> bool:
    """Whether the expression depends neither on the column nor on other logits of the row."""
    return not depends_on_column(expression) and not any(
        is_reduced(operand.source) for operand in operands_of(expression)
    )


_NORMALIZATIONS = (
    F.normalize,
    torch.norm,
    torch.linalg.norm,
    "norm",
    operator.truediv,
    "exp",
    torch.exp,
)
"""What a function that computes similarities does to its inputs, each time that it is called."""


def _are_equal(site: Site, first: Any, second: Any) -> bool:
    """Whether two tensors are equal: one node, or the same normalization of equal tensors."""
    if first is second:
        return True
    if not (isinstance(first, Node) and isinstance(second, Node)):
        return type(first) is type(second) and not is_tensor(first) and bool(first == second)
    return (
        first.target in _NORMALIZATIONS
        and first.target == second.target
        and len(first.args) == len(second.args)
        and dict(first.kwargs) == dict(second.kwargs)
        and not any(map(site.is_changed, [first, second, *first.all_input_nodes]))
        and all(_are_equal(site, *pair) for pair in zip(first.args, second.args, strict=True))
    )


def _input(logits: Logits) -> Any:
    projection = logits.projection
    return applied(projection.input, logits.row_operations, projection.hidden)


def _same(site: Site, first: Any, second: Any) -> bool:
    """Whether two expressions are the same function, without operands that vary."""
    if isinstance(first, Apply) and isinstance(second, Apply):
        return (
            first.target == second.target
            and len(first.args) == len(second.args)
            and all(_same(site, *pair) for pair in zip(first.args, second.args, strict=True))
            and dict(first.kwargs) == dict(second.kwargs)
        )
    if isinstance(first, Operand) and isinstance(second, Operand):
        return first.kind is second.kind is OperandKind.SCALAR and _are_equal(
            site, first.source, second.source
        )
    return first is second or (type(first) is type(second) and first == second)

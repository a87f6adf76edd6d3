"""``torch.stack`` of logits, and what follows.

One head is taken, or all are reduced over the new dimension, as the logarithm of a mixture of a
student's and a teacher's probabilities is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language import (
    HERE,
    Apply,
    Logits,
    Rule,
    Site,
    Stack,
    TransformResult,
    beside,
    dimension,
    is_tensor,
    operands_of,
    read,
    reduction,
    same_logits,
    same_shape,
    tensor_example,
    transform,
    without_ellipsis,
)
from cce_inductor.patterns.transforms.cast import cast
from cce_inductor.patterns.transforms.copy import copy
from cce_inductor.patterns.transforms.select import getitem
from cce_inductor.patterns.transforms.shape import permute, transpose, unsqueeze
from cce_inductor.reporting import reasons


@transform(torch.stack)
def stack(site: Site, tensors: Any, dim: Any = 0) -> Stack:
    dim = dimension(dim, site.example.dim())
    first = next(filter(site.is_logits, tensors), None)
    if first is None:
        site.unsupported(reasons.MIXES_PROJECTIONS)
    shape = tuple(tensor_example(first).shape)
    parts = []
    for tensor in tensors:
        if not same_shape(tensor_example(tensor).shape, shape):
            site.unsupported(reasons.STACKS_SEVERAL_SHAPES)
        if site.is_logits(tensor):
            part = site.logits(tensor)
        else:
            part = site.logits(first)
            part = part.replace(expression=read(site, tensor, part, shape))
        parts.append(unsqueeze(site.with_logits(tensor, part), tensor, dim))
    return Stack(dim, tuple(parts))


def through_stack(
    site: Site, input: Node, rule: Rule | None, default: Callable[..., Any]
) -> TransformResult:
    """Return the logits after a node that reads stacked logits.

    Args:
        site: the node.
        input: the argument that holds stacked logits.
        rule: the node's transform rule, None for a pointwise function.
        default: applies a pointwise function, called with a site for each of the stacked logits.

    Raises:
        UnsupportedError: the operation mixes the stacked logits in another way than reducing them
            to one, or cannot be followed.
    """
    stacked = site.stack(input)
    assert stacked is not None
    if rule is getitem:
        return _taken(site, stacked, *site.node.args)
    if site.node.target in _COMBINED:
        return site.apply(_reduced, stacked)
    if reduction.get(site.node) is not None:
        site.unsupported(reasons.MIXES_PROJECTIONS)
    if rule is None and any(
        is_tensor(other) and tensor_example(other).dim() > 0
        for other in site.node.all_input_nodes
        if other is not input
    ):
        site.unsupported(reasons.STACK_WITH_TENSOR)
    if rule not in (None, cast, copy, permute, transpose):
        site.unsupported(reasons.MIXES_PROJECTIONS)
    parts = []
    for part in stacked.parts:
        inner = site.with_logits(input, part)
        parts.append(default(inner) if rule is None else inner.apply(rule))
    dim = stacked.dim
    if rule in (permute, transpose):
        dim = parts[0].row_operations[-1].args[1].index(dim)
    return Stack(dim, tuple(parts))


def _taken(site: Site, stacked: Stack, input: Any, index: Any) -> TransformResult:
    rank = tensor_example(input).dim()
    entries = without_ellipsis(index if isinstance(index, tuple) else (index,), rank)
    if len(entries) != rank or None in entries:
        site.unsupported(reasons.ADDS_DIMENSIONS_TO_STACK)
    entry = entries[stacked.dim]
    if isinstance(entry, slice) and entry == slice(None):
        parts = tuple(getitem(site.with_logits(input, p), input, entries) for p in stacked.parts)
        gone = sum(not isinstance(e, slice) for e in entries[: stacked.dim])
        return Stack(stacked.dim - gone, parts)
    if not isinstance(entry, int):
        site.unsupported(reasons.TAKES_SEVERAL_PROJECTIONS)
    part, others = stacked.parts[entry], (*entries[: stacked.dim], *entries[stacked.dim + 1 :])
    if all(isinstance(each, slice) and each == slice(None) for each in others):
        return _unstacked(site, input, part, stacked.dim)
    first = (*entries[: stacked.dim], 0, *entries[stacked.dim + 1 :])
    return getitem(site.with_logits(input, part), input, first)


def _unstacked(site: Site, input: Any, part: Logits, dim: int) -> Logits:
    """Return logits without the dimension of the stack.

    The `unsqueeze` is dropped if it is the last operation and no operand was read since. Otherwise
    the dimension is indexed.
    """
    *before, last = part.row_operations
    is_last = last.target is torch.unsqueeze and last.args == (HERE, dim)
    read_since = any(
        each.kind.varies_over_rows and each.row_operations == part.row_operations
        for each in operands_of(part.expression)
    )
    if is_last and not read_since:
        vocabulary_dim = before[-1].vocabulary_dim if before else part.projection.vocabulary_dim
        return part.replace(row_operations=tuple(before), vocabulary_dim=vocabulary_dim)
    rank = tensor_example(input).dim()
    entries = (*[slice(None)] * dim, 0, *[slice(None)] * (rank - dim - 1))
    return getitem(site.with_logits(input, part), input, entries)


def _reduced(
    site: Site,
    stacked: Stack,
    input: Any,
    dim: Any = None,
    keepdim: Any = False,
    *,
    dtype: Any = None,
) -> Logits:
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    rank = tensor_example(input).dim()
    if len(dims) != 1 or dims[0] is None or dimension(dims[0], rank) != stacked.dim:
        site.unsupported(reasons.MIXES_PROJECTIONS)
    parts = stacked.parts
    if not keepdim:
        parts = tuple(_unstacked(site, input, part, stacked.dim) for part in parts)
    first = parts[0]
    every = [p.expression if same_logits(p, first) else beside(site, p, first) for p in parts]
    if None in every:
        site.unsupported(reasons.MIXES_PROJECTIONS)
    if site.example.dtype == torch.float64:  # `dtype` may have asked for it
        first = first.replace(compute_dtype=torch.float64)
    return first.replace(expression=_COMBINED[site.node.target](every))


def _folded(target: str) -> Callable[[list[Any]], Any]:
    """Return a function that combines expressions by an operator of two arguments."""
    return functools.partial(functools.reduce, lambda a, b: Apply(target, (a, b)))


def _mean(values: list[Any]) -> Apply:
    return Apply("div.Tensor", (_folded("add.Tensor")(values), len(values)))


_COMBINED: dict[Any, Callable[[list[Any]], Any]] = {
    **dict.fromkeys((torch.sum, "sum"), _folded("add.Tensor")),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.logsumexp, "logsumexp", torch.special.logsumexp), _folded("logaddexp")),
}
"""Reductions over the dimension of a stack, as functions of the values of one logit."""

"""``torch.stack`` of several heads' logits, and the operations until one head is taken again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language import (
    Rule,
    Site,
    Stack,
    TransformResult,
    dimension,
    is_tensor,
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
    if not all(site.is_logits(tensor) for tensor in tensors):
        site.unsupported(reasons.STACKS_WITH_SOMETHING_ELSE)
    dim = dimension(dim, site.example.dim())
    shape = tensor_example(tensors[0]).shape
    parts = []
    for tensor in tensors:
        if not same_shape(tensor_example(tensor).shape, shape):
            site.unsupported(reasons.STACKS_SEVERAL_SHAPES)
        parts.append(unsqueeze(site.with_logits(tensor, site.logits(tensor)), tensor, dim))
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
        UnsupportedError: the operation mixes the stacked logits, or cannot be followed.
    """
    stacked = site.stack(input)
    assert stacked is not None
    if rule is getitem:
        return _taken(site, stacked, *site.node.args)
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
    part = stacked.parts[entry]
    first = (*entries[: stacked.dim], 0, *entries[stacked.dim + 1 :])
    return getitem(site.with_logits(input, part), input, first)

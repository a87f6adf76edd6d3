"""Changes in place through a view that holds one entry of each row, the diagonal for example.

``z.diagonal().sub_(m)`` changes `z` itself: where the column is the number of the row, the new
value is a function of the old one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.kernels.names import OperandKind
from cce_inductor.kernels.statistics.index import Index
from cce_inductor.patterns.language.capture import captured
from cce_inductor.patterns.language.examples import (
    arguments_of,
    is_symbol,
    same_shape,
    tensor_example,
)
from cce_inductor.patterns.language.expression import where
from cce_inductor.patterns.language.logits import Logits
from cce_inductor.patterns.language.masks import target_mask
from cce_inductor.patterns.language.operands import number_operand, operand, row_operand
from cce_inductor.patterns.language.rows import Row, RowStatistic, parts
from cce_inductor.patterns.language.site import Site
from cce_inductor.reporting import reasons


def changed_through_view(site: Site, view: Node, row: Row, logits: Logits) -> Logits:
    """Return the logits after the node of `site` has changed a view of one entry of each row.

    Args:
        site: the node that changes the view.
        view: the argument that is changed.
        row: the value of the view.
        logits: the matrix of logits that it is a view of.

    Raises:
        UnsupportedError: the change is not a pointwise function, or an operand does not fit.
    """
    mask = target_mask(site, logits, _index_of(site, row))

    def meaning(node: Node) -> tuple[Any, torch.dtype]:
        value = tensor_example(node)
        if node is view:
            return logits.expression, value.dtype
        if site.is_logits(node):
            site.unsupported(reasons.VIEW_WITH_OTHER_LOGITS)
        if value.numel() == 1:
            return operand(site, OperandKind.SCALAR, node, logits), value.dtype
        if not same_shape(value.shape, tensor_example(view).shape):
            site.unsupported(reasons.BROADCAST_TO_LARGER_SHAPE)
        return row_operand(site, node, logits), value.dtype

    return logits.replace(
        expression=where(mask, _new_value(site, logits, meaning), logits.expression)
    )


def _index_of(site: Site, row: Row) -> Any:
    """Return the index of each row's entry in the vocabulary."""
    entries = [part for part in parts(row) if isinstance(part, RowStatistic) and part.kind is Index]
    if not entries or any(entry.index is not entries[0].index for entry in entries):
        site.unsupported(reasons.CHANGES_UNKNOWN_ENTRIES)
    return entries[0].index


def _new_value(
    site: Site, logits: Logits, meaning: Callable[[Node], tuple[Any, torch.dtype]]
) -> Any:
    node = site.node
    args, kwargs = arguments_of(node)
    if node.target is not operator.setitem:
        return captured(site, site.function, args, kwargs, logits, meaning)
    _, index, value = args
    if index not in (slice(None), Ellipsis):
        site.unsupported(reasons.ASSIGNS_SOME_ROWS)
    if is_symbol(value):
        return number_operand(site, value, logits)
    return meaning(value)[0] if isinstance(value, Node) else value

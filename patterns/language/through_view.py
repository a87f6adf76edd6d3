"""Logits of which some entries were changed in place through a view that is a value of rows.

``z.diagonal().sub_(m)`` changes one entry of each row of `z`: where the column is the row's index,
the new value of a logit is a function of the old one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language.algebra import call
from cce_inductor.patterns.language.examples import is_symbol, same_shape, tensor_example
from cce_inductor.patterns.language.expression import COLUMN, Apply, Operand, where
from cce_inductor.patterns.language.logits import Logits
from cce_inductor.patterns.language.rows import Row, Statistic, parts
from cce_inductor.patterns.language.site import Site
from cce_inductor.reporting import reasons


def changed_through_view(site: Site, view: Node, row: Row, logits: Logits) -> Logits:
    """What logits are after the node of `site` has changed `view`, a view of one entry a row.

    Args:
        site: the node that changes the view.
        view: the changed argument of the node.
        row: the view as a value of rows.
        logits: the two-dimensional logits that it is a view of.

    Raises:
        UnsupportedError: the change is not a pointwise function, or an operand does not fit.
    """
    entry = _entry_of(site, row)
    dim = logits.vocabulary_dim

    def one_a_row(source: Any) -> Operand:
        source = call(torch.unsqueeze, source, dim)
        return Operand("r", source, logits.row_operations, dim, site.node)

    def meaning(node: Node) -> tuple[Any, torch.dtype]:
        value = tensor_example(node)
        if node is view:
            return logits.expression, value.dtype
        if site.is_logits(node):
            site.unsupported(reasons.VIEW_WITH_OTHER_LOGITS)
        if value.numel() == 1:
            return Operand("s", node, logits.row_operations, dim, site.node), value.dtype
        if not same_shape(value.shape, tensor_example(view).shape):
            site.unsupported(reasons.BROADCAST_TO_LARGER_SHAPE)
        return one_a_row(node), value.dtype

    here = Apply("eq.Tensor", (COLUMN, one_a_row(entry)))
    new = _new_value(site, logits, meaning)
    return logits.replace(expression=where(here, new, logits.expression))


def _entry_of(site: Site, row: Row) -> Any:
    """The index of each row's entry in the vocabulary."""
    found = [part for part in parts(row) if isinstance(part, Statistic) and part.kind == "index"]
    if not found or any(each.index is not found[0].index for each in found):
        site.unsupported(reasons.CHANGES_UNKNOWN_ENTRIES)
    return found[0].index


def _new_value(site: Site, logits: Logits, meaning: Any) -> Any:
    node = site.node
    if node.target is not operator.setitem:
        return site.captured(site.function, node.args, node.kwargs, logits, meaning)
    _, index, value = node.args
    if index not in (slice(None), Ellipsis):
        site.unsupported(reasons.ASSIGNS_SOME_ROWS)
    if is_symbol(value):
        return site.number(value, logits)
    return meaning(value)[0] if isinstance(value, Node) else value

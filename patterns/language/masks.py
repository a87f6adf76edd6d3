"""Masks over the vocabulary, as boolean expressions, and logits that are overwritten under a mask.

A mask compares each logit's place in the vocabulary with an index, and is never a tensor.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.kernels.names import OperandKind
from cce_inductor.patterns.language.examples import constant, is_symbol, tensor_example
from cce_inductor.patterns.language.expression import COLUMN, Apply, Operand
from cce_inductor.patterns.language.indexing import column_numbers, columns_along, row_numbers
from cce_inductor.patterns.language.logits import Call, Logits
from cce_inductor.patterns.language.operands import number_operand, operand, row_operand
from cce_inductor.patterns.language.rows import call, vocabulary_of
from cce_inductor.patterns.language.site import Site


def column_mask(place: int) -> Apply:
    """Return the mask of one column."""
    return Apply("eq.Scalar", (COLUMN, place))


def range_mask(start: int | Operand | None, stop: int | Operand | None) -> Apply:
    """Return the mask of the columns from `start` up to but not including `stop`.

    Args:
        start, stop: numbers or operands; None for no limit. At least one is given.
    """
    bounds = [
        Apply(f"{compare}.{'Tensor' if isinstance(at, Operand) else 'Scalar'}", (COLUMN, at))
        for compare, at in (("ge", start), ("lt", stop))
        if at is not None
    ]
    return bounds[0] if len(bounds) == 1 else Apply("logical_and", tuple(bounds))


def index_mask(site: Site, logits: Logits, index: Node) -> Apply:
    """Return the mask of the entry of each row that an index tensor names.

    A negative index counts from the end.
    """
    columns = call(torch.reshape, column_numbers(index, logits), (1, -1))
    taken = call(operator.getitem, columns, (call(torch.zeros_like, index), index))
    return _mask_at(site, logits, call(torch.unsqueeze, taken, 1))


def scatter_mask(site: Site, logits: Logits, index: Node) -> Apply:
    """Return the mask of the entry of each row that the index of a `scatter` names.

    Such an index has the rank of the logits.
    """
    dim = logits.vocabulary_dim
    width = vocabulary_of(logits)
    columns = columns_along(index, logits)
    table = call(torch.ops.cce_inductor.expand_rows.default, columns, index, dim, width)
    return _mask_at(site, logits, call(torch.gather, table, dim, index))


def diagonal_mask(site: Site, logits: Logits) -> Apply:
    """Return the mask of the diagonal of a matrix of logits."""
    rows = call(torch.unsqueeze, row_numbers(site, logits), logits.vocabulary_dim)
    return _mask_at(site, logits, rows)


def columns_mask(site: Site, logits: Logits, indices: Node) -> Apply:
    """Return the mask of the columns that an index tensor names, the same in every row."""
    columns = column_numbers(indices, logits)
    is_named = call(torch.isin, columns, call(operator.getitem, columns, indices))
    return Apply("ne.Scalar", (operand(site, OperandKind.COLUMN, is_named, logits), 0))


def target_mask(site: Site, logits: Logits, target: Node) -> Apply:
    """Return the mask of the class of each row, given without the vocabulary's dimension."""
    return Apply("eq.Tensor", (COLUMN, row_operand(site, target, logits)))


def _mask_at(site: Site, logits: Logits, columns: Call) -> Apply:
    return Apply("eq.Tensor", (COLUMN, operand(site, OperandKind.ROW, columns, logits)))


def overwritten(site: Site, logits: Logits, input: Any, mask: Any, value: Any) -> Logits:
    """Return the logits with another value where a mask is true.

    Args:
        input: the argument that holds the logits.
        mask: a boolean expression.
        value: a number, or an expression.
    """
    x = logits.expression
    if is_symbol(value):
        value = number_operand(site, value, logits)
    if isinstance(value, (Apply, Operand)):
        return logits.replace(expression=Apply("where.self", (mask, value, x)))
    constant_value = float(value) if isinstance(value, bool) else constant(value)
    if tensor_example(input).dtype != torch.bool:
        chosen = Apply("where.ScalarSelf", (mask, constant_value, x))
    elif constant_value:
        chosen = Apply("logical_or", (mask, x))
    else:
        chosen = Apply("logical_and", (Apply("logical_not", (mask,)), x))
    return logits.replace(expression=chosen)

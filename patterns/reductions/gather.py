"""One entry, or some, of each row: ``gather``, ``take_along_dim``, ``log_probs[rows, target]``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..algebra import Algebra, call, without_vocabulary
from ..logits import HERE, Logits, Row
from ..rules import Site, dimension, is_tensor, reduction, tensor_example


@reduction(torch.take_along_dim, "take_along_dim")
def take_along_dim(site: Site, input: Any, indices: Any, dim: Any = None) -> Row | Logits:
    if dim is None:
        site.unsupported("it takes from all logits")
    return gather(site, input, dim, indices)


@reduction(torch.gather, "gather")
def gather(
    site: Site, input: Any, dim: Any, index: Any, *, sparse_grad: Any = False
) -> Row | Logits:
    logits = site.logits(input)
    shape = tensor_example(input).shape
    if dimension(dim, len(shape)) != logits.vocabulary_dim:
        return _rows_by_index(site, logits, dimension(dim, len(shape)), index)
    logits = site.over_vocabulary(logits, dim)
    taken = tensor_example(index).shape
    vocabulary_dim = logits.vocabulary_dim
    if len(taken) != len(shape) or any(
        taken[at] != shape[at] for at in range(len(shape)) if at != vocabulary_dim
    ):
        site.unsupported("its index does not have the rows of the logits")
    return Algebra(site, logits).gather(logits.expression, index)


def _rows_by_index(site: Site, logits: Logits, dim: int, index: Any) -> Logits:
    """Rows, where the index is the same for every entry of the vocabulary."""
    source = index.args[0] if index.op == "call_method" and index.target == "expand" else None
    if not isinstance(source, Node) or tensor_example(source).dim() != tensor_example(index).dim():
        site.unsupported("it gathers from rows by an index that may differ in the vocabulary")
    if tensor_example(source).shape[logits.vocabulary_dim] != 1:
        site.unsupported("it gathers from rows by an index that may differ in the vocabulary")
    return logits.with_row_operation(torch.take_along_dim, HERE, source, dim)


@reduction("diagonal", torch.diagonal)
def diagonal(site: Site, input: Any, offset: Any = 0, dim1: Any = 0, dim2: Any = 1) -> Row:
    logits = site.logits(input)
    rows, columns = tensor_example(input).shape[:2]
    if tensor_example(input).dim() != 2 or offset != 0 or rows != columns:
        site.unsupported("it is not the diagonal of a square matrix")
    entries = call(torch.arange, rows, device=tensor_example(input).device)
    logits = site.over_vocabulary(logits, dim2)
    found = Algebra(site, logits).gather(logits.expression, entries, kind="index")
    return without_vocabulary(found, logits, False)


@reduction(operator.getitem)
def getitem(site: Site, input: Any, index: Any) -> Row | None:
    """Index tensors for every dimension; None for any other index."""
    if not site.is_logits(input):
        return None
    logits = site.logits(input)
    rank = tensor_example(input).dim()
    entries = index if isinstance(index, tuple) else (index,)
    if len(entries) != rank or logits.vocabulary_dim != rank - 1:
        return None
    *rows, column = entries
    if rows and isinstance(rows[0], (list, tuple, range)):
        if list(rows[0]) != list(range(len(rows[0]))) or rank != 2:
            return None
        if tensor_example(input).shape[0] != len(rows[0]):
            return None
        rows = []
    elif not all(_is_index(row) for row in rows):
        return None
    elif len(rows) == 1 and _counts(rows[0], tensor_example(input).shape[0]):
        rows = []
    if not _is_index(column):
        return None
    result = tensor_example(site.node).shape
    if tensor_example(column).shape != result:
        site.unsupported("its index is broadcast")
    if rows:
        taken, dim = (*rows, slice(None)), len(result)
        logits = logits.with_row_operation(operator.getitem, HERE, taken, vocabulary_dim=dim)
    if rows and not any(tensor_example(row).shape == result for row in rows):
        site.unsupported("its index is broadcast")
    found = Algebra(site, logits).gather(logits.expression, column, kind="index")
    return without_vocabulary(found, logits, False)


def _counts(node: Node, size: Any) -> bool:
    """Whether it is ``torch.arange(size)``."""
    return (
        node.target is torch.arange
        and len(node.args) == 1
        and tensor_example(node).shape == (size,)
    )


def _is_index(entry: Any) -> bool:
    return is_tensor(entry) and tensor_example(entry).dtype in (torch.int64, torch.int32)

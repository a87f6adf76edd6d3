"""Some entries of each row: ``gather``, ``take_along_dim``, ``log_probs[rows, target]``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language import (
    HERE,
    Algebra,
    Logits,
    ReductionResult,
    Row,
    Site,
    dimension,
    is_integer_tensor,
    non_negative,
    reduction,
    row_numbers,
    same_shape,
    same_size,
    takes_one_of_each_row,
    tensor_example,
    without_vocabulary,
)
from cce_inductor.reporting import reasons


@reduction(torch.take_along_dim, "take_along_dim")
def take_along_dim(site: Site, input: Any, indices: Any, dim: Any = None) -> ReductionResult:
    if dim is None:
        site.unsupported(reasons.TAKES_FROM_ALL)
    return _taken(site, input, dim, indices, non_negative)


@reduction(torch.gather, "gather")
def gather(
    site: Site, input: Any, dim: Any, index: Any, *, sparse_grad: Any = False
) -> ReductionResult:
    return _taken(site, input, dim, index, lambda logits, index: index)


def _taken(
    site: Site, input: Any, dim: Any, index: Any, read: Callable[..., Any]
) -> ReductionResult:
    logits = site.logits(input)
    shape = tensor_example(input).shape
    if dimension(dim, len(shape)) != logits.vocabulary_dim:
        return _rows_by_index(site, logits, dimension(dim, len(shape)), index)
    logits = site.over_vocabulary(logits, dim)
    taken = tensor_example(index).shape
    vocabulary_dim = logits.vocabulary_dim
    if len(taken) != len(shape) or any(
        not same_size(taken[at], shape[at]) for at in range(len(shape)) if at != vocabulary_dim
    ):
        site.unsupported(reasons.INDEX_WITHOUT_ROWS)
    return Algebra(site, logits).gather(logits.expression, read(logits, index))


def _rows_by_index(site: Site, logits: Logits, dim: int, index: Any) -> Logits:
    """Return the rows that an index names, which must be the same for every column."""
    source = index.args[0] if index.op == "call_method" and index.target == "expand" else None
    if not isinstance(source, Node) or tensor_example(source).dim() != tensor_example(index).dim():
        site.unsupported(reasons.INDEX_MAY_DIFFER_IN_VOCABULARY)
    if tensor_example(source).shape[logits.vocabulary_dim] != 1:
        site.unsupported(reasons.INDEX_MAY_DIFFER_IN_VOCABULARY)
    return logits.with_row_operation(torch.take_along_dim, HERE, source, dim)


@reduction("diag", torch.diag)
def diag(site: Site, input: Any, diagonal: Any = 0) -> Row:
    return _diagonal(site, input, diagonal)


@reduction(torch.linalg.diagonal)
def linalg_diagonal(
    site: Site, input: Any, *, offset: Any = 0, dim1: Any = -2, dim2: Any = -1
) -> Row:
    return _diagonal(site, input, offset)


@reduction("diagonal", torch.diagonal)
def diagonal(site: Site, input: Any, offset: Any = 0, dim1: Any = 0, dim2: Any = 1) -> Row:
    return _diagonal(site, input, offset)


def _diagonal(site: Site, input: Any, offset: Any) -> Row:
    """Return the diagonal of a matrix that has an entry of it in each row."""
    logits = site.logits(input)
    shape = tensor_example(input).shape
    if len(shape) != 2 or offset != 0:
        site.unsupported(reasons.NOT_THE_DIAGONAL_OF_A_MATRIX)
    if not same_size(site.example.shape[0], shape[1 - logits.vocabulary_dim]):
        site.unsupported(reasons.DIAGONAL_WITHOUT_SOME_ROWS)
    logits = site.over_vocabulary(logits, logits.vocabulary_dim)
    entries = row_numbers(site, logits)
    entry = Algebra(site, logits).index(logits.expression, entries)
    return without_vocabulary(entry, logits, keepdim=False)


@reduction(operator.getitem)
def getitem(site: Site, input: Any, index: Any) -> ReductionResult:
    """Follow index tensors for every dimension; return None for any other index."""
    if not site.is_logits(input):
        return None
    logits = site.logits(input)
    rank = tensor_example(input).dim()
    entries = index if isinstance(index, tuple) else (index,)
    if len(entries) != rank or logits.vocabulary_dim != rank - 1:
        return None
    *rows, column = entries
    if takes_one_of_each_row(site, logits, entries):
        rows = []
    if not all(map(is_integer_tensor, (*rows, column))):
        return None
    result = tensor_example(site.node).shape
    if not same_shape(tensor_example(column).shape, result):
        site.unsupported(reasons.INDEX_IS_BROADCAST)
    if rows:
        taken, dim = (*rows, slice(None)), len(result)
        logits = logits.with_row_operation(operator.getitem, HERE, taken, vocabulary_dim=dim)
    if rows and not any(same_shape(tensor_example(row).shape, result) for row in rows):
        site.unsupported(reasons.INDEX_IS_BROADCAST)
    entry = Algebra(site, logits).index(logits.expression, column)
    return without_vocabulary(entry, logits, keepdim=False)

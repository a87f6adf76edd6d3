"""One entry of each row: how an index names it, and logits that get another value there."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language.algebra import call, size_of, vocabulary_of
from cce_inductor.patterns.language.examples import (
    constant,
    is_symbol,
    is_tensor,
    same_size,
    tensor_example,
)
from cce_inductor.patterns.language.expression import COLUMN, Apply, Operand
from cce_inductor.patterns.language.logits import Call, Logits
from cce_inductor.patterns.language.site import Site


def takes_one_of_each_row(site: Site, logits: Logits, entries: tuple[Any, ...]) -> bool:
    """Whether ``logits[entries]`` is one entry of each row of a matrix, in the rows' order."""
    shape = site.shape_of(logits)
    if len(entries) != 2 or len(shape) != 2 or logits.vocabulary_dim != 1:
        return False
    rows, column = entries
    return counts(site, rows, shape[0]) and is_index(column)


def counts(site: Site, index: Any, size: Any) -> bool:
    """Whether an index is ``0, 1, ... size - 1``: a range, or `torch.arange` in any spelling."""
    if isinstance(index, (list, tuple, range)):
        return size == len(index) and list(index) == list(range(len(index)))
    if not isinstance(index, Node) or site.is_changed(index):
        return False
    if index.op == "call_method" and index.target in ("to", "long", "contiguous", "clone"):
        return is_index(index) and counts(site, index.args[0], size)
    if index.target is not torch.arange or not is_index(index):
        return False
    named = [index.kwargs[k] for k in ("start", "end", "step") if k in index.kwargs]
    bounds = (*index.args, *named)
    start, _, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if isinstance(start, Node) or isinstance(step, Node) or (start, step) != (0, 1):
        return False
    return same_size(tensor_example(index).shape[0], size)


def is_index(entry: Any) -> bool:
    return is_tensor(entry) and tensor_example(entry).dtype in (torch.int64, torch.int32)


def at_index(site: Site, logits: Logits, index: Node) -> Apply:
    """Where the vocabulary's entry is the one that an index tensor names, one a row: counted from
    the end if it is negative."""
    entries = call(torch.reshape, _entries(index, logits), (1, -1))
    found = call(operator.getitem, entries, (call(torch.zeros_like, index), index))
    return _here(site, logits, call(torch.unsqueeze, found, 1))


def at_scatter(site: Site, logits: Logits, index: Node) -> Apply:
    """The same of the index of a `scatter`, which has the dimensions of the logits."""
    dim = logits.vocabulary_dim
    width = vocabulary_of(logits)
    entries = _entries_along(index, logits)
    table = call(torch.ops.cce_inductor.expand_rows.default, entries, index, dim, width)
    return _here(site, logits, call(torch.gather, table, dim, index))


def at_diagonal(site: Site, logits: Logits) -> Apply:
    """Where a row and the vocabulary's entry have the same place in a matrix."""
    rows = call(torch.unsqueeze, places_of_rows(site, logits), logits.vocabulary_dim)
    return _here(site, logits, rows)


def places_of_rows(site: Site, logits: Logits) -> Call:
    """``0, 1, ...``, one for each row of a matrix."""
    dim = 1 - logits.vocabulary_dim
    count = size_of(logits, dim, site.shape_of(logits)[dim])
    return call(torch.arange, count, device=tensor_example(logits.projection.node).device)


def wrapped(logits: Logits, indices: Node) -> Call:
    """The indices of a `take_along_dim` over the vocabulary, as ones that `gather` takes."""
    entries = _entries_along(indices, logits)
    return call(torch.take_along_dim, entries, indices, logits.vocabulary_dim)


def _entries_along(index: Node, logits: Logits) -> Call:
    """The places in the vocabulary, in its dimension of an index."""
    rank, dim = tensor_example(index).dim(), logits.vocabulary_dim
    return call(
        torch.reshape, _entries(index, logits), tuple(-1 if at == dim else 1 for at in range(rank))
    )


def among(site: Site, logits: Logits, indices: Node) -> Apply:
    """Where the vocabulary's entry is one of those that an index tensor names in every row."""
    entries = _entries(indices, logits)
    found = call(torch.isin, entries, call(operator.getitem, entries, indices))
    column = Operand("c", found, logits.row_operations, logits.vocabulary_dim, site.node)
    return Apply("ne.Scalar", (column, 0))


def _entries(index: Node, logits: Logits) -> Call:
    """The places in the vocabulary. To take from them by an index checks it, as the replaced code
    does."""
    count = vocabulary_of(logits)
    return call(torch.arange, count, device=tensor_example(index).device)


def _here(site: Site, logits: Logits, places: Call) -> Apply:
    row = Operand("r", places, logits.row_operations, logits.vocabulary_dim, site.node)
    return Apply("eq.Tensor", (COLUMN, row))


def value_of_rows(site: Site, logits: Logits, value: Node) -> Operand:
    """A tensor of one value a row, without the vocabulary's dimension, as an operand."""
    column = call(torch.unsqueeze, value, logits.vocabulary_dim)
    return Operand("r", column, logits.row_operations, logits.vocabulary_dim, site.node)


def overwritten(site: Site, logits: Logits, input: Any, inside: Any, value: Any) -> Logits:
    """The logits with another value where `inside` is true.

    Args:
        input: the argument that holds the logits.
        value: a number, or an expression.
    """
    x = logits.expression
    if is_symbol(value):
        value = site.number(value, logits)
    if isinstance(value, (Apply, Operand)):
        return logits.replace(expression=Apply("where.self", (inside, value, x)))
    number = float(value) if isinstance(value, bool) else constant(value)
    if tensor_example(input).dtype != torch.bool:
        chosen = Apply("where.ScalarSelf", (inside, number, x))
    elif number:
        chosen = Apply("logical_or", (inside, x))
    else:
        chosen = Apply("logical_and", (Apply("logical_not", (inside,)), x))
    return logits.replace(expression=chosen)

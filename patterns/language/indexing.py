"""What an index into logits names: all rows in order, one entry of each row, a dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language.examples import (
    arguments_of,
    is_tensor,
    same_size,
    tensor_example,
)
from cce_inductor.patterns.language.logits import Call, Logits
from cce_inductor.patterns.language.rows import call, size_of, vocabulary_of
from cce_inductor.patterns.language.site import Site


def without_ellipsis(entries: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """Return one entry for each dimension that is indexed, and None for each new dimension.

    A boolean mask stands for as many dimensions as it has.
    """
    used = sum(_dimensions(entry) for entry in entries)
    fill = (slice(None),) * (rank - used)
    for position, entry in enumerate(entries):
        if entry is Ellipsis:
            return (*entries[:position], *fill, *entries[position + 1 :])
    return (*entries, *fill)


def _dimensions(entry: Any) -> int:
    if entry is None or entry is Ellipsis:
        return 0
    if isinstance(entry, Node) and is_tensor(entry) and tensor_example(entry).dtype == torch.bool:
        return tensor_example(entry).dim()
    return 1


def is_integer_tensor(entry: Any) -> bool:
    """Whether an entry of an index is a tensor of places, and no mask."""
    return is_tensor(entry) and tensor_example(entry).dtype in (torch.int64, torch.int32)


def takes_one_of_each_row(site: Site, logits: Logits, entries: tuple[Any, ...]) -> bool:
    """Whether ``logits[entries]`` is one entry of each row of a matrix, in the rows' order."""
    shape = site.shape_of(logits)
    if len(entries) != 2 or len(shape) != 2 or logits.vocabulary_dim != 1:
        return False
    rows, column = entries
    return is_arange(site, rows, shape[0]) and is_integer_tensor(column)


def is_arange(site: Site, index: Any, size: Any) -> bool:
    """Whether an index is ``0, 1, ... size - 1``: a range, or `torch.arange` in any spelling."""
    if isinstance(index, (list, tuple, range)):
        return size == len(index) and list(index) == list(range(len(index)))
    if not isinstance(index, Node) or site.is_changed(index):
        return False
    if index.op == "call_method" and index.target in ("to", "long", "contiguous", "clone"):
        return is_integer_tensor(index) and is_arange(site, index.args[0], size)
    if index.target is not torch.arange or not is_integer_tensor(index):
        return False
    args, kwargs = arguments_of(index)
    bounds = (*args, *(kwargs[name] for name in ("start", "end", "step") if name in kwargs))
    start, _, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if isinstance(start, Node) or isinstance(step, Node) or (start, step) != (0, 1):
        return False
    return same_size(tensor_example(index).shape[0], size)


def row_numbers(site: Site, logits: Logits) -> Call:
    """Return ``0, 1, ...``, one for each row of a matrix."""
    dim = 1 - logits.vocabulary_dim
    count = size_of(logits, dim, site.shape_of(logits)[dim])
    return call(torch.arange, count, device=tensor_example(logits.projection.node).device)


def column_numbers(index: Node, logits: Logits) -> Call:
    """Return ``0, 1, ...``, one for each column, on the device of `index`.

    Taking from them by the user's index raises the same error for an index out of range as the
    replaced code does.
    """
    return call(torch.arange, vocabulary_of(logits), device=tensor_example(index).device)


def columns_along(index: Node, logits: Logits) -> Call:
    """Return the `column_numbers` in the vocabulary's dimension, with the rank of `index`."""
    rank, dim = tensor_example(index).dim(), logits.vocabulary_dim
    shape = tuple(-1 if at == dim else 1 for at in range(rank))
    return call(torch.reshape, column_numbers(index, logits), shape)


def non_negative(logits: Logits, indices: Node) -> Call:
    """Return the indices of a `take_along_dim` over the vocabulary counted from the front."""
    return call(
        torch.take_along_dim, columns_along(indices, logits), indices, logits.vocabulary_dim
    )

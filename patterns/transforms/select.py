"""Some rows, or a range of the vocabulary: ``logits[:, :-1]``, ``logits[..., :v]``, `split`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language import (
    HERE,
    Logits,
    Site,
    UnsupportedError,
    constant,
    dimension,
    example,
    tensor_example,
    transform,
    vocabulary_range,
    without_ellipsis,
)
from cce_inductor.reporting import reasons


@transform(operator.getitem)
def getitem(site: Site, input: Any, index: Any) -> Logits:
    several = site.several(input)
    if several is not None:
        if not isinstance(index, int):
            site.unsupported(reasons.SELECTS_SEVERAL_PARTS)
        return several[index]
    logits = site.logits(input)
    rank = tensor_example(input).dim()
    entries = without_ellipsis(index if isinstance(index, tuple) else (index,), rank)
    if any(_is_index_tensor(entry) for entry in entries):
        return _gathered(site, logits, entries, index, rank)

    source, result, moved = 0, 0, None
    for place, entry in enumerate(entries):
        if source == logits.vocabulary_dim and entry is not None:
            if not isinstance(entry, slice):
                site.unsupported(reasons.SELECTS_ONE_ENTRY)
            size = site.example.shape[result]
            logits = vocabulary_range(site, logits, entry, size)
            entries = (*entries[:place], slice(None), *entries[place + 1 :])
            moved = result
        source += entry is not None
        result += entry is None or isinstance(entry, slice)
    assert moved is not None, "an index without ellipsis has an entry for every dimension"
    if all(entry == slice(None) for entry in entries):
        return logits
    if Ellipsis not in (index if isinstance(index, tuple) else ()):
        index = entries if isinstance(index, tuple) else index
    elif any(isinstance(e, slice) and e != slice(None) for e in entries) or None in entries:
        index = entries
    return logits.with_row_operation(operator.getitem, HERE, index, vocabulary_dim=moved)


def _gathered(
    site: Site, logits: Logits, entries: tuple[Any, ...], index: Any, rank: int
) -> Logits:
    """Return the rows that index tensors or masks name.

    The vocabulary must be the last dimension, which then stays the last one.
    """
    if logits.vocabulary_dim != rank - 1 or entries[-1] != slice(None):
        site.unsupported(reasons.SELECTS_SOME_ENTRIES)
    if any(isinstance(entry, (list, tuple)) for entry in entries):
        site.unsupported(reasons.SELECTS_ROWS_BY_LIST)
    return logits.with_row_operation(
        operator.getitem, HERE, index, vocabulary_dim=site.example.dim() - 1
    )


def _is_index_tensor(entry: Any) -> bool:
    """Whether an entry of an index is a tensor: of places, or a mask."""
    if isinstance(entry, (list, tuple)):
        raise UnsupportedError(reasons.SELECTS_ROWS_BY_LIST)
    return isinstance(entry, Node) and isinstance(example(entry), torch.Tensor)


@transform(torch.narrow, "narrow")
def narrow(site: Site, input: Any, dim: Any, start: Any, length: Any) -> Logits:
    logits = site.logits(input)
    dim = dimension(dim, tensor_example(input).dim())
    if dim == logits.vocabulary_dim:
        start, length = int(constant(start)), int(constant(length))
        return vocabulary_range(site, logits, slice(start, start + length), length)
    return logits.with_row_operation(torch.narrow, HERE, dim, start, length)


@transform(torch.select, "select")
def select(site: Site, input: Any, dim: Any, index: Any) -> Logits:
    logits = site.logits(input)
    dim = dimension(dim, tensor_example(input).dim())
    if dim == logits.vocabulary_dim:
        site.unsupported(reasons.SELECTS_ONE_ENTRY)
    moved = logits.vocabulary_dim - (dim < logits.vocabulary_dim)
    return logits.with_row_operation(torch.select, HERE, dim, index, vocabulary_dim=moved)


@transform(torch.index_select, "index_select")
def index_select(site: Site, input: Any, dim: Any, index: Any) -> Logits:
    logits = site.logits(input)
    dim = dimension(dim, tensor_example(input).dim())
    if dim == logits.vocabulary_dim:
        site.unsupported(reasons.SELECTS_SOME_ENTRIES)
    return logits.with_row_operation(torch.index_select, HERE, dim, index)


@transform("split", torch.split, "chunk", torch.chunk, "tensor_split", torch.tensor_split)
def split(site: Site, input: Any, sizes: Any, dim: Any = 0) -> tuple[Logits, ...]:
    """The parts have the sizes of the node's example, in order."""
    logits = site.logits(input)
    dim = dimension(dim, tensor_example(input).dim())
    if dim == logits.vocabulary_dim:
        site.unsupported(reasons.SPLITS_VOCABULARY)
    parts, start = [], 0
    for part in example(site.node):
        length = part.shape[dim]
        if not isinstance(length, int):
            site.unsupported(reasons.SPLITS_DYNAMIC_ROWS)
        parts.append(logits.with_row_operation(torch.narrow, HERE, dim, start, length))
        start += length
    return tuple(parts)


@transform("unbind", torch.unbind)
def unbind(site: Site, input: Any, dim: Any = 0) -> tuple[Logits, ...]:
    logits = site.logits(input)
    dim = dimension(dim, tensor_example(input).dim())
    if dim == logits.vocabulary_dim:
        site.unsupported(reasons.SPLITS_VOCABULARY)
    moved = logits.vocabulary_dim - (dim < logits.vocabulary_dim)
    return tuple(
        logits.with_row_operation(torch.select, HERE, dim, index, vocabulary_dim=moved)
        for index in range(len(example(site.node)))
    )

"""Some of the rows: ``logits[:, :-1]``, ``logits[:, -1]``, ``logits[i]``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..logits import HERE, Logits
from ..rules import Site, UnsupportedError, example, tensor_example, transform


@transform(operator.getitem)
def getitem(site: Site, input: Any, index: Any) -> Logits:
    logits = site.logits(input)
    rank = tensor_example(input).dim()
    entries = _without_ellipsis(index if isinstance(index, tuple) else (index,), rank)
    if any(_is_tensor_like(entry) for entry in entries):
        return _gathered(site, logits, entries, index, rank)

    source, result, moved = 0, 0, None
    for entry in entries:
        if source == logits.vocabulary_dim and entry is not None:
            if entry != slice(None):
                site.unsupported("it selects some entries of the vocabulary")
            moved = result
        source += entry is not None
        result += entry is None or isinstance(entry, slice)
    assert moved is not None, "an index without ellipsis has an entry for every dimension"
    return logits.with_row_operation(operator.getitem, HERE, index, vocabulary_dim=moved)


def _gathered(
    site: Site, logits: Logits, entries: tuple[Any, ...], index: Any, rank: int
) -> Logits:
    """Rows by index tensors, which leave the last dimension last when it is not indexed."""
    if logits.vocabulary_dim != rank - 1 or entries[-1] != slice(None):
        site.unsupported("it selects some entries of the vocabulary")
    for entry in entries:
        if _is_tensor_like(entry) and tensor_example(entry).dtype not in (torch.int64, torch.int32):
            site.unsupported("it selects rows by a mask, so their number depends on the data")
    return logits.with_row_operation(
        operator.getitem, HERE, index, vocabulary_dim=site.example.dim() - 1
    )


def _is_tensor_like(entry: Any) -> bool:
    if isinstance(entry, (list, tuple)):
        raise UnsupportedError("it selects rows by a list")
    return isinstance(entry, Node) and isinstance(example(entry), torch.Tensor)


def _without_ellipsis(entries: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """One entry for each dimension, None for each new one."""
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    fill = (slice(None),) * (rank - used)
    for position, entry in enumerate(entries):
        if entry is Ellipsis:
            return (*entries[:position], *fill, *entries[position + 1 :])
    return (*entries, *fill)

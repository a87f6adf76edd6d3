"""Assignments in place: ``logits[..., n:] = -inf``, ``logits[rows, target] = values``."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language import (
    Apply,
    Logits,
    Operand,
    Site,
    call,
    column_mask,
    columns_mask,
    constant,
    example,
    index_mask,
    is_symbol,
    is_tensor,
    number_operand,
    overwritten,
    pointwise,
    range_mask,
    read,
    row_operand,
    same_shape,
    takes_one_of_each_row,
    tensor_example,
    transform,
    vocabulary_of,
    without_ellipsis,
)
from cce_inductor.reporting import reasons


@transform(operator.setitem)
def setitem(site: Site, input: Any, index: Any, value: Any) -> Logits:
    """Return the logits that `input` holds after the assignment."""
    logits = site.logits(input)
    shape = tuple(tensor_example(input).shape)
    if isinstance(index, Node) and is_tensor(index):
        mask = tensor_example(index)
        if mask.dtype == torch.bool and same_shape(mask.shape, shape):
            return _where(site, input, index, value)
        if len(shape) > 1 or tensor_example(index).dtype != torch.bool:
            site.unsupported(reasons.ASSIGNS_SOME_ROWS)
    entries = without_ellipsis(index if isinstance(index, tuple) else (index,), len(shape))
    if len(entries) != len(shape) or None in entries:
        site.unsupported(reasons.ASSIGNS_BY_UNKNOWN_INDEX)
    if takes_one_of_each_row(site, logits, entries):
        return _one_of_each_row(site, input, entries[1], value)
    entry = entries[logits.vocabulary_dim]
    if any(dim != logits.vocabulary_dim and e != slice(None) for dim, e in enumerate(entries)):
        if entry == slice(None):
            site.unsupported(reasons.ASSIGNS_SOME_ROWS)
        site.unsupported(reasons.ASSIGNS_BY_ROW_AND_CLASS)
    if isinstance(entry, Node) and is_tensor(entry):
        if logits.vocabulary_dim != len(shape) - 1:
            site.unsupported(reasons.ASSIGNS_VOCABULARY_NOT_LAST)
        if tensor_example(entry).dtype == torch.bool:
            return _where(site, input, entry, value)
    mask = _mask(site, logits, entry)
    return logits if mask is None else _assigned(site, input, mask, value)


def _mask(site: Site, logits: Logits, entry: Any) -> Apply | None:
    """Return the mask of the columns that an entry of an index names, None if it names none."""
    if isinstance(entry, Node) and is_tensor(entry):
        return columns_mask(site, logits, entry)
    if isinstance(entry, (list, tuple)):
        masks = [column_mask(_place(site, logits, at)) for at in entry]
        return functools.reduce(_either, masks) if masks else None
    is_static = isinstance(logits.vocabulary, int)
    is_dynamic_slice = isinstance(entry, slice) and (
        not is_static or is_symbol(entry.start) or is_symbol(entry.stop)
    )
    if is_dynamic_slice:
        return _dynamic_range_mask(site, logits, entry)
    start, stop = _range(site, logits, entry)
    to_the_end = is_static and stop >= logits.vocabulary
    return range_mask(start, None if to_the_end else stop)


def _either(first: Apply, second: Apply) -> Apply:
    return Apply("logical_or", (first, second))


def _one_of_each_row(site: Site, input: Node, index: Node, value: Any) -> Logits:
    logits = site.logits(input)
    rows = tensor_example(input).shape[:1]
    if not same_shape(tensor_example(index).shape, rows):
        site.unsupported(reasons.INDEX_IS_BROADCAST)
    here = index_mask(site, logits, index)
    if site.is_logits(value) or not is_tensor(value) or not same_shape(example(value).shape, rows):
        return _assigned(site, input, here, value)
    return overwritten(site, logits, input, here, row_operand(site, value, logits))


def _assigned(site: Site, input: Any, mask: Any, value: Any) -> Logits:
    logits = site.logits(input)
    if is_tensor(value):
        if any(size != 1 for size in tensor_example(value).shape):
            site.unsupported(reasons.ASSIGNS_TENSOR)
        value = read(site, value, logits)
    return overwritten(site, logits, input, mask, value)


def _range(site: Site, logits: Logits, entry: Any) -> tuple[int, int]:
    """Return the first column that is assigned to, and the one after the last."""
    if isinstance(entry, slice):
        parts = (entry.start, entry.stop, entry.step)
        numbers = [None if part is None else int(constant(part)) for part in parts]
        start, stop, step = slice(*numbers).indices(site.fixed_vocabulary(logits))
        if step != 1:
            site.unsupported(reasons.ASSIGNS_EVERY_OTHER_ENTRY)
        return start, max(start, stop)
    at = _place(site, logits, entry)
    return at, at + 1


def _place(site: Site, logits: Logits, at: Any) -> int:
    """Return a constant place in the vocabulary, counted from the front."""
    place = int(constant(at))
    return place if place >= 0 else place % site.fixed_vocabulary(logits)


def _dynamic_range_mask(site: Site, logits: Logits, entries: slice) -> Apply:
    """Return the mask of a range whose ends, or the vocabulary, may differ in the next call."""
    if entries.step not in (None, 1):
        site.unsupported(reasons.ASSIGNS_EVERY_OTHER_ENTRY)
    start, stop = (_bound(site, logits, at) for at in (entries.start or 0, entries.stop))
    return range_mask(start, stop)


def _bound(site: Site, logits: Logits, at: Any) -> int | Operand | None:
    """Return an end of a range, which counts from the end if it is negative, from the front."""
    if at is None or (isinstance(at, int) and at >= 0):
        return at
    place = number_operand(site, at, logits)
    from_the_end = call(torch.add, place.source, vocabulary_of(logits))
    counted = call(torch.where, call(torch.lt, place.source, 0), from_the_end, place.source)
    return dataclasses.replace(place, source=counted)


def _where(site: Site, input: Node, mask: Node, value: Any) -> Logits:
    if is_tensor(value) and tensor_example(value).dim() > 0:
        site.unsupported(reasons.ASSIGNS_TENSOR)
    return pointwise(site, torch.where, mask, value, input)

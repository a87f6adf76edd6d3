"""``logits[..., n:] = -inf``: entries of the vocabulary that get another value, in place."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..algebra import call
from ..expression import COLUMN, Apply, Operand
from ..logits import Logits
from ..rules import Site, constant, is_tensor, tensor_example, transform
from .select import without_ellipsis


@transform(operator.setitem)
def setitem(site: Site, input: Any, index: Any, value: Any) -> Logits:
    """What `input` holds afterwards."""
    logits = site.logits(input)
    if not tensor_example(input).is_floating_point():
        site.unsupported("it changes a mask of the logits, or integers made of them")
    shape = tuple(tensor_example(input).shape)
    if isinstance(index, Node) and is_tensor(index):
        if tensor_example(index).dtype == torch.bool and tensor_example(index).shape == shape:
            return _where(site, input, index, value)
        if len(shape) > 1 or tensor_example(index).dtype != torch.bool:
            site.unsupported("it assigns to some of the rows")
    entries = without_ellipsis(index if isinstance(index, tuple) else (index,), len(shape))
    if len(entries) != len(shape) or None in entries:
        site.unsupported("it assigns by an index that is not known")
    entry = entries[logits.vocabulary_dim]
    if any(dim != logits.vocabulary_dim and e != slice(None) for dim, e in enumerate(entries)):
        if entry == slice(None):
            site.unsupported("it assigns to some of the rows")
        site.unsupported("it assigns to entries that rows and vocabulary are indexed for together")
    if isinstance(entry, Node) and is_tensor(entry):
        if logits.vocabulary_dim != len(shape) - 1:
            site.unsupported("it assigns to logits whose last dimension is not the vocabulary")
        if tensor_example(entry).dtype == torch.bool:
            return _where(site, input, entry, value)
        return _assigned(site, logits, _is_among(site, logits, entry), value)
    if isinstance(entry, (list, tuple)):
        inside = None
        for at in entry:
            here = Apply("eq.Scalar", (COLUMN, int(constant(at)) % logits.vocabulary))
            inside = here if inside is None else Apply("logical_or", (inside, here))
        return logits if inside is None else _assigned(site, logits, inside, value)
    start, stop = _range(site, logits, entry)
    inside = Apply("ge.Scalar", (COLUMN, start))
    if stop < logits.vocabulary:
        inside = Apply("logical_and", (inside, Apply("lt.Scalar", (COLUMN, stop))))
    return _assigned(site, logits, inside, value)


def _assigned(site: Site, logits: Logits, inside: Any, value: Any) -> Logits:
    if is_tensor(value) and tensor_example(value).dim() > 0:
        site.unsupported("it assigns a tensor")
    if is_tensor(value):
        new: Any = site.read(value, logits)
        assigned = Apply("where.self", (inside, new, logits.expression))
    else:
        assigned = Apply("where.ScalarSelf", (inside, constant(value), logits.expression))
    return logits.replace(expression=assigned)


def _is_among(site: Site, logits: Logits, indices: Node) -> Apply:
    """For each entry of the vocabulary whether it is one of `indices`."""
    entries = call(torch.arange, logits.vocabulary, device=tensor_example(indices).device)
    places = call(torch.remainder, indices, logits.vocabulary)
    among = call(torch.isin, entries, places)
    column = Operand("c", among, logits.row_operations, logits.vocabulary_dim, site.node)
    return Apply("ne.Scalar", (column, 0))


def _range(site: Site, logits: Logits, entry: Any) -> tuple[int, int]:
    if isinstance(entry, slice):
        parts = (entry.start, entry.stop, entry.step)
        numbers = [None if part is None else int(constant(part)) for part in parts]
        start, stop, step = slice(*numbers).indices(logits.vocabulary)
        if step != 1:
            site.unsupported("it assigns to every other entry")
        return start, max(start, stop)
    at = int(constant(entry)) % logits.vocabulary
    return at, at + 1


def _where(site: Site, input: Node, mask: Node, value: Any) -> Logits:
    if is_tensor(value) and tensor_example(value).dim() > 0:
        site.unsupported("it assigns a tensor")
    return site.pointwise(torch.where, mask, value, input)

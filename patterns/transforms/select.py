"""Some of the rows, or a range of the vocabulary: ``logits[:, :-1]``, ``logits[..., :v]``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language import (
    COLUMN,
    HERE,
    Apply,
    Expression,
    Logits,
    Operand,
    Projection,
    Site,
    TensorOperation,
    UnsupportedError,
    constant,
    dimension,
    example,
    is_reduced,
    is_symbol,
    is_tensor,
    leaves,
    tensor_example,
    transform,
    where,
)
from cce_inductor.reporting import reasons
from cce_inductor.torch_internals.symbols import size_hint


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


def vocabulary_range(
    site: Site, logits: Logits, entries: slice, size: int | torch.SymInt
) -> Logits:
    """The logits of a range of the vocabulary: of a range of the weight's rows.

    Args:
        size: of the range.
    """
    if entries == slice(None):
        return logits
    if any(map(is_symbol, (entries.start, entries.stop))) or not isinstance(logits.vocabulary, int):
        if entries.step not in (None, 1):
            site.unsupported(reasons.SELECTS_SOME_ENTRIES)
    else:
        parts = (entries.start, entries.stop, entries.step)
        numbers = (None if part is None else int(constant(part)) for part in parts)
        start, stop, step = slice(*numbers).indices(logits.vocabulary)
        if (start, stop, step) == (0, logits.vocabulary, 1):
            return logits
        if step != 1 or stop <= start:
            site.unsupported(reasons.SELECTS_SOME_ENTRIES)
        entries, size = slice(start, stop), stop - start
    for leaf in leaves(logits.expression):
        if isinstance(leaf, Operand) and is_reduced(leaf.source):
            site.unsupported(reasons.SELECTS_ENTRIES_OF_SOFTMAX)
    if _depends_on_column(logits.expression):
        site.unsupported(reasons.SELECTS_ENTRIES_AFTER_MASK)
    return _narrowed(logits, entries, size)


def _depends_on_column(expression: Expression) -> bool:
    return any(
        leaf is COLUMN or (isinstance(leaf, Operand) and leaf.kind in ("c", "b"))
        for leaf in leaves(expression)
    )


def _narrowed(logits: Logits, entries: slice, size: int | torch.SymInt) -> Logits:
    projection = logits.projection
    chosen = TensorOperation(operator.getitem, (HERE, entries))
    projection = projection.replace(
        weight_operations=(*projection.weight_operations, chosen),
        bias_operations=(*projection.bias_operations, chosen),
    )
    return logits.replace(projection=projection, vocabulary=size)


def in_vocabulary(logits: Logits, changed: Logits, expression: Expression) -> Expression | None:
    """What is done to each of `logits` after a change in place of `changed`, which has the same
    memory and may have a range of their vocabulary, or they of its.

    Args:
        expression: what is done to each of `changed` now.

    Returns:
        None if their entries of the vocabulary cannot be compared.
    """
    if changed.projection == logits.projection:
        return expression
    if _depends_on_column(expression):
        return None
    if _range_in(changed.projection, logits.projection) is not None:
        return expression
    entries = _range_in(logits.projection, changed.projection)
    if entries is None:
        return None
    inside = Apply("ge.Scalar", (COLUMN, entries.start))
    inside = Apply("logical_and", (inside, Apply("lt.Scalar", (COLUMN, entries.stop))))
    return where(inside, expression, logits.expression)


def begins_vocabulary(part: Logits, whole: Logits) -> bool:
    """Whether each entry of the vocabulary of `part` has the same place in that of `whole`, whose
    memory it has."""
    if part.projection == whole.projection:
        return True
    entries = _range_in(whole.projection, part.projection)
    return entries is not None and entries.start == 0


def _range_in(whole: Projection, part: Projection) -> slice | None:
    """The entries of the vocabulary of `whole` that `part` has, None if that is not how they
    differ."""
    count = len(whole.weight_operations)
    ranges = part.weight_operations[count:]
    start, stop = 0, size_hint(whole.vocabulary)
    for operation in ranges:
        if operation.target is not operator.getitem or not isinstance(operation.args[1], slice):
            return None
        entries = operation.args[1]
        if not isinstance(entries.start, int) or not isinstance(entries.stop, int):
            return None
        start, stop = start + entries.start, start + entries.stop
    same = part.replace(
        weight_operations=part.weight_operations[:count],
        bias_operations=part.bias_operations[: len(whole.bias_operations)],
    )
    return slice(start, stop) if same == whole and ranges else None


def _gathered(
    site: Site, logits: Logits, entries: tuple[Any, ...], index: Any, rank: int
) -> Logits:
    """Rows by index tensors or masks, which leave the last dimension last when it is not
    indexed."""
    if logits.vocabulary_dim != rank - 1 or entries[-1] != slice(None):
        site.unsupported(reasons.SELECTS_SOME_ENTRIES)
    if any(isinstance(entry, (list, tuple)) for entry in entries):
        site.unsupported(reasons.SELECTS_ROWS_BY_LIST)
    return logits.with_row_operation(
        operator.getitem, HERE, index, vocabulary_dim=site.example.dim() - 1
    )


def _is_index_tensor(entry: Any) -> bool:
    if isinstance(entry, (list, tuple)):
        raise UnsupportedError(reasons.SELECTS_ROWS_BY_LIST)
    return isinstance(entry, Node) and isinstance(example(entry), torch.Tensor)


def without_ellipsis(entries: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """One entry for each dimension, None for each new one; a mask stands for as many as it has."""
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
    """Parts, one after another: their sizes are those of the examples."""
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

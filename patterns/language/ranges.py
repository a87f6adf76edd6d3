"""Logits of a range of the vocabulary, which are logits of a range of the weight's rows."""

from __future__ import annotations

import operator

import torch

from cce_inductor.patterns.language.examples import constant, is_symbol
from cce_inductor.patterns.language.expression import (
    Expression,
    depends_on_column,
    operands_of,
    where,
)
from cce_inductor.patterns.language.logits import HERE, Logits, Projection, TensorOperation
from cce_inductor.patterns.language.masks import range_mask
from cce_inductor.patterns.language.rows import is_reduced
from cce_inductor.patterns.language.site import Site
from cce_inductor.reporting import reasons
from cce_inductor.torch_internals.symbols import size_hint


def vocabulary_range(
    site: Site, logits: Logits, entries: slice, size: int | torch.SymInt
) -> Logits:
    """Return the logits of a range of the vocabulary.

    Args:
        size: the size of the range in the example.

    Raises:
        UnsupportedError: it is not a contiguous range, or a logit depends on its column.
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
    if any(is_reduced(operand.source) for operand in operands_of(logits.expression)):
        site.unsupported(reasons.SELECTS_ENTRIES_OF_SOFTMAX)
    if depends_on_column(logits.expression):
        site.unsupported(reasons.SELECTS_ENTRIES_AFTER_MASK)
    projection = logits.projection
    taken = TensorOperation(operator.getitem, (HERE, entries))
    projection = projection.replace(
        weight_operations=(*projection.weight_operations, taken),
        bias_operations=(*projection.bias_operations, taken),
    )
    return logits.replace(projection=projection, vocabulary=size)


def expression_after_change(
    logits: Logits, changed: Logits, expression: Expression
) -> Expression | None:
    """Return the expression of logits whose memory was changed in place under another name.

    Either may be a range of the other's vocabulary.

    Args:
        logits: the logits before the change.
        changed: the other name of their memory, before the change.
        expression: the expression of `changed` after the change.

    Returns:
        None if it is not known which columns are the same.
    """
    if changed.projection == logits.projection:
        return expression
    if depends_on_column(expression):
        return None
    if _range_in(changed.projection, logits.projection) is not None:
        return expression
    entries = _range_in(logits.projection, changed.projection)
    if entries is None:
        return None
    return where(range_mask(entries.start, entries.stop), expression, logits.expression)


def begins_vocabulary(part: Logits, whole: Logits) -> bool:
    """Whether each column of `part` has the same number in `whole`, whose memory it shares."""
    if part.projection == whole.projection:
        return True
    entries = _range_in(whole.projection, part.projection)
    return entries is not None and entries.start == 0


def _range_in(whole: Projection, part: Projection) -> slice | None:
    """Return the columns of `whole` that `part` has, None if it is not a range of `whole`."""
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

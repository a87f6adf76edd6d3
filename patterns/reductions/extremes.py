"""``max``, ``argmax``, ``amax``, ``argmin`` and ``topk`` over the vocabulary, for accuracies."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import (
    Algebra,
    Apply,
    Logits,
    Row,
    Site,
    call,
    constant,
    reduction,
    without_vocabulary,
)
from cce_inductor.reporting import reasons


@reduction(torch.argmax, "argmax")
def argmax(site: Site, input: Any, dim: Any = None, keepdim: Any = False) -> Row:
    logits = _over_one_dimension(site, input, dim)
    _, index = Algebra(site, logits).max(logits.expression)
    return without_vocabulary(index, logits, keepdim)


@reduction(torch.argmin, "argmin")
def argmin(site: Site, input: Any, dim: Any = None, keepdim: Any = False) -> Row:
    logits = _over_one_dimension(site, input, dim)
    _, index = Algebra(site, logits).max(Apply("neg", (logits.expression,)))
    return without_vocabulary(index, logits, keepdim)


@reduction(torch.max, "max")
def maximum(site: Site, input: Any, dim: Any = None, keepdim: Any = False) -> tuple[Row, Row] | Row:
    if dim is None and len(site.node.args) < 2:
        value, _ = Algebra(site, site.logits(input)).max(site.logits(input).expression)
        return call(torch.amax, value)
    if not isinstance(dim, int):
        site.unsupported(reasons.TENSOR_INSTEAD_OF_DIMENSION)
    logits = site.over_vocabulary(site.logits(input), dim)
    value, index = Algebra(site, logits).max(logits.expression)
    return (
        without_vocabulary(value, logits, keepdim),
        without_vocabulary(index, logits, keepdim),
    )


@reduction(torch.amax, "amax")
def amax(site: Site, input: Any, dim: Any = (), keepdim: Any = False) -> Row:
    logits = site.over_vocabulary(site.logits(input), dim)
    value, _ = Algebra(site, logits).max(logits.expression)
    return without_vocabulary(value, logits, keepdim)


@reduction(torch.topk, "topk")
def topk(
    site: Site, input: Any, k: Any, dim: Any = -1, largest: Any = True, sorted: Any = True
) -> tuple[Row, Row]:
    logits = site.over_vocabulary(site.logits(input), dim)
    if not largest:
        site.unsupported(reasons.TAKES_THE_SMALLEST)
    return Algebra(site, logits).topk(logits.expression, int(constant(k)))


def _over_one_dimension(site: Site, input: Any, dim: Any) -> Logits:
    if dim is None:
        site.unsupported(reasons.REDUCES_ROWS_AND_VOCABULARY)
    return site.over_vocabulary(site.logits(input), dim)

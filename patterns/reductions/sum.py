"""``sum`` and ``mean`` over the vocabulary, or over all dimensions."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import (
    Algebra,
    Row,
    Site,
    call,
    dimension,
    reduction,
    tensor_example,
    vocabulary_of,
)
from cce_inductor.reporting import reasons


@reduction(torch.sum, "sum")
def sum(site: Site, input: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> Row:
    return _reduced(site, input, dim, keepdim, torch.sum)


@reduction(torch.mean, "mean")
def mean(
    site: Site, input: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None
) -> Row:
    rows = _reduced(site, input, dim, keepdim, torch.mean)
    return call(torch.div, rows, vocabulary_of(site.logits(input)))


def _reduced(site: Site, input: Any, dim: Any, keepdim: Any, over_rows: Any) -> Row:
    logits = site.logits(input)
    rank = tensor_example(input).dim()
    given = range(rank) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    dims = sorted({dimension(each, rank) for each in given}) or list(range(rank))
    if len(dims) == 1:
        logits = site.over_vocabulary(logits, dims[0])
    if logits.vocabulary_dim not in dims:
        site.unsupported(reasons.REDUCES_ROWS)
    rows = Algebra(site, logits).sum(logits.expression)
    return call(over_rows, rows, tuple(dims), keepdim=keepdim)

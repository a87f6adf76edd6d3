"""``logits.size(0)``. Dynamo calls it itself if the number of rows depends on data."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import (
    Row,
    Site,
    applied,
    call,
    dimension,
    reduction,
    size_of,
    tensor_example,
    vocabulary_of,
)
from cce_inductor.reporting import reasons


@reduction(torch.ops.aten.sym_size.int, "size")
def size(site: Site, input: Any, dim: Any = None) -> Row:
    logits = site.logits(input)
    if dim is None:
        # An expanded column has the size of the logits and takes no memory.
        rows = applied(logits.projection.input, logits.row_operations, logits.projection.hidden)
        column = call(torch.narrow, rows, logits.vocabulary_dim, 0, 1)
        sizes: list[Any] = [-1] * tensor_example(input).dim()
        sizes[logits.vocabulary_dim] = vocabulary_of(logits)
        return call(torch.Tensor.size, call(torch.Tensor.expand, column, tuple(sizes)))
    dim = dimension(dim, tensor_example(input).dim())
    if dim == logits.vocabulary_dim:
        site.unsupported(reasons.READS_VOCABULARY_SIZE)
    return size_of(logits, dim)

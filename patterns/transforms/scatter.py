"""``scatter(-1, index, value)`` with one index for each row."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import (
    Logits,
    Site,
    dimension,
    is_tensor,
    overwritten,
    read,
    same_shape,
    same_size,
    scatter_mask,
    tensor_example,
    transform,
)
from cce_inductor.reporting import reasons


@transform("scatter", "scatter_", torch.scatter)
def scatter(
    site: Site, input: Any, dim: Any, index: Any, value: Any = None, **named: Any
) -> Logits:
    logits = site.logits(input)
    value = named.pop("src", value)
    if named:
        site.unsupported(reasons.SCATTER_REDUCES)
    if dimension(dim, tensor_example(input).dim()) != logits.vocabulary_dim:
        site.unsupported(reasons.SCATTERS_OVER_ROWS)
    sizes, shape = tensor_example(index).shape, tensor_example(input).shape
    if sizes[logits.vocabulary_dim] != 1 or len(sizes) != len(shape):
        site.unsupported(reasons.SCATTERS_SEVERAL_ENTRIES)
    rows = [dim for dim in range(len(shape)) if dim != logits.vocabulary_dim]
    if not all(same_size(sizes[dim], shape[dim]) for dim in rows):
        site.unsupported(reasons.INDEX_WITHOUT_ROWS)
    if is_tensor(value):
        if site.is_logits(value) or not same_shape(tensor_example(value).shape, sizes):
            site.unsupported(reasons.SCATTERS_NO_VALUE_PER_ROW)
        value = read(site, value, logits)
    return overwritten(site, logits, input, scatter_mask(site, logits, index), value)

"""``scatter(-1, index, value)`` with one index a row, as a one-hot is made."""

from __future__ import annotations

from typing import Any

import torch

from ..expression import COLUMN, Apply
from ..logits import Logits
from ..rules import Site, constant, dimension, is_tensor, tensor_example, transform


@transform("scatter", "scatter_", torch.scatter)
def scatter(
    site: Site, input: Any, dim: Any, index: Any, value: Any = None, **named: Any
) -> Logits:
    logits = site.logits(input)
    value = named.pop("src", value)
    if named or is_tensor(value):
        site.unsupported("it scatters a tensor, or reduces")
    if not tensor_example(input).is_floating_point():
        site.unsupported("it changes a mask of the logits, or integers made of them")
    if dimension(dim, tensor_example(input).dim()) != logits.vocabulary_dim:
        site.unsupported("it scatters over the rows")
    sizes, shape = tensor_example(index).shape, tensor_example(input).shape
    if sizes[logits.vocabulary_dim] != 1 or len(sizes) != len(shape):
        site.unsupported("it scatters to several entries of a row")
    rows = [dim for dim in range(len(shape)) if dim != logits.vocabulary_dim]
    if any(sizes[dim] != shape[dim] for dim in rows):
        site.unsupported("its index does not have the rows of the logits")
    here = Apply("eq.Tensor", (COLUMN, site.read(index, logits)))
    scattered = Apply("where.ScalarSelf", (here, constant(value), logits.expression))
    return logits.replace(expression=scattered)

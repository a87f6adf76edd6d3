"""Convolutions with a kernel of size 1: ``conv1d(input, weight)``, `conv2d` and `conv3d`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from cce_inductor.patterns.language import (
    HERE,
    ProjectionResult,
    Site,
    TensorOperation,
    is_tensor,
    product,
    projection,
    tensor_example,
)


@projection(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    site: Site,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> ProjectionResult:
    """The weight is [vocabulary, hidden, 1, ...], and dimension 1 of `input` is hidden."""
    if not (is_tensor(input) and is_tensor(weight)):
        return None
    rank, shape = tensor_example(input).dim(), tuple(tensor_example(weight).shape)
    if rank != len(shape) or any(size != 1 for size in shape[2:]) or groups != 1:
        return None
    if _all(stride) != {1} or not (padding in ("valid", "same") or _all(padding) == {0}):
        return None
    as_matrix = TensorOperation(torch.reshape, (HERE, shape[:2]))
    return product(
        site,
        input,
        weight,
        transposed=False,
        bias=bias,
        weight_operations=(as_matrix,),
        vocabulary_dim=1,
    )


def _all(sizes: Any) -> set[Any]:
    """Return the sizes, given as one for all dimensions or as one for each, each once."""
    return set(sizes) if isinstance(sizes, (tuple, list)) else {sizes}

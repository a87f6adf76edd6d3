"""A convolution over single positions: ``conv1d(input, weight)`` with a [vocabulary, hidden, 1]
weight, and its brothers of two and three dimensions."""

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
    return set(sizes) if isinstance(sizes, (tuple, list)) else {sizes}

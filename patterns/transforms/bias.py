"""``logits + bias`` with one value for each vocabulary entry, the same in every row.

Where nothing stands between, it is the projection's bias; anywhere else it is pointwise.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language import (
    COMPUTE_DTYPES,
    LOGIT,
    Logits,
    Site,
    is_tensor,
    pointwise,
    same_shape,
    same_size,
    tensor_example,
    transform,
)
from cce_inductor.patterns.transforms.join import summed


@transform(operator.add, torch.add, "add", "__add__", "__radd__", operator.iadd, "add_")
def add(site: Site, input: Any, other: Any, *, alpha: Any = 1) -> Logits:
    if alpha == 1:
        if site.is_logits(input) and site.is_logits(other):
            first, second = site.logits(input), site.logits(other)
            same = same_shape(tensor_example(input).shape, tensor_example(other).shape)
            if first.projection.node is not second.projection.node and same:
                joined = summed(site, first, second)
                if joined is not None:
                    return joined
        for logits_node, bias in ((input, other), (other, input)):
            if site.is_logits(logits_node) and is_tensor(bias) and not site.is_logits(bias):
                logits = site.logits(logits_node)
                if _is_bias(site, logits, logits_node, bias):
                    projection = logits.projection.replace(linear_bias=bias)
                    return logits.replace(projection=projection)
    return pointwise(site, torch.add, input, other, alpha=alpha)


def _is_bias(site: Site, logits: Logits, logits_node: Node, bias: Node) -> bool:
    before, value = tensor_example(logits_node), tensor_example(bias)
    return (
        logits.expression is LOGIT
        and logits.projection.linear_bias is None
        and same_size(logits.vocabulary, logits.projection.vocabulary)
        and site.example.dtype != torch.float64
        and value.dtype in COMPUTE_DTYPES
        and logits.vocabulary_dim == before.dim() - 1
        and same_shape(site.example.shape, before.shape)
        and value.dim() > 0
        and same_size(value.shape[-1], logits.vocabulary)
        and same_size(value.numel(), logits.vocabulary)
    )

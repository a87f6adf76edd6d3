"""``logits + bias`` with one value for each vocabulary entry, the same in every row."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..logits import Logits
from ..rules import Site, is_tensor, tensor_example, transform


@transform(operator.add, torch.add, "add", "__add__", "__radd__")
def add(site: Site, input: Any, other: Any, *, alpha: Any = 1) -> Logits:
    if not site.is_logits(input):
        input, other = other, input
    logits = site.logits(input)
    if alpha != 1 or site.is_logits(other) or not is_tensor(other):
        site.unsupported("what it adds is not a bias over the vocabulary")
    if logits.linear_bias is not None or logits.modification.steps:
        site.unsupported("it adds a bias to logits that have one or were scaled before")
    if logits.vocabulary_dim != site.example.dim() - 1:
        site.unsupported("what it adds is not a bias over the vocabulary")
    if site.example.shape != tensor_example(input).shape:
        site.unsupported("what it adds differs from row to row")
    shape = tensor_example(other).shape
    if not shape or any(size != 1 for size in shape[:-1]):
        site.unsupported("what it adds differs from row to row")
    if shape[-1] != site.example.shape[logits.vocabulary_dim]:
        site.unsupported("what it adds is not a bias over the vocabulary")
    if site.example.dtype == torch.float64:
        logits = logits.replace(compute_dtype=torch.float64)
    return logits.replace(linear_bias=other)

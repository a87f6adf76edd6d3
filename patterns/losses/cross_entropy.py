"""`torch.nn.functional.cross_entropy` and `torch.nn.CrossEntropyLoss`, with class indices."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch.nn import _reduction

from ..logits import CrossEntropy
from ..rules import Site, constant, loss, tensor_example


@loss(F.cross_entropy)
def cross_entropy(
    site: Site,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: Any = 0.0,
) -> CrossEntropy:
    logits = site.logits(input)
    if site.is_logits(target) or tensor_example(target).is_floating_point():
        site.unsupported("its targets are class probabilities")
    class_dim = 0 if tensor_example(input).dim() == 1 else 1
    if logits.vocabulary_dim != class_dim:
        site.unsupported("its class dimension is not the vocabulary")
    if tensor_example(target).device != tensor_example(input).device:
        site.unsupported("its targets are on another device")
    if weight is not None and tensor_example(weight).requires_grad:
        site.unsupported("its class weights require a gradient")
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    return CrossEntropy(
        logits=logits,
        target=target,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=constant(label_smoothing),
    )

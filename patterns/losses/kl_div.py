"""`torch.nn.functional.kl_div`, for distillation from a teacher's probabilities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from cce_inductor.patterns.language import (
    Algebra,
    Apply,
    LossResult,
    Site,
    call,
    loss,
    loss_reduction,
    read,
    vocabulary_of,
)
from cce_inductor.reporting import reasons


@loss(F.kl_div)
def kl_div(
    site: Site,
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: Any = "mean",
    log_target: Any = False,
) -> LossResult:
    reduction = loss_reduction(size_average, reduce, reduction)
    logits = site.logits(input if site.is_logits(input) else target)
    input, target = read(site, input, logits), read(site, target, logits)
    if log_target:
        difference = Apply("sub.Tensor", (target, input))
        divergence = Apply("mul.Tensor", (Apply("exp", (target,)), difference))
    else:
        itself = Apply("xlogy.Tensor", (target, target))
        divergence = Apply("sub.Tensor", (itself, Apply("mul.Tensor", (target, input))))
    if reduction == "none":
        return logits.replace(expression=divergence)
    rows = Algebra(site, logits).sum(divergence)
    if reduction == "sum":
        return call(torch.sum, rows)
    if reduction == "mean":
        return call(torch.div, call(torch.mean, rows), vocabulary_of(logits))
    if logits.vocabulary_dim == 0:
        site.unsupported(reasons.BATCH_DIMENSION_IS_VOCABULARY)
    of_batch = call(torch.sum, call(torch.flatten, rows, 1), 1)
    return call(torch.mean, of_batch, 0)

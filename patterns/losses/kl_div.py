"""`torch.nn.functional.kl_div`, for distillation from a teacher's probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from cce_inductor.patterns.language import (
    Algebra,
    Apply,
    LossResult,
    Operand,
    Site,
    call,
    is_detached,
    is_reduced,
    loss,
    loss_reduction,
    read,
    vocabulary_of,
    where,
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
        itself = _negative_entropy(target)
        if itself is None:
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


def _negative_entropy(target: Any) -> Apply | None:
    """Return ``p * log(p)`` of a softmax from its logarithm, which needs no second pass.

    It is 0 where a logit is -inf, as xlogy is. None if the target is not known to be a softmax.
    """
    if is_detached(target):
        inner = _negative_entropy(target.args[0])
        return None if inner is None else Apply("detach", (inner,))
    if not (isinstance(target, Apply) and target.target == "exp"):
        return None
    logarithm = target.args[0]
    if not (isinstance(logarithm, Apply) and logarithm.target == "sub.Tensor"):
        return None
    logit, normalizer = logarithm.args
    if not (isinstance(normalizer, Operand) and is_reduced(normalizer.source)):
        return None
    finite = where(Apply("eq.Scalar", (logit, -math.inf)), 0.0, logit)
    return Apply("mul.Tensor", (target, Apply("sub.Tensor", (finite, normalizer))))

"""Casts: ``.float()``, ``.to(dtype)``, ``.type(dtype)``."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import (
    COMPUTE_DTYPES,
    Apply,
    Logits,
    ReductionResult,
    Site,
    call,
    reduction,
    tensor_example,
    transform,
)
from cce_inductor.reporting import reasons


@transform("float", "double", "half", "bfloat16", "type", "bool", "int", "long")
def cast(site: Site, input: Any, *args: Any, **kwargs: Any) -> Logits:
    """The new dtype is that of the node's example; statistics are rounded to it at the end."""
    logits = site.logits(input)
    before, after = tensor_example(input), site.example
    if after.device != before.device:
        site.unsupported(reasons.moves_between(before.device, after.device))
    if after.dtype == torch.bool:
        return logits.replace(expression=Apply("ne.Scalar", (logits.expression, 0)))
    exact = not before.dtype.is_floating_point  # a truth value, or a small integer
    if after.dtype not in COMPUTE_DTYPES and not exact:
        site.unsupported(reasons.casts_to(after.dtype))
    if before.dtype == torch.bool:
        one_or_zero = Apply("where.Scalar", (logits.expression, 1.0, 0.0))
        logits = logits.replace(expression=one_or_zero)
    if after.dtype == torch.float64:
        return logits.replace(compute_dtype=torch.float64)
    return logits


@reduction("to", "type_as")
def cast_as(site: Site, input: Any, *args: Any, **kwargs: Any) -> ReductionResult:
    """Cast logits, or another tensor to the dtype and device of the logits."""
    if site.is_logits(input):
        return cast(site, input)
    after = site.example
    if after.dtype == tensor_example(input).dtype:
        site.unsupported(reasons.RESULT_MAY_SHARE_MEMORY)
    return call(torch.Tensor.to, input, after.device, after.dtype)

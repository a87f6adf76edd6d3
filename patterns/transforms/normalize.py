"""``log_softmax`` and ``softmax`` over the vocabulary: logits minus the logsumexp of their row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from cce_inductor.patterns.language import Algebra, Apply, Logits, Site, late, transform


@transform(torch.log_softmax, F.log_softmax, "log_softmax", torch.special.log_softmax)
def log_softmax(
    site: Site, input: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None
) -> Logits:
    logits = site.over_vocabulary(site.logits(input), _implicit(site, input, dim))
    if site.example.dtype == torch.float64:
        logits = logits.replace(compute_dtype=torch.float64)
    lse = late(site, Algebra(site, logits).logsumexp(logits.expression), logits)
    return logits.replace(expression=Apply("sub.Tensor", (logits.expression, lse)))


@transform(torch.softmax, F.softmax, "softmax", torch.special.softmax)
def softmax(
    site: Site, input: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None
) -> Logits:
    logits = log_softmax(site, input, dim, dtype=dtype)
    return logits.replace(expression=Apply("exp", (logits.expression,)))


def _implicit(site: Site, input: Any, dim: Any) -> Any:
    """Return the dimension, which PyTorch chooses by the rank if it is None."""
    if dim is not None:
        return dim
    return 0 if len(site.shape_of(site.logits(input))) in (0, 1, 3) else 1

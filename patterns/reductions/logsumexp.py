"""``torch.logsumexp`` over the vocabulary, which the z-loss squares."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import Algebra, Row, Site, reduction, without_vocabulary


@reduction(torch.logsumexp, "logsumexp", torch.special.logsumexp)
def logsumexp(site: Site, input: Any, dim: Any, keepdim: Any = False) -> Row:
    logits = site.over_vocabulary(site.logits(input), dim)
    return without_vocabulary(Algebra(site, logits).logsumexp(logits.expression), logits, keepdim)

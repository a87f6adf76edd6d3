"""``torch.logsumexp`` over the vocabulary, as the z-loss has it."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language.algebra import Algebra, without_vocabulary
from cce_inductor.patterns.language.rows import Row
from cce_inductor.patterns.language.site import Site
from cce_inductor.patterns.language.tables import reduction


@reduction(torch.logsumexp, "logsumexp", torch.special.logsumexp)
def logsumexp(site: Site, input: Any, dim: Any, keepdim: Any = False) -> Row:
    logits = site.over_vocabulary(site.logits(input), dim)
    return without_vocabulary(Algebra(site, logits).logsumexp(logits.expression), logits, keepdim)

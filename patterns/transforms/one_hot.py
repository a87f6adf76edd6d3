"""``one_hot(target, vocabulary)``, from which margins and smoothed targets are computed.

Combined with logits, it is a comparison of the target with each logit's column, and not a tensor.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from cce_inductor.patterns.language import Apply, Logits, Site, block, target_mask
from cce_inductor.reporting import reasons


@block(F.one_hot)
def one_hot(site: Site, logits: Logits, tensor: Any, num_classes: Any = -1) -> Apply:
    if logits.vocabulary_dim != len(site.shape_of(logits)) - 1:
        site.unsupported(reasons.CLASSES_ARE_NOT_VOCABULARY)
    return Apply("where.Scalar", (target_mask(site, logits, tensor), 1, 0))

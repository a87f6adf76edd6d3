"""``one_hot(target, vocabulary)``, as margins and smoothed targets are made of.

Where it meets logits it is a comparison with the place in the vocabulary, and no tensor.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from cce_inductor.patterns.language import COLUMN, Apply, Logits, Site, block, value_of_rows
from cce_inductor.reporting import reasons


@block(F.one_hot)
def one_hot(site: Site, logits: Logits, tensor: Any, num_classes: Any = -1) -> Apply:
    if logits.vocabulary_dim != len(site.shape_of(logits)) - 1:
        site.unsupported(reasons.CLASSES_ARE_NOT_VOCABULARY)
    here = Apply("eq.Tensor", (COLUMN, value_of_rows(site, logits, tensor)))
    return Apply("where.Scalar", (here, 1, 0))

"""Operations that keep every value: copies, memory layouts, ``detach``, dropout that is off."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from cce_inductor.patterns.language import Logits, Site, constant, tensor_example, transform
from cce_inductor.reporting import reasons


@transform("contiguous", "clone", torch.clone, "detach", torch.detach, "requires_grad_", "cpu")
@transform(operator.pos, torch.positive, "positive", "__pos__")
def copy(site: Site, input: Any, *, memory_format: Any = None) -> Logits:
    if site.example.device != tensor_example(input).device:
        site.unsupported(reasons.MOVES_TO_ANOTHER_DEVICE)
    return site.logits(input)


@transform(F.dropout, torch.dropout)
def dropout(
    site: Site, input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False
) -> Logits:
    if training and constant(p) != 0:
        site.unsupported(reasons.RANDOM)
    return site.logits(input)

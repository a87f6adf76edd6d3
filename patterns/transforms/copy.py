"""``contiguous`` and ``clone``: another memory layout or another copy of the same logits."""

from __future__ import annotations

from typing import Any

import torch

from ..logits import Logits
from ..rules import Site, transform


@transform("contiguous", "clone", torch.clone)
def copy(site: Site, input: Any, *, memory_format: Any = None) -> Logits:
    return site.logits(input)

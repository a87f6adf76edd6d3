"""``logits.fill_diagonal_(-inf)``, which removes each example's similarity to itself."""

from __future__ import annotations

from typing import Any

from cce_inductor.patterns.language import (
    Logits,
    Site,
    diagonal_mask,
    overwritten,
    tensor_example,
    transform,
)
from cce_inductor.reporting import reasons


@transform("fill_diagonal_")
def fill_diagonal_(site: Site, input: Any, fill_value: Any, wrap: Any = False) -> Logits:
    logits = site.logits(input)
    if tensor_example(input).dim() != 2 or wrap:
        site.unsupported(reasons.FILLS_DIAGONAL_OF_NO_MATRIX)
    return overwritten(site, logits, input, diagonal_mask(site, logits), fill_value)

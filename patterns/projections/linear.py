"""``F.linear(input, weight, bias)``, which is also what `torch.nn.Linear` calls."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from cce_inductor.patterns.language import ProjectionResult, Site, product, projection


@projection(F.linear)
def linear(site: Site, input: Any, weight: Any, bias: Any = None) -> ProjectionResult:
    return product(site, input, weight, transposed=False, bias=bias)

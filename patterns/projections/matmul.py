"""``input @ weight.T``, `matmul`, `mm`, `bmm`, and with a bias `addmm` and `baddbmm`."""

from __future__ import annotations

import operator
from typing import Any

import torch

from cce_inductor.patterns.language import ProjectionResult, Site, product, projection


@projection(operator.matmul, torch.matmul, "matmul", "__matmul__", torch.mm, "mm", torch.bmm, "bmm")
def matmul(site: Site, input: Any, other: Any) -> ProjectionResult:
    return product(site, input, other, transposed=True)


@projection(torch.addmm, "addmm", torch.baddbmm, "baddbmm")
def addmm(
    site: Site, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1
) -> ProjectionResult:
    if beta != 1 or alpha != 1:
        return None
    return product(site, mat1, mat2, transposed=True, bias=input)

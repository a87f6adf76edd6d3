"""``logits.fill_diagonal_(-inf)``: each example's similarity to itself gets another value."""

from __future__ import annotations

from typing import Any

import torch

from ..algebra import call
from ..expression import COLUMN, Apply, Operand
from ..logits import Logits
from ..rules import Site, constant, tensor_example, transform


@transform("fill_diagonal_")
def fill_diagonal_(site: Site, input: Any, fill_value: Any, wrap: Any = False) -> Logits:
    logits = site.logits(input)
    shape, dim = tensor_example(input).shape, logits.vocabulary_dim
    if len(shape) != 2 or wrap:
        site.unsupported("it fills the diagonal of something else than a matrix")
    rows = call(torch.arange, shape[1 - dim], device=tensor_example(input).device)
    index = call(torch.unsqueeze, rows, dim)
    here = Operand("r", index, logits.row_operations, dim, site.node)
    filled = (Apply("eq.Tensor", (COLUMN, here)), constant(fill_value), logits.expression)
    return logits.replace(expression=Apply("where.ScalarSelf", filled))

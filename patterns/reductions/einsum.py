"""``einsum("bsv,bsv->bs", one_hot, log_probs)``: a product that is summed over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import (
    Algebra,
    Row,
    Site,
    pointwise,
    reduction,
    without_vocabulary,
)
from cce_inductor.reporting import reasons


@reduction(torch.einsum)
def einsum(site: Site, equation: Any, *operands: Any) -> Row:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    terms, _, result = str(equation).replace(" ", "").partition("->")
    subscripts = terms.split(",")
    if len(operands) != 2 or len(set(subscripts)) != 1 or "." in terms:
        site.unsupported(reasons.NOT_A_PRODUCT_OF_SAME_SHAPE)
    product = pointwise(site, torch.mul, *operands)
    (summed,) = set(subscripts)
    letter = summed[product.vocabulary_dim]
    if result != summed.replace(letter, "") or len(set(summed)) != len(summed):
        site.unsupported(reasons.NOT_A_SUM_OVER_VOCABULARY)
    rows = Algebra(site, product).sum(product.expression)
    return without_vocabulary(rows, product, False)

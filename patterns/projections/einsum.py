"""``torch.einsum("bsh,vh->bsv", input, weight)`` with any letters and in either operand order."""

from __future__ import annotations

from typing import Any

import torch

from cce_inductor.patterns.language import (
    ProjectionResult,
    Site,
    product,
    projection,
    tensor_example,
)


@projection(torch.einsum)
def einsum(site: Site, equation: Any, *operands: Any) -> ProjectionResult:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    subscripts, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:
        return None
    pairs = list(zip(subscripts.split(","), operands, strict=False))
    for (input, input_node), (weight, weight_node) in (pairs, pairs[::-1]):
        transposed = _is_projection(input, weight, result)
        if transposed is None or not _ranks_fit(input, input_node):
            continue
        logits = product(site, input_node, weight_node, transposed=transposed)
        if logits is not None:
            return logits
    return None


def _is_projection(input: str, weight: str, result: str) -> bool | None:
    """Return whether the weight is [hidden, vocabulary]; None if the equation is no projection."""
    letters = input.replace("...", "", 1)
    if len(weight) != 2 or not letters or len(set(letters)) != len(letters):
        return None
    rows, hidden = input[:-1], input[-1]
    if hidden not in weight or hidden == weight.replace(hidden, ""):
        return None
    vocabulary = weight.replace(hidden, "", 1)
    if vocabulary in input or result != rows + vocabulary:
        return None
    return weight[0] == hidden


def _ranks_fit(subscript: str, node: Any) -> bool:
    """Whether an operand has the rank of its subscript. An ellipsis stands for any rank."""
    return "..." in subscript or tensor_example(node).dim() == len(subscript)

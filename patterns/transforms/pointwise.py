"""Functions of one logit: products and quotients with a number, and tanh.

A softcap, ``cap * tanh(logits / cap)``, is three of them, each with its own constant.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..logits import Logits
from ..rules import Site, constant, transform


def _step(logits: Logits, name: str, value: float | None = None) -> Logits:
    return logits.replace(modification=logits.modification.then(name, value))


@transform(operator.mul, torch.mul, torch.multiply, "mul", "multiply", "__mul__", "__rmul__")
def mul(site: Site, input: Any, other: Any) -> Logits:
    if not site.is_logits(input):
        input, other = other, input
    return _step(site.logits(input), "mul", constant(other))


@transform(
    operator.truediv,
    torch.div,
    torch.divide,
    torch.true_divide,
    "div",
    "divide",
    "true_divide",
    "__truediv__",
)
def div(site: Site, input: Any, other: Any, *, rounding_mode: Any = None) -> Logits:
    if rounding_mode is not None:
        site.unsupported("it rounds the quotient")
    return _step(site.logits(input), "div", constant(other))


@transform(operator.neg, torch.neg, torch.negative, "neg", "negative", "__neg__")
def neg(site: Site, input: Any) -> Logits:
    return _step(site.logits(input), "mul", -1.0)


@transform(torch.tanh, torch.nn.functional.tanh, "tanh")
def tanh(site: Site, input: Any) -> Logits:
    return _step(site.logits(input), "tanh")

"""Exponentials in base 2, the base in which a device computes them.

exp(x) is 2^(x log2(e)). The kernels use `LOG2_E`, which is log2(e) rounded to float32, as if it
were exact, and divide by the same number at the end, so that its rounding (1.3e-8) scales the
differences of logits instead of the logits. The product is rounded once, together with what is
subtracted from it (a fused multiply-add), so that a value near the subtracted one keeps all its
digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = 1.4426950216293335
"""log2(e) = 1.44269504088896..., rounded to float32."""


def logsumexp_of(shift: Tensor, total: Tensor) -> Tensor:
    """The natural logarithm of ``total * 2^shift``, float64."""
    return (shift + total.log2()) / LOG2_E


def exponent_of(lse: Tensor) -> tuple[Tensor, Tensor]:
    """What makes ``exp(x - lse)`` of a float32 x: ``2^(x * LOG2_E + offset) * factor``.

    Args:
        lse: float64.

    Returns:
        The offset in float32; the factor in float64, near 1, which holds what float32 cannot.
    """
    exact = lse * -LOG2_E
    offset = exact.to(torch.float32)
    return offset, (exact - offset.double()).exp2()

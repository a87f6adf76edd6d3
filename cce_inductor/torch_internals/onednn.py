"""Matrix products by oneDNN, one of the two libraries that PyTorch has for them on the CPU."""

from __future__ import annotations

import functools

import torch

LONGEST_SUM = 192
"""How many products are added one after another. More lose more precision than `torch.mm` does:
MKL's sums are as long, and oneDNN's would be up to three times as long."""


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` takes tensors of a dtype on a device.

    On x86, `torch.mm` multiplies float32 matrices with MKL, and those of narrower dtypes with
    oneDNN, which is twice as fast on processors of AMD for float32, too.
    """
    is_ours = dtype == torch.float32 and device.type == "cpu" and _has_linear()
    return is_ours and bool(torch._C._get_mkldnn_enabled())


@functools.cache
def _has_linear() -> bool:
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``onto + input @ weight.t() + bias``, in the precision of
    ``torch.backends.mkldnn.matmul``.

    Args:
        input: [m, k].
        weight: [n, k]. Its transpose is best contiguous; oneDNN is slow for most other strides, so
            that they are copied.
        bias: [n].
        onto: [m, n], to which the product is added in place; None for a result in new memory.
    """
    size = input.shape[1]
    if size == 0:  # oneDNN refuses sums of nothing.
        product = torch.nn.functional.linear(input, weight, bias)
        return product if onto is None else onto.add_(product)
    length = -(-size // -(-size // LONGEST_SUM))
    for a, b in zip(input.split(length, 1), weight.split(length, 1), strict=True):
        if not b.t().is_contiguous():
            b = b.contiguous()
        product = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        onto = product if onto is None else onto.add_(product)
        bias = None
    assert onto is not None, "a sum of at least one product"
    return onto

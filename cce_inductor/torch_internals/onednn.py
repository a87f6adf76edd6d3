"""Matrix products by oneDNN, one of the two libraries that PyTorch has for them on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

LONGEST_SUM = 192
"""The most terms of a dot product that oneDNN adds one after another. MKL adds as many. Left to
itself, oneDNN adds up to three times as many, which rounds more than `torch.mm` does."""

PART = 2**19
"""The most elements of a product that `add_product` has in memory at a time, if a row has fewer."""


def applies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `multiply` and `add_product` take tensors of a dtype on a device.

    On x86, `torch.mm` uses MKL for float32, and oneDNN for narrower dtypes. On processors of AMD,
    oneDNN multiplies float32 matrices twice as fast as MKL.
    """
    is_ours = dtype == torch.float32 and device.type == "cpu" and _has_linear()
    return is_ours and bool(torch._C._get_mkldnn_enabled())


@functools.cache
def _has_linear() -> bool:
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``input @ weight.t() + bias`` in new memory.

    Args:
        input: [m, k].
        weight: [n, k], of any strides. It is copied unless its transpose is contiguous.
        bias: [n].
    """
    total = None
    for a, b in _pieces(input, weight):
        product = _linear(a, b, bias if total is None else None)
        total = product if total is None else total.add_(product)
    return torch.nn.functional.linear(input, weight, bias) if total is None else total


def add_product(onto: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> None:
    """Add ``input @ weight.t()`` to `onto` [m, n]; see `multiply`."""
    rows = max(1, PART // max(1, weight.shape[0]))
    for a, b in _pieces(input, weight):
        for part, out in zip(a.split(rows), onto.split(rows), strict=True):
            out.add_(_linear(part, b, None))


def _pieces(
    input: torch.Tensor, weight: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pieces of equal length of both, along k: none if they are empty, which oneDNN refuses.

    For a weight that is neither contiguous nor the transpose of a contiguous one, oneDNN may take
    600 times as long.
    """
    size = input.shape[1]
    if size == 0:
        return
    count = -(-size // LONGEST_SUM)
    length = -(-size // count)
    for a, b in zip(input.split(length, 1), weight.split(length, 1), strict=True):
        yield a, b if b.t().is_contiguous() else b.contiguous()


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN ignores its strides.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product

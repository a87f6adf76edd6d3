"""Matrix products that the library of a device returns wider than their operands.

For float16 and bfloat16, cuBLAS can return the float32 sums that it computes in any case
(`torch.mm` with ``out_dtype``). Not all devices have that.
"""

from __future__ import annotations

import functools

import torch


def applies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `multiply` and `add_product` take matrices of a dtype on a device.

    Not on devices of AMD, which PyTorch calls "cuda" as well: nobody has compared their results.
    """
    is_ours = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return is_ours and not torch.version.hip and _are_on_cuda()


@functools.cache
def _are_on_cuda() -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(f"aten::mm.{overload}", "CUDA") for overload in ("dtype", "dtype_out"))


def multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compute ``a @ b`` in the dtype and the memory of `out`, float32 [m, n]."""
    torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def add_product(onto: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add ``a @ b`` to `onto`, float32 [m, n]."""
    onto.add_(torch.ops.aten.mm.dtype(a, b, onto.dtype))

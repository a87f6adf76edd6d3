"""Matrix products that the library of a device returns wider than their operands.

For float16 and bfloat16, cuBLAS can return the float32 sums that it computes in any case. The
operators with an ``out_dtype`` are new, hardly documented, and not on all devices.
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
    return all(has(f"aten::{name}.dtype_out", "CUDA") for name in ("mm", "addmm"))


def multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compute ``a @ b`` in the dtype and the memory of `out`, float32 [m, n]."""
    torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def add_product(onto: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add ``a @ b`` to `onto`, float32 [m, n]."""
    torch.ops.aten.addmm.dtype_out(onto, a, b, onto.dtype, out=onto)

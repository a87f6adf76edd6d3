"""Matrix products whose result is wider than their operands.

bfloat16 operands are multiplied in bfloat16, which is fast, but the library rounds the result to
bfloat16. A second product that starts from minus the rounded result returns what the rounding lost
(the library accumulates in float32), and the sum of both is exact to about 2^-17. On CUDA, the
library returns what it has accumulated, and nothing is lost. The range of float16 is too small for
operands: gradients of a mean over tokens are near its smallest numbers, and their parts may exceed
its largest. float16 operands are therefore multiplied in float32, as precisely as the user lets
PyTorch multiply float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise import host
from cce_inductor.kernels.head import accumulation_dtype
from cce_inductor.torch_internals import onednn, wide_products


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are multiplied."""
    return torch.float32 if dtype == torch.float16 else dtype


class WideProduct:
    """``out = beta * out + a @ b`` with `out` in the accumulation dtype of `a` and `b`.

    No intermediate result is rounded to the operands' dtype, unless that is asked for. float32 is
    multiplied by oneDNN where that is possible, and everything else by `torch.mm`.

    Args:
        dtype: the operands' dtype, as `operand_dtype` returns it.
        capacity: elements of the largest `out`; scratch for it is allocated once if `dtype` is
            narrower than its accumulation dtype.

    Attributes:
        wide: the dtype of `out`.
        exact: whether that is also the dtype of the operands.
        by_onednn: whether oneDNN multiplies, which returns its results in new memory.
    """

    def __init__(self, dtype: torch.dtype, capacity: int, device: torch.device):
        wide = self.wide = accumulation_dtype(dtype)
        self.exact = dtype == wide
        self.by_onednn = onednn.applies(dtype, device)
        self._is_returned_wide = wide_products.applies(dtype, device)
        elements = 0 if self.exact else capacity
        self._rounded = torch.empty(elements, dtype=dtype, device=device)
        elements = 0 if self._is_returned_wide else elements
        self._widened = torch.empty(elements, dtype=wide, device=device)

    @staticmethod
    def scratch_itemsize(dtype: torch.dtype, device: torch.device) -> int:
        """Return the bytes of scratch, or of oneDNN's results, for each element of `out`."""
        wide = accumulation_dtype(dtype)
        if onednn.applies(dtype, device):
            return wide.itemsize
        if dtype == wide:
            return 0
        is_returned_wide = wide_products.applies(dtype, device)
        return dtype.itemsize + (0 if is_returned_wide else wide.itemsize)

    def rounded(self, a: Tensor, b: Tensor, bias: Tensor | None, memory: Tensor | None) -> Tensor:
        """Return ``a @ b + bias``, rounded once to the dtype of the operands and `bias`.

        Args:
            a, b: [m, k] and [k, n].
            bias: [n].
            memory: at least ``m * n`` elements for the result; None if `by_onednn`.
        """
        if self.by_onednn:
            return onednn.multiply(a, b.t(), bias)
        assert memory is not None, "memory for the result"
        shape = a.shape[0], b.shape[1]
        out = _view(memory, shape)
        rounded = out if self.exact else _view(self._rounded, shape)
        if bias is None:
            torch.mm(a, b, out=rounded)
        else:
            torch.addmm(bias, a, b, out=rounded)
        return out if self.exact else out.copy_(rounded)

    def __call__(
        self, out: Tensor, a: Tensor, b: Tensor, *, beta: int, recovered: Tensor | None = None
    ) -> None:
        """Update `out`.

        Args:
            out: [m, n]; it is not read if `beta` is 0.
            a, b: [m, k] and [k, n].
            beta: 0 or 1.
            recovered: the numbers of the rows of the product that must not be rounded to the
                operands' dtype, int64; None for all rows.
        """
        if self.by_onednn:
            onednn.add_product(out if beta else out.zero_(), a, b.t())
            return
        if self.exact:
            if beta:
                out.addmm_(a, b)
            else:
                torch.mm(a, b, out=out)
            return
        if self._is_returned_wide:
            (wide_products.add_product if beta else wide_products.multiply)(out, a, b)
            return
        rounded, widened = _view(self._rounded, out.shape), _view(self._widened, out.shape)
        torch.mm(a, b, out=rounded)
        if beta:
            out.add_(widened.copy_(rounded))
        else:
            out.copy_(rounded)
        if recovered is None:
            out.add_(widened.copy_(_lost(rounded, a, b)))
        elif len(recovered):
            lost = _lost(rounded[recovered], a[recovered], b)
            out.index_add_(0, recovered, lost.to(self.wide))


def _lost(rounded: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return what rounding took from ``a @ b``, in the memory of the rounded product."""
    rounded.addmm_(a, b, beta=-1)
    if host.runs_ahead(rounded.device) or not bool(rounded.sum().isfinite()):
        # An infinite result has no rounding error: inf - inf must not make it nan.
        rounded.nan_to_num_(0.0, 0.0, 0.0)
    return rounded


def _view(memory: Tensor, shape: Sequence[int]) -> Tensor:
    return memory[: math.prod(shape)].view(shape)

"""Buffers for one block of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.product import WideProduct
from cce_inductor.kernels.head import TILE, Head
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.schedule import schedule


class Workspace:
    """Buffers for one block of rows and one tile, allocated once and handed out as views.

    Attributes:
        rows: the rows of a block, as many as `Head.workspace_bytes` holds, at least 1.
        product: the matrix product, with its scratch.
    """

    def __init__(self, head: Head, rows: int, hidden: int, device: torch.device, *, backward: bool):
        width = min(TILE, head.vocabulary)
        longest = max(width, hidden) if backward else width
        with_operand = backward and head.compute_dtype != head.logit_dtype
        row_bytes = (
            width * head.logit_dtype.itemsize * _block_count(head, backward=backward)
            + width * head.compute_dtype.itemsize * with_operand
            + longest * WideProduct.scratch_itemsize(head.compute_dtype)
        )
        self.rows = max(1, min(rows, head.workspace_bytes // max(1, row_bytes)))

        def buffer(dtype: torch.dtype) -> Tensor:
            return torch.empty(self.rows * width, dtype=dtype, device=device)

        self._logits = buffer(head.logit_dtype)
        self._operand = buffer(head.compute_dtype) if with_operand else None
        capacity = max(self.rows * longest, hidden * width if backward else 0)
        self.product = WideProduct(head.compute_dtype, capacity, device)

    def row_blocks(self, rows: int) -> Iterator[slice]:
        """Yield ranges that cover `rows` rows, each within the workspace."""
        for start in range(0, rows, self.rows):
            yield slice(start, min(start + self.rows, rows))

    def logits(self, head: Head, input: Tensor, weight: Tensor, tile: slice) -> Tensor:
        """Return the block's logits, [rows, tile] in the logit dtype.

        They are rounded to the compute dtype once, after the bias, as `linear` rounds them. With
        a bias of another dtype they are not rounded at all.
        """
        rows, width = input.shape[0], weight.shape[0]
        logits = self._logits[: rows * width].view(rows, width)
        bias = None if head.linear_bias is None else head.linear_bias[tile]
        if bias is None or bias.dtype == head.compute_dtype:
            self.product.rounded(logits, input, weight.t(), bias)
        else:
            self.product(logits, input, weight.t(), beta=0)
            logits.add_(bias)
        return logits

    def operand(self, dz: Tensor) -> Tensor:
        """Return `dz` in the compute dtype."""
        if self._operand is None:
            return dz
        return self._operand[: dz.numel()].view(dz.shape).copy_(dz)


def _block_count(head: Head, *, backward: bool) -> int:
    """Return the number of blocks in the logit dtype that exist at the same time."""
    program = head.program
    count = 1
    if not program.is_plain:
        peak = derivative(program, head.operands).peak if backward else schedule(program).peak()
        count += peak
    if any(statistic.value_count > 1 for statistic in program.statistics):
        count += 3 if backward else 2
    return count

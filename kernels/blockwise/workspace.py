"""Buffers for one block of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.product import WideProduct, operand_dtype
from cce_inductor.kernels.head import TILE, Factors, Head
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.schedule import schedule

ROWS_IN_CACHE = 512
"""The rows of a block that one thread computes alone: 2 MiB of float32 logits stay in its cache.
Products of a narrower dtype have all rows at once if they can, because a sum of several products
costs time for what rounding takes away."""


def rows_of_block(
    head: Head, every: Sequence[Factors], rows: int, lanes: int, *, backward: bool
) -> int:
    """Return how many rows of a tile a lane computes at a time, so that all lanes together have
    `Head.workspace_bytes`: at least 1, at most `rows`.

    Args:
        head: the program, and the size of the workspace.
        every: the matrix products that the program reads.
        rows: the number of rows that there are.
        lanes: the number of lanes.
        backward: whether gradients are computed.
    """
    blocks = _block_count(head, len(every), backward=backward)
    row_bytes = blocks * _width(head) * head.logit_dtype.itemsize
    row_bytes += sum(_Sizes(head, factors, backward).row_bytes for factors in every)
    most = head.workspace_bytes // (lanes * max(1, row_bytes))
    is_wide = all(operand_dtype(each.compute_dtype) == head.logit_dtype for each in every)
    if lanes > 1 and is_wide:
        most = min(most, ROWS_IN_CACHE * -(-torch.get_num_threads() // lanes))
    return max(1, min(rows, most))


def row_blocks(rows: int, rows_of_block: int) -> Iterator[slice]:
    """Yield ranges that cover `rows` rows, each of at most `rows_of_block`."""
    for start in range(0, rows, rows_of_block):
        yield slice(start, min(start + rows_of_block, rows))


class _Sizes:
    """What one matrix product needs besides its block of logits.

    Attributes:
        dtype: the dtype in which the factors are multiplied.
        width: the columns of a tile.
        with_operand: whether the gradient of the block is converted to another dtype.
        capacity_of_weight: the elements of a tile's weight gradient, 0 without gradients.
        longest: the longest row of a result.
        row_bytes: the bytes for each row of the block.
    """

    def __init__(self, head: Head, factors: Factors, backward: bool):
        hidden = factors.linear_weight.shape[1]
        self.dtype, self.width = operand_dtype(factors.compute_dtype), _width(head)
        self.with_operand = backward and self.dtype != head.logit_dtype
        self.capacity_of_weight = hidden * self.width if backward else 0
        self.longest = max(self.width, hidden) if backward else self.width
        scratch = self.longest * WideProduct.scratch_itemsize(self.dtype, factors.input.device)
        self.row_bytes = scratch + self.width * self.dtype.itemsize * self.with_operand


class Workspace:
    """Buffers for the blocks of one matrix product, allocated once and handed out as views.

    Args:
        head: the program.
        factors: the matrix product.
        rows: the rows of a block.
        backward: whether gradients are computed.

    Attributes:
        rows: the rows of a block.
        product: the matrix product, with its scratch.
    """

    def __init__(self, head: Head, factors: Factors, rows: int, *, backward: bool):
        sizes, device = _Sizes(head, factors, backward), factors.input.device
        self.rows = rows

        def buffer(dtype: torch.dtype) -> Tensor:
            return torch.empty(rows * sizes.width, dtype=dtype, device=device)

        capacity = max(rows * sizes.longest, sizes.capacity_of_weight)
        self.product = WideProduct(sizes.dtype, capacity, device)
        self._logits = None if self.product.allocates else buffer(self.product.wide)
        self._operand = buffer(sizes.dtype) if sizes.with_operand else None

    def logits(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a block of logits, [rows, tile] in the accumulation dtype.

        They are rounded to the compute dtype once, after the bias, as `linear` rounds them. With
        a bias of another dtype they are not rounded at all.
        """
        if bias is None or bias.dtype == input.dtype:
            return self.product.rounded(input, weight.t(), bias, self._logits)
        shape = input.shape[0], weight.shape[0]
        logits = input.new_empty(shape, dtype=self.product.wide)
        self.product(logits, input, weight.t(), beta=0)
        return logits.add_(bias)

    def operand(self, dz: Tensor) -> Tensor:
        """Return `dz` in the compute dtype."""
        if self._operand is None:
            return dz
        return self._operand[: dz.numel()].view(dz.shape).copy_(dz)


def _width(head: Head) -> int:
    return min(TILE, head.vocabulary)


def _block_count(head: Head, products: int, *, backward: bool) -> int:
    """Return the number of blocks in the logit dtype that exist at the same time."""
    program = head.program
    count = products
    if not program.is_plain:
        peak = derivative(program, head.operands).peak if backward else schedule(program).peak()
        count += peak
    if any(statistic.value_count > 1 for statistic in program.statistics):
        count += 3 if backward else 2
    return count

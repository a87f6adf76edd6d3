"""Buffers for one block of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.product import WideProduct, operand_dtype
from cce_inductor.kernels.head import Factors, Head
from cce_inductor.kernels.program.derivative import derivative
from cce_inductor.kernels.program.schedule import schedule
from cce_inductor.torch_internals import onednn

ROWS_IN_CACHE = 512
"""The rows of a block that one thread computes alone: 2 MiB of float32 logits stay in its cache."""


class BlockRows(NamedTuple):
    """How many rows of a tile a lane computes at a time.

    Attributes:
        block: the rows of a block of logits.
        product: the rows whose gradients are multiplied together for the gradient of the weight:
            several blocks of them where the gradients are converted to a narrower dtype.
    """

    block: int
    product: int


def block_rows(
    head: Head, every: Sequence[Factors], rows: int, lanes: int, *, backward: bool
) -> BlockRows:
    """Return how many rows a lane computes at a time, so that all lanes together have
    `Head.workspace_bytes`: at least 1, at most `rows`.

    Args:
        head: the program, and the size of the workspace.
        every: the matrix products that the program reads.
        rows: the number of rows that there are.
        lanes: the number of lanes.
        backward: whether gradients are computed.
    """
    sizes = [_Sizes(head, factors, backward) for factors in every]
    blocks = _block_count(head, len(every), backward=backward)
    row_bytes = blocks * _width(head) * head.logit_dtype.itemsize
    row_bytes += sum(each.row_bytes for each in sizes)
    lane_bytes = head.workspace_bytes // lanes
    most = lane_bytes // max(1, row_bytes)
    if most < onednn.ROWS[-1]:  # oneDNN multiplies no block of so few rows.
        row_bytes -= sum(each.onednn_bytes for each in sizes)
        most = min(onednn.ROWS[-1] - 1, lane_bytes // max(1, row_bytes))
    if head.linear_weight.device.type == "cpu":
        most = min(most, ROWS_IN_CACHE * -(-torch.get_num_threads() // lanes))
    block = max(1, min(rows, most))
    operand_bytes = sum(each.operand_bytes for each in sizes)
    more = max(0, lane_bytes - block * row_bytes) // (block * operand_bytes) if operand_bytes else 0
    return BlockRows(block, block * min(1 + more, -(-rows // block)))


def row_blocks(rows: int, rows_of_block: int) -> Iterator[slice]:
    """Yield ranges that cover `rows` rows, each of at most `rows_of_block`."""
    for start in range(0, rows, rows_of_block):
        yield slice(start, min(start + rows_of_block, rows))


class _Sizes:
    """What one matrix product needs besides its block of logits.

    Attributes:
        dtype: the dtype in which the factors are multiplied.
        width: the columns of a tile.
        operand_bytes: the bytes for each row of the gradient in that dtype, 0 if it is the dtype of
            the logits.
        capacity_of_weight: the elements of a tile's weight gradient, 0 without gradients.
        longest: the longest row of a result.
        row_bytes: the bytes for each row of the block.
        onednn_bytes: how many of them are for results of oneDNN.
    """

    def __init__(self, head: Head, factors: Factors, backward: bool):
        hidden = factors.linear_weight.shape[1]
        self.dtype, self.width = operand_dtype(factors.compute_dtype), _width(head)
        is_converted = backward and self.dtype != head.logit_dtype
        self.operand_bytes = self.width * self.dtype.itemsize if is_converted else 0
        self.capacity_of_weight = hidden * self.width if backward else 0
        self.longest = max(self.width, hidden) if backward else self.width
        scratch = self.longest * WideProduct.scratch_itemsize(self.dtype, factors.input.device)
        self.row_bytes = scratch + self.operand_bytes
        by_onednn = onednn.applies(self.dtype, factors.input.device)
        self.onednn_bytes = scratch if by_onednn else 0


class Workspace:
    """Buffers for the blocks of one matrix product, allocated once and handed out as views. Only
    the results of oneDNN have memory of their own.

    Args:
        head: the program.
        factors: the matrix product.
        rows: the rows of a block, and of a product for the gradient of the weight.
        backward: whether gradients are computed.

    Attributes:
        rows: the same.
        product: the matrix product, with its scratch.
    """

    def __init__(self, head: Head, factors: Factors, rows: BlockRows, *, backward: bool):
        sizes, device = _Sizes(head, factors, backward), factors.input.device
        self.rows = rows

        def buffer(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows * sizes.width, dtype=dtype, device=device)

        capacity = max(rows.block * sizes.longest, sizes.capacity_of_weight)
        self.product = WideProduct(sizes.dtype, capacity, device)
        by_onednn = self.product.by_onednn
        self._logits = None if by_onednn else buffer(rows.block, self.product.wide)
        self._operands = buffer(rows.product, sizes.dtype) if sizes.operand_bytes else None
        self._collected: Tensor | None = None

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

    def copy(self, logits: Tensor) -> Tensor:
        """Return a copy of a block of logits in the accumulation dtype."""
        if self._logits is None:
            return logits.to(self.product.wide, copy=True)
        return self._logits[: logits.numel()].view(logits.shape).copy_(logits)

    def operand(self, dz: Tensor) -> Tensor:
        """Return `dz` in the compute dtype, and collect it until `take_operands`."""
        if self._operands is None:
            self._collected = dz
            return dz
        start, width = self.collected, dz.shape[1]
        every = self._operands[: len(self._operands) // width * width].view(-1, width)
        self._collected = every[: start + len(dz)]
        return self._collected[start:].copy_(dz)

    @property
    def collected(self) -> int:
        """The number of rows that `operand` has collected."""
        return 0 if self._collected is None else len(self._collected)

    @property
    def is_full(self) -> bool:
        """Whether there is no room to collect another block."""
        is_converted = self._operands is not None
        return not is_converted or self.collected + self.rows.block > self.rows.product

    def take_operands(self) -> Tensor:
        """Return what `operand` has collected, [rows, tile], and begin anew."""
        assert self._collected is not None, "at least one block"
        collected, self._collected = self._collected, None
        return collected


def _width(head: Head) -> int:
    return min(head.tile, head.vocabulary)


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

"""Logits at a few indices of each row, without the other logits.

A program that reads logits at indices alone needs only the rows of the weight at these indices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cce_inductor.kernels.all_statistics import Indices
from cce_inductor.kernels.blockwise.product import operand_dtype
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.workspace import row_blocks
from cce_inductor.kernels.head import Factors, Head, accumulation_dtype
from cce_inductor.kernels.statistics.indexed import NOWHERE, Indexed

COLUMNS_PER_INDEX = 8
"""Rows of the weight are gathered only if the vocabulary has at least this many columns for each
index; otherwise a matrix product is faster."""


def applies(head: Head, indices: Indices) -> bool:
    """Whether a program reads nothing but logits at few indices.

    Only on the CPU: on a device, `unique` would make the host wait.

    Args:
        head: the program.
        indices: the indices of its statistics, and maybe of others.
    """
    program = head.program
    if not program.is_plain or not all(isinstance(each, Indexed) for each in program.statistics):
        return False
    count = sum(indices[each].shape[1] for each in program.indexed)
    on_cpu = head.linear_weight.device.type == "cpu"
    return on_cpu and COLUMNS_PER_INDEX * count <= head.vocabulary


class Selected:
    """The logits of a matrix product at indices, and the gradients of its factors.

    Args:
        head: says how much memory the gathered rows of the weight may take.
        factors: the matrix product.
        kept: the rows that are computed.
        index: [rows, k] int64, `NOWHERE` for indices that are ignored.
    """

    def __init__(self, head: Head, factors: Factors, kept: KeptRows, index: Tensor):
        self._factors, self._kept = factors, kept
        self._dtype = operand_dtype(factors.compute_dtype)
        self._wide = accumulation_dtype(self._dtype)
        self._input = kept.select(factors.input)
        self._is_somewhere = index != NOWHERE
        self._index = index.clamp(min=0)
        count, hidden = max(index.shape[1], 1), factors.linear_weight.shape[1]
        row_bytes = 2 * count * max(hidden, 1) * self._wide.itemsize
        self._rows = max(1, head.workspace_bytes // row_bytes)

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield blocks of rows, their input [rows, 1, hidden], and the weights at their indices,
        [rows, k, hidden]."""
        for block in row_blocks(len(self._index), self._rows):
            input = self._input[block].to(self._dtype).to(self._wide).unsqueeze(1)
            weight = self._factors.linear_weight[self._index[block]]
            yield block, input, weight.to(self._dtype).to(self._wide)

    def logits(self) -> Tensor:
        """Return the logits, float64 [rows, k], rounded as a block of logits is; 0 for ignored
        indices."""
        logits = torch.zeros(self._index.shape, dtype=torch.float64, device=self._index.device)
        bias = self._factors.linear_bias
        for block, input, weight in self._blocks():
            values = torch.bmm(input, weight.transpose(1, 2)).squeeze(1)
            if bias is not None:
                values = values + bias[self._index[block]]
            if bias is None or bias.dtype == self._dtype:
                values = values.to(self._dtype)
            logits[block] = values
        return logits.where(self._is_somewhere, 0.0)

    def gradients(
        self, grad: Tensor, *, wants_input: bool, wants_weight: bool, wants_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of input, weight and bias; None for those not asked for.

        Args:
            grad: the gradient of the logits, float64 [rows, k].
            wants_input, wants_weight, wants_bias: which of them are asked for.
        """
        grad = grad.where(self._is_somewhere, 0.0).to(self._wide)
        d_input = d_weight = d_bias = None
        if wants_input:
            d_input = self._input.new_zeros(self._input.shape)
        if wants_weight or wants_bias:
            used, place = self._index.unique(return_inverse=True)
        if wants_weight:
            shape = (len(used), self._input.shape[1])
            sums = torch.zeros(shape, dtype=self._wide, device=grad.device)
        for block, input, weight in self._blocks():
            of_block = grad[block].unsqueeze(1)
            if d_input is not None:
                d_input[block] = torch.bmm(of_block, weight).squeeze(1).to(d_input.dtype)
            if wants_weight:
                products = torch.bmm(of_block.transpose(1, 2), input)
                sums.index_add_(0, place[block].flatten(), products.flatten(0, 1))
        if wants_weight:
            d_weight = self._factors.linear_weight.new_zeros(self._factors.linear_weight.shape)
            d_weight[used] = sums.to(d_weight.dtype)
        if wants_bias:
            assert self._factors.linear_bias is not None, "a gradient for a bias that is not there"
            total = torch.zeros(len(used), dtype=self._wide, device=grad.device)
            total.index_add_(0, place.flatten(), grad.flatten())
            d_bias = self._factors.linear_bias.new_zeros(len(self._factors.linear_bias))
            d_bias[used] = total.to(d_bias.dtype)
        return None if d_input is None else self._kept.restore(d_input), d_weight, d_bias

"""Gradients that are summed block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.workspace import Workspace
from cce_inductor.kernels.head import TILE
from cce_inductor.kernels.names import Name, OperandKind


class OperandGradient:
    """The gradient of a program's operand, summed over the dimensions it was broadcast along."""

    def __init__(self, name: Name, operand: Tensor, kept: KeptRows):
        self.kind, self.operand, self.kept = name.kind, operand, kept
        shape = (kept.count,) if self.kind is OperandKind.ROW else operand.shape
        self._sum = torch.zeros(shape, dtype=torch.float64, device=kept.device)

    def add(self, gradient: Tensor, like: Tensor, block: slice, tile: slice) -> None:
        """Add the gradient of a block, broadcast to the shape of `like`."""
        gradient = gradient.expand(like.shape)
        if self.kind is OperandKind.ROW:
            self._sum[block] += gradient.sum(1)
        elif self.kind is OperandKind.COLUMN:
            self._sum[tile] += gradient.sum(0)
        else:
            self._sum += gradient.sum(1).sum(0, dtype=torch.float64)

    def result(self) -> Tensor:
        """Return the sum, in the dtype of the operand."""
        total = self.kept.restore(self._sum) if self.kind is OperandKind.ROW else self._sum
        return total.to(dtype=self.operand.dtype, device=self.operand.device)


class InputGradient:
    """``dz @ weight``, summed over the tiles.

    The tiles are summed in groups first: a float32 sum of all tiles, one after another, would lose
    more precision than one product of stored logits does.
    """

    TILES = 16

    def __init__(self, input: Tensor, workspace: Workspace):
        self._total = torch.zeros(input.shape, dtype=workspace.product.wide, device=input.device)
        self._group = torch.empty_like(self._total)
        self._tiles = 0
        self._product = workspace.product

    def add(self, dz: Tensor, weight: Tensor, block: slice) -> None:
        """Add the product of a block of the current tile."""
        self._product(self._group[block], dz, weight, beta=int(self._tiles > 0))

    def end_tile(self) -> None:
        """End the current tile."""
        self._tiles += 1
        if self._tiles == self.TILES:
            self._end_group()

    def _end_group(self) -> None:
        self._total += self._group
        self._tiles = 0

    def result(self) -> Tensor:
        """Return the sum of all tiles, in the memory of the running sum."""
        if self._tiles:
            self._end_group()
        return self._total


class WeightGradient:
    """``dz.T @ input`` of one tile at a time, summed over the row blocks and rounded once.

    The product is computed as ``input.T @ dz``, [hidden, tile], so the input is transposed in
    memory once. Transposing each block of ``dz`` costs a third of the speed in low precision.
    """

    def __init__(self, input: Tensor, d_weight: Tensor, workspace: Workspace):
        self.d_weight = d_weight
        self._product = workspace.product
        self._input_t = input.t() if self._product.exact else input.t().contiguous()
        # A single product needs no sum that is wider than the gradient.
        self._is_one_product = input.shape[0] <= workspace.rows and d_weight.dtype == input.dtype
        dtype = input.dtype if self._is_one_product else workspace.product.wide
        width = min(TILE, d_weight.shape[0])
        self._sum = torch.empty(input.shape[1] * width, dtype=dtype, device=input.device)

    def add(self, dz: Tensor, block: slice) -> None:
        """Add the product of a block of the current tile."""
        hidden, width = self._input_t.shape[0], dz.shape[1]
        total = self._sum[: hidden * width].view(hidden, width)
        if self._is_one_product:
            torch.mm(self._input_t, dz, out=total)
        else:
            self._product(total, self._input_t[:, block], dz, beta=int(block.start > 0))

    def write(self, tile: slice) -> None:
        """Move the sum to the tile's rows of the gradient."""
        out = self.d_weight[tile]
        out.copy_(self._sum[: out.numel()].view(out.shape[1], out.shape[0]).t())

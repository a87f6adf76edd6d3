"""Gradients that are summed block by block.

Each lane sums the tiles of a group, and the sums of the groups are added in order. A float32 sum of
all tiles, one after another, would lose more precision than one product of stored logits does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.workspace import Workspace
from cce_inductor.kernels.names import Name, OperandKind


class OperandGradient:
    """The gradient of a program's operand, summed over the dimensions it was broadcast along.

    Attributes:
        sum: float64, in the shape of the operand, or [kept rows].
    """

    def __init__(self, name: Name, operand: Tensor, kept: KeptRows):
        self.kind, self._operand, self._kept = name.kind, operand, kept
        shape = (kept.count,) if self.kind is OperandKind.ROW else operand.shape
        self.sum = torch.zeros(shape, dtype=torch.float64, device=kept.device)

    def add(
        self, gradient: Tensor, like: Tensor, rows: slice | Tensor, columns: slice | Tensor
    ) -> None:
        """Add the gradient of a block, broadcast to the shape of `like`."""
        gradient = gradient.expand(like.shape)
        if self.kind is OperandKind.ROW:
            self.sum[rows] += gradient.sum(1)
        elif self.kind is OperandKind.COLUMN:
            self.sum[columns] += gradient.sum(0)
        else:
            self.sum += gradient.sum(1).sum(0, dtype=torch.float64)

    def add_row(self, row: Tensor, columns: slice | Tensor) -> None:
        """Add the gradient of a block that is summed over its rows, [columns]."""
        if self.kind is OperandKind.COLUMN:
            self.sum[columns] += row
        else:
            self.sum += row.sum(dtype=torch.float64)

    def take(self, other: OperandGradient) -> None:
        """Move the sum of another into this one."""
        self.sum += other.sum
        other.sum.zero_()

    def result(self) -> Tensor:
        """Return the sum, in the dtype of the operand."""
        total = self._kept.restore(self.sum) if self.kind is OperandKind.ROW else self.sum
        return total.to(dtype=self._operand.dtype, device=self._operand.device)


class InputGradient:
    """``dz @ weight``, summed over the tiles of a group."""

    def __init__(self, input: Tensor, workspace: Workspace):
        self._product = workspace.product
        self._like = input
        self._sum: Tensor | None = None
        self._tiles = 0
        self._is_empty = True
        self._gathered = input.new_empty(0, dtype=workspace.product.wide)

    def add(self, dz: Tensor, weight: Tensor, rows: slice | Tensor, heavy: Tensor | None) -> None:
        """Add the product of some rows of the current tile; see `Visit.heavy`."""
        if self._sum is None:
            self._sum = torch.empty_like(self._like, dtype=self._product.wide)
        if isinstance(rows, slice):
            beta = int(self._tiles > 0)
            self._product(self._sum[rows], dz, weight, beta=beta, recovered=heavy)
        else:
            if self._is_empty:
                self._sum.zero_()
            self._sum.index_add_(0, rows, self._of_rows(dz, weight))
        self._is_empty = False

    def _of_rows(self, dz: Tensor, weight: Tensor) -> Tensor:
        count, hidden = dz.shape[0], weight.shape[1]
        if len(self._gathered) < count * hidden:
            self._gathered = self._gathered.new_empty(count * hidden)
        product = self._gathered[: count * hidden].view(count, hidden)
        self._product(product, dz, weight, beta=0)
        return product

    def end_tile(self) -> None:
        """End the current tile."""
        self._tiles += 1

    def end_group(self, total: Tensor | None) -> Tensor | None:
        """Return `total`, None for zero, plus the sum of the group, in the memory of either."""
        is_empty, self._is_empty, self._tiles = self._is_empty, True, 0
        if is_empty or self._sum is None:
            return total
        if total is None:
            total, self._sum = self._sum, None
            return total
        total += self._sum
        return total


class WeightGradient:
    """``dz.T @ input`` of one tile at a time, summed over the blocks of rows and rounded once.

    Where the gradient has the dtype of the sum, or is a single product of all rows, it is computed
    in its own memory. Else the product is ``input.T @ dz``, [hidden, tile]: transposing each block
    of ``dz`` costs a third of the speed in low precision.

    Args:
        d_weight: [vocabulary, hidden], of which each tile writes its own rows.
        input: [rows, hidden].
        workspace: the buffers.
        is_exact: whether nothing but products is added.
        is_added: whether the sums are added to what `d_weight` has, in the dtype of the sums.
    """

    def __init__(
        self,
        d_weight: Tensor,
        input: Tensor,
        workspace: Workspace,
        *,
        is_exact: bool,
        is_added: bool,
    ):
        self._d_weight, self._product = d_weight, workspace.product
        self._is_added = is_added
        self._is_wide = d_weight.dtype == input.dtype == workspace.product.wide
        # A single product needs no sum that is wider than the gradient.
        is_whole = input.shape[0] <= workspace.rows.product and d_weight.dtype == input.dtype
        self._is_one_product = is_exact and is_whole and not self._is_wide
        self._buffer = input.new_empty(0, dtype=workspace.product.wide)

    @property
    def is_transposed(self) -> bool:
        """Whether the products are ``input.T @ dz``."""
        return not (self._is_wide or self._is_one_product)

    def begin(self, columns: slice | Tensor) -> None:
        """Begin a tile of the vocabulary."""
        self._columns, self._is_empty = columns, not self._is_added
        if self._is_in_place:
            self._total = self._d_weight[columns]
            return
        width = columns.stop - columns.start if isinstance(columns, slice) else len(columns)
        hidden = self._d_weight.shape[1]
        if len(self._buffer) < hidden * width:
            self._buffer = self._buffer.new_empty(hidden * width)
        shape = (hidden, width) if self.is_transposed else (width, hidden)
        self._total = self._buffer[: hidden * width].view(shape)

    def add(self, dz: Tensor, input_t: Tensor) -> None:
        """Add the product of some rows of the tile, whose input is [hidden, rows]."""
        first, second = (input_t, dz) if self.is_transposed else (dz.t(), input_t.t())
        if self._is_one_product:
            torch.mm(first, second, out=self._total)
        else:
            self._product(self._total, first, second, beta=int(not self._is_empty))
        self._is_empty = False

    def add_outer(self, columns: Tensor, input: Tensor) -> None:
        """Add the product of a few rows, [columns, rows] and [rows, hidden], in the dtype of the
        sum."""
        total = self._total.t() if self.is_transposed else self._total
        total.addmm_(columns, input, beta=int(not self._is_empty))
        self._is_empty = False

    def end(self) -> None:
        """Write the tile's rows of the gradient."""
        if self._is_in_place:
            return
        total = self._total.t() if self.is_transposed else self._total
        if isinstance(self._columns, slice):
            self._d_weight[self._columns].copy_(total)
        else:
            self._d_weight.index_copy_(0, self._columns, total.to(self._d_weight.dtype))

    @property
    def _is_in_place(self) -> bool:
        """Whether the tile's rows of the gradient are computed in their own memory."""
        return self._is_one_product or (self._is_wide and isinstance(self._columns, slice))

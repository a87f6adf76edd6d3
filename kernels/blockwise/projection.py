"""One matrix product that makes logits, block by block, and the gradients of its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.gradients import InputGradient, WeightGradient
from cce_inductor.kernels.blockwise.product import operand_dtype
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.workspace import Workspace
from cce_inductor.kernels.head import Factors, Head


class Projection:
    """The blocks of one matrix product; `begin` chooses the tile of the vocabulary.

    Args:
        head: the program that reads the logits.
        factors: the matrix product.
        kept: the rows that are computed.
        rows: the rows of a block.
        backward: whether gradients are computed.
    """

    def __init__(self, head: Head, factors: Factors, kept: KeptRows, rows: int, *, backward: bool):
        self._factors, self._kept = factors, kept
        self._dtype, self._logit_dtype = operand_dtype(factors.compute_dtype), head.logit_dtype
        self._input = kept.select(factors.input).to(self._dtype)
        self._workspace = Workspace(head, factors, rows, backward=backward)

    def begin(self, tile: slice) -> None:
        """Begin a tile of the vocabulary."""
        self._tile = tile
        self._weight = self._factors.linear_weight[tile].to(self._dtype)
        bias = self._factors.linear_bias
        self._bias = None if bias is None else bias[tile]

    def logits(self, block: slice) -> Tensor:
        """Return a block of rows of the tile, in the logit dtype."""
        logits = self._workspace.logits(self._input[block], self._weight, self._bias)
        return logits.to(self._logit_dtype)


class ProjectionGradient(Projection):
    """The gradients of a matrix product's factors, summed over its blocks.

    Args:
        wants_input, wants_weight, wants_bias: which of them are asked for.
    """

    def __init__(
        self,
        head: Head,
        factors: Factors,
        kept: KeptRows,
        rows: int,
        *,
        wants_input: bool,
        wants_weight: bool,
        wants_bias: bool,
    ):
        super().__init__(head, factors, kept, rows, backward=True)
        weight = factors.linear_weight
        self._d_input = self._d_weight = self._d_bias = None
        if wants_input:
            self._d_input = InputGradient(self._input, self._workspace)
        if wants_weight:
            d_weight = weight.new_empty(weight.shape)
            self._d_weight = WeightGradient(self._input, d_weight, self._workspace)
        if wants_bias:
            self._d_bias = torch.zeros(
                weight.shape[0], dtype=head.logit_dtype, device=weight.device
            )

    @property
    def is_wanted(self) -> bool:
        """Whether any of the gradients is asked for."""
        return any(each is not None for each in (self._d_input, self._d_weight, self._d_bias))

    def add(self, dz: Tensor, block: slice) -> None:
        """Add what the gradient of a block of logits contributes."""
        if self._d_bias is not None:
            self._d_bias[self._tile] += dz.sum(0)
        operand = self._workspace.operand(dz)
        if self._d_input is not None:
            self._d_input.add(operand, self._weight, block)
        if self._d_weight is not None:
            self._d_weight.add(operand, block)

    def end(self) -> None:
        """End the tile."""
        if self._d_input is not None:
            self._d_input.end_tile()
        if self._d_weight is not None:
            self._d_weight.write(self._tile)

    def skip(self, tile: slice) -> None:
        """Leave out a tile whose gradient is zero."""
        if self._d_weight is not None:
            self._d_weight.d_weight[tile] = 0

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of input, weight and bias; None for those not asked for."""
        d_input = d_bias = None
        if self._d_input is not None:
            d_input = self._kept.restore(self._d_input.result().to(self._factors.input.dtype))
        if self._d_bias is not None:
            assert self._factors.linear_bias is not None, "a gradient for a bias that is not there"
            d_bias = self._d_bias.to(self._factors.linear_bias.dtype)
        return d_input, None if self._d_weight is None else self._d_weight.d_weight, d_bias

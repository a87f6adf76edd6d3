"""One matrix product that makes logits, tile by tile, and the gradients of its factors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.control_variate import ControlVariate, TileTerm
from cce_inductor.kernels.blockwise.gradients import InputGradient, WeightGradient
from cce_inductor.kernels.blockwise.product import operand_dtype
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.workspace import BlockRows, Workspace
from cce_inductor.kernels.head import Factors, Head
from cce_inductor.kernels.names import LOGIT


class Projection:
    """What the lanes share of a matrix product.

    Args:
        head: the program that reads the logits.
        factors: the matrix product.
        kept: the rows that are computed.
        stored: memory for the logits of the first tiles, which the forward writes and the backward
            reads, [tiles, rows, tile]; None for none.

    Attributes:
        input: the kept rows in the dtype of the product, [rows, hidden].
    """

    def __init__(self, head: Head, factors: Factors, kept: KeptRows, stored: Tensor | None):
        self.head, self.factors, self.kept, self.stored = head, factors, kept, stored
        self.dtype = operand_dtype(factors.compute_dtype)
        self.input = kept.select(factors.input).to(self.dtype)


class Tile:
    """A lane's part of a matrix product: one tile of the vocabulary at a time.

    Args:
        projection: what the lanes share.
        rows: the rows of a block.
        backward: whether gradients are computed.
    """

    def __init__(self, projection: Projection, rows: BlockRows, *, backward: bool = False):
        self._projection, self._head = projection, projection.head
        self._workspace = Workspace(self._head, projection.factors, rows, backward=backward)

    def begin(self, tile: slice) -> None:
        """Begin a tile of the vocabulary."""
        self._tile, self._columns = tile, self._head.columns(tile)
        number, width = tile.start // self._head.tile, tile.stop - tile.start
        stored = self._projection.stored
        self._stored = None
        if stored is not None and number < len(stored):
            self._stored = stored[number, :, :width]
        factors = self._projection.factors
        self._weight = factors.linear_weight[self._columns].to(self._projection.dtype)
        bias = factors.linear_bias
        self._bias = None if bias is None else bias[self._columns]

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Return some rows of the tile, in the logit dtype, and store them if there is memory."""
        self._input = self._projection.input[rows]
        logits = self._workspace.logits(self._input, self._weight, self._bias)
        if self._stored is not None:
            self._stored[rows].copy_(logits)
        return logits.to(self._head.logit_dtype)


class ProjectionGradient(Projection):
    """The gradients of a matrix product's factors.

    Args:
        onto: what the gradient of the weight is added to; None for a new tensor.
        wants_input, wants_weight, wants_bias: which of them are asked for.

    Attributes:
        d_input: the sum of the groups so far, in the accumulation dtype; None before the first.
        d_weight, d_bias: the gradients, of which each tile writes its own entries; None for those
            not asked for.
        is_added: whether `d_weight` has a gradient to which this one is added.
    """

    def __init__(
        self,
        head: Head,
        factors: Factors,
        kept: KeptRows,
        stored: Tensor | None,
        onto: Tensor | None,
        *,
        wants_input: bool,
        wants_weight: bool,
        wants_bias: bool,
    ):
        super().__init__(head, factors, kept, stored)
        weight = factors.linear_weight
        self.wants_input = wants_input
        self.d_input: Tensor | None = None
        self.is_added = onto is not None
        self.d_weight = None
        if wants_weight:
            self.d_weight = weight.new_empty(weight.shape) if onto is None else onto
        self.d_bias = None
        if wants_bias:
            self.d_bias = torch.zeros(weight.shape[0], dtype=head.logit_dtype, device=weight.device)

    @functools.cached_property
    def input_t(self) -> Tensor:
        """The input, [hidden, rows], transposed in memory if its products are faster then."""
        is_wide = self.dtype == self.head.logit_dtype
        return self.input.t() if is_wide else self.input.t().contiguous()

    @property
    def is_wanted(self) -> bool:
        """Whether any of the gradients is asked for."""
        return self.wants_input or self.d_weight is not None or self.d_bias is not None

    def results(self, variate: ControlVariate | None) -> list[Tensor | None]:
        """Return the gradients of input, weight and bias; None for those not asked for."""
        d_input = None
        if self.wants_input:
            d_input = self.d_input
            if d_input is None:
                d_input = torch.zeros(
                    self.input.shape, dtype=self.head.logit_dtype, device=self.input.device
                )
            if variate is not None:
                variate.add_to_input(d_input)
            d_input = self.kept.restore(d_input.to(self.factors.input.dtype))
        d_bias = self.d_bias
        if d_bias is not None:
            assert self.factors.linear_bias is not None, "a gradient for a bias that is not there"
            d_bias = d_bias.to(self.factors.linear_bias.dtype)
        return [d_input, self.d_weight, d_bias]


class TileGradient(Tile):
    """A lane's part of the gradients of a matrix product's factors.

    Args:
        variate: stands in for the pairs that are not computed; None if all are.
    """

    def __init__(
        self, projection: ProjectionGradient, rows: BlockRows, variate: ControlVariate | None
    ):
        super().__init__(projection, rows, backward=True)
        self._shared, self._variate = projection, variate
        self._d_input = self._d_weight = None
        self._end_of_collected = 0
        if projection.wants_input:
            self._d_input = InputGradient(projection.input, self._workspace)
        if projection.d_weight is not None:
            self._d_weight = WeightGradient(
                projection.d_weight,
                projection.input,
                self._workspace,
                is_exact=variate is None,
                is_added=projection.is_added,
            )

    @property
    def is_wanted(self) -> bool:
        """Whether any of the gradients is asked for."""
        return self._shared.is_wanted

    def begin(self, tile: slice) -> None:
        """Begin a tile of the vocabulary."""
        super().begin(tile)
        if self._d_weight is not None:
            self._d_weight.begin(self._columns)

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Return some rows of the tile, in the logit dtype, as they are stored or computed."""
        if self._stored is None:
            return super().logits(rows)
        return self._workspace.copy(self._stored[rows]).to(self._head.logit_dtype)

    def add(self, dz: Tensor, rows: slice | Tensor, heavy: Tensor | None) -> None:
        """Add what the gradient of some rows of the tile contributes; see `Visit.heavy`."""
        if self._shared.d_bias is not None:
            self._shared.d_bias[self._columns] += dz.sum(0)
        operand = self._workspace.operand(dz)
        if self._d_input is not None:
            self._d_input.add(operand, self._weight, rows, heavy)
        if not isinstance(rows, slice):
            self._multiply(self._input.t())
            return
        self._end_of_collected = rows.stop
        if self._workspace.is_full:
            self._multiply_collected()

    def _multiply_collected(self) -> None:
        """Add to the gradient of the weight what was collected of adjacent rows."""
        stop = self._end_of_collected
        is_transposed = self._d_weight is not None and self._d_weight.is_transposed
        input_t = self._shared.input_t if is_transposed else self._shared.input.t()
        self._multiply(input_t[:, stop - self._workspace.collected : stop])

    def _multiply(self, input_t: Tensor) -> None:
        operands = self._workspace.take_operands()
        if self._d_weight is not None:
            self._d_weight.add(operands, input_t)

    def add_terms(self, number: int) -> list[TileTerm]:
        """Add what stands in for the pairs of the tile that are not computed, and return it."""
        if self._variate is None:
            return []
        terms = self._variate.of_tile(number, self._tile, self._weight, self._bias)
        for term in terms:
            term.multiply(self._weight)
            columns, outer = term.columns(LOGIT), term.outer()
            if self._shared.d_bias is not None and columns is not None:
                self._shared.d_bias[self._columns] += columns
            if self._d_weight is not None and outer is not None:
                self._d_weight.add_outer(*outer)
        return terms

    def end(self) -> None:
        """End the tile."""
        if self._workspace.collected:
            self._multiply_collected()
        if self._d_input is not None:
            self._d_input.end_tile()
        if self._d_weight is not None:
            self._d_weight.end()

    def skip(self, tile: slice) -> None:
        """Leave out a tile whose gradient is zero."""
        if self._shared.d_weight is not None and not self._shared.is_added:
            self._shared.d_weight[self._head.columns(tile)] = 0

    def end_group(self) -> None:
        """Add the sum of a group of tiles to what the lanes share."""
        if self._d_input is not None:
            self._shared.d_input = self._d_input.end_group(self._shared.d_input)

"""The gradients of all tensors, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.control_variate import ControlVariate
from cce_inductor.kernels.blockwise.gradients import OperandGradient
from cce_inductor.kernels.blockwise.projection import ProjectionGradient, TileGradient
from cce_inductor.kernels.blockwise.pullback import as_large_as
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.blockwise.visits import Visit, Visits
from cce_inductor.kernels.blockwise.workspace import BlockRows
from cce_inductor.kernels.head import Gradients, Head, Wanted
from cce_inductor.kernels.names import LOGIT, Name, OperandKind


class SharedGradients:
    """The gradients, to which all lanes add.

    Args:
        input: [rows, hidden].
        head: the head, with the part of its program that has a gradient.
        kept: the rows that are computed.
        visits: which rows of each tile are computed.
        variate: stands in for those that are not; None if all are.
        wanted: which gradients are asked for.
        stored: the logits that the forward has stored, [tiles, rows, tile]; None for none.
        d_weight: what the gradient of the weight is added to; None for a new tensor.
    """

    def __init__(
        self,
        input: Tensor,
        head: Head,
        kept: KeptRows,
        visits: Visits,
        variate: ControlVariate | None,
        wanted: Wanted,
        stored: Tensor | None = None,
        d_weight: Tensor | None = None,
    ):
        self.head, self.kept, self.visits, self.variate = head, kept, visits, variate
        self._wanted = wanted
        self.projections = {
            name: ProjectionGradient(
                head,
                each,
                kept,
                stored if name == LOGIT else None,
                d_weight if name == LOGIT else None,
                **wanted_of(name, wanted),
            )
            for name, each in head.factors(input).items()
        }
        self._operands = self.operand_gradients()

    def operand_gradients(self) -> dict[Name, OperandGradient]:
        """Return a gradient of zero for each operand whose gradient is asked for."""
        return {
            name: OperandGradient(name, self.head.operands[name.position], self.kept)
            for name, kind in self.head.program.operands.items()
            if self._wanted.operands[name.position] and not kind.is_product
        }

    def add(
        self, tiles: Mapping[Name, TileGradient], operands: Mapping[Name, OperandGradient]
    ) -> None:
        """Add the sums of a group of tiles."""
        for tile in tiles.values():
            tile.end_group()
        for name, gradient in operands.items():
            self._operands[name].take(gradient)

    def results(self) -> Gradients:
        """Return the gradients, once all groups are added."""
        by_position = {name.position: each.result() for name, each in self._operands.items()}
        for name in self.head.program.products:
            by_position |= zip(name.positions, self.projections[name].results(None), strict=False)
        of_operands = or_zeros(by_position, self.head, self._wanted)
        input, weight, bias = self.projections[LOGIT].results(self.variate)
        return Gradients(input, weight, bias, of_operands)


class BackwardLane:
    """Computes the gradients of groups of tiles.

    Args:
        shared: the gradients, to which all lanes add.
        rows: the rows of a block.
    """

    def __init__(self, shared: SharedGradients, rows: BlockRows):
        self._shared, self._rows = shared, rows
        self._tiles = {
            name: TileGradient(each, rows, shared.variate if name == LOGIT else None)
            for name, each in shared.projections.items()
        }
        self._operands = shared.operand_gradients()

    def compute(self, group: int) -> None:
        shared = self._shared
        for number, tile in shared.head.strided(group):
            visits = list(shared.visits.blocks(number, self._rows.block))
            if not visits and shared.variate is None:
                for each in self._tiles.values():
                    each.skip(tile)
                continue
            for each in self._tiles.values():
                each.begin(tile)
            for visit in visits:
                self._add(visit, tile)
            self._add_terms(number, tile)
            for each in self._tiles.values():
                each.end()

    def commit(self) -> None:
        self._shared.add(self._tiles, self._operands)

    def _add(self, visit: Visit, tile: slice) -> None:
        """Add the gradients of some rows of a tile."""
        head = self._shared.head
        values = self._shared.kept.operands(head, visit.rows, tile)
        for name, each in self._tiles.items():
            values[name] = each.logits(visit.rows)
        logits = values[LOGIT]
        gradients = visit.pullback.of_block(values, visit.block, tile)
        for name, operand in self._operands.items():
            if name in gradients:
                operand.add(gradients[name], logits, visit.rows, head.columns(tile))
        for name, each in self._tiles.items():
            if each.is_wanted:
                each.add(as_large_as(gradients.get(name), logits), visit.rows, visit.heavy)

    def _add_terms(self, number: int, tile: slice) -> None:
        """Add what stands in for the rows of a tile that are not computed."""
        shared = self._shared
        for term in self._tiles[LOGIT].add_terms(number):
            assert shared.variate is not None
            for name, operand in self._operands.items():
                if name.kind is OperandKind.ROW:
                    shared.variate.add_to_rows(operand.sum, term, name)
                elif (columns := term.columns(name)) is not None:
                    operand.add_row(columns, shared.head.columns(tile))


def wanted_of(name: Name, wanted: Wanted) -> dict[str, bool]:
    """Return which gradients of a matrix product's factors are asked for."""
    if name == LOGIT:
        asked = [wanted.input, wanted.linear_weight, wanted.linear_bias]
    else:
        asked = [wanted.operands[position] for position in name.positions]
    names = ("wants_input", "wants_weight", "wants_bias")
    return {**dict.fromkeys(names, False), **dict(zip(names, asked, strict=False))}


def or_zeros(
    by_position: Mapping[int, Tensor | None], head: Head, wanted: Wanted
) -> list[Tensor | None]:
    """Return the gradient of each operand, zeros for one that is asked for and has none."""
    return [
        torch.zeros_like(operand) if is_wanted and at not in by_position else by_position.get(at)
        for at, (operand, is_wanted) in enumerate(zip(head.operands, wanted.operands, strict=True))
    ]

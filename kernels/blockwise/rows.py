"""The rows that are computed: all, or those with a class index that is not ignored."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_inductor.kernels import all_statistics, sampling
from cce_inductor.kernels.blockwise import host
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import COLUMN, Name


class KeptRows:
    """The rows of a batch that are computed.

    A device that the host runs ahead of is not asked how many rows are kept if the gradient is
    sampled. As many rows as the batch has are computed then: the kept ones, and after the last the
    first again, and so on. A repeated row has neither a gradient nor an index (`once`), so that the
    sample does without it. What is computed of all rows, as their mean, is about what it would be
    of the kept ones.

    Args:
        tokens: the number of rows in the batch.
        head: its `skip_ignored` says whether ignored rows are left out.

    Attributes:
        rows: the indices of the computed rows; None for all rows in their order.
        count: the number of computed rows.
        repeated: which of them repeat another row, bool [count]; None if none does. If all rows are
            ignored, each of them is the first row of the batch, repeated.
    """

    def __init__(self, tokens: int, head: Head):
        self.rows: Tensor | None = None
        self.repeated: Tensor | None = None
        self.tokens = self.count = tokens
        self.device = head.linear_weight.device
        kept = None
        if head.skip_ignored:
            kept = all_statistics.kept_rows(head.program, head.operands)
        if kept is None:
            return
        if host.runs_ahead(self.device) and sampling.applies(head):
            self._repeat(kept)
        elif not bool(kept.all()):
            self.rows = kept.to(self.device).nonzero().squeeze(1)
            self.count = self.rows.shape[0]

    def _repeat(self, kept: Tensor) -> None:
        first_kept = kept.logical_not().long().argsort(stable=True)
        turn, count = torch.arange(self.tokens, device=self.device), kept.sum()
        self.rows = first_kept[turn % count.clamp(min=1)]
        self.repeated = turn >= count
        self._is_kept, self._place = kept, first_kept.argsort()

    @property
    def own_count(self) -> int | Tensor:
        """The number of computed rows that repeat no other, on the device if some may repeat."""
        return self.count if self.repeated is None else self.repeated.logical_not().sum()

    def select(self, tensor: Tensor) -> Tensor:
        """Return the computed rows of `tensor`; the tensor itself if `rows` is None."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def once(self, selected: Tensor, nothing: float) -> Tensor:
        """Return a tensor of the computed rows with `nothing` in those that repeat another."""
        if self.repeated is None:
            return selected
        return selected.masked_fill(_column(self.repeated, selected), nothing)

    def restore(self, selected: Tensor) -> Tensor:
        """Undo `select`, with zeros in the other rows."""
        if self.rows is None:
            return selected
        if self.repeated is not None:
            every = selected.index_select(0, self._place)
            return every.masked_fill(_column(self._is_kept, selected).logical_not(), 0.0)
        full = selected.new_zeros(self.tokens, *selected.shape[1:])
        return full.index_copy_(0, self.rows, selected)

    def operands(self, head: Head, block: slice | Tensor, tile: slice) -> dict[Name, Tensor]:
        """Return a head's operands in shapes that broadcast against a block of logits.

        Products of other heads are not among them.

        Args:
            head: the head.
            block: the rows of the block among the computed ones, a slice or indices.
            tile: its range of the head's order of the vocabulary.
        """
        values: dict[Name, Tensor] = {}
        columns = head.columns(tile)
        if head.program.reads_columns:
            values[COLUMN] = head.column_numbers(tile).unsqueeze(0)
        rows = block if self.rows is None else self.rows[block]
        for name, kind in head.program.operands.items():
            if kind.is_product:
                continue
            operand = kind.of_block(head.operands[name.position], rows, columns)
            if operand.is_floating_point():
                operand = operand.to(head.logit_dtype)
            values[name] = operand.to(self.device, non_blocking=True)
        return values


def _column(of_rows: Tensor, like: Tensor) -> Tensor:
    """Return a tensor [rows] in a shape that broadcasts against [rows, ...]."""
    return of_rows.view(-1, *(1 for _ in like.shape[1:]))

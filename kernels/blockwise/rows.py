"""The rows that are computed: all, or those with a class index that is not ignored."""

from __future__ import annotations

from torch import Tensor

from cce_inductor.kernels import all_statistics
from cce_inductor.kernels.head import Head
from cce_inductor.kernels.names import COLUMN, Name


class KeptRows:
    """The rows of a batch that are computed.

    Args:
        tokens: the number of rows in the batch.
        head: its `skip_ignored` says whether ignored rows are left out.

    Attributes:
        rows: the indices of the kept rows; None if all are kept.
        count: the number of kept rows.
    """

    def __init__(self, tokens: int, head: Head):
        self.rows: Tensor | None = None
        self.tokens = tokens
        self.device = head.linear_weight.device
        if head.skip_ignored:
            kept = all_statistics.kept_rows(head.program, head.operands)
            if kept is not None and not bool(kept.all()):
                self.rows = kept.to(self.device).nonzero().squeeze(1)
        self.count = tokens if self.rows is None else self.rows.shape[0]

    def select(self, tensor: Tensor) -> Tensor:
        """Return the kept rows of `tensor`; the tensor itself if all are kept."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def restore(self, kept: Tensor) -> Tensor:
        """Undo `select`, with zeros in the other rows."""
        if self.rows is None:
            return kept
        full = kept.new_zeros(self.tokens, *kept.shape[1:])
        return full.index_copy_(0, self.rows, kept)

    def operands(self, head: Head, block: slice | Tensor, tile: slice) -> dict[Name, Tensor]:
        """Return a head's operands in shapes that broadcast against a block of logits.

        Products of other heads are not among them.

        Args:
            head: the head.
            block: the rows of the block among the kept ones, a slice or indices.
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
            values[name] = operand.to(self.device)
        return values

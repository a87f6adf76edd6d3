"""The values of a program at the mean hidden state of a batch.

They stand for those of all rows where something must be chosen for the vocabulary as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.product import operand_dtype
from cce_inductor.kernels.blockwise.rows import KeptRows
from cce_inductor.kernels.head import TILE, Head
from cce_inductor.kernels.names import COLUMN, LOGIT, Name
from cce_inductor.kernels.program.schedule import Schedule
from cce_inductor.kernels.program.text import Program

_ENTRIES = 16 * TILE
"""The vocabulary entries whose weights are converted at a time."""


class MeanRow:
    """The logits and operands of one row, [1, vocabulary] or a shape that broadcasts against it.

    The logits are those of the mean hidden state. An operand with a value for each row has its
    mean; an integer or boolean one, which has none, has the value of the first row.

    Args:
        input: [rows, hidden].
        head: the head, whose order is that of the values.
        kept: the rows that are computed, at least one.
    """

    def __init__(self, input: Tensor, head: Head, kept: KeptRows):
        self.values: dict[Name, Tensor] = {LOGIT: _logits(input, head, kept)}
        every = slice(0, head.vocabulary)
        columns = head.columns(every)
        if head.program.reads_columns:
            places = torch.arange(head.vocabulary, device=kept.device)
            self.values[COLUMN] = places[columns].unsqueeze(0)
        for name, kind in head.program.operands.items():
            operand = head.operands[name.position]
            if kind.varies_over_rows:
                rows = kept.select(operand.to(kept.device))
                is_mean = rows.is_floating_point()
                operand = rows.mean(0, keepdim=True) if is_mean else rows[:1]
            value = kind.of_block(operand, slice(None), columns)
            if value.is_floating_point():
                value = value.to(head.logit_dtype)
            self.values[name] = value.to(kept.device)

    def value(self, program: Program, name: Name) -> Tensor:
        """Return a value of a program, [1, vocabulary]."""
        values = dict(self.values)
        Schedule(program.steps, (name,)).run(values, in_place=False)
        return values[name].to(values[LOGIT].dtype).expand(values[LOGIT].shape)


def vocabulary_order(input: Tensor, head: Head, kept: KeptRows) -> Tensor:
    """Return the vocabulary in the order of the first softmax at the mean hidden state, the
    likeliest entry first, int64 [vocabulary].

    Then few blocks hold most of the mass of most rows.
    """
    if kept.count == 0:
        return torch.arange(head.vocabulary, device=kept.device)
    normalizer = head.program.normalizers[0]
    value = MeanRow(input, head, kept).value(head.program, normalizer.value)
    return value.squeeze(0).argsort(descending=True, stable=True)


def _logits(input: Tensor, head: Head, kept: KeptRows) -> Tensor:
    """Return the logits of the mean hidden state, [1, vocabulary] in the head's order."""
    dtype = operand_dtype(head.compute_dtype)
    mean = kept.select(input).mean(0, dtype=head.logit_dtype).to(dtype)
    weight = head.linear_weight
    logits = torch.cat([torch.mv(part.to(dtype), mean) for part in weight.split(_ENTRIES)])
    if head.linear_bias is not None:
        logits = logits + head.linear_bias
    columns = head.columns(slice(0, head.vocabulary))
    return logits.to(head.logit_dtype)[columns].unsqueeze(0)

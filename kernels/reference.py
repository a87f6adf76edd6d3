"""The specification: the statistics of each row, from logits that are stored.

Ordinary PyTorch, with its own gradients. `blockwise` must agree with it to rounding; tests run it
in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.names import COLUMN, LOGIT, Name
from cce_inductor.kernels.program.text import Program


def compute_statistics(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
) -> list[Tensor]:
    """Return the results of the program's statistics, in order.

    Args:
        input: [rows, hidden].
        linear_weight: [vocabulary, hidden], the dtype of `input`.
        linear_bias: [vocabulary] or None.
        operands: those that `program` names, see `OperandKind`; indices are [rows] or [rows, k].
        program: what is computed.
    """
    linear = torch.nn.functional.linear
    logits = {LOGIT: linear(input, linear_weight, linear_bias)}
    for name in program.products:
        logits[name] = linear(*(operands[position] for position in name.positions))
    return statistics_of(logits, operands, program)


def statistics_of(
    logits: Mapping[Name, Tensor], operands: Sequence[Tensor], program: Program
) -> list[Tensor]:
    """Return the results of the program's statistics, in order.

    Args:
        logits: [rows, vocabulary]: ``z``, and those of other heads, by their names.
        operands: as for `compute_statistics`. The tensors of products are not read.
        program: what is computed.
    """
    z = logits[LOGIT]
    columns = torch.arange(z.shape[1], device=z.device)
    values: dict[Name, Tensor] = {**logits, COLUMN: columns}
    every = slice(None)
    for name, kind in program.operands.items():
        if not kind.is_product:
            values[name] = kind.of_block(operands[name.position], every, every)
    for step in program.steps:
        values[step.name] = step.run(values, z.dtype)
    for root in program.roots:
        values[root] = values[root].to(z.dtype).expand(z.shape)
    return [
        result
        for statistic in program.statistics
        for result in statistic.reference(values, operands)
    ]


def rows_of_operands(operands: Sequence[Tensor], program: Program, rows: Tensor) -> list[Tensor]:
    """Return the operands of some rows. The tensors of products are returned as they are."""
    at = {each.index.position for each in program.indexed}
    at |= {
        name.position
        for name, kind in program.operands.items()
        if kind.varies_over_rows and not kind.is_product
    }
    return [each[rows] if position in at else each for position, each in enumerate(operands)]

"""Statistics and their gradients in one pass, if the upstream gradients are known beforehand.

The logits of some rows are computed and stored, then the gradients of these rows, then the logits
of the next rows in the same memory. So no logits are computed twice: a step takes three matrix
products, like unfused code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise import engine
from cce_inductor.kernels.blockwise.workspace import ROWS_IN_CACHE, row_blocks
from cce_inductor.kernels.head import TILE, Gradients, Head, Wanted, tile_count
from cce_inductor.kernels.stored import stored_shape

LEAST_ROWS = 128
"""The least number of rows whose logits are stored together, if there are more. Each block of rows
reads the weight twice, and reads and writes its gradient, which takes longer than the products of
fewer rows."""


_ROW_STEP = 16
"""Rows are computed in multiples of this many, the float32 numbers of a vector of AVX-512."""


def rows_at_once(head: Head) -> int:
    """Return how many rows have logits that fit the workspace, 0 if fewer than `LEAST_ROWS`. More
    than `ROWS_IN_CACHE` take no less time."""
    row_bytes = tile_count(head.vocabulary) * TILE * head.logit_dtype.itemsize
    rows = min(head.workspace_bytes // row_bytes // _ROW_STEP * _ROW_STEP, ROWS_IN_CACHE)
    return rows if rows >= LEAST_ROWS else 0


def _tile_for(head: Head, rows: int) -> int:
    """Return how wide tiles are, so that a block of a few rows has as many logits as one of many.
    Each block takes some time beside its products."""
    return TILE * min(max(1, ROWS_IN_CACHE // rows), tile_count(head.vocabulary))


def compute_with_gradients(
    grads: Sequence[Tensor | None], input: Tensor, head: Head, wanted: Wanted
) -> tuple[list[Tensor], Gradients]:
    """Return the statistics of each row, and the gradients.

    Args:
        grads: the gradient of each statistic, float64; None for those without one.
        input: [rows, hidden] in the dtype of the logits.
        head: as in `compute_statistics`. Its `rows_at_once` is greater than 0, its weight has the
            dtype of the logits, and its program has a softmax and reads no other head.
        wanted: which gradients are asked for, none of operands.
    """
    rows = max(1, min(rows_at_once(head), len(input)))
    head = dataclasses.replace(head, tile=_tile_for(head, rows))
    head = dataclasses.replace(head, stored_tiles=head.tile_count)
    stored = input.new_empty(stored_shape(head, rows))
    d_input = torch.empty_like(input) if wanted.input else None
    d_weight = d_bias = None
    parts = []
    for block in list(row_blocks(len(input), rows)) or [slice(0, 0)]:
        of_block = dataclasses.replace(head, operands=_operands_of(head, block))
        here = stored[:, : block.stop - block.start]
        results = engine.compute_statistics(input[block], of_block, here)
        given = [None if grad is None else grad[block] for grad in grads]
        given += [None] * (len(results) - len(given))
        part = engine.compute_gradients(given, results, input[block], of_block, wanted, d_weight)
        if d_input is not None:
            d_input[block] = part.input
        d_weight = part.linear_weight
        d_bias = part.linear_bias if d_bias is None else d_bias.add_(part.linear_bias)
        parts.append(results[: len(grads)])
    whole = [torch.cat(each) for each in zip(*parts, strict=True)]
    return whole, Gradients(d_input, d_weight, d_bias, [None] * len(head.operands))


def _operands_of(head: Head, block: slice) -> list[Tensor]:
    """Return the operands for some rows."""
    operands = list(head.operands)
    for name in {*head.program.operands, *(each.index for each in head.program.indexed)}:
        if name.kind is not None and name.kind.varies_over_rows:
            operands[name.position] = operands[name.position][block]
    return operands

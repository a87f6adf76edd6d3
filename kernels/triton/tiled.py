"""Statistics and gradients by the operators of `specification`, with small tensor code around them.

In the forward, `tile_statistics` stores a few numbers for each row and each tile of the vocabulary;
a second step, on [tiles, rows], combines them in a fixed order and in float64. In the backward, the
vocabulary is divided into blocks: `logit_gradient` computes a block's logits again and writes their
gradient, and two library products make the gradients of weight and input from it.

Everything here can be traced: Inductor compiles the operators to kernels, and fuses the rest around
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cce_inductor.kernels import all_statistics
from cce_inductor.kernels.head import TILE, Gradients, Head, Wanted
from cce_inductor.kernels.names import Name, OperandKind
from cce_inductor.kernels.saved import saved_normalizers
from cce_inductor.kernels.statistics.base import Numbers, Statistic
from cce_inductor.kernels.statistics.indexed import Indexed
from cce_inductor.kernels.statistics.logsumexp import LogSumExp
from cce_inductor.kernels.triton.gradient import UntiledError, gradient_program
from cce_inductor.kernels.triton.specification import (
    add_product,
    block_starts,
    logit_gradient,
    stored_numbers,
    tile_statistics,
    weight_block,
)

DEVICES = {"cuda"}
"""The types of device that have templates."""

INDEX_LIMIT = 16
"""The largest number of indices of a row. Each is compared with every column."""

UNSEEN_ROWS = 8192
"""The least number of rows that blocks are sized for if that number is symbolic."""

MIN_BLOCK = 8192
"""The least number of columns of a block of gradients. The float32 sum of the input's gradient is
read and written for each block; with narrow blocks, that costs more than the products."""

STATISTICS_WIDTHS = (TILE, TILE // 2, TILE // 4)
"""The numbers of columns that a tile of statistics may have. Wide tiles store fewer numbers."""

TILES_ENOUGH = 1024
"""The number of tiles, of 128 rows each, that keeps a device busy."""


def reason_against(head: Head) -> str | None:
    """Return why a program cannot be computed by the templates; None if it can."""
    if not isinstance(head.linear_weight.shape[0], int):
        return "there is no template for a vocabulary whose size changes"
    if head.compute_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there is no template for {head.compute_dtype}"
    if head.program.products:
        return "there is no template for the logits of several heads"
    if all(isinstance(statistic, Indexed) for statistic in head.program.statistics):
        return "nothing is reduced over the vocabulary"
    for statistic in head.program.statistics:
        if isinstance(statistic, Indexed):
            shape = statistic.index_of(head.operands).shape
            if not statistic.is_flat and not (
                isinstance(shape[1], int) and shape[1] <= INDEX_LIMIT
            ):
                return f"the template gathers at most {INDEX_LIMIT} indices a row"
        elif not statistic.has_template:
            return f"{statistic.name} has no template"
    return None


def compute_statistics(
    input: Tensor, head: Head, sources: str = "", tile: int | None = None
) -> list[Tensor]:
    """Return what `blockwise.engine.compute_statistics` does, by `tile_statistics`.

    `reason_against` must return None. With ``head.skip_ignored``, rows whose indices are all
    ignored have results of 0. An index out of bounds fails an assertion on the device.

    Args:
        input, head: as for `blockwise.engine.compute_statistics`.
        sources: as for `tile_statistics`.
        tile: columns of a tile of statistics; None to choose by the sizes.
    """
    program, vocabulary = head.program, head.vocabulary
    tile = tile or _statistics_width(input.shape[0], vocabulary)
    indices = _indices(head)
    _assert_in_bounds(list(indices.values()), vocabulary)
    stored = tile_statistics(
        input.to(head.compute_dtype),
        head.linear_weight.to(head.compute_dtype),
        head.linear_bias,
        _on_device_of(input, head.operands),
        list(indices.values()),
        str(program),
        head.skip_ignored,
        tile,
        sources,
    )
    of_tiles = all_statistics.parts(stored_numbers(program, stored))
    whole = all_statistics.combined(
        {s: each if s not in indices else _unsqueezed(each) for s, each in of_tiles.items()}
    )
    by_statistic = all_statistics.results(whole, indices)
    results = [result for statistic in program.statistics for result in by_statistic[statistic]]
    for normalizer in saved_normalizers(head):
        wide = _of_wider_tiles(normalizer, of_tiles[normalizer], tile)
        results.append(wide.to(head.logit_dtype))
    kept = _kept(head)
    return results if kept is None else [_zero_unless(kept, result) for result in results]


def _unsqueezed(numbers: Numbers) -> Numbers:
    """Add a dimension of one tile: kernels do not store values at indices for each tile."""
    return tuple(each.unsqueeze(0) for each in numbers)


def _of_wider_tiles(normalizer: LogSumExp, of_tiles: Numbers, tile: int) -> Tensor:
    """Return the logsumexp of each tile of `blockwise`, [rows, tiles]."""
    (lse,) = of_tiles
    wide = min(TILE // tile, lse.shape[0])
    missing = -lse.shape[0] % wide
    if missing:
        nothing = lse.new_full((missing, lse.shape[1]), -math.inf)
        lse = torch.cat([lse, nothing])
    (combined,) = normalizer.combine((lse.unflatten(0, (-1, wide)).transpose(0, 1),), ())
    return combined.t()


def compute_gradients(
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor],
    input: Tensor,
    head: Head,
    wanted: Wanted,
    sources: str = "",
) -> Gradients:
    """Return what `blockwise.engine.compute_gradients` does, by `logit_gradient` and products.

    Raises:
        UntiledError: the gradient cannot be written as a program.
    """
    program, weight = head.program, head.linear_weight
    rows, vocabulary, input_dtype = input.shape[0], head.vocabulary, input.dtype
    by_value = all_statistics.cotangents(program, grads, results, _indices(head), head.logit_dtype)
    names = {name.position: name for name in program.operands}
    wanted_operands = [names[at] for at, asked in enumerate(wanted.operands) if asked]
    if any(name.kind is OperandKind.LOGIT for name in wanted_operands):
        raise UntiledError("it is as large as the logits")
    gradient, operands = gradient_program(
        program, _on_device_of(input, head.operands), by_value, wanted_operands, _kept(head)
    )

    input = input.to(head.compute_dtype)
    d_input: Tensor | None = None
    d_weights: list[Tensor] = []
    d_biases: list[Tensor] = []
    sums: dict[Name, list[Tensor]] = {name: [] for name in wanted_operands}
    width = _block_width(rows, vocabulary, head, len(gradient.blocks))
    blocks = range(0, vocabulary, width)
    before: list[Tensor] = []  # the gradients from the previous block
    for start, first in zip(blocks, block_starts(weight, width, len(blocks)), strict=True):
        columns = min(width, vocabulary - start)
        if weight.dtype == head.compute_dtype:
            block = weight.narrow(0, start, columns)
        else:
            block = weight_block(weight, start, columns, head.compute_dtype, before)
        dz, *of_operands = logit_gradient(
            input,
            weight if weight.dtype == head.compute_dtype else block,
            head.linear_bias,
            operands,
            str(gradient),
            first,
            columns,
            before,
            sources,
        )
        before = []
        if wanted.input:
            d_input = add_product(d_input, dz, block)
            before.append(d_input)
        if wanted.linear_weight:
            d_weights.append(_rounded_product(dz.t(), input, weight.dtype))
            before.append(d_weights[-1])
        if wanted.linear_bias:
            d_biases.append(dz.sum(0, dtype=torch.float32))
            before.append(d_biases[-1])
        for name, values in zip(wanted_operands, of_operands, strict=True):
            over = program.operands[name].summed_dims
            sums[name].append(values.sum(over, dtype=torch.float64))
            before.append(sums[name][-1])

    d_operands: list[Tensor | None] = [None] * len(head.operands)
    for name, of_blocks in sums.items():
        operand = head.operands[name.position]
        is_column = name.kind is OperandKind.COLUMN
        total = torch.cat(of_blocks) if is_column else torch.stack(of_blocks).sum(0)
        d_operands[name.position] = total.to(operand.dtype)
    bias = head.linear_bias
    return Gradients(
        d_input.to(input_dtype) if d_input is not None else None,
        torch.cat(d_weights) if d_weights else None,
        torch.cat(d_biases).to(bias.dtype) if bias is not None and d_biases else None,
        d_operands,
    )


def _rounded_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a @ b``, rounded once to `dtype`."""
    if dtype == a.dtype:
        return a @ b
    if a.dtype == torch.float32:
        return (a @ b).to(dtype)
    if a.device.type == "cuda":  # Inductor lets the library write into the whole gradient.
        return torch.mm(a, b, out_dtype=torch.float32).to(dtype)
    return add_product(None, a, b).to(dtype)


def _expected(rows: Any) -> int:
    """Return the number of rows for which a block of gradients has to fit the workspace."""
    if isinstance(rows, int):
        return rows
    return max(UNSEEN_ROWS, int(rows.node.hint) if rows.node.has_hint() else 0)


def _statistics_width(rows: Any, vocabulary: int) -> int:
    """Return the columns of a tile of statistics: the most that leave enough tiles for a device.

    If the number of rows is symbolic, the tiles are the narrowest, so that the kernel does not
    depend on the number that was compiled first.
    """
    row_tiles = -(-rows // 128) if isinstance(rows, int) else 0
    for width in STATISTICS_WIDTHS:
        if row_tiles * -(-vocabulary // width) >= TILES_ENOUGH:
            return width
    return STATISTICS_WIDTHS[-1]


def _block_width(rows: Any, vocabulary: int, head: Head, blocks: int) -> int:
    """Return the columns of a block of gradients that fit the workspace, at least `MIN_BLOCK`."""
    row_bytes = head.compute_dtype.itemsize + torch.float32.itemsize * (blocks - 1)
    width = head.workspace_bytes // max(1, row_bytes * (_expected(rows) or 1))
    return min(vocabulary, max(MIN_BLOCK, width // TILE * TILE))


def _assert_in_bounds(indices: Sequence[Tensor], vocabulary: int) -> None:
    """Assert on the device that no index is out of bounds.

    The assertion has a kernel of its own, because it would serialize another's matrix products.
    """
    if indices:
        outside = sum((index >= vocabulary).sum() for index in indices)
        message = "index out of bounds: an index is not in the vocabulary"
        torch.ops.aten._assert_async.msg(outside == 0, message)


def _on_device_of(input: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
    """Return the operands on the device of `input`. Only a scalar may be on another device."""
    return [operand.to(input.device) for operand in operands]


def _indices(head: Head) -> dict[Statistic, Tensor]:
    """Return the indices of each statistic that has some: int32 [rows, k], `NOWHERE` for an ignored
    one, the size of the vocabulary for one out of bounds."""
    indices: dict[Statistic, Tensor] = {}
    for statistic in head.program.indexed:
        given = statistic.index_of(head.operands).to(torch.int64)
        index = statistic.prepared(given, head.vocabulary)
        valid = statistic.is_valid(given, head.vocabulary).view(index.shape)
        indices[statistic] = torch.where(valid, index, head.vocabulary).to(torch.int32)
    return indices


def _kept(head: Head) -> Tensor | None:
    """Return which rows are computed; None for all."""
    return all_statistics.kept_rows(head.program, head.operands) if head.skip_ignored else None


def _zero_unless(kept: Tensor, result: Tensor) -> Tensor:
    shape = (-1, *(1 for _ in result.shape[1:]))
    return torch.where(kept.view(shape), result, torch.zeros_like(result))

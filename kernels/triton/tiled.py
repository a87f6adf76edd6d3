"""Reductions of logits by the operators of `tile_ops`, with small tensor code around them.

`tile_statistics` leaves for each row and each tile of the vocabulary what the program's reductions
need of it; a second step, on [tiles, rows], makes the results, in a fixed order and in float64.
The backward takes the vocabulary in blocks: `logit_gradient` computes a block's logits again and
writes their gradient, which two library products turn into gradients of weight and input.

All of it can be traced: compiled, the operators become kernels, and the rest is fused around them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cce_inductor.kernels.blockwise.engine import TILE, Gradients, Head, Wanted
from cce_inductor.kernels.program.text import INDEXED, Name, Program, Reduction, position
from cce_inductor.kernels.statistics.reductions import NOWHERE, cotangents, index_of, is_valid_index
from cce_inductor.kernels.triton.gradient import UntiledError, gradient_program
from cce_inductor.kernels.triton.specification import (
    add_product,
    block_starts,
    logit_gradient,
    statistics_of,
    tile_statistics,
    weight_block,
)

DEVICES = {"cuda"}
"""The types of device that have templates."""

INDEX_LIMIT = 16
"""The largest number of indices a row: each is compared with every column."""

UNSEEN_ROWS = 8192
"""What a number of rows that is a symbol is taken for, if no larger one was seen."""

MIN_BLOCK = 8192
"""Columns of a block of gradients at least. The float32 sum of the input's gradient is read and
written for each block, which costs more than the products where blocks are narrow."""

STATISTICS_WIDTHS = (TILE, TILE // 2, TILE // 4)
"""Columns of a tile of statistics: the wider, the fewer statistics are stored."""

TILES_ENOUGH = 1024
"""For a device to be busy, of 128 rows each."""

_KINDS = frozenset(["logsumexp", "sum", "mean", "dot", "max", *INDEXED])


def reason_against(head: Head) -> str | None:
    """Why a program cannot be computed here, None if it can."""
    if not isinstance(head.linear_weight.shape[0], int):
        return "there is no template for a vocabulary whose size changes"
    if head.compute_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there is no template for {head.compute_dtype}"
    if all(reduction.kind in INDEXED for reduction in head.program.reductions):
        return "nothing is reduced over the vocabulary"
    for reduction in head.program.reductions:
        if reduction.kind not in _KINDS:
            return f"{reduction.kind} has no template"
        if reduction.kind == "gather":
            count = head.operands[position(reduction.args[1])].shape[1]
            if not isinstance(count, int) or count > INDEX_LIMIT:
                return f"the template gathers at most {INDEX_LIMIT} indices a row"
    return None


def reduce(input: Tensor, head: Head, sources: str = "", tile: int | None = None) -> list[Tensor]:
    """`blockwise.reduce` by `tile_statistics`, for programs that `reason_against` has nothing
    against.

    Rows whose indices are all ignored have zeros for results if ``head.skip_ignored``. An index
    out of bounds is an assertion on the device.

    Args:
        input, head: as for `blockwise.reduce`.
        sources: as for `tile_statistics`.
        tile: columns of a tile of statistics; None for as many as suit the sizes.
    """
    program, vocabulary = head.program, head.linear_weight.shape[0]
    tile = tile or _statistics_width(input.shape[0], vocabulary)
    indices = _indices(head)
    _assert_in_bounds(indices, vocabulary)
    kept = _kept(head, indices)
    found = iter(
        tile_statistics(
            input.to(head.compute_dtype),
            head.linear_weight.to(head.compute_dtype),
            head.linear_bias,
            _here(head.operands, input),
            indices,
            str(program),
            head.skip_ignored,
            tile,
            sources,
        )
    )
    statistics = [
        (reduction, [next(found) for _ in range(count)])
        for reduction, count in statistics_of(program)
    ]
    by_reduction = dict(statistics)
    normalizers = {
        reduction: _Normalizer(*each)
        for reduction, each in statistics
        if reduction.kind == "logsumexp"
    }
    results: list[Tensor] = []
    of_index = iter(indices)
    for reduction, (first, *rest) in statistics:
        if reduction.kind == "logsumexp":
            results.append(normalizers[reduction].lse)
        elif reduction.kind == "mean":
            results.append(normalizers[reduction.weights].mean(first.double(), rest[0]))
        elif reduction.kind == "sum":
            results.append(first.sum(0, dtype=torch.float64))
        elif reduction.kind == "dot":
            of_q = by_reduction[reduction.weights][0].double()
            results.append((first.double() * of_q + rest[0]).sum(0))
        elif reduction.kind == "max":
            top, where = first.max(0)
            columns = rest[0].gather(0, where.unsqueeze(0)).squeeze(0)
            results += [top.double(), columns.long()]
        else:
            values = first.double().masked_fill(next(of_index) == NOWHERE, 0.0)
            results.append(values if reduction.kind == "gather" else values.squeeze(1))
    for normalizer in list(normalizers.values())[:1]:
        results.append(normalizer.of_wider_tiles(tile, vocabulary).to(head.logit_dtype))
    if kept is None:
        return results
    return [_zero_unless(kept, result) for result in results]


class _Normalizer:
    """The softmax of a row, from the greatest of each tile and the sum of its masses below that.

    Attributes:
        shift: of each tile, float64 [tiles, rows].
        total: of each tile, the sum of ``exp(x - shift)``.
        lse: of the row.
    """

    def __init__(self, top: Tensor, total: Tensor):
        self.shift = top.masked_fill(top == -math.inf, 0.0).double()
        self.total = total.double()
        self.lse = _logsumexp(self.of_tiles, 0)

    @property
    def of_tiles(self) -> Tensor:
        return self.shift + self.total.log()

    def mean(self, center: Tensor, weighted: Tensor) -> Tensor:
        """From the statistics of a mean."""
        # A tile without any mass has no weight, whatever it says.
        share = (self.shift - self.lse).exp().masked_fill(self.total == 0, 0.0)
        return (share * (center * self.total + weighted)).sum(0)

    def of_wider_tiles(self, tile: int, vocabulary: int) -> Tensor:
        """The logsumexp of each tile of `blockwise`, [rows, tiles]."""
        wide = min(TILE // tile, self.total.shape[0])
        of_tiles = self.of_tiles
        missing = -of_tiles.shape[0] % wide
        if missing:
            nothing = of_tiles.new_full((missing, of_tiles.shape[1]), -math.inf)
            of_tiles = torch.cat([of_tiles, nothing])
        return _logsumexp(of_tiles.unflatten(0, (-1, wide)), 1).t()


def _logsumexp(values: Tensor, dim: int) -> Tensor:
    """`torch.logsumexp`, whose decomposition asks whether there are any rows: of rows that depend
    on data nobody knows while the graph is traced."""
    top = values.amax(dim, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    return (values - top).exp().sum(dim).log() + top.squeeze(dim)


def reduce_backward(
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor],
    input: Tensor,
    head: Head,
    wanted: Wanted,
    sources: str = "",
) -> Gradients:
    """`blockwise.reduce_backward` by `logit_gradient` and matrix products.

    Raises:
        UntiledError: the gradient cannot be written as a program.
    """
    program, weight = head.program, head.linear_weight
    rows, vocabulary, input_dtype = input.shape[0], weight.shape[0], input.dtype
    indices = _indices(head)
    by_text = {
        str(reduction): index for reduction, index in zip(_indexed(program), indices, strict=True)
    }
    by_value = cotangents(program, list(grads), list(results), by_text, head.logit_dtype)
    names = {at: name for name, at in program.operands.items()}
    wanted_operands = [names[at] for at, asked in enumerate(wanted.operands) if asked]
    if any(name[0] == "b" for name in wanted_operands):
        raise UntiledError("it is as large as the logits")
    gradient, operands = gradient_program(
        program, _here(head.operands, input), by_value, wanted_operands, _kept(head, indices)
    )

    input = input.to(head.compute_dtype)
    d_input: Tensor | None = None
    d_weights: list[Tensor] = []
    d_biases: list[Tensor] = []
    sums: dict[Name, list[Tensor]] = {name: [] for name in wanted_operands}
    width = _block_width(rows, vocabulary, head, len(gradient.reductions))
    blocks = range(0, vocabulary, width)
    before: list[Tensor] = []  # what has been made of the block before
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
            d_weights.append(_product(dz.t(), input, weight.dtype))
            before.append(d_weights[-1])
        if wanted.linear_bias:
            d_biases.append(dz.sum(0, dtype=torch.float32))
            before.append(d_biases[-1])
        for name, values in zip(wanted_operands, of_operands, strict=True):
            over = {"r": [1], "c": [0], "s": [0, 1]}[name[0]]
            sums[name].append(values.sum(over, dtype=torch.float64))
            before.append(sums[name][-1])

    found: list[Tensor | None] = [None] * len(head.operands)
    for name, of_blocks in sums.items():
        operand = head.operands[position(name)]
        total = torch.cat(of_blocks) if name[0] == "c" else torch.stack(of_blocks).sum(0)
        found[position(name)] = total.to(operand.dtype)
    bias = head.linear_bias
    return Gradients(
        d_input.to(input_dtype) if d_input is not None else None,
        torch.cat(d_weights) if d_weights else None,
        torch.cat(d_biases).to(bias.dtype) if bias is not None and d_biases else None,
        found,
    )


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b``, rounded once."""
    if dtype == a.dtype:
        return a @ b
    if a.dtype == torch.float32:
        return (a @ b).to(dtype)
    if a.device.type == "cuda":  # Inductor lets the library write into the whole gradient
        return torch.mm(a, b, out_dtype=torch.float32).to(dtype)
    return add_product(None, a, b).to(dtype)


def _expected(rows: Any) -> int:
    """How many rows a block of gradients has to be narrow enough for."""
    if isinstance(rows, int):
        return rows
    return max(UNSEEN_ROWS, int(rows.node.hint) if rows.node.has_hint() else 0)


def _statistics_width(rows: Any, vocabulary: int) -> int:
    """Columns of a tile of statistics: as many as leave enough tiles for a device. For a number of
    rows that is a symbol the least, so that the kernel does not depend on which was seen first."""
    row_tiles = -(-rows // 128) if isinstance(rows, int) else 0
    for width in STATISTICS_WIDTHS:
        if row_tiles * -(-vocabulary // width) >= TILES_ENOUGH:
            return width
    return STATISTICS_WIDTHS[-1]


def _block_width(rows: Any, vocabulary: int, head: Head, blocks: int) -> int:
    """Columns of a block of gradients that the workspace holds, `MIN_BLOCK` or more."""
    row_bytes = head.compute_dtype.itemsize + torch.float32.itemsize * (blocks - 1)
    width = head.workspace_bytes // max(1, row_bytes * (_expected(rows) or 1))
    return min(vocabulary, max(MIN_BLOCK, width // TILE * TILE))


def _assert_in_bounds(indices: Sequence[Tensor], vocabulary: int) -> None:
    """On the device, in a kernel of its own: an assertion among matrix products serializes
    them."""
    if indices:
        outside = sum((index >= vocabulary).sum() for index in indices)
        message = "index out of bounds: an index is not in the vocabulary"
        torch.ops.aten._assert_async.msg(outside == 0, message)


def _here(operands: Sequence[Tensor], input: Tensor) -> list[Tensor]:
    """The operands on the device of `input`; only one of a single value may be elsewhere."""
    return [operand.to(input.device) for operand in operands]


def _indexed(program: Program) -> list[Reduction]:
    return [reduction for reduction in program.reductions if reduction.kind in INDEXED]


def _indices(head: Head) -> list[Tensor]:
    """The indices of each reduction at indices, in order: int32 [rows, k], `NOWHERE` for none,
    the size of the vocabulary for one out of bounds."""
    vocabulary = head.linear_weight.shape[0]
    found = []
    for reduction in _indexed(head.program):
        given = head.operands[position(reduction.args[1])].to(torch.int64)
        index = index_of(reduction, given, vocabulary)
        valid = is_valid_index(reduction, given, vocabulary).view(index.shape)
        found.append(torch.where(valid, index, vocabulary).to(torch.int32))
    return found


def _kept(head: Head, indices: Sequence[Tensor]) -> Tensor | None:
    """Which rows are computed, None for all."""
    if not head.skip_ignored:
        return None
    targets = [
        index != NOWHERE
        for reduction, index in zip(_indexed(head.program), indices, strict=True)
        if reduction.kind == "target"
    ]
    return torch.cat(targets, 1).any(1)


def _zero_unless(kept: Tensor, result: Tensor) -> Tensor:
    shape = (-1, *(1 for _ in result.shape[1:]))
    return torch.where(kept.view(shape), result, torch.zeros_like(result))

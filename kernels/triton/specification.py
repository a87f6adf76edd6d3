"""The operators that the templates implement: statistics of tiles, and gradients of blocks.

Here they are ordinary tensor code that stores what it computes: the specification of `templates`,
which take their place when Inductor compiles for a GPU.

- `tile_statistics`: what each tile of the vocabulary contributes to the reductions of each row
- `block_starts`: where the blocks of the vocabulary begin
- `weight_block`: the weight of a block, in the dtype of its products
- `logit_gradient`: a block of logits, and what a program makes of it
- `add_product`: a matrix product that is summed in float32
- `multiply_add`: a step of a program that is rounded once

They are as few launches, and as few different kernels, as they can be for any number of blocks:
what differs from block to block is a tensor, an address, or a number that only an operator sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cce_inductor.kernels.program.schedule import schedule
from cce_inductor.kernels.program.text import INDEXED, Name, Program, Reduction
from cce_inductor.kernels.statistics.reductions import center_of

NAMESPACE = "cce_inductor"
ALIGNMENT = 16
"""Bytes at which what is handed to a kernel begins, and the rows of what it writes."""

_STATISTICS = {"logsumexp": 2, "max": 2, "mean": 2, "dot": 2}
"""How many statistics a reduction leaves of each tile, if not one."""

COLUMN = Name("j")


def statistics_of(program: Program) -> list[tuple[Reduction, int]]:
    """Every reduction, with the number of its statistics."""
    return [(reduction, _STATISTICS.get(reduction.kind, 1)) for reduction in program.reductions]


def statistic_shapes(
    program: Program, widths: Sequence[int], rows: Any, vocabulary: int, tile: int
) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """Shape and dtype of what `tile_statistics` returns; `widths` are those of the indices."""
    of_index, tiles = iter(widths), -(-vocabulary // tile)
    found: list[tuple[tuple[Any, ...], torch.dtype]] = []
    for reduction, count in statistics_of(program):
        if reduction.kind in INDEXED:
            found.append(((rows, next(of_index)), torch.float32))
            continue
        found.append(((tiles, rows), torch.float32))
        if count == 2:
            dtype = torch.int32 if reduction.kind == "max" else torch.float32
            found.append(((tiles, rows), dtype))
    return found


@torch.library.custom_op(f"{NAMESPACE}::tile_statistics", mutates_args=())
def tile_statistics(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    indices: Sequence[Tensor],
    program: str,
    skip_ignored: bool,
    tile: int,
    sources: str,
) -> list[Tensor]:
    """What each tile of the vocabulary contributes to the reductions of each row.

    Args:
        input: [rows, hidden].
        linear_weight: [vocabulary, hidden], the dtype of `input`; products are summed in float32.
        linear_bias: [vocabulary] or None.
        operands: what the program's steps name, as for `blockwise.reduce`.
        indices: for each reduction at indices, in order: int32 [rows, k], `NOWHERE` for none.
        program: what is computed.
        skip_ignored: whether nothing is promised of rows that have no target.
        tile: its width.
        sources: a digest of this package, which a compiler's caches see here and nowhere else.

    Returns:
        For each reduction, [tiles, rows] float32 unless noted:

        - logsumexp(x): the greatest x, and the sum of the masses ``exp(x - greatest)`` (0 in place
          of a greatest of -inf)
        - sum(x): the sum
        - mean(x, y), dot(q, y): a finite number near the weighted mean of y, where the masses of
          x, or the absolute values of q, are the weights; and the sum of the masses, or of q,
          times y's distance from that number
        - max(x): the greatest, nan if any is; its first column, int32
        - at indices: the values, [rows, k]; undefined for an index that is not in the vocabulary
    """
    parsed, vocabulary = Program.parse(program), linear_weight.shape[0]
    widths = [index.shape[1] for index in indices]
    found = [
        input.new_zeros(shape, dtype=dtype)
        for shape, dtype in statistic_shapes(parsed, widths, input.shape[0], vocabulary, tile)
    ]
    for number, start in enumerate(range(0, vocabulary, tile)):
        columns = slice(start, min(start + tile, vocabulary))
        values = _block(input, linear_weight[columns], linear_bias, operands, parsed, columns)
        outputs, of_index = iter(found), iter(indices)
        for reduction in parsed.reductions:
            x = values[reduction.value]
            output = next(outputs)
            if reduction.kind in INDEXED:
                index = next(of_index).long()
                inside = (index >= columns.start) & (index < columns.stop)
                here = x.gather(1, (index - start).clamp(0, x.shape[1] - 1))
                output.copy_(torch.where(inside, here, output))
            elif reduction.kind == "sum":
                output[number] = x.sum(1)
            elif reduction.kind == "dot":
                y = values[reduction.values[1]]
                output[number] = center = center_of(x.abs(), y)
                next(outputs)[number] = (x * (y - center.unsqueeze(1))).sum(1)
            elif reduction.kind == "max":
                output[number], where = x.max(1)
                next(outputs)[number] = where + start
            else:
                top = x.amax(1)
                distance = x - top.masked_fill(top == -math.inf, 0.0).unsqueeze(1)
                mass = distance.exp()
                if reduction.kind == "logsumexp":
                    output[number] = top
                    next(outputs)[number] = mass.sum(1)
                else:
                    # What has no mass counts for nothing, whatever it is.
                    y = values[reduction.values[1]].masked_fill(mass == 0.0, 0.0)
                    output[number] = center = center_of(mass, y)
                    next(outputs)[number] = (mass * (y - center.unsqueeze(1))).sum(1)
    return found


@tile_statistics.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    indices: Sequence[Tensor],
    program: str,
    skip_ignored: bool,
    tile: int,
    sources: str,
) -> list[Tensor]:
    rows, vocabulary = input.shape[0], linear_weight.shape[0]
    widths = [index.shape[1] for index in indices]
    shapes = statistic_shapes(Program.parse(program), widths, rows, vocabulary, tile)
    return [input.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


def _block_starts(like: Tensor, width: int, count: int) -> list[Tensor]:
    """The first column of each of `count` blocks: int32, one number each, where `like` is."""
    spacing = ALIGNMENT // torch.int32.itemsize
    starts = torch.arange(0, count * width, width, dtype=torch.int32, device=like.device)
    return list(starts.repeat_interleave(spacing)[::spacing].unbind())


def _fake_block_starts(like: Tensor, width: int, count: int) -> list[Tensor]:
    return [like.new_empty((), dtype=torch.int32) for _ in range(count)]


# Its results share one tensor, which `torch.library.custom_op` does not allow.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("block_starts(Tensor like, int width, int count) -> Tensor[]")
_library.impl("block_starts", _block_starts, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::block_starts", _fake_block_starts, lib=_library)
block_starts = torch.ops.cce_inductor.block_starts

# `torch.addcmul` that a compiler may not take apart.
_library.define("multiply_add(Tensor addend, Tensor a, Tensor b) -> Tensor")
_library.impl("multiply_add", torch.addcmul, "CompositeExplicitAutograd")


@torch.library.custom_op(f"{NAMESPACE}::weight_block", mutates_args=())
def weight_block(
    linear_weight: Tensor, start: int, width: int, dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    """A copy of ``linear_weight[start : start + width]`` in another dtype.

    It waits for the tensors `after`, which are not read: once they are computed, the block before
    needs its memory no longer.
    """
    return linear_weight.narrow(0, start, width).to(dtype, copy=True).contiguous()


@weight_block.register_fake
def _(
    linear_weight: Tensor, start: int, width: int, dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    return linear_weight.new_empty((width, linear_weight.shape[1]), dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::logit_gradient", mutates_args=())
def logit_gradient(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    start: Tensor,
    width: int,
    after: Sequence[Tensor],
    sources: str,
) -> list[Tensor]:
    """What the program's steps make of a block of logits.

    Args:
        input, linear_bias, operands: as for `tile_statistics`.
        linear_weight: [vocabulary, hidden], or the block's own [width, hidden].
        program: ends in ``block`` for each result.
        start: the block's first column, int32 [].
        width: its columns.
        after: as for `weight_block`.
        sources: as for `tile_statistics`.

    Returns:
        [rows, width] each, the first in the dtype of `input`, the others in float32. The rows
        begin at multiples of `ALIGNMENT` bytes.
    """
    parsed, first = Program.parse(program), int(start)
    columns = slice(first, first + width)
    if linear_weight.shape[0] != width:
        linear_weight = linear_weight[columns]
    values = _block(input, linear_weight, linear_bias, operands, parsed, columns)
    blocks = _new_blocks(parsed, input, width)
    for reduction, block in zip(parsed.reductions, blocks, strict=True):
        block.copy_(values[reduction.values[-1]])
    return blocks


@logit_gradient.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    start: Tensor,
    width: int,
    after: Sequence[Tensor],
    sources: str,
) -> list[Tensor]:
    return _new_blocks(Program.parse(program), input, width)


def row_stride(width: int, dtype: torch.dtype) -> int:
    """Of a block's rows, so that each begins where the library's fast products want it."""
    spacing = ALIGNMENT // dtype.itemsize
    return -(-width // spacing) * spacing


def block_dtypes(program: Program, dtype: torch.dtype) -> list[torch.dtype]:
    """Of what `logit_gradient` returns for an input of `dtype`."""
    return [dtype, *(torch.float32 for _ in program.reductions[1:])]


def _new_blocks(program: Program, input: Tensor, width: int) -> list[Tensor]:
    return [
        input.new_empty_strided((input.shape[0], width), (row_stride(width, dtype), 1), dtype=dtype)
        for dtype in block_dtypes(program, input.dtype)
    ]


@torch.library.custom_op(f"{NAMESPACE}::add_product", mutates_args=())
def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b``, float32, summed in float32.

    Args:
        total: float32 [m, n], None for zeros.
        a, b: [m, k] and [k, n] of one dtype.
    """
    if a.dtype == torch.float32:
        return a @ b if total is None else torch.addmm(total, a, b)
    if a.device.type == "cuda":
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32)
    product = a.float() @ b.float()
    return product if total is None else total + product


@torch.library.custom_op(f"{NAMESPACE}::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`add_product` in the memory of `total`."""
    if a.dtype != torch.float32 and a.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


@add_product.register_fake
def _(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


def _block(
    input: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    columns: slice,
) -> dict[Name, Tensor]:
    """The program's values in some columns, whose weight is given; those reduced are float32."""
    z = input.float() @ weight.float().t()
    if linear_bias is not None:
        z += linear_bias[columns]
    place = torch.arange(columns.start, columns.stop, device=z.device)
    values = {Name("z"): z, COLUMN: place.unsqueeze(0)}
    for name, at in program.operands.items():
        operand = operands[at]
        if operand.is_floating_point():
            operand = operand.float()
        if name[0] == "r":
            operand = operand.unsqueeze(1)
        elif name[0] == "c":
            operand = operand[columns].unsqueeze(0)
        elif name[0] == "b":
            operand = operand[:, columns]
        values[name] = operand
    schedule(program).run(values, in_place=False)
    for root in program.roots:
        values[root] = values[root].to(torch.float32).expand(z.shape)
    return values

"""The operators that the templates implement: statistics of tiles, and gradients of blocks.

Here they are ordinary tensor code that stores what it computes: the specification of `templates`,
which take their place when Inductor compiles for a GPU.

- `tile_statistics`: what each tile of the vocabulary contributes to the reductions of each row
- `logit_gradient`: a block of logits, and what a program makes of it
- `add_product`: a matrix product that is summed in float32
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .program import INDEXED, Name, Program, Reduction

NAMESPACE = "cce_inductor"
TILE = 128
"""Columns of a tile of statistics: more leave no registers for what is computed of them."""

_STATISTICS = {"logsumexp": 2, "max": 2}
"""How many statistics a reduction leaves of each tile, if not one."""


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
    compute_dtype: torch.dtype,
    tile: int,
    sources: str,
) -> list[Tensor]:
    """What each tile of the vocabulary contributes to the reductions of each row.

    Args:
        input: [rows, hidden].
        linear_weight: [vocabulary, hidden].
        linear_bias: [vocabulary] or None.
        operands: what the program's steps name, as for `blockwise.reduce`.
        indices: for each reduction at indices, in order: int32 [rows, k], `NOWHERE` for none.
        program: what is computed.
        skip_ignored: whether nothing is promised of rows that have no target.
        compute_dtype: of the product's operands; it is summed in float32.
        tile: its width.
        sources: a digest of this package, which a compiler's caches see here and nowhere else.

    Returns:
        For each reduction, [tiles, rows] float32 unless noted:

        - logsumexp(x): the greatest x, the sum of ``exp(x - greatest)`` (0 in place of -inf)
        - sum(x): the sum
        - mean(x, y): the sum of ``exp(x - greatest) * y``, for y = x of ``... * (x - greatest)``
        - max(x): the greatest, nan if any is; its first column, int32
        - at indices: the values, [rows, k]; 0 where there is none, nan for one out of bounds
    """
    parsed, vocabulary = Program.parse(program), linear_weight.shape[0]
    widths = [index.shape[1] for index in indices]
    found = [
        input.new_zeros(shape, dtype=dtype)
        for shape, dtype in statistic_shapes(parsed, widths, input.shape[0], vocabulary, tile)
    ]
    for number, start in enumerate(range(0, vocabulary, tile)):
        columns = slice(start, min(start + tile, vocabulary))
        values = _block(input, linear_weight, linear_bias, operands, parsed, compute_dtype, columns)
        outputs, of_index = iter(found), iter(indices)
        for reduction in parsed.reductions:
            x = values[reduction.value]
            output = next(outputs)
            if reduction.kind in INDEXED:
                index = next(of_index).long()
                inside = (index >= columns.start) & (index < columns.stop)
                here = x.gather(1, (index - start).clamp(0, x.shape[1] - 1))
                output.copy_(torch.where(inside, here, output))
                output.masked_fill_(index >= vocabulary, math.nan)
            elif reduction.kind == "sum":
                output[number] = x.sum(1)
            elif reduction.kind == "max":
                output[number], where = x.max(1)
                next(outputs)[number] = where + start
            else:
                top = x.amax(1)
                shift = top.masked_fill(top == -math.inf, 0.0).unsqueeze(1)
                mass = (x - shift).exp()
                if reduction.kind == "logsumexp":
                    output[number] = top
                    next(outputs)[number] = mass.sum(1)
                else:
                    _, y = reduction.values
                    other = x - shift if y == reduction.value else values[y]
                    output[number] = (mass * other).sum(1)
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
    compute_dtype: torch.dtype,
    tile: int,
    sources: str,
) -> list[Tensor]:
    rows, vocabulary = input.shape[0], linear_weight.shape[0]
    widths = [index.shape[1] for index in indices]
    shapes = statistic_shapes(Program.parse(program), widths, rows, vocabulary, tile)
    return [input.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


@torch.library.custom_op(f"{NAMESPACE}::logit_gradient", mutates_args=())
def logit_gradient(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    compute_dtype: torch.dtype,
    start: int,
    width: int,
    sources: str,
) -> list[Tensor]:
    """What the program's steps make of a block of logits.

    Args:
        input, linear_weight, linear_bias, operands, compute_dtype: as for `tile_statistics`.
        program: ends in ``block(x)`` for each result.
        start, width: the block's columns.
        sources: as for `tile_statistics`.

    Returns:
        [rows, width] each, the first in the compute dtype, the others in float32.
    """
    parsed, columns = Program.parse(program), slice(start, start + width)
    values = _block(input, linear_weight, linear_bias, operands, parsed, compute_dtype, columns)
    shapes = block_shapes(parsed, input.shape[0], compute_dtype, width)
    return [
        values[reduction.value].to(dtype, copy=True).contiguous()
        for reduction, (_, dtype) in zip(parsed.reductions, shapes, strict=True)
    ]


@logit_gradient.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    compute_dtype: torch.dtype,
    start: int,
    width: int,
    sources: str,
) -> list[Tensor]:
    shapes = block_shapes(Program.parse(program), input.shape[0], compute_dtype, width)
    return [input.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


def block_shapes(
    program: Program, rows: Any, compute_dtype: torch.dtype, width: int
) -> list[tuple[tuple[Any, int], torch.dtype]]:
    """Shape and dtype of what `logit_gradient` returns."""
    dtypes = [compute_dtype, *(torch.float32 for _ in program.reductions[1:])]
    return [((rows, width), dtype) for dtype in dtypes]


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
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    compute_dtype: torch.dtype,
    columns: slice,
) -> dict[Name, Tensor]:
    """The program's values in some columns; those that are reduced are float32."""
    weight = linear_weight[columns].to(compute_dtype)
    z = input.to(compute_dtype).float() @ weight.float().t()
    if linear_bias is not None:
        z += linear_bias[columns]
    place = torch.arange(columns.start, columns.stop, device=z.device)
    values = {Name("z"): z, Name("j"): place.unsqueeze(0)}
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
    program.forward.run(values, in_place=False)
    for root in program.roots:
        values[root] = values[root].to(torch.float32).expand(z.shape)
    return values

"""The operators that the templates implement: statistics of tiles, and gradients of blocks.

Here they are ordinary tensor code that stores the logits. It specifies the templates, which take
its place when Inductor compiles for a GPU.

- `tile_statistics`: what each tile of the vocabulary contributes to the reductions of each row
- `block_starts`: where the blocks of the vocabulary begin
- `weight_block`: the weight of a block, in the dtype of its products
- `logit_gradient`: what a program computes from a block of logits
- `add_product`: a matrix product that is summed in float32
- `multiply_add`: a step of a program that is rounded once

To keep launches and distinct kernels few, only a tensor, an address, or an argument that no kernel
sees differs from one block to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_inductor.kernels.names import COLUMN, LOGIT, NAMESPACE, Name
from cce_inductor.kernels.program.schedule import schedule
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.base import Statistic
from cce_inductor.kernels.statistics.indexed import Indexed
from cce_inductor.kernels.statistics.numerics import exp_

ALIGNMENT = 16
"""Bytes. The arguments of a kernel and the rows that it writes begin at multiples of this."""


class StatisticsCall(NamedTuple):
    """The arguments of `tile_statistics`.

    Attributes:
        input: [rows, hidden].
        linear_weight: [vocabulary, hidden], the dtype of `input`; products are summed in float32.
        linear_bias: [vocabulary] or None.
        operands: the tensors that the program's steps name, as for `Head`.
        indices: for each statistic at indices, in order: int32 [rows, k], `NOWHERE` if ignored.
        program: what is computed.
        skip_ignored: whether the numbers of rows that have no target are undefined.
        tile: columns of a tile.
        sources: a digest of this package, which a compiler's caches see only here.
    """

    input: Any
    linear_weight: Any
    linear_bias: Any
    operands: Sequence[Any]
    indices: Sequence[Any]
    program: str
    skip_ignored: bool
    tile: int
    sources: str


_STATISTICS_SCHEMA = (
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor[] operands, "
    "Tensor[] indices, str program, bool skip_ignored, SymInt tile, str sources) -> Tensor[]"
)


class Stored(NamedTuple):
    """A tensor that `tile_statistics` returns.

    Attributes:
        shape: [tiles, rows], or [rows, k] for a statistic at indices.
        dtype: float32 or int32.
        is_of_tiles: whether it has a dimension of tiles.
    """

    shape: tuple[Any, ...]
    dtype: torch.dtype
    is_of_tiles: bool


def stored_by_statistics(
    program: Program, widths: Sequence[int], rows: Any, vocabulary: int, tile: int
) -> list[Stored]:
    """Return what `tile_statistics` returns; `widths` are the numbers of indices of a row."""
    of_index, tiles = iter(widths), -(-vocabulary // tile)
    stored: list[Stored] = []
    for statistic in program.statistics:
        if isinstance(statistic, Indexed):
            stored.append(Stored((rows, next(of_index)), torch.float32, False))
        stored += [Stored((tiles, rows), dtype, True) for dtype in statistic.tile_dtypes]
    return stored


def stored_numbers(program: Program, stored: Sequence[Any]) -> dict[Statistic, tuple[Any, ...]]:
    """Assign the tensors that `tile_statistics` returns to the program's statistics."""
    rest = iter(stored)
    return {
        statistic: tuple(next(rest) for _ in range(max(1, len(statistic.tile_dtypes))))
        for statistic in program.statistics
    }


@torch.library.custom_op(
    f"{NAMESPACE}::tile_statistics", mutates_args=(), schema=_STATISTICS_SCHEMA
)
def tile_statistics(*arguments: Any) -> list[Tensor]:
    """Return what each tile of the vocabulary contributes to the statistics of each row.

    Args:
        *arguments: see `StatisticsCall`.

    Returns:
        For each statistic the numbers of `Statistic.of_tile`, [tiles, rows] float32 or int32. For
        a statistic at indices, the values [rows, k] float32; undefined for an index that is not
        in the vocabulary.
    """
    call = StatisticsCall(*arguments)
    program, vocabulary = Program.parse(call.program), call.linear_weight.shape[0]
    results = _new_statistics(*call)
    by_statistic = stored_numbers(program, results)
    for number, start in enumerate(range(0, vocabulary, call.tile)):
        columns = slice(start, min(start + call.tile, vocabulary))
        values = _block(
            call.input,
            call.linear_weight[columns],
            call.linear_bias,
            call.operands,
            program,
            columns,
        )
        of_index = iter(call.indices)
        for statistic in program.statistics:
            is_indexed = isinstance(statistic, Indexed)
            index = next(of_index).long() if is_indexed else None
            read = [values[name] for name in statistic.values]
            if statistic.overwrites:
                read = [value.clone() for value in read]
            numbers = statistic.of_tile(read, columns, index, exp_)
            for stored, each in zip(by_statistic[statistic], numbers, strict=True):
                if is_indexed:
                    stored += each
                else:
                    stored[number] = each
    return results


@tile_statistics.register_fake
def _new_statistics(*arguments: Any) -> list[Tensor]:
    call = StatisticsCall(*arguments)
    widths = [index.shape[1] for index in call.indices]
    rows, vocabulary = call.input.shape[0], call.linear_weight.shape[0]
    program = Program.parse(call.program)
    return [
        call.input.new_zeros(stored.shape, dtype=stored.dtype)
        for stored in stored_by_statistics(program, widths, rows, vocabulary, call.tile)
    ]


def _block_starts(like: Tensor, width: int, count: int) -> list[Tensor]:
    """Return the first column of each of `count` blocks, int32 [] each, on the device of `like`."""
    spacing = ALIGNMENT // torch.int32.itemsize
    starts = torch.arange(0, count * width, width, dtype=torch.int32, device=like.device)
    return list(starts.repeat_interleave(spacing)[::spacing].unbind())


def _fake_block_starts(like: Tensor, width: int, count: int) -> list[Tensor]:
    return [like.new_empty((), dtype=torch.int32) for _ in range(count)]


# The results share one tensor, which `torch.library.custom_op` does not allow.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("block_starts(Tensor like, int width, int count) -> Tensor[]")
_library.impl("block_starts", _block_starts, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::block_starts", _fake_block_starts, lib=_library)
block_starts = torch.ops.cce_inductor.block_starts

# This is `torch.addcmul`, except that a compiler may not decompose it.
_library.define("multiply_add(Tensor addend, Tensor a, Tensor b) -> Tensor")
_library.impl("multiply_add", torch.addcmul, "CompositeExplicitAutograd")


@torch.library.custom_op(f"{NAMESPACE}::weight_block", mutates_args=())
def weight_block(
    linear_weight: Tensor, start: int, width: int, dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    """Return a copy of ``linear_weight[start : start + width]`` in another dtype.

    The tensors `after` are not read. They are computed first, so that the memory of the
    previous block is free.
    """
    return linear_weight.narrow(0, start, width).to(dtype, copy=True).contiguous()


@weight_block.register_fake
def _(
    linear_weight: Tensor, start: int, width: int, dtype: torch.dtype, after: Sequence[Tensor]
) -> Tensor:
    return linear_weight.new_empty((width, linear_weight.shape[1]), dtype=dtype)


class GradientCall(NamedTuple):
    """The arguments of `logit_gradient`.

    Attributes:
        input, linear_bias, operands, sources: as for `StatisticsCall`.
        linear_weight: [vocabulary, hidden], or the block's own [width, hidden].
        program: ends in one ``block`` for each result.
        start: the block's first column, int32 [].
        width: columns of the block.
        after: as for `weight_block`.
    """

    input: Any
    linear_weight: Any
    linear_bias: Any
    operands: Sequence[Any]
    program: str
    start: Any
    width: int
    after: Sequence[Any]
    sources: str


_GRADIENT_SCHEMA = (
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor[] operands, str program, "
    "Tensor start, SymInt width, Tensor[] after, str sources) -> Tensor[]"
)


@torch.library.custom_op(f"{NAMESPACE}::logit_gradient", mutates_args=(), schema=_GRADIENT_SCHEMA)
def logit_gradient(*arguments: Any) -> list[Tensor]:
    """Return what the program's steps compute from a block of logits.

    Args:
        *arguments: see `GradientCall`.

    Returns:
        [rows, width] each, the first in the dtype of `input`, the others in float32. The rows
        begin at multiples of `ALIGNMENT` bytes.
    """
    call = GradientCall(*arguments)
    program, first = Program.parse(call.program), int(call.start)
    columns = slice(first, first + call.width)
    weight = call.linear_weight
    if weight.shape[0] != call.width:
        weight = weight[columns]
    values = _block(call.input, weight, call.linear_bias, call.operands, program, columns)
    blocks = _new_blocks(*call)
    for output, block in zip(program.blocks, blocks, strict=True):
        block.copy_(values[output.values[-1]])
    return blocks


@logit_gradient.register_fake
def _new_blocks(*arguments: Any) -> list[Tensor]:
    call = GradientCall(*arguments)
    rows, width = call.input.shape[0], call.width
    return [
        call.input.new_empty_strided((rows, width), (row_stride(width, dtype), 1), dtype=dtype)
        for dtype in block_dtypes(Program.parse(call.program), call.input.dtype)
    ]


def row_stride(width: int, dtype: torch.dtype) -> int:
    """Return the stride of a block's rows, each of which begins at a multiple of `ALIGNMENT`: the
    library's fast products require that."""
    spacing = ALIGNMENT // dtype.itemsize
    return -(-width // spacing) * spacing


def block_dtypes(program: Program, dtype: torch.dtype) -> list[torch.dtype]:
    """Return the dtypes of what `logit_gradient` returns for an input of `dtype`."""
    return [dtype, *(torch.float32 for _ in program.blocks[1:])]


@torch.library.custom_op(f"{NAMESPACE}::add_product", mutates_args=())
def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return ``total + a @ b``, float32, summed in float32.

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
    """Compute `add_product` in the memory of `total`."""
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
    """Return the program's values in some columns; `weight` has only these. Roots are float32."""
    z = input.float() @ weight.float().t()
    if linear_bias is not None:
        z += linear_bias[columns]
    place = torch.arange(columns.start, columns.stop, device=z.device)
    values = {LOGIT: z, COLUMN: place.unsqueeze(0)}
    for name, kind in program.operands.items():
        operand = kind.of_block(operands[name.position], slice(None), columns)
        values[name] = operand.float() if operand.is_floating_point() else operand
    schedule(program).run(values, in_place=False)
    for root in program.roots:
        values[root] = values[root].to(torch.float32).expand(z.shape)
    return values

"""Device functions of the templates: one tile of logits, and what is reduced of it.

Blocks are [rows, columns] in float32, rows of tokens and columns of the vocabulary.
"""

import triton
import triton.language as tl


@triton.jit
def grouped(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile, in an order in which `GROUP` row tiles share what they read."""
    width = GROUP * column_tiles
    first = tile // width * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = tile % width
    return first + within % size, within // size


@triton.jit
def logits(
    input,
    weight,
    rows,
    columns,
    row_count,
    column_count,
    hidden,
    depth,
    stride_ir,
    stride_ih,
    stride_wv,
    stride_wh,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """``input[rows] @ weight[columns].T``; `depth` is `hidden`, or 0 for a tile of zeros.

    Rows and columns beyond their count are computed from the first one's data.
    """
    rows = tl.where(rows < row_count, rows, 0)
    columns = tl.where(columns < column_count, columns, 0)
    place = tl.arange(0, BLOCK_H)
    inputs = input + rows[:, None] * stride_ir + place[None, :] * stride_ih
    weights = weight + columns[None, :] * stride_wv + place[:, None] * stride_wh
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, depth, BLOCK_H):
        if EVEN_H:
            a = tl.load(inputs)
            b = tl.load(weights)
        else:
            inside = place < hidden - start
            a = tl.load(inputs, mask=inside[None, :], other=0.0)
            b = tl.load(weights, mask=inside[:, None], other=0.0)
        total = tl.dot(a.to(COMPUTE), b.to(COMPUTE), total, input_precision=PRECISION)
        inputs += BLOCK_H * stride_ih
        weights += BLOCK_H * stride_wh
    return total


@triton.jit
def logits_by_descriptor(
    inputs,
    weights,
    first_row,
    first_column,
    depth,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The same of tensor descriptors; whatever lies beyond a tensor reads as 0."""
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, depth, BLOCK_H):
        a = inputs.load([first_row, start])
        b = weights.load([first_column, start])
        total = tl.dot(a, b.T, total, input_precision=PRECISION)
    return total


@triton.jit
def only(x, inside, fill: tl.constexpr):
    """`x` in float32, `fill` in columns beyond the vocabulary."""
    return tl.where(inside[None, :], x.to(tl.float32), fill)


@triton.jit
def shift_of(top):
    """What is subtracted before exp: the greatest of a row, 0 if that is -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def mass(x, top):
    """``exp(x - shift_of(top))``."""
    return tl.exp(x - shift_of(top)[:, None])


@triton.jit
def first_greatest(x, columns):
    """The greatest of each row, nan if any is, and its first column."""
    is_nan = x != x
    top, where = tl.max(
        tl.where(is_nan, float("inf"), x),
        1,
        return_indices=True,
        return_indices_tie_break_left=True,
    )
    has_nan = tl.max(is_nan.to(tl.int32), 1) > 0
    first = tl.min(columns, 0)
    return tl.where(has_nan, float("nan"), top), first + where


@triton.jit
def at(x, columns, index):
    """The value in column `index` of each row, 0 if that is not in the tile."""
    return tl.sum(tl.where(columns[None, :] == index[:, None], x, 0.0), 1)

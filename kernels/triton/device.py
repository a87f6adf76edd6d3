"""Device functions of the templates: one tile of logits, and its reductions.

Blocks are [rows, columns] in float32: rows are tokens, columns are vocabulary entries.
"""

import triton
import triton.language as tl

from cce_inductor.kernels.triton.base2 import LOG2_E as _LOG2_E

LOG2_E = tl.constexpr(_LOG2_E)


@triton.jit
def grouped(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return a tile's row and column; in this order, `GROUP` row tiles share what they read."""
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
    stride_ir,
    stride_ih,
    stride_wv,
    stride_wh,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """Return ``input[rows] @ weight[columns].T``.

    Rows and columns beyond their count are computed from the first one's data.
    """
    rows = tl.where(rows < row_count, rows, 0)
    columns = tl.where(columns < column_count, columns, 0)
    place = tl.arange(0, BLOCK_H)
    inputs = input + rows[:, None] * stride_ir + place[None, :] * stride_ih
    weights = weight + columns[None, :] * stride_wv + place[:, None] * stride_wh
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        if EVEN_H:
            a = tl.load(inputs)
            b = tl.load(weights)
        else:
            inside = place < hidden - start
            a = tl.load(inputs, mask=inside[None, :], other=0.0)
            b = tl.load(weights, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        inputs += BLOCK_H * stride_ih
        weights += BLOCK_H * stride_wh
    return total


@triton.jit
def logits_by_descriptor(
    inputs,
    weights,
    first_row,
    first_column,
    hidden,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Return the same as `logits` from tensor descriptors, which read 0 beyond a tensor."""
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        a = inputs.load([first_row, start])
        b = weights.load([first_column, start])
        total = tl.dot(a, b.T, total, input_precision=PRECISION)
    return total


@triton.jit
def only(x, inside, fill: tl.constexpr, EVEN: tl.constexpr):
    """Return `x` in float32, with `fill` in columns beyond the vocabulary (none if `EVEN`)."""
    x = x.to(tl.float32)
    if not EVEN:
        x = tl.where(inside[None, :], x, fill)
    return x


@triton.jit
def finite(top):
    """Return what to subtract before exp2: the greatest value of a row, but 0 in place of -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def above(x, top):
    """Return a block minus the greatest value of each row, which is 0 or less."""
    return x - finite(top)[:, None]


@triton.jit
def mass_of(distance):
    """Return the exponential of a distance, computed in base 2 (see `base2`)."""
    return tl.exp2(distance * LOG2_E)


@triton.jit
def rescaled(total, old_top, top):
    """Convert a sum of masses ``exp(x - old_top)`` to a sum of masses ``exp(x - top)``."""
    return total * mass_of(old_top - finite(top))


@triton.jit
def nearer(center, size, weights, y):
    """Return a finite number near the mean of `y` in each row, weighted by the absolute weights.
    `center` is that number for the previous columns, whose absolute weights have the sum `size`."""
    weights = tl.abs(weights)
    distance = tl.sum(weights * (y - center[:, None]), 1) / (size + tl.sum(weights, 1))
    return center + tl.where(tl.abs(distance) < float("inf"), distance, 0.0)


@triton.jit
def moved(center, new_center, total, weights, y):
    """Return what to add to the weighted sum of the distances from `center` in the previous
    columns, whose weights have the sum `total`. That gives the weighted sum of the distances from
    `new_center`, with these columns included."""
    here = tl.sum(weights * (y - new_center[:, None]), 1)
    return (center - new_center) * total + here


@triton.jit
def greater(top, where_top, x, first_column):
    """Return each row's greatest value and its column, after the block `x`; nan is the greatest."""
    is_nan = x != x
    here, where = tl.max(
        tl.where(is_nan, float("-inf"), x),
        1,
        return_indices=True,
        return_indices_tie_break_left=True,
    )
    any_nan, first_nan = tl.max(
        is_nan.to(tl.int32), 1, return_indices=True, return_indices_tie_break_left=True
    )
    here = tl.where(any_nan > 0, float("nan"), here)
    where = tl.where(any_nan > 0, first_nan, where)
    better = (here > top) | ((here != here) & (top == top))
    return tl.where(better, here, top), tl.where(better, first_column + where, where_top)


@triton.jit
def any_in(index, first_column, WIDTH: tl.constexpr):
    """Whether an index of any row is among the `WIDTH` columns from the first one."""
    here = (index >= first_column) & (index < first_column + WIDTH)
    return tl.max(here.to(tl.int32), 0) > 0


@triton.jit
def at(x, columns, index):
    """Return the value in column `index` of each row, 0 if that is not in the tile."""
    return tl.sum(tl.where(columns[None, :] == index[:, None], x, 0.0), 1)

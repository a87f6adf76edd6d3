"""Device functions of the templates: one tile of logits, and what is reduced of it.

Blocks are [rows, columns] in float32, rows of tokens and columns of the vocabulary.
"""

import triton
import triton.language as tl

from cce_inductor.kernels.triton.base2 import LOG2_E as _LOG2_E

LOG2_E = tl.constexpr(_LOG2_E)


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
    """``input[rows] @ weight[columns].T``.

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
    """The same of tensor descriptors; whatever lies beyond a tensor reads as 0."""
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        a = inputs.load([first_row, start])
        b = weights.load([first_column, start])
        total = tl.dot(a, b.T, total, input_precision=PRECISION)
    return total


@triton.jit
def only(x, inside, fill: tl.constexpr, EVEN: tl.constexpr):
    """`x` in float32, with `fill` in columns beyond the vocabulary; with `EVEN` there are none."""
    x = x.to(tl.float32)
    if not EVEN:
        x = tl.where(inside[None, :], x, fill)
    return x


@triton.jit
def finite(top):
    """What is subtracted before exp2: the greatest value of a row, but 0 in place of -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def above(x, top):
    """A block minus the greatest value of each row: 0 or less."""
    return x - finite(top)[:, None]


@triton.jit
def mass_of(distance):
    """The exponential of a distance, computed in base 2 (see `base2`)."""
    return tl.exp2(distance * LOG2_E)


@triton.jit
def rescaled(total, old_top, top):
    """A sum of masses ``exp(x - old_top)`` as a sum of masses ``exp(x - top)``."""
    return total * mass_of(old_top - finite(top))


@triton.jit
def nearer(center, size, weights, y):
    """A finite number near the weighted mean of `y` in each row; the absolute values of the weights
    count. `center` is that of the columns before, whose weights had the sum `size`."""
    weights = tl.abs(weights)
    distance = tl.sum(weights * (y - center[:, None]), 1) / (size + tl.sum(weights, 1))
    return center + tl.where(tl.abs(distance) < float("inf"), distance, 0.0)


@triton.jit
def moved(center, new_center, total, weights, y):
    """What to add to the weighted sum of the distances from `center` in the columns before, whose
    weights had the sum `total`. The result is the weighted sum of the distances from `new_center`,
    and includes these columns."""
    here = tl.sum(weights * (y - new_center[:, None]), 1)
    return (center - new_center) * total + here


@triton.jit
def greater(top, where_top, x, first_column):
    """The greatest value of each row and its column, after the block `x`; nan is the greatest."""
    is_nan = x != x
    here, where = tl.max(
        tl.where(is_nan, float("inf"), x),
        1,
        return_indices=True,
        return_indices_tie_break_left=True,
    )
    here = tl.where(tl.max(is_nan.to(tl.int32), 1) > 0, float("nan"), here)
    better = (here > top) | ((here != here) & (top == top))
    return tl.where(better, here, top), tl.where(better, first_column + where, where_top)


@triton.jit
def any_in(index, first_column, WIDTH: tl.constexpr):
    """Whether an index of any row is among the `WIDTH` columns from the first one."""
    here = (index >= first_column) & (index < first_column + WIDTH)
    return tl.max(here.to(tl.int32), 0) > 0


@triton.jit
def at(x, columns, index):
    """The value in column `index` of each row, 0 if that is not in the tile."""
    return tl.sum(tl.where(columns[None, :] == index[:, None], x, 0.0), 1)

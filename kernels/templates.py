"""The two Triton templates, as text that Inductor completes.

Both compute tiles of logits and apply a program's pointwise steps to them, which Inductor writes
in (`modification`, as FlexAttention's score function is). They differ in what they leave: the
statistics of `tile_ops.tile_statistics`, or the blocks of `tile_ops.logit_gradient`. The text
depends on the program's reductions only, and calls the functions of `device`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import textwrap
from collections.abc import Callable
from typing import Any

from .. import compat
from .program import INDEXED, Name, Program, Reduction
from .tile_ops import statistics_of

PACKAGE = __package__ or "cce_inductor.kernels"


@dataclasses.dataclass(frozen=True)
class Template:
    """A template's text and the names of its arguments after input, weight and bias, in order.

    Attributes:
        name: by which Inductor knows it; equal for equal texts.
        source: the text.
        outputs: the arguments that it writes, except for the first result.
    """

    name: str
    source: str
    outputs: tuple[str, ...]


def first_result(program: Program) -> int:
    """Which result of `tile_statistics` is stored through Inductor: the first of tiles."""
    kinds = [reduction.kind for reduction, count in statistics_of(program) for _ in range(count)]
    return next(at for at, kind in enumerate(kinds) if kind not in INDEXED)


def roots_of(program: Program) -> tuple[Name, ...]:
    """The values that Inductor computes in a template, in the order of their subgraphs."""
    return tuple(root for root in program.roots if root != "z")


@functools.cache
def statistics_template(
    program: Program,
    widths: tuple[int, ...],
    has_bias: bool,
    skip_ignored: bool,
    by_descriptor: bool,
) -> Template:
    """For `tile_statistics`.

    Args:
        program: one that reduces something over the vocabulary.
        widths: how many indices a row each reduction at indices has.
        has_bias: whether there is one.
        skip_ignored: whether a tile of rows without any target is left out.
        by_descriptor: whether input and weight are read through tensor descriptors.
    """
    values, shapes = _values(program)
    lines = _StatisticsLines(values)
    indices = [f"INDEX{number}" for number in range(len(widths))]
    indexed = iter(zip(indices, widths, strict=True))
    for number, reduction in enumerate(program.reductions):
        if reduction.kind in INDEXED:
            lines.at_indices(number, reduction, *next(indexed))
        elif reduction.kind == "sum":
            lines.sum(number, reduction)
        elif reduction.kind == "max":
            lines.max(number, reduction)
        elif reduction.kind == "logsumexp":
            lines.logsumexp(number, reduction)
        else:
            lines.mean(number, reduction)
    kept = None
    if skip_ignored and lines.targets:
        kept = " | ".join(f"({target} >= 0)" for target in lines.targets)
    body = [*lines.loads, *_logits(has_bias, by_descriptor, kept), *shapes, *lines.stores]
    source = _KERNEL.format(
        package=PACKAGE,
        arguments=_names(["INPUT", "WEIGHT", *(["BIAS"] * has_bias), *indices, *lines.outputs]),
        width="V",
        start="0",
        local="local",
        prologue=_indented(_DESCRIPTORS if by_descriptor else _STRIDES, 4),
        body=_indented("\n".join(body), 8),
    )
    return _template("statistics", source, lines.outputs)


class _StatisticsLines:
    """The lines of a tile's statistics, reduction by reduction.

    Attributes:
        loads: lines before the product.
        stores: lines after it.
        outputs: the arguments that are written, but for the first statistic.
        targets: variables that hold class indices.
    """

    def __init__(self, values: dict[Name, str]):
        self.values = values
        self.loads: list[str] = []
        self.stores: list[str] = []
        self.outputs: list[str] = []
        self.targets: list[str] = []
        self._has_first = False
        self._softmax: dict[Name, int] = {}

    def _store(self, value: str, name: str) -> None:
        """One number of each row; the first of all goes through Inductor."""
        if self._has_first:
            self.outputs.append(name)
            place = f"{name} + column_tile * M + rows"
            self.stores.append(f"tl.store({place}, {value}, mask=row_inside)")
            return
        self._has_first = True
        self.stores.append(
            f'{{{{store_output(("column_tile", "rows"), "{value}", "row_inside", '
            'indent_width=8, val_shape=("BLOCK_M",))}}'
        )

    def at_indices(self, number: int, reduction: Reduction, argument: str, width: int) -> None:
        """The value at each index; the first tile says what has none."""
        x, out = self.values[reduction.value], f"OUT{number}"
        self.outputs.append(out)
        for k in range(width):
            index = f"index{number}_{k}"
            at_k = f"rows * {_stride(argument, 0)} + {k} * {_stride(argument, 1)}"
            message = "index out of bounds: an index is not in the vocabulary"
            self.loads += [
                f"{index} = tl.load({argument} + {at_k}, mask=row_inside, other=-1)",
                f'tl.device_assert({index} < V, "{message}")',
            ]
            if reduction.kind == "target":
                self.targets.append(index)
            place = f"{out} + rows * {width} + {k}"
            self.stores += [
                f"found = device.at({x}, columns, {index})",
                f"here = row_inside & ({index} // BLOCK_V == column_tile) & ({index} >= 0)",
                f"tl.store({place}, found, mask=here & ({index} < V))",
                f'nothing = tl.where({index} < 0, 0.0, float("nan")) + tl.zeros_like(found)',
                f"first = row_inside & (tl.zeros_like({index}) == column_tile)",
                f"tl.store({place}, nothing, mask=first & (({index} < 0) | ({index} >= V)))",
            ]

    def sum(self, number: int, reduction: Reduction) -> None:
        x = self.values[reduction.value]
        self.stores.append(f"sum{number} = tl.sum(device.only({x}, inside, 0.0), 1)")
        self._store(f"sum{number}", f"SUM{number}")

    def max(self, number: int, reduction: Reduction) -> None:
        low = f'device.only({self.values[reduction.value]}, inside, float("-inf"))'
        self.stores.append(f"top{number}, first{number} = device.first_greatest({low}, columns)")
        self._store(f"top{number}", f"TOP{number}")
        self._store(f"first{number}", f"FIRST{number}")

    def logsumexp(self, number: int, reduction: Reduction) -> None:
        at = self._softmax_of(number, reduction.value)
        self._store(f"top{at}", f"TOP{number}")
        self.stores.append(f"total{number} = tl.sum(mass{at}, 1)")
        self._store(f"total{number}", f"TOTAL{number}")

    def mean(self, number: int, reduction: Reduction) -> None:
        x, y = reduction.values
        at = self._softmax_of(number, x)
        other = f"device.only({self.values[y]}, inside, 0.0)"
        if y == x:
            other = f"{other} - device.shift_of(top{at})[:, None]"
        product = f"tl.where(mass{at} == 0, 0.0, mass{at} * ({other}))"
        self.stores.append(f"mean{number} = tl.sum({product}, 1)")
        self._store(f"mean{number}", f"MEAN{number}")

    def _softmax_of(self, number: int, x: Name) -> int:
        """The number of the variables that hold the greatest of `x`, and its masses."""
        if x not in self._softmax:
            self._softmax[x] = number
            self.stores += [
                f'low{number} = device.only({self.values[x]}, inside, float("-inf"))',
                f"top{number} = tl.max(low{number}, 1)",
                f"mass{number} = device.mass(low{number}, top{number})",
            ]
        return self._softmax[x]


@functools.cache
def gradient_template(program: Program, has_bias: bool, by_descriptor: bool) -> Template:
    """For `logit_gradient`; the argument START holds the first column.

    Args:
        program: one that ends in blocks.
        has_bias, by_descriptor: as for `statistics_template`.
    """
    values, shapes = _values(program)
    first, *others = program.reductions
    outputs = [f"BLOCK{number}" for number in range(1, len(program.reductions))]
    mask = "row_inside[:, None] & inside[None, :]"
    stores = [
        f"block = {values[first.value]} + tl.zeros_like(z)",
        f"block_inside = {mask}",
        '{{store_output(("rows[:, None]", "local[None, :]"), "block", "block_inside", '
        'indent_width=8, val_shape=("BLOCK_M", "BLOCK_V"))}}',
    ]
    for name, reduction in zip(outputs, others, strict=True):
        place = f"{name} + rows[:, None] * WIDTH + local[None, :]"
        value = f"{values[reduction.value]} + tl.zeros_like(z)"
        stores.append(f"tl.store({place}, {value}, mask=block_inside)")
    body = [*_logits(has_bias, by_descriptor, None), *shapes, *stores]
    source = _KERNEL.format(
        package=PACKAGE,
        arguments=_names(["INPUT", "WEIGHT", *(["BIAS"] * has_bias), "START", *outputs]),
        width="WIDTH",
        start="tl.load(START).to(tl.int32)",
        # Of a block of one entry Inductor drops the mask: what is beyond it must be the same.
        local="tl.where(inside, local, 0)",
        prologue=_indented(_DESCRIPTORS if by_descriptor else _STRIDES, 4),
        body=_indented("\n".join(body), 8),
    )
    return _template("gradient", source, outputs)


_KERNEL = """\
import {package}.device as device
{{{{def_kernel({arguments})}}}}
    M = {{{{size("INPUT", 0)}}}}
    H = {{{{size("INPUT", 1)}}}}
    V = {{{{size("WEIGHT", 0)}}}}
    start_column = {start}
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv({width}, BLOCK_V)
{prologue}
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = device.grouped(tile, row_tiles, column_tiles, GROUP)
        rows = row_tile.to(INDEX_DTYPE) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_inside = rows < M
        local = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = local < {width}
        columns = start_column + {local}
{body}
"""

_STRIDES = """\
stride_ir = {{stride("INPUT", 0)}}
stride_ih = {{stride("INPUT", 1)}}
stride_wv = {{stride("WEIGHT", 0)}}
stride_wh = {{stride("WEIGHT", 1)}}"""

_DESCRIPTORS = """\
inputs = tl.make_tensor_descriptor(
    INPUT, [M, H], [{{stride("INPUT", 0)}}, 1], [BLOCK_M, BLOCK_H]
)
weights = tl.make_tensor_descriptor(
    WEIGHT, [V, H], [{{stride("WEIGHT", 0)}}, 1], [BLOCK_V, BLOCK_H]
)"""


def _logits(has_bias: bool, by_descriptor: bool, kept: str | None) -> list[str]:
    """Lines that make `z`, a tile of logits; of zeros where no row is `kept`."""
    depth = "H"
    lines = []
    if kept is not None:
        lines.append(f"any_kept = tl.max(({kept}).to(tl.int32), 0)")
        depth = "any_kept * H"
    if by_descriptor:
        lines.append(
            "z = device.logits_by_descriptor(inputs, weights, (row_tile * BLOCK_M).to(tl.int32), "
            f"(start_column + column_tile * BLOCK_V).to(tl.int32), {depth}, "
            "PRECISION, BLOCK_M, BLOCK_V, BLOCK_H)"
        )
    else:
        lines.append(
            f"z = device.logits(INPUT, WEIGHT, rows, columns.to(INDEX_DTYPE), M, V, H, {depth}, "
            "stride_ir, stride_ih, stride_wv, stride_wh, "
            "COMPUTE, PRECISION, BLOCK_M, BLOCK_V, BLOCK_H, EVEN_H)"
        )
    if has_bias:
        place = f"BIAS + tl.minimum(columns, V - 1) * {_stride('BIAS', 0)}"
        lines.append(f"z += tl.load({place}).to(tl.float32)[None, :]")
    return lines


_BLOCK_TYPES = "".join(
    f", {name}={text}"
    for name, text in {
        "input_shapes": '{"z": ("BLOCK_M", "BLOCK_V"), "row": ("BLOCK_M", "1"), '
        '"column": ("1", "BLOCK_V")}',
        "input_dtypes": '{"row": "index", "column": "index"}',
    }.items()
    if compat.modification_takes(name)
)


def _values(program: Program) -> tuple[dict[Name, str], list[str]]:
    """What the values that are reduced are called, and the lines that make them of `z`.

    What a subgraph reads at row and column is read everywhere, so both stay within bounds.
    """
    values = {Name("z"): "z"}
    lines = []
    if roots_of(program):
        # An operand of one value a logit may have more than 2^31 of them.
        wide = ".to(tl.int64)" if any(name[0] == "b" for name in program.operands) else ""
        lines = [
            f"row = tl.minimum(rows, M - 1)[:, None]{wide}",
            "column = tl.minimum(columns, V - 1)[None, :]",
        ]
    for number, root in enumerate(roots_of(program)):
        values[root] = f"x{number}"
        lines.append(
            f'{{{{modification(subgraph_number={number}, output_name="x{number}", z="z", '
            f'row="row", column="column"{_BLOCK_TYPES}) | indent_except_first(2)}}}}'
        )
        lines.append(f"x{number} = x{number} + tl.zeros_like(z)")
    return values, lines


def _stride(argument: str, dim: int) -> str:
    return f'{{{{stride("{argument}", {dim})}}}}'


def _names(arguments: list[str]) -> str:
    return ", ".join(f'"{argument}"' for argument in arguments)


def _indented(text: str, spaces: int) -> str:
    return textwrap.indent(text, " " * spaces)


def _template(kind: str, source: str, outputs: list[str]) -> Template:
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return Template(f"cce_{kind}_{digest}", source, tuple(outputs))


Grid = Callable[..., tuple[Any, Any, int]]


def grid(rows: Any, width: Any, meta: dict[str, Any], *, cdiv: Any, min: Any) -> Any:
    """One program a tile, or as many as the device runs at a time, which take turns."""
    tiles = cdiv(rows, meta["BLOCK_M"]) * cdiv(width, meta["BLOCK_V"])
    return (min(tiles, meta["PROGRAMS"]) if meta["PROGRAMS"] else tiles, 1, 1)

"""The two Triton templates, as text that Inductor completes.

Both compute tiles of logits and apply a program's pointwise steps to them, which Inductor writes
in (`modification`, as FlexAttention's score function is). They differ in what they leave: the
statistics of `tile_ops.tile_statistics`, or the blocks of `tile_ops.logit_gradient`. The text
depends on the program's reductions only, and calls the functions of `device`.

What is done to a tile after its product is time that the tensor cores wait, so it is as little as
can be: exponentials are in base 2 (see `base2`), and what concerns single columns is skipped in
tiles that have none of them. Nothing may assert or call a function that is not inlined: the
assembler would wait after every product (its remark C7510).

Names in the templates:

- M, H, V: rows, hidden size, vocabulary; WIDTH: columns of a block, START: its first column
- BLOCK_M, BLOCK_V, BLOCK_H: a tile's rows, its columns, and how much of H is read at a time
- PARTS: tiles of BLOCK_V columns whose statistics are stored as one; EVEN_V: whether no tile
  reaches beyond the last column
- GROUP: tiles of rows that share what they read of the weight; PROGRAMS: see `grid`

The loops over tiles have one stage: only the loop over H is pipelined. Triton would pipeline a loop
over tiles where H is one step, and fails to (3.6, with a store through a descriptor).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import textwrap
from collections.abc import Callable
from typing import Any

from cce_inductor.kernels.program.text import INDEXED, Name, Program, Reduction
from cce_inductor.kernels.triton.specification import statistics_of
from cce_inductor.torch_internals.versions import modification_takes

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
    columns = "tl.minimum(columns, V - 1)"
    values = {root: f"x{number}" for number, root in enumerate(roots_of(program))}
    lines = _StatisticsLines({Name("z"): "z", **values})
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
        elif reduction.kind == "mean":
            lines.mean(number, reduction)
        else:
            lines.dot(number, reduction)
    parts = "tl.minimum(column_tiles - tile_of_statistics * PARTS, PARTS)"
    if skip_ignored and lines.targets:
        kept = " | ".join(f"({target} >= 0)" for target in lines.targets)
        parts = f"tl.max(({kept}).to(tl.int32), 0) * {parts}"
    arguments = ["INPUT", "WEIGHT", *(["BIAS"] * has_bias), *indices, *lines.outputs]
    body = [*_logits(by_descriptor, "columns", "V")]
    if has_bias:
        body.append(_bias(columns))
    body += _places(program, columns)
    for root, name in values.items():
        body += _value(program, root, name, 3)
    body += lines.updates
    source = _STATISTICS.format(
        package=PACKAGE,
        arguments=_names(arguments),
        prologue=_indented(_DESCRIPTORS if by_descriptor else _STRIDES, 4),
        before=_indented("\n".join(lines.before), 8),
        parts=parts,
        body=_indented("\n".join(body), 12),
        after=_indented("\n".join(lines.after), 8),
    )
    return _template("statistics", source, lines.outputs)


class _StatisticsLines:
    """The lines of a tile's statistics, reduction by reduction.

    Attributes:
        before: lines before the first part of the tile.
        updates: lines for each part, after its product.
        after: lines that store what the parts have left.
        outputs: the arguments that are written, but for the first statistic.
        targets: variables that hold class indices.
    """

    def __init__(self, values: dict[Name, str]):
        self.values = values
        self.before: list[str] = []
        self.updates: list[str] = []
        self.after: list[str] = []
        self.outputs: list[str] = []
        self.targets: list[str] = []
        self._has_first = False
        self._softmax: dict[Name, int] = {}
        self._sum_updates: dict[Name, str] = {}

    def _begin(self, name: str, value: str, dtype: str = "float32") -> None:
        self.before.append(f"{name} = tl.full([BLOCK_M], {value}, tl.{dtype})")

    def _inside(self, value: Name, fill: str) -> str:
        return f"device.only({self.values[value]}, inside, {fill}, EVEN_V)"

    def _store(self, value: str, name: str) -> None:
        """One number of each row; the first of all goes through Inductor."""
        if self._has_first:
            self.outputs.append(name)
            place = f"{name} + tile_of_statistics * M + rows"
            self.after.append(f"tl.store({place}, {value}, mask=row_inside)")
            return
        self._has_first = True
        self.after.append(
            f'{{{{store_output(("tile_of_statistics", "rows"), "{value}", "row_inside", '
            'indent_width=8, val_shape=("BLOCK_M",))}}'
        )

    def at_indices(self, number: int, reduction: Reduction, argument: str, width: int) -> None:
        """The value at each index, where a row of the tile has one."""
        x, out = self.values[reduction.value], f"OUT{number}"
        self.outputs.append(out)
        for k in range(width):
            index = f"index{number}_{k}"
            at_k = f"{_at_rows(argument)} + {k} * {_stride(argument, 1)}"
            self.before.append(f"{index} = tl.load({at_k}, mask=row_inside, other=-1)")
            if reduction.kind == "target":
                self.targets.append(index)
            # First, so that the values are not needed any more when they are exponentiated.
            self.updates[:0] = [
                f"if device.any_in({index}, first_column, BLOCK_V):",
                f"    found = device.at({x}, columns, {index})",
                f"    here = ({index} >= first_column) & ({index} < first_column + BLOCK_V)",
                f"    here &= row_inside & ({index} < V)",
                f"    tl.store({out} + rows * {width} + {k}, found, mask=here)",
            ]

    def sum(self, number: int, reduction: Reduction) -> None:
        self._begin(f"sum{number}", "0.0")
        value = self._inside(reduction.value, "0.0")
        update = f"sum{number} += tl.sum({value}, 1)"
        self.updates.append(update)
        self._sum_updates[reduction.value] = update
        self._store(f"sum{number}", f"SUM{number}")

    def max(self, number: int, reduction: Reduction) -> None:
        top, first = f"greatest{number}", f"first{number}"
        self._begin(top, 'float("-inf")')
        self._begin(first, "0", "int32")
        low = self._inside(reduction.value, 'float("-inf")')
        update = f"device.greater({top}, {first}, {low}, first_column)"
        self.updates.append(f"{top}, {first} = {update}")
        self._store(top, f"GREATEST{number}")
        self._store(first, f"FIRST{number}")

    def logsumexp(self, number: int, reduction: Reduction) -> None:
        at = self._softmax_of(number, reduction.value)
        self._store(f"top{at}", f"TOP{number}")
        self._store(f"total{at}", f"TOTAL{number}")

    def mean(self, number: int, reduction: Reduction) -> None:
        x, y = reduction.values
        at = self._softmax_of(number, x)
        scaled = f"device.rescaled({{}}, before{at}, top{at})"
        self._weighted_sum(
            number,
            before=self._total_update(at),
            weights=f"mass{at}",
            y=f"device.with_mass({self._inside(y, '0.0')}, mass{at})",
            weighted=scaled.format(f"weighted{number}"),
            total=scaled.format(f"total{at}"),
            size=scaled.format(f"total{at}"),
        )

    def dot(self, number: int, reduction: Reduction) -> None:
        q, y = reduction.values
        size, weights = f"size{number}", f"weights{number}"
        self._begin(size, "0.0")
        self._weighted_sum(
            number,
            before=self._sum_updates[q],
            weights=self._inside(q, "0.0"),
            y=self._inside(y, "0.0"),
            weighted=f"weighted{number}",
            total=self._sum_updates[q].split()[0],
            size=size,
        )
        self.updates.append(f"{size} += tl.sum(tl.abs({weights}), 1)")

    def _weighted_sum(
        self,
        number: int,
        *,
        before: str,
        weights: str,
        y: str,
        weighted: str,
        total: str,
        size: str,
    ) -> None:
        """Lines for the two statistics of a weighted sum of `y`.

        Args:
            number: of the reduction.
            before: the line that adds to the sum of the weights.
            weights, y: of this part.
            weighted: the second statistic, of the parts before.
            total, size: the sum of the weights of the parts before, and that of their absolutes.
        """
        self._begin(f"center{number}", "0.0")
        self._begin(f"weighted{number}", "0.0")
        centers = f"center{number}, nearer{number}"
        part = f"weights{number}, y{number}"
        place = self.updates.index(before)
        self.updates[place:place] = [
            f"{part} = {weights}, {y}",
            f"nearer{number} = device.nearer(center{number}, {size}, {part})",
            f"weighted{number} = {weighted} + device.moved({centers}, {total}, {part})",
            f"center{number} = nearer{number}",
        ]
        self._store(f"center{number}", f"CENTER{number}")
        self._store(f"weighted{number}", f"WEIGHTED{number}")

    def _softmax_of(self, number: int, x: Name) -> int:
        """The number of the variables that hold the masses of `x` and what is above them."""
        if x not in self._softmax:
            self._softmax[x] = number
            self._begin(f"top{number}", 'float("-inf")')
            self._begin(f"total{number}", "0.0")
            low = self._inside(x, 'float("-inf")')
            self.updates += [
                f"low{number} = {low}",
                f"before{number} = top{number}",
                f"top{number} = tl.maximum(top{number}, tl.max(low{number}, 1))",
                f"mass{number} = device.mass_of(device.above(low{number}, top{number}))",
                self._total_update(number),
            ]
        return self._softmax[x]

    def _total_update(self, number: int) -> str:
        old = f"device.rescaled(total{number}, before{number}, top{number})"
        return f"total{number} = {old} + tl.sum(mass{number}, 1)"


@functools.cache
def gradient_template(
    program: Program,
    has_bias: bool,
    by_descriptor: bool,
    stores_by_descriptor: bool,
    weight_is_block: bool,
) -> Template:
    """For `logit_gradient`; the argument START holds the first column.

    Args:
        program: one that ends in blocks.
        has_bias, by_descriptor: as for `statistics_template`.
        stores_by_descriptor: whether the first block is written through one.
        weight_is_block: whether the weight's first row is that of START.
    """
    lines = _logits(by_descriptor, *(("local", "WIDTH") if weight_is_block else ("columns", "V")))
    if has_bias:
        lines.append(_bias("columns"))
    lines += _places(program, "columns")
    first, *others = program.reductions
    x, *in_indexed_tiles = first.values
    indices = [f"INDEX{number}" for number in range(len(first.args[2:]))]
    before = [
        f"index{number} = tl.load({_at_rows(index)}, row_inside, other=-1)"
        for number, index in enumerate(indices)
    ]
    if indices:
        any_in = (
            f"device.any_in(index{number}, first_column, BLOCK_V)" for number in range(len(indices))
        )
        (y,) = in_indexed_tiles
        lines += [
            f"if {' | '.join(any_in)}:",
            *_indented_lines(_value(program, y, "block", 3)),
            "else:",
            *_indented_lines(_value(program, x, "block", 3)),
        ]
    else:
        lines += _value(program, x, "block", 2)
    if stores_by_descriptor:
        lines.append(
            '{{store_output(("row_tile * BLOCK_M", "column_tile * BLOCK_V"), "block", '
            'indent_width=8, val_shape=("BLOCK_M", "BLOCK_V"), block_indexing=True)}}'
        )
    else:
        lines.append(
            '{{store_output(("rows[:, None]", "local[None, :]"), "block", "block_inside", '
            'indent_width=8, val_shape=("BLOCK_M", "BLOCK_V"))}}'
        )
    outputs = [f"BLOCK{number}" for number in range(1, len(program.reductions))]
    for name, reduction in zip(outputs, others, strict=True):
        place = f"{name} + rows[:, None] * {_stride(name, 0)} + local[None, :]"
        lines += _value(program, reduction.value, "other", 2)
        lines.append(f"tl.store({place}, other, mask=block_inside)")
    arguments = ["INPUT", "WEIGHT", *(["BIAS"] * has_bias), "START", *indices, *outputs]
    source = _GRADIENT.format(
        package=PACKAGE,
        arguments=_names(arguments),
        prologue=_indented(_DESCRIPTORS if by_descriptor else _STRIDES, 4),
        before=_indented("\n".join(before), 8),
        body=_indented("\n".join(lines), 8),
    )
    return _template("gradient", source, outputs)


_STATISTICS = """\
import {package}.device as device
{{{{def_kernel({arguments})}}}}
    M = {{{{size("INPUT", 0)}}}}
    H = {{{{size("INPUT", 1)}}}}
    V = {{{{size("WEIGHT", 0)}}}}
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(V, BLOCK_V)
    tiles_of_statistics = tl.cdiv(column_tiles, PARTS)
{prologue}
    for tile in tl.range(
        tl.program_id(0), row_tiles * tiles_of_statistics, tl.num_programs(0), num_stages=1
    ):
        row_tile, tile_of_statistics = device.grouped(tile, row_tiles, tiles_of_statistics, GROUP)
        rows = row_tile.to(INDEX_DTYPE) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_inside = rows < M
{before}
        for part in tl.range(0, {parts}, num_stages=1):
            first_column = (tile_of_statistics * PARTS + part) * BLOCK_V
            columns = first_column + tl.arange(0, BLOCK_V)
            inside = columns < V
{body}
{after}
"""

_GRADIENT = """\
import {package}.device as device
{{{{def_kernel({arguments})}}}}
    M = {{{{size("INPUT", 0)}}}}
    H = {{{{size("INPUT", 1)}}}}
    V = {{{{size("WEIGHT", 0)}}}}
    start = tl.load(START).to(tl.int32)
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(WIDTH, BLOCK_V)
{prologue}
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), num_stages=1
    ):
        row_tile, column_tile = device.grouped(tile, row_tiles, column_tiles, GROUP)
        rows = row_tile.to(INDEX_DTYPE) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_inside = rows < M
        local = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = local < WIDTH
        block_inside = row_inside[:, None] & inside[None, :]
        # Inductor leaves out the mask of a store to a block of one entry. All entries of the tile
        # then write there, so that all of them have to compute that entry.
        local = tl.where(inside, local, 0)
        first_column = start + column_tile * BLOCK_V
        columns = start + local
{before}
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


def _logits(by_descriptor: bool, at: str, height: str) -> list[str]:
    """Lines that make `z`, a tile of products.

    Args:
        by_descriptor: as for `statistics_template`.
        at: the variable that holds the rows of the weight.
        height: how many rows it has.
    """
    if by_descriptor:
        first = "first_column" if at == "columns" else "column_tile * BLOCK_V"
        return [
            f"z = device.logits_by_descriptor(inputs, weights, row_tile * BLOCK_M, {first}, H, "
            "PRECISION, BLOCK_M, BLOCK_V, BLOCK_H)"
        ]
    return [
        f"z = device.logits(INPUT, WEIGHT, rows, {at}.to(INDEX_DTYPE), M, {height}, H, "
        "stride_ir, stride_ih, stride_wv, stride_wh, PRECISION, BLOCK_M, BLOCK_V, BLOCK_H, EVEN_H)"
    ]


def _bias(columns: str) -> str:
    return f"z += tl.load(BIAS + {columns} * {_stride('BIAS', 0)}).to(tl.float32)[None, :]"


_BLOCK_TYPES = "".join(
    f", {name}={text}"
    for name, text in {
        "input_shapes": '{"z": ("BLOCK_M", "BLOCK_V"), "row": ("BLOCK_M", "1"), '
        '"column": ("1", "BLOCK_V")}',
        "input_dtypes": '{"row": "index", "column": "index"}',
    }.items()
    if modification_takes(name)
)


def _places(program: Program, columns: str) -> list[str]:
    """Lines for the row and the column of each logit, within bounds: what a subgraph reads there
    is read everywhere."""
    if not roots_of(program):
        return []
    # An operand of one value a logit may have more than 2^31 of them.
    wide = ".to(tl.int64)" if any(name[0] == "b" for name in program.operands) else ""
    return [f"row = tl.minimum(rows, M - 1)[:, None]{wide}", f"column = {columns}[None, :]"]


def _value(program: Program, root: Name, name: str, indent: int) -> list[str]:
    """Lines that make a value of `z`, called `name`; `indent` is theirs, in steps of four."""
    if root == "z":
        return [f"{name} = z"]
    number = roots_of(program).index(root)
    return [
        f'{{{{modification(subgraph_number={number}, output_name="{name}", z="z", '
        f'row="row", column="column"{_BLOCK_TYPES}) | indent_except_first({indent})}}}}',
        f"{name} = {name} + tl.zeros_like(z)",
    ]


def _at_rows(argument: str) -> str:
    return f"{argument} + rows * {_stride(argument, 0)}"


def _stride(argument: str, dim: int) -> str:
    return f'{{{{stride("{argument}", {dim})}}}}'


def _names(arguments: list[str]) -> str:
    return ", ".join(f'"{argument}"' for argument in arguments)


def _indented_lines(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _indented(text: str, spaces: int) -> str:
    return textwrap.indent(text, " " * spaces)


def _template(kind: str, source: str, outputs: list[str]) -> Template:
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return Template(f"cce_{kind}_{digest}", source, tuple(outputs))


Grid = Callable[..., tuple[Any, Any, int]]


def grid(rows: Any, width: Any, meta: dict[str, Any], *, cdiv: Any, min: Any) -> Any:
    """One program a tile, or as many as the device runs at a time, which take turns."""
    columns = meta["BLOCK_V"] * meta.get("PARTS", 1)
    tiles = cdiv(rows, meta["BLOCK_M"]) * cdiv(width, columns)
    return (min(tiles, meta["PROGRAMS"]) if meta["PROGRAMS"] else tiles, 1, 1)

"""The text of the two Triton templates for a program.

The templates are `templates/statistics.jinja` and `templates/gradient.jinja`. Their square brackets
are filled in here, once for each program. Inductor fills in their double braces for each call, and
writes the steps of the program into them (`modification`, like FlexAttention's score function).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2

from cce_inductor.kernels.names import LOGIT, Name, OperandKind
from cce_inductor.kernels.program.text import Program
from cce_inductor.kernels.statistics.template_lines import TemplateLines
from cce_inductor.torch_internals.versions import modification_takes

_DEVICE = f"{__package__}.device"

_jinja = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    block_start_string="[%",
    block_end_string="%]",
    variable_start_string="[[",
    variable_end_string="]]",
    comment_start_string="[#",
    comment_end_string="#]",
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclasses.dataclass(frozen=True)
class Template:
    """The text of a template, and the name by which Inductor knows it: equal for equal texts."""

    name: str
    source: str


def roots_of(program: Program) -> tuple[Name, ...]:
    """Return the values that Inductor computes in a template, in the order of their subgraphs."""
    return tuple(root for root in program.roots if root != LOGIT)


@functools.lru_cache(maxsize=256)
def statistics_template(
    program: Program,
    widths: tuple[int, ...],
    has_bias: bool,
    skip_ignored: bool,
    by_descriptor: bool,
) -> Template:
    """Return the template of `tile_statistics`.

    Args:
        program: one that reduces something over the vocabulary.
        widths: the number of indices of a row, for each statistic at indices.
        has_bias: whether there is a bias.
        skip_ignored: whether to skip a tile whose rows have no target.
        by_descriptor: whether input and weight are read through tensor descriptors.
    """
    indices = [f"INDEX{number}" for number in range(len(widths))]
    values = {root: f"x{number}" for number, root in enumerate(roots_of(program))}
    lines = TemplateLines({LOGIT: "z", **values}, list(zip(indices, widths, strict=True)))
    for number, statistic in enumerate(program.statistics):
        statistic.write(lines, number)
    return _rendered(
        "statistics",
        program,
        ["INPUT", "WEIGHT", *(["BIAS"] * has_bias), *indices, *lines.outputs],
        has_bias=has_bias,
        by_descriptor=by_descriptor,
        lines=lines,
        targets=lines.targets if skip_ignored else [],
    )


@functools.lru_cache(maxsize=256)
def gradient_template(
    program: Program,
    has_bias: bool,
    by_descriptor: bool,
    stores_by_descriptor: bool,
    weight_is_block: bool,
) -> Template:
    """Return the template of `logit_gradient`.

    Args:
        program: one that ends in blocks.
        has_bias, by_descriptor: as for `statistics_template`.
        stores_by_descriptor: whether the first block is written through a descriptor.
        weight_is_block: whether the weight has only the rows of the block, from START on.
    """
    first, *others = program.blocks
    indices = [f"INDEX{number}" for number in range(len(first.indices))]
    outputs = [f"BLOCK{number}" for number in range(1, len(program.blocks))]
    return _rendered(
        "gradient",
        program,
        ["INPUT", "WEIGHT", *(["BIAS"] * has_bias), "START", *indices, *outputs],
        has_bias=has_bias,
        by_descriptor=by_descriptor,
        stores_by_descriptor=stores_by_descriptor,
        weight_is_block=weight_is_block,
        indices=indices,
        first=first,
        others=list(zip(others, outputs, strict=True)),
    )


def _rendered(kind: str, program: Program, arguments: list[str], **options: Any) -> Template:
    """Fill in the square brackets of a template."""
    # An operand with one value per logit may have more than 2^31 values.
    is_wide = any(name.kind is OperandKind.LOGIT for name in program.operands)
    source = _jinja.get_template(f"{kind}.jinja").render(
        device=_DEVICE,
        arguments=", ".join(f'"{argument}"' for argument in arguments),
        roots=roots_of(program),
        value=functools.partial(_value, program),
        wide=".to(tl.int64)" if is_wide else "",
        **options,
    )
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return Template(f"cce_{kind}_{digest}", source)


def _value(program: Program, root: Name, variable: str, indent: int) -> list[str]:
    """Return the lines that compute a value of the program.

    Args:
        program: the program of the value.
        root: the value.
        variable: the variable that it is assigned to.
        indent: the indentation of the lines, in steps of four spaces.
    """
    if root == LOGIT:
        return [f"{variable} = z"]
    number = roots_of(program).index(root)
    return [
        f'{{{{modification(subgraph_number={number}, output_name="{variable}", z="z", '
        f'row="row", column="column"{_BLOCK_TYPES}) | indent_except_first({indent})}}}}',
        f"{variable} = {variable} + tl.zeros_like(z)",
    ]


_BLOCK_TYPES = "".join(
    f", {name}={text}"
    for name, text in {
        "input_shapes": '{"z": ("BLOCK_M", "BLOCK_V"), "row": ("BLOCK_M", "1"), '
        '"column": ("1", "BLOCK_V")}',
        "input_dtypes": '{"row": "index", "column": "index"}',
    }.items()
    if modification_takes(name)
)


def grid(rows: Any, width: Any, meta: dict[str, Any], *, cdiv: Any, min: Any) -> Any:
    """Return the launch grid: one program for each tile, or as many as the device runs at a time,
    which take turns at the tiles."""
    columns = meta["BLOCK_V"] * meta.get("BLOCKS", 1)
    tiles = cdiv(rows, meta["BLOCK_M"]) * cdiv(width, columns)
    return (min(tiles, meta["PROGRAMS"]) if meta["PROGRAMS"] else tiles, 1, 1)

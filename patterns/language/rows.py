"""Values of rows: one number for each row of logits, and what is computed from such numbers.

They have the shape of the logits with 1 in the vocabulary dimension, or the number of indices.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from cce_inductor.kernels.statistics.base import Statistic
from cce_inductor.patterns.language.expression import Expression, Operand, operands_of
from cce_inductor.patterns.language.logits import (
    Call,
    Logits,
    Projection,
    applied,
    projections_read,
)


@dataclasses.dataclass(frozen=True, eq=False)
class RowStatistic:
    """A reduction over the vocabulary, which the fused operator computes.

    The result is float64 unless it is an index.

    Attributes:
        kind: what is computed of each row, a class of `kernels.statistics`.
        logits: the logits whose rows are reduced. `values` is reduced, not their expression.
        values: what is reduced; for a mean the logits of the softmax and the averaged value.
        index: the indices of a statistic at indices: a node or a call.
        constants: further arguments of the reduction.
        output: which of the reduction's results this is.
        ignored: a target and the index in it that marks rows whose value is not used.
    """

    kind: type[Statistic]
    logits: Logits
    values: tuple[Expression, ...]
    index: Node | Call | None = None
    constants: tuple[Any, ...] = ()
    output: int = 0
    ignored: tuple[Node, int] | None = None

    @property
    def operands(self) -> list[Operand]:
        """The operands of the values."""
        return [operand for value in self.values for operand in operands_of(value)]

    @property
    def projections(self) -> list[Projection]:
        """The projection of the logits, and those of the other heads that are read."""
        others = [each for value in self.values for each in projections_read(value)]
        return [*self.logits.projections, *others]

    @property
    def reads(self) -> list[tuple[Node, Node | None]]:
        """Every node that the statistic reads directly, each with its reader in the user's graph.

        The reader is None where it is the consumer of the statistic, whichever that is.
        """
        read: list[tuple[Node, Node | None]] = [*_reads_of(self.logits)]
        for operand in self.operands:
            if isinstance(operand.source, Logits):
                read += _reads_of(operand.source)
            else:
                sources = parts(operand.source)
                read += [(part, operand.reader) for part in sources if isinstance(part, Node)]
        return [*read, *((part, None) for part in parts(self.index) if isinstance(part, Node))]


@dataclasses.dataclass(frozen=True, eq=False)
class AtRows:
    """An operand that is constant over the row, as a value of rows of `logits`."""

    operand: Operand
    logits: Logits


Row: TypeAlias = RowStatistic | Call | AtRows | Node
"""One value for each row, or a value computed from such values: what replaces a loss."""


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    """Return a call that will be a node of the rewritten graph."""
    return Call(target, args, tuple(kwargs.items()))


def without_vocabulary(row: Row, logits: Logits, keepdim: bool) -> Row:
    """Return a row in the shape of a reduction over the vocabulary."""
    return row if keepdim else call(torch.squeeze, row, logits.vocabulary_dim)


def size_of(logits: Logits, dim: int, size: int | torch.SymInt | None = None) -> Any:
    """Return the size of a dimension of logits: an int, or a call if it is known only at run time.

    Args:
        size: the size in the example, None to compute it at run time in any case.
    """
    if isinstance(size, int):
        return size
    projection = logits.projection
    if dim == logits.vocabulary_dim:
        weight = applied(projection.linear_weight, projection.weight_operations, projection.hidden)
        return call(torch.ops.aten.sym_size.int, weight, 0)
    rows = applied(projection.input, logits.row_operations, projection.hidden)
    return call(torch.ops.aten.sym_size.int, rows, dim)


def vocabulary_of(logits: Logits) -> Any:
    """Return the size of the vocabulary: an int, or a call if it is known only at run time."""
    return size_of(logits, logits.vocabulary_dim, logits.vocabulary)


def detach_row(row: Row) -> Row:
    """Return the same value without a gradient."""
    return call(torch.detach, row)


def rest_of(row: Row) -> Row:
    """Return the part of a row that float32 cannot hold, detached; 0 where the row is infinite."""
    rest = call(operator.sub, row, call(torch.Tensor.to, row, torch.float32))
    return call(torch.detach, call(torch.nan_to_num, rest, 0.0, 0.0, 0.0))


def ignoring(row: Any, target: Node, ignore_index: int) -> Any:
    """Return the same value, marked as not used in rows whose target is ignored."""
    if isinstance(row, RowStatistic):
        return dataclasses.replace(row, ignored=(target, ignore_index))
    if isinstance(row, Call):
        args = tuple(ignoring(a, target, ignore_index) for a in row.args)
        return dataclasses.replace(row, args=args)
    if isinstance(row, AtRows) and not isinstance(row.operand.source, Node):
        source = ignoring(row.operand.source, target, ignore_index)
        return dataclasses.replace(row, operand=dataclasses.replace(row.operand, source=source))
    return row


def parts(row: Any) -> list[Any]:
    """Return all values that a row is computed from, each before its users, the row itself last.

    For logits, these are the nodes that they are computed from.
    """
    reached: dict[int, Any] = {}

    def visit(item: Any) -> None:
        if isinstance(item, (tuple, list)):
            for each in item:
                visit(each)
        elif isinstance(item, Logits):
            visit(nodes_of_logits(item))
        elif isinstance(item, (RowStatistic, Call, AtRows, Node)) and id(item) not in reached:
            if isinstance(item, Call):
                visit((item.args, [value for _, value in item.kwargs]))
            elif isinstance(item, AtRows):
                visit(item.operand.source)
            elif isinstance(item, RowStatistic):
                visit([operand.source for operand in item.operands])
                visit(item.index)
            reached[id(item)] = item

    visit(row)
    return list(reached.values())


def is_reduced(source: Any) -> bool:
    """Whether a row is computed from reductions of logits."""
    return any(isinstance(part, RowStatistic) for part in parts(source))


def is_sum(source: Any) -> bool:
    """Whether a row is computed from sums over the vocabulary, and not only from chosen logits."""
    return any(isinstance(part, RowStatistic) and part.kind.is_sum for part in parts(source))


def nodes_of(row: Any) -> list[Node]:
    """Return every node that a row is computed from."""
    nodes = []
    for part in parts(row):
        if isinstance(part, Node):
            nodes.append(part)
        elif isinstance(part, RowStatistic):
            nodes += nodes_of_logits(part.logits)
    return nodes


def nodes_of_projection(projection: Projection) -> list[Node]:
    """Return every node that a projection reads."""
    sources = parts((projection.input, projection.linear_weight))
    nodes = [part for part in sources if isinstance(part, Node)]
    if projection.linear_bias is not None:
        nodes.append(projection.linear_bias)
    for operation in projection.weight_operations:
        nodes += operation.nodes
    return nodes


def nodes_of_logits(logits: Logits) -> list[Node]:
    """Return every node that the rows of logits are computed from, without those that their
    expression reads."""
    operations = [node for operation in logits.row_operations for node in operation.nodes]
    return [*nodes_of_projection(logits.projection), *operations]


def _reads_of(logits: Logits) -> list[tuple[Node, Node]]:
    """Return every node that a matrix product reads, each with the node of the product."""
    return [
        (node, origin) for node in nodes_of_logits(logits) for origin in logits.projection.origins
    ]

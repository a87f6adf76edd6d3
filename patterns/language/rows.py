"""Values of rows: one number for each row of logits, and what is made of such numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Node

from cce_inductor.patterns.language.expression import Expression, Operand, leaves
from cce_inductor.patterns.language.logits import Call, Logits, Projection


@dataclasses.dataclass(frozen=True, eq=False)
class Statistic:
    """A reduction over the vocabulary, by `kernels.program`.

    As all values of rows, it has the shape of the logits with 1 in the vocabulary dimension (or
    the number of indices), and is float64 unless it is an index.

    Attributes:
        kind: of the reduction.
        logits: whose rows these are; their expression is not what is reduced.
        values: what is reduced; for "mean" the logits of the softmax, then of what.
        index: the indices of "gather", "index" and "target", a node or a call.
        constants: further arguments of the reduction.
        output: which of its results.
        ignored: a target and the index of it that make the row's value one nobody looks at.
    """

    kind: str
    logits: Logits
    values: tuple[Expression, ...]
    index: Node | Call | None = None
    constants: tuple[Any, ...] = ()
    output: int = 0
    ignored: tuple[Node, int] | None = None

    @property
    def reads(self) -> list[tuple[Node, Node | None]]:
        """Every node that it reads by itself, each with the one that reads it in the user's code;
        None where that is whatever consumes the statistic."""
        origins = self.logits.projection.origins
        found = [(node, origin) for node in nodes_of_logits(self.logits) for origin in origins]
        for operand in _operands(self.values):
            sources = parts(operand.source)
            found += [(part, operand.reader) for part in sources if isinstance(part, Node)]
        return [*found, *((part, None) for part in parts(self.index) if isinstance(part, Node))]


@dataclasses.dataclass(frozen=True, eq=False)
class AtRows:
    """An operand of kind "r" or "s" as a value of rows of `logits`."""

    operand: Operand
    logits: Logits


Row = Statistic | Call | AtRows | Node
"""A value for each row, or what is made of such values: what takes the place of a loss."""


def parts(row: Any) -> list[Any]:
    """What a value of rows is made of, the innermost first, itself last."""
    found: dict[int, Any] = {}

    def visit(item: Any) -> None:
        if isinstance(item, (tuple, list)):
            for each in item:
                visit(each)
        elif isinstance(item, (Statistic, Call, AtRows, Node)) and id(item) not in found:
            if isinstance(item, Call):
                visit((item.args, [value for _, value in item.kwargs]))
            elif isinstance(item, AtRows):
                visit(item.operand.source)
            elif isinstance(item, Statistic):
                visit([operand.source for operand in _operands(item.values)])
                visit(item.index)
            found[id(item)] = item

    visit(row)
    return list(found.values())


def is_reduced(source: Any) -> bool:
    """Whether a value of rows is made of reductions of logits."""
    return any(isinstance(part, Statistic) for part in parts(source))


def is_sum(source: Any) -> bool:
    """Whether a value of rows is made of sums over the vocabulary, not of chosen logits only."""
    return any(isinstance(part, Statistic) and part.kind in _SUMS for part in parts(source))


_SUMS = ("logsumexp", "sum", "mean", "dot")


def _operands(expressions: tuple[Expression, ...]) -> list[Operand]:
    found = [leaf for each in expressions for leaf in leaves(each)]
    return [leaf for leaf in found if isinstance(leaf, Operand)]


def nodes_of(row: Any) -> list[Node]:
    """Every node that a value of rows is computed from."""
    found = []
    for part in parts(row):
        if isinstance(part, Node):
            found.append(part)
        elif isinstance(part, Statistic):
            found += nodes_of_logits(part.logits)
    return found


def nodes_of_projection(projection: Projection) -> list[Node]:
    """Every node that a projection reads."""
    sources = parts((projection.input, projection.linear_weight))
    found = [part for part in sources if isinstance(part, Node)]
    if projection.linear_bias is not None:
        found.append(projection.linear_bias)
    for operation in projection.weight_operations:
        found += operation.nodes
    return found


def nodes_of_logits(logits: Logits) -> list[Node]:
    """Every node that the rows of logits are computed from; not what their expression reads."""
    operations = [node for operation in logits.row_operations for node in operation.nodes]
    return [*nodes_of_projection(logits.projection), *operations]

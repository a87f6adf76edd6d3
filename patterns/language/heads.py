"""Logits of another head, or other rows of the same head, as a part of an expression.

A student and a teacher have logits of the same rows and the same vocabulary, from two matrix
products. A function of both is an expression of the first one's logits, in which those of the other
are an operand that is a product itself. Their blocks are computed side by side, and neither is
stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Node

from cce_inductor.kernels.names import OperandKind
from cce_inductor.patterns.language.expression import (
    LOGIT,
    Expression,
    Leaf,
    Operand,
    leaves,
    substituted,
)
from cce_inductor.patterns.language.logits import Call, Logits, same_logits
from cce_inductor.patterns.language.rows import AtRows, RowStatistic
from cce_inductor.patterns.language.site import Site


def beside(site: Site, other: Logits, logits: Logits) -> Expression | None:
    """Return logits of another matrix product as an expression of `logits`.

    Args:
        site: the node that reads both.
        other: the logits of the other product, in the same shape as `logits`.
        logits: the logits in whose expression they will stand.

    Returns:
        None if they cannot stand there: their vocabulary is another dimension, or they read a
        stored tensor of other rows that is as large as they are.
    """
    if other.vocabulary_dim != logits.vocabulary_dim:
        return None
    try:
        return _Move(site, other, logits).expression(other.expression)
    except _ImmovableError:
        return None


class _ImmovableError(Exception):
    """Something reads other rows than the logits that are moved, or does so in an unknown way."""


@dataclasses.dataclass(frozen=True)
class _Move:
    """Turns expressions and rows of `other` into those of `logits`."""

    site: Site
    other: Logits
    logits: Logits

    def expression(self, expression: Any) -> Any:
        made: dict[int, Any] = {}
        for leaf in leaves(expression):
            if leaf is LOGIT:
                made[id(leaf)] = self._product(self.other)
            elif isinstance(leaf, Operand) and leaf.kind.varies_over_rows:
                made[id(leaf)] = self._operand(leaf)
        return substituted(expression, made)

    def _product(self, source: Logits) -> Leaf | Operand:
        """Return the logit of a product, before any function of it: an operand, or the logit itself
        if the product is that of `logits`."""
        if same_logits(source, self.logits):
            return LOGIT
        biased = source.projection.linear_bias is not None
        kind = OperandKind.BIASED_PRODUCT if biased else OperandKind.PRODUCT
        source = source.replace(expression=LOGIT, path=())
        rows, dim = self.logits.row_operations, self.logits.vocabulary_dim
        return Operand(kind, source, rows, dim, self.site.node)

    def _operand(self, operand: Operand) -> Leaf | Operand:
        """Return an operand with the rows of `other` as one with those of `logits`."""
        if operand.kind.is_product:
            since = self.other.row_operations[len(operand.row_operations) :]
            moved = operand.source.replace(
                row_operations=(*operand.source.row_operations, *since),
                vocabulary_dim=self.other.vocabulary_dim,
            )
            return self._product(moved)
        if operand.kind is OperandKind.ROW:
            try:
                source: Any = self._row(operand.source)
            except _ImmovableError:
                source = AtRows(operand, self.other)
        elif operand.row_operations == self.other.row_operations:
            source = operand.source
        else:
            raise _ImmovableError
        return dataclasses.replace(
            operand,
            source=source,
            row_operations=self.logits.row_operations,
            vocabulary_dim=self.logits.vocabulary_dim,
        )

    def _row(self, row: Any) -> Any:
        """Return a row that is computed from statistics of `other`, from statistics of `logits`.

        One operator then computes the statistics of both heads, the normalizers of two softmaxes
        for example.
        """
        if isinstance(row, tuple):
            return tuple(map(self._row, row))
        if isinstance(row, Call):
            return Call(row.target, self._row(row.args), self._row(row.kwargs))
        if isinstance(row, RowStatistic):
            if not same_logits(row.logits, self.other):
                raise _ImmovableError
            values = tuple(map(self.expression, row.values))
            return dataclasses.replace(row, logits=self.logits, values=values)
        if isinstance(row, (Node, AtRows)):
            raise _ImmovableError
        return row

"""Reductions of an expression over the vocabulary, each in as few passes as algebra allows.

What a row's softmax needs is one pass over its logits. But ``log_softmax(z)`` is written as
``z - lse`` with an `lse` that is known after that pass only; so is a hand-written ``z - max(z)``.
Such values are *late*. The sum of ``q * (z - lse)`` is ``sum(q * z) - lse * sum(q)``, and needs
no second pass. Where no such identity is known, the late value becomes an operand of a second
pass, which is always right.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.kernels.program.text import overload
from cce_inductor.patterns.language.expression import (
    LOGIT,
    Apply,
    Expression,
    Operand,
    is_constant_over_row,
    leaves,
)
from cce_inductor.patterns.language.logits import Call, Logits, applied
from cce_inductor.patterns.language.rows import AtRows, Row, Statistic
from cce_inductor.patterns.language.site import Site

_ADD, _SUB, _MUL, _DIV = "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"


def _is_detached(x: Any) -> bool:
    return isinstance(x, Apply) and x.target == "detach"


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    return Call(target, args, tuple(kwargs.items()))


def size_of(logits: Logits, dim: int, size: int | torch.SymInt | None = None) -> Any:
    """The size of a dimension of logits: the number, or what computes it in the graph, if it may
    be another in the next call.

    Args:
        size: as an example has it, None to have it computed in the graph.
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
    """`size_of` the vocabulary."""
    return size_of(logits, logits.vocabulary_dim, logits.vocabulary)


class Algebra:
    """Reductions of expressions over the rows of one `Logits`."""

    def __init__(self, site: Site, logits: Logits):
        self.site = site
        self.logits = logits

    def logsumexp(self, x: Any) -> Row:
        if _is_detached(x):
            return detach_row(self.logsumexp(x.args[0]))
        if is_constant_over_row(x):
            classes = self.site.fixed_vocabulary(self.logits)
            return call(operator.add, self.row(x), math.log(classes))
        core, shift = self._split(x)
        lse = self._statistic("logsumexp", core)
        return lse if shift is None else call(operator.add, lse, shift)

    def gather(self, x: Any, index: Node, *, kind: str = "gather", constants: Any = ()) -> Row:
        """`x` at the indices: a function of the values there, where those are late."""
        if _is_detached(x):
            return detach_row(self.gather(x.args[0], index, kind=kind, constants=constants))
        if is_constant_over_row(x):
            return self.row(x)
        if (
            isinstance(x, Apply)
            and self._late(x)
            and x.target in (_ADD, _SUB, _MUL, _DIV, "neg", "exp")
        ):
            args = [self.gather(a, index, kind=kind, constants=constants) for a in x.args]
            return Call(overload(x.target), tuple(args), x.kwargs)
        return Statistic(kind, self.logits, (x,), index, constants)

    def max(self, x: Any) -> tuple[Row, Row]:
        """The greatest value and its index."""
        return self._greatest("max", x)

    def topk(self, x: Any, k: int) -> tuple[Row, Row]:
        """The greatest k values and their indices."""
        return self._greatest("topk", x, k)

    def _greatest(self, kind: str, x: Any, *constants: int) -> tuple[Row, Row]:
        if _is_detached(x):
            value, index = self._greatest(kind, x.args[0], *constants)
            return detach_row(value), index
        core, shift = self._split(x)
        if isinstance(core, Apply) and core.target == "exp" and self._late(core):
            value, index = self._greatest(kind, core.args[0], *constants)
            value = call(torch.exp, value)
        else:
            value, index = (
                Statistic(kind, self.logits, (core,), None, constants, output) for output in (0, 1)
            )
        return value if shift is None else call(operator.add, value, shift), index

    def sum(self, x: Any) -> Row:
        if _is_detached(x):
            return detach_row(self.sum(x.args[0]))
        if is_constant_over_row(x):
            return call(operator.mul, self.row(x), vocabulary_of(self.logits))
        if isinstance(x, Apply) and x.target == "exp" and LOGIT in leaves(x):
            return call(torch.exp, self.logsumexp(x.args[0]))
        if not self._late(x) or not isinstance(x, Apply):
            return self._statistic("sum", x)
        if x.target in (_ADD, _SUB) and not x.kwargs:
            return Call(overload(x.target), tuple(self.sum(a) for a in x.args))
        if x.target == "neg":
            return call(operator.neg, self.sum(x.args[0]))
        if x.target == _DIV and not x.kwargs and is_constant_over_row(x.args[1]):
            return call(operator.truediv, self.sum(x.args[0]), self.row(x.args[1]))
        if x.target == _MUL:
            first, second = x.args
            if is_constant_over_row(first):
                first, second = second, first
            if is_constant_over_row(second):
                return call(operator.mul, self.sum(first), self.row(second))
            product = self._sum_of_product(first, second)
            return product if product is not None else self._statistic("sum", x)
        return self._statistic("sum", x)

    def row(self, x: Any) -> Any:
        """An expression that is constant over the row, as a value of rows."""
        if isinstance(x, Operand):
            return AtRows(x, self.logits)
        if isinstance(x, Apply):
            args = tuple(self.row(a) for a in x.args)
            return Call(overload(x.target), args, tuple((k, self.row(v)) for k, v in x.kwargs))
        return x

    def _sum_of_product(self, first: Any, second: Any) -> Row | None:
        """None if no identity is known."""
        for weight, value in ((first, second), (second, first)):
            factor, rest = self._factor(weight)
            if isinstance(rest, Apply) and rest.target == "exp":
                core, shift = self._split(rest.args[0])
                mean = None if shift is None else self._mean(core, value)
                if mean is not None:
                    lse = self._statistic("logsumexp", core)
                    mass = call(torch.exp, call(operator.add, lse, shift))
                    total = call(operator.mul, mass, mean)
                    return total if factor is None else factor(total)
        for fixed, late in ((first, second), (second, first)):
            if self._late(fixed) or not isinstance(late, Apply):
                continue
            if late.target in (_ADD, _SUB) and not late.kwargs:
                sums = [self._dot(fixed, term) for term in late.args]
                return Call(overload(late.target), tuple(sums))
            if late.target == "neg":
                return call(operator.neg, self.sum(Apply(_MUL, (fixed, late.args[0]))))
            if late.target in (_MUL, _DIV) and not late.kwargs:
                factor, rest = self._factor(late)
                if factor is not None:
                    return factor(self.sum(Apply(_MUL, (fixed, rest))))
        return None

    def _dot(self, fixed: Any, term: Any) -> Row:
        """The sum of a product, of which only a late value is to be subtracted."""
        if is_constant_over_row(fixed) or is_constant_over_row(term) or self._late(term):
            return self.sum(Apply(_MUL, (fixed, term)))
        return Statistic("dot", self.logits, (fixed, term))

    def _mean(self, core: Any, value: Any) -> Row | None:
        """Of `value` under softmax(core); None if it is late in a way that is not linear."""
        if is_constant_over_row(value):
            return self.row(value)
        if not self._late(value):
            return Statistic("mean", self.logits, (core, value))
        if isinstance(value, Apply) and value.target in (_ADD, _SUB) and not value.kwargs:
            means = [self._mean(core, term) for term in value.args]
            if None not in means:
                return Call(overload(value.target), tuple(means))
        factor, rest = self._factor(value)
        if factor is not None:
            mean = self._mean(core, rest)
            return None if mean is None else factor(mean)
        return None

    def _factor(self, x: Any) -> tuple[Any, Any]:
        """A function of rows that multiplies, None for the identity, and what it multiplies."""
        if not isinstance(x, Apply) or x.kwargs:
            return None, x
        if x.target == "neg":
            inner, rest = self._factor(x.args[0])
            return lambda row: call(operator.neg, inner(row) if inner else row), rest
        if x.target == _DIV and is_constant_over_row(x.args[1]):
            inner, rest = self._factor(x.args[0])
            by = self.row(x.args[1])
            return lambda row: call(operator.truediv, inner(row) if inner else row, by), rest
        if x.target == _MUL:
            first, second = x.args
            if is_constant_over_row(first):
                first, second = second, first
            if is_constant_over_row(second):
                inner, rest = self._factor(first)
                by = self.row(second)
                return lambda row: call(operator.mul, inner(row) if inner else row, by), rest
        return None, x

    def _split(self, x: Any) -> tuple[Any, Row | None]:
        """`x` as a core and a late value of rows that is added to it, None if there is none."""
        if isinstance(x, Apply) and x.target in (_ADD, _SUB) and not x.kwargs and self._late(x):
            first, second = x.args
            if is_constant_over_row(second) and self._late(second):
                core, shift = self._split(first)
                row = self.row(second)
                if x.target == _SUB:
                    row = call(operator.neg, row)
                return core, row if shift is None else call(operator.add, shift, row)
            if x.target == _ADD and is_constant_over_row(first) and self._late(first):
                core, shift = self._split(second)
                row = self.row(first)
                return core, row if shift is None else call(operator.add, shift, row)
        return x, None

    def _late(self, x: Any) -> bool:
        return self.site.is_late(x, self.logits)

    def _statistic(self, kind: str, x: Expression) -> Statistic:
        return Statistic(kind, self.logits, (x,))


def late(site: Site, row: Row, logits: Logits) -> Operand:
    """A value of rows, made of statistics of `logits`, as an operand of their expression."""
    return Operand("r", row, logits.row_operations, logits.vocabulary_dim, site.node)


def without_vocabulary(row: Row, logits: Logits, keepdim: bool) -> Row:
    """A value of rows in the shape of a reduction over the vocabulary."""
    return row if keepdim else call(torch.squeeze, row, logits.vocabulary_dim)


def detach_row(row: Row) -> Row:
    """The same value without a gradient."""
    return call(torch.detach, row)


def rest_of(row: Row) -> Row:
    """What float32 cannot hold of a value of rows, without a gradient; 0 of an infinite one."""
    rest = call(operator.sub, row, call(torch.Tensor.to, row, torch.float32))
    return call(torch.detach, call(torch.nan_to_num, rest, 0.0, 0.0, 0.0))


def ignoring(row: Any, target: Node, ignore_index: int) -> Any:
    """The same value, which nobody looks at where the target is ignored."""
    if isinstance(row, Statistic):
        return dataclasses.replace(row, ignored=(target, ignore_index))
    if isinstance(row, Call):
        args = tuple(ignoring(a, target, ignore_index) for a in row.args)
        return dataclasses.replace(row, args=args)
    if isinstance(row, AtRows) and not isinstance(row.operand.source, Node):
        source = ignoring(row.operand.source, target, ignore_index)
        return dataclasses.replace(row, operand=dataclasses.replace(row.operand, source=source))
    return row

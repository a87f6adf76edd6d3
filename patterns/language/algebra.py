"""Reductions of an expression over the vocabulary, in as few passes as identities allow.

The softmax of a row needs one pass over its logits. But ``log_softmax(z)`` is the expression
``z - lse``, whose `lse` is known only after that pass. So is the maximum in ``z - max(z)``.
Such values are *late*. The sum of ``q * (z - lse)`` equals ``sum(q * z) - lse * sum(q)``, which
needs no second pass. If no such identity is known, the late value is an operand of a second pass,
which is always correct.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from cce_inductor.kernels.program.text import overload
from cce_inductor.kernels.statistics.base import Statistic
from cce_inductor.kernels.statistics.dot import Dot
from cce_inductor.kernels.statistics.gather import Gather
from cce_inductor.kernels.statistics.index import Index
from cce_inductor.kernels.statistics.indexed import Indexed
from cce_inductor.kernels.statistics.logsumexp import LogSumExp
from cce_inductor.kernels.statistics.max import Max
from cce_inductor.kernels.statistics.mean import Mean
from cce_inductor.kernels.statistics.sum import Sum
from cce_inductor.kernels.statistics.target import Target
from cce_inductor.kernels.statistics.topk import MOST_K, TopK
from cce_inductor.patterns.language.expression import (
    LOGIT,
    Apply,
    Expression,
    Operand,
    is_constant_over_row,
    is_detached,
    leaves,
)
from cce_inductor.patterns.language.logits import Call, Logits
from cce_inductor.patterns.language.rows import (
    AtRows,
    Row,
    RowStatistic,
    call,
    detach_row,
    vocabulary_of,
)
from cce_inductor.patterns.language.site import Site
from cce_inductor.reporting import reasons

_ADD, _SUB, _MUL, _DIV = "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"


class Algebra:
    """Reductions of expressions over the vocabulary of one `Logits`."""

    def __init__(self, site: Site, logits: Logits):
        self.site = site
        self.logits = logits

    def logsumexp(self, x: Any) -> Row:
        """Return ``log(sum(exp(x)))`` over the vocabulary."""
        if is_detached(x):
            return detach_row(self.logsumexp(x.args[0]))
        if is_constant_over_row(x):
            classes = self.site.fixed_vocabulary(self.logits)
            return call(operator.add, self.row(x), math.log(classes))
        core, shift = self._split(x)
        lse = self._statistic(LogSumExp, core)
        return lse if shift is None else call(operator.add, lse, shift)

    def gather(self, x: Any, index: Row) -> Row:
        """Return `x` at the indices, [..., k] with k in the vocabulary's dimension."""
        return self._at(Gather, x, index)

    def index(self, x: Any, index: Row) -> Row:
        """Return `x` at one index for each row, counted from the end if it is negative."""
        return self._at(Index, x, index)

    def target(self, x: Any, target: Row, ignore_index: int) -> Row:
        """Return `x` at the class of each row, 0 where the class is `ignore_index`."""
        return self._at(Target, x, target, ignore_index)

    def _at(self, kind: type[Indexed], x: Any, index: Row, *constants: int) -> Row:
        if is_detached(x):
            return detach_row(self._at(kind, x.args[0], index, *constants))
        if is_constant_over_row(x):
            return self.row(x)
        if (
            isinstance(x, Apply)
            and self._late(x)
            and x.target in (_ADD, _SUB, _MUL, _DIV, "neg", "exp")
        ):
            # A function of late values is applied to the gathered values: it needs no second pass.
            args = [self._at(kind, a, index, *constants) for a in x.args]
            return Call(overload(x.target), tuple(args), x.kwargs)
        return RowStatistic(kind, self.logits, (x,), index, constants)

    def max(self, x: Any) -> tuple[Row, Row]:
        """Return the greatest value and its index."""
        return self._greatest(Max, x)

    def topk(self, x: Any, k: int) -> tuple[Row, Row]:
        """Return the greatest k values and their indices.

        Raises:
            UnsupportedError: k is 0 or too large for the kernels.
        """
        if not 0 < k <= MOST_K:
            self.site.unsupported(reasons.topk_out_of_range(MOST_K))
        return self._greatest(TopK, x, k)

    def _greatest(self, kind: type[Statistic], x: Any, *constants: int) -> tuple[Row, Row]:
        if is_detached(x):
            value, index = self._greatest(kind, x.args[0], *constants)
            return detach_row(value), index
        core, shift = self._split(x)
        if isinstance(core, Apply) and core.target == "exp" and self._late(core):
            value, index = self._greatest(kind, core.args[0], *constants)
            value = call(torch.exp, value)
        else:
            value, index = (
                RowStatistic(kind, self.logits, (core,), None, constants, output)
                for output in (0, 1)
            )
        return value if shift is None else call(operator.add, value, shift), index

    def sum(self, x: Any) -> Row:
        """Return the sum over the vocabulary."""
        if is_detached(x):
            return detach_row(self.sum(x.args[0]))
        if is_constant_over_row(x):
            return call(operator.mul, self.row(x), vocabulary_of(self.logits))
        if isinstance(x, Apply) and x.target == "exp" and LOGIT in leaves(x):
            return call(torch.exp, self.logsumexp(x.args[0]))
        if not self._late(x) or not isinstance(x, Apply):
            return self._statistic(Sum, x)
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
            return product if product is not None else self._statistic(Sum, x)
        return self._statistic(Sum, x)

    def row(self, x: Any) -> Any:
        """Return an expression that is constant over the row, computed once for each row."""
        if isinstance(x, Operand):
            return AtRows(x, self.logits)
        if isinstance(x, Apply):
            args = tuple(self.row(a) for a in x.args)
            return Call(overload(x.target), args, tuple((k, self.row(v)) for k, v in x.kwargs))
        return x

    def _sum_of_product(self, first: Any, second: Any) -> Row | None:
        """Return the sum of a product with a late factor, None if no identity is known."""
        for weight, value in ((first, second), (second, first)):
            factor, rest = self._factor(weight)
            if isinstance(rest, Apply) and rest.target == "exp":
                core, shift = self._split(rest.args[0])
                mean = None if shift is None else self._mean(core, value)
                if mean is not None:
                    lse = self._statistic(LogSumExp, core)
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
        """Return the sum of a product from which a late value will be subtracted."""
        if is_constant_over_row(fixed) or is_constant_over_row(term) or self._late(term):
            return self.sum(Apply(_MUL, (fixed, term)))
        return RowStatistic(Dot, self.logits, (fixed, term))

    def _mean(self, core: Any, value: Any) -> Row | None:
        """Return the mean of `value` under softmax(core).

        None if `value` is not a linear function of late values.
        """
        if is_constant_over_row(value):
            return self.row(value)
        if not self._late(value):
            return RowStatistic(Mean, self.logits, (core, value))
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
        """Split `x` into a factor that is constant over the row and the rest.

        Returns:
            A function that multiplies a row by the factor (None if there is no factor), and the
            rest.
        """
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
        """Split `x` into a core and the late rows that are added to it, None if there are none."""
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

    def _statistic(self, kind: type[Statistic], x: Expression) -> RowStatistic:
        return RowStatistic(kind, self.logits, (x,))
